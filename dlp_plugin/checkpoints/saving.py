"""Saves a model with the files and tensors of its source that transformers would change or drop.

transformers rewrites ``config.json``, tokenizer and generation settings in its newest form. It
also drops tensors that the model class has no module for, such as those of multi-token prediction.
This module copies everything that has not changed from the source, byte for byte.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compressed_tensors.distributed import is_source_process
from compressed_tensors.quantization.utils import is_module_quantized
from loguru import logger
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerBase

from dlp_plugin.checkpoints.files import (
    INDEX,
    copy_others,
    read_config,
    weight_files,
    write_json,
)
from dlp_plugin.checkpoints.names import SourceNames
from dlp_plugin.checkpoints.packed import README, with_note, without_card
from dlp_plugin.checkpoints.quantized import quantization_of
from dlp_plugin.checkpoints.sources import built, load_config, local_folder

__all__ = ["save_like"]

_QUANTIZATION = "quantization_config"
_RECIPE = "recipe.yaml"  # not copied: llm-compressor has written the source's and the new stages
# Files of a tokenizer
_TOKENIZER = {
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "merges.txt",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
}


def save_like(
    source: str | Path,
    model: Any,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    **arguments: Any,
) -> None:
    """Save a model that was made from a checkpoint, with the checkpoint's other files and tensors.

    With several processes all must call this function; the first one writes.

    :param source: the checkpoint, a local folder or an id on the hub
    :param model: to save
    :param folder: to save in; it may be missing
    :param tokenizer: the source's, or another one
    :param arguments: of ``save_pretrained()``
    """
    model.save_pretrained(folder, **arguments)
    if not is_source_process():
        return
    beside = local_folder(source)
    quantized = any(is_module_quantized(module) for module in model.modules())
    _write_config(beside, load_config(source).to_dict(), model.config, folder, quantized)
    other = Path(tokenizer.name_or_path or beside)
    its_own = other.is_dir() and not other.samefile(beside)
    copy_others(beside, folder, [_RECIPE, *(_TOKENIZER if its_own else ())])
    if its_own:
        names = {path.name for path in other.iterdir()}
        copy_others(other, folder, names - _TOKENIZER)
    if not _TOKENIZER & {path.name for path in folder.iterdir()}:
        tokenizer.save_pretrained(folder)
    if (readme := folder / README).is_file():  # a packed source's note would be wrong here
        readme.write_bytes(with_note(without_card(readme.read_bytes())))
    _carry_over(source, beside, folder)


def _write_config(
    beside: Path, before: dict[str, Any], config: Any, folder: Path, quantized: bool
) -> None:
    """Write the source's config.json with only the changed fields replaced, under their old names.

    So that programs with an older transformers can still read it.
    """
    found = read_config(beside)
    written = read_config(folder) or {}
    if found is None:
        return
    source = {key: value for key, value in found.items() if key != _QUANTIZATION}
    _overlay(source, before, config.to_dict(), dict(getattr(config, "attribute_map", {})))
    if quantized:
        source[_QUANTIZATION] = written[_QUANTIZATION]
    if source == found:
        (folder / "config.json").write_bytes((beside / "config.json").read_bytes())
    else:
        write_json(folder / "config.json", source)


def _overlay(
    source: dict[str, Any],
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    others: Mapping[str, str] | None = None,
) -> None:
    """Change the fields of a configuration that differ between two states of it.

    :param source: content of ``config.json``, changed in place
    :param before: the configuration as transformers loaded it
    :param after: the configuration now
    :param others: alternative name of a field to its name in ``before`` and ``after``
    """
    names = {field: name for name, field in (others or {}).items()} | {"dtype": "torch_dtype"}
    for field in before.keys() | after.keys():
        if field in (_QUANTIZATION, "transformers_version", "architectures", "_name_or_path"):
            continue
        name = field if field in source or names.get(field) not in source else names[field]
        one, other = before.get(field), after.get(field)
        if one == other:
            continue
        if isinstance(one, dict) and isinstance(other, dict) and isinstance(source.get(name), dict):
            _overlay(source[name], one, other)
        elif field in after:
            source[name] = other
        else:
            source.pop(name, None)


def _carry_over(source: str | Path, beside: Path, folder: Path) -> None:
    """Add the source's tensors that the model class has no module for, unchanged."""
    try:
        places = weight_files(beside)
    except FileNotFoundError:  # the source's weights are not safetensors files
        return
    names = SourceNames(built(source))
    carried = {key: place for key, place in places.items() if not names.has_place(key)}
    held = {key: file.name for key, file in weight_files(folder).items()}
    wanted = {key: place for key, place in carried.items() if key not in held}
    if quantization_of(load_config(source)):
        wanted = _less_quantized(wanted)
    if not wanted:
        return
    old, sources = sorted(set(held.values())), sorted(set(wanted.values()))
    total = len(old) + len(sources)
    shards = [f"model-{number + 1:05}-of-{total:05}.safetensors" for number in range(total)]
    renamed = dict(zip(old, shards, strict=False))
    for name, shard in renamed.items():
        (folder / name).rename(folder / shard)
    weight_map = {key: renamed[name] for key, name in held.items()}
    dense: list[str] = []
    for file, shard in zip(sources, shards[len(old) :], strict=True):
        with safe_open(file, framework="pt") as opened:
            tensors = {key: opened.get_tensor(key) for key in wanted if wanted[key] == file}
        save_file(tensors, folder / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, shard)
        dense += [key.removesuffix(".weight") for key, one in tensors.items() if one.ndim == 2]
    size = sum((folder / shard).stat().st_size for shard in shards)
    write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})
    _leave_unquantized(folder, dense)
    logger.info(
        "{} tensors that transformers has no module for are copied from the source: {} ...",
        len(wanted),
        next(iter(wanted)),
    )


def _less_quantized(places: Mapping[str, Path]) -> dict[str, Path]:
    """Leave out tensors of quantized modules: the saved config.json does not describe these."""
    quantized = {key.rpartition(".")[0] for key in places if "scale" in key or "packed" in key}
    if quantized:
        logger.warning(
            "{} quantized modules that transformers does not know are left out: {} ...; to keep "
            "them, start from the dense checkpoint",
            len(quantized),
            min(quantized),
        )
    return {key: place for key, place in places.items() if key.rpartition(".")[0] not in quantized}


def _leave_unquantized(folder: Path, modules: list[str]) -> None:
    """Put modules on the quantization's ignore list, for engines that do load these modules."""
    config = read_config(folder) or {}
    if quantization := config.get(_QUANTIZATION):
        quantization["ignore"] = [*(quantization.get("ignore") or []), *modules]
        write_json(folder / "config.json", config)
