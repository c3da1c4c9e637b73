"""A model saved as its source is: what lies beside the weights, and what it had no place for.

transformers writes config.json, tokenizer and generation settings anew, in its newest form, and
leaves out tensors that a model class has no place for, such as those of multi-token prediction.
Here all that has not changed is the source's, byte for byte.
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
from dlp_plugin.checkpoints.packed import README, without_card
from dlp_plugin.checkpoints.quantized import quantization_of
from dlp_plugin.checkpoints.sources import built, load_config, local_folder

__all__ = ["save_like"]

_QUANTIZATION = "quantization_config"
_RECIPE = "recipe.yaml"  # llm-compressor adds to the source's
# What a tokenizer may consist of
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
    """Save a model that was made from a checkpoint, with all that the checkpoint has besides.

    Of several processes all call this, and the first one writes.

    :param source: the checkpoint, a local folder or an id on the hub
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
    if (readme := folder / README).is_file():  # of a packed folder: what is saved is not
        readme.write_bytes(without_card(readme.read_bytes()))
    _carry_over(source, beside, folder)


def _write_config(
    beside: Path, before: dict[str, Any], config: Any, folder: Path, quantized: bool
) -> None:
    """The source's config.json with what has changed, which old readers know to read."""
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
    """Change in a configuration what differs between two readings of it.

    :param others: further names of fields, to those that the readings have
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
    """Add the tensors that the source's model has no place for, as they are there."""
    try:
        places = weight_files(beside)
    except FileNotFoundError:  # weights in another format
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
        "{} tensors that transformers has no place for are carried over as they are: {} ...",
        len(wanted),
        next(iter(wanted)),
    )


def _less_quantized(places: Mapping[str, Path]) -> dict[str, Path]:
    """Tensors of modules that are not quantized: what is saved says nothing of how they were."""
    quantized = {key.rpartition(".")[0] for key in places if "scale" in key or "packed" in key}
    if quantized:
        logger.warning(
            "{} quantized modules that transformers has no place for are left out: {} ...; take "
            "the dense checkpoint to keep them",
            len(quantized),
            min(quantized),
        )
    return {key: place for key, place in places.items() if key.rpartition(".")[0] not in quantized}


def _leave_unquantized(folder: Path, modules: list[str]) -> None:
    """Have engines that do know these modules take them as they are."""
    config = read_config(folder) or {}
    if quantization := config.get(_QUANTIZATION):
        quantization["ignore"] = [*(quantization.get("ignore") or []), *modules]
        write_json(folder / "config.json", config)
