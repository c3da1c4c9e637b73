"""Whole checkpoints packed into :mod:`~dlp_plugin.checkpoints.sparse_format`, and back."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from loguru import logger
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from dlp_plugin.checkpoints.bits import integers_of_words, words_for, words_of_integers
from dlp_plugin.checkpoints.files import (
    INDEX,
    copy_others,
    read_config,
    read_index,
    weight_files,
    write_json,
)
from dlp_plugin.checkpoints.names import linears_of_blocks
from dlp_plugin.checkpoints.packed import README, packed_linears, with_card, without_card
from dlp_plugin.checkpoints.quantized import quantization_of
from dlp_plugin.checkpoints.sources import built
from dlp_plugin.checkpoints.sparse_format import (
    PARTS,
    QUANT_METHOD,
    VERSION,
    Stored,
    decode,
    decode_integers,
    encode,
    encode_integers,
)
from dlp_plugin.files import check_vacant, replacing, reserved

__all__ = ["Packed", "pack", "unpack"]

_KNOWN = ("compressed-tensors", "pack-quantized")
# A pack-quantized Linear's own tensors; only the last may be missing.
_QUANTIZED = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")
_WORDS = ".weight_packed"

Advance = Callable[[float], Any]


@dataclass(frozen=True)
class Packed:
    """What :func:`pack` made of the Linears of a checkpoint.

    :param linears: full name of every packed Linear to how it is stored
    :param dense: how many Linears of blocks are left as they were
    :param bytes_before: of the packed Linears' weights in the source
    :param bytes_after: of the same in the packed checkpoint
    """

    linears: Mapping[str, Stored]
    dense: int
    bytes_before: int
    bytes_after: int

    @property
    def weights(self) -> int:
        """How many weights the packed Linears have."""
        return sum(stored.weights for stored in self.linears.values())


@dataclass(frozen=True)
class _Source:
    """A checkpoint that is read tensor by tensor."""

    folder: Path
    config: dict[str, Any]
    places: Mapping[str, Path]

    def tensor(self, key: str) -> Tensor:
        with safe_open(self.places[key], framework="pt") as opened:
            tensor: Tensor = opened.get_tensor(key)
        return tensor

    def parts(self, name: str, locals_: Iterable[str]) -> dict[str, Tensor]:
        keys = {local: f"{name}.{local}" for local in locals_}
        return {local: self.tensor(key) for local, key in keys.items() if key in self.places}


def pack(
    source: str | Path | PreTrainedModel,
    output: str | Path,
    advance: Advance = lambda _: None,
) -> Packed:
    """Write a pruned checkpoint, or model in memory, in the sparse format.

    Packed are the Linears of blocks that shrink by it, dense ones and pack-quantized ones
    (W4A16, W8A16); embeddings, heads and experts stay as they are. Shard by shard, so that one
    is in memory at a time; other files are copied, and ``README.md`` is told how to load it.

    :param source: folder of a saved model; or the model that ``oneshot()`` returned, which is
        then packed as if it had been saved, and written without a tokenizer
    :param output: folder to be made; it may exist if it is empty
    :param advance: called with the fraction of the tensors done by each step
    :raises FileNotFoundError: if ``source`` has no config or weights or lacks a shard, or the
        parent of ``output`` is missing
    :raises FileExistsError: if ``output`` holds something already
    :raises BlockingIOError: if another run is writing ``output``
    :raises ValueError: if a file is damaged, ``source`` is packed already, is quantized in
        another way or where the format has no place for it, or nothing of it would shrink
    """
    output = Path(output)
    with reserved(output):
        check_vacant(output)
        if not isinstance(source, PreTrainedModel):
            return _pack(Path(source), output, advance)
        if quantization_of(source.config).get("quant_method") == QUANT_METHOD:
            raise ValueError("the model is packed already; its save_pretrained() writes it so")
        with tempfile.TemporaryDirectory() as folder:
            source.save_pretrained(folder)
            return _pack(Path(folder), output, advance)


def _pack(source: Path, output: Path, advance: Advance) -> Packed:
    opened = _opened(source)
    bits = _bits(opened)
    names = linears_of_blocks(built(opened.folder), opened.places)
    quantized = {k.removesuffix(_WORDS) for k in opened.places if k.endswith(_WORDS)}
    if outside := sorted(quantized - names):
        raise ValueError(
            f"{outside[0]} of {opened.folder} is quantized, and the format has Linears of blocks "
            "only, experts not among them: put it on the ignore list, or pack the dense checkpoint"
        )
    linears: dict[str, Stored] = {}
    before = after = 0

    def convert(key: str) -> dict[str, Tensor] | None:
        nonlocal before, after
        name, _, local = key.rpartition(".")
        if name not in names or local not in ("weight", *_QUANTIZED):
            return None
        if local not in ("weight", _QUANTIZED[0]):
            return {}
        held = opened.parts(name, _QUANTIZED if name in quantized else ("weight",))
        where = f"{opened.places[key]}: {name}"
        found = _encoded(where, held, bits) if name in quantized else _pruned(held["weight"])
        if found is None:
            return None
        linears[name], parts = found
        before += _size(held)
        after += _size(parts)
        return {f"{name}.{part}": tensor for part, tensor in parts.items()}

    def config() -> dict[str, Any]:
        if not linears:
            raise ValueError(
                f"no Linear of {opened.folder} would shrink by packing: prune it first, half of "
                "the weights or more"
            )
        settings = {
            "quant_method": QUANT_METHOD,
            "version": VERSION,
            "linears": {name: stored.to_config() for name, stored in linears.items()},
            "source": opened.config.get("quantization_config"),
        }
        return {**opened.config, "quantization_config": settings}

    _write(opened, output, convert, config, with_card, advance)
    logger.info(f"{len(linears)} Linears of {opened.folder} packed to {output}")
    return Packed(linears, len(names) - len(linears), before, after)


def unpack(source: str | Path, output: str | Path, advance: Advance = lambda _: None) -> None:
    """Write the checkpoint that a packed one was packed from: the same tensors, bit for bit.

    :param source: folder that :func:`pack` wrote
    :param output: folder to be made; it may exist if it is empty
    :param advance: called with the fraction of the tensors done by each step
    :raises FileNotFoundError: as :func:`pack` does
    :raises FileExistsError: as :func:`pack` does, likewise ``BlockingIOError``
    :raises ValueError: naming file and tensor, if a file is damaged, or ``source`` is not packed
        or by a newer version
    """
    output = Path(output)
    with reserved(output):
        check_vacant(output)
        _unpack(Path(source), output, advance)


def _unpack(source: Path, output: Path, advance: Advance) -> None:
    opened = _opened(source)
    linears = packed_linears(opened.folder)
    if not linears:
        raise ValueError(f"{source} is not packed; give a folder that `dlp-plugin pack` wrote")

    def convert(key: str) -> dict[str, Tensor] | None:
        name, _, part = key.rpartition(".")
        if name not in linears or part not in PARTS:
            return None
        stored = linears[name]
        if part != next(iter(stored.part_shapes())):
            return {}
        parts = opened.parts(name, PARTS)
        where = f"{opened.places[key]}: {name}"
        if stored.kind != "integers":
            return {f"{name}.weight": decode(stored, parts, name=where)}
        words = words_of_integers(decode_integers(stored, parts, where), stored.bits)
        restored = parts | {"weight_packed": words, "weight_shape": torch.tensor(stored.shape)}
        return {f"{name}.{local}": restored[local] for local in _QUANTIZED if local in restored}

    def config() -> dict[str, Any]:
        restored = dict(opened.config)
        quantization = restored.pop("quantization_config")["source"]
        return restored | ({"quantization_config": quantization} if quantization else {})

    _write(opened, output, convert, config, without_card, advance)
    logger.info(f"{len(linears)} Linears of {source} unpacked to {output}")


def _opened(folder: Path) -> _Source:
    config = read_config(folder)
    if config is None:
        raise FileNotFoundError(f"{folder} holds no config.json; give the folder of a saved model")
    return _Source(folder, config, weight_files(folder))


def _write(
    source: _Source,
    output: Path,
    convert: Callable[[str], dict[str, Tensor] | None],
    config: Callable[[], dict[str, Any]],
    card: Callable[[bytes], bytes],
    advance: Advance,
) -> None:
    """Write a checkpoint with some tensors in place of others, shard by shard.

    :param convert: gives, for a tensor's full name, what is written in its place by full names;
        None for itself
    :param config: gives config.json once all are converted
    :param card: what README.md becomes
    """
    with replacing(output) as beside:
        beside.mkdir()
        weight_map: dict[str, str] = {}
        size = 0
        for shard in sorted(set(source.places.values())):
            tensors: dict[str, Tensor] = {}
            with safe_open(shard, framework="pt") as opened:
                metadata = opened.metadata()
            for key in (key for key, place in source.places.items() if place == shard):
                made = convert(key)
                tensors.update({key: source.tensor(key)} if made is None else made)
                advance(1 / len(source.places))
            if tensors:
                save_file(tensors, beside / shard.name, metadata=metadata or {"format": "pt"})
            weight_map |= dict.fromkeys(tensors, shard.name)
            size += _size(tensors)
        write_json(beside / "config.json", config())
        if content := read_index(source.folder):
            total = {**(content.get("metadata") or {}), "total_size": size}
            write_json(beside / INDEX, {**content, "metadata": total, "weight_map": weight_map})
        readme = source.folder / README
        if text := card(readme.read_bytes() if readme.is_file() else b""):
            (beside / README).write_bytes(text)
        copy_others(source.folder, beside, [README])


def _bits(source: _Source) -> set[int]:
    """How many bits the weights of a checkpoint's quantized Linears may have; none if dense.

    :raises ValueError: if it is packed already, or quantized in a way that has no place
    """
    quantization = source.config.get("quantization_config")
    if quantization is None:
        return set()
    method = quantization.get("quant_method")
    if method == QUANT_METHOD:
        raise ValueError(
            f"{source.folder} is packed already; `dlp-plugin unpack` writes what it was packed from"
        )
    kind = (method, quantization.get("format"))
    other = [] if kind == _KNOWN else ["quant_method {}, format {}".format(*kind)]
    other += [k for k in ("kv_cache_scheme", "transform_config") if quantization.get(k)]
    other += ["weight_g_idx"] if any(k.endswith(".weight_g_idx") for k in source.places) else []
    groups = list((quantization.get("config_groups") or {}).values())
    weights = [group.get("weights") or {} for group in groups]
    for group, args in zip(groups, weights, strict=True):
        other += [k for k in ("input_activations", "output_activations") if group.get(k)]
        said = (args.get("type"), args.get("num_bits"), args.get("strategy"))
        if said[0] != "int" or said[1] not in (4, 8) or said[2] not in ("group", "channel"):
            other.append("weights of type {}, {} bits, strategy {}".format(*said))
    if other:
        raise ValueError(
            f"{source.folder} is quantized in another way than packing knows ({', '.join(other)}): "
            "give a dense checkpoint, or a weight-only one of 4 or 8 bits in groups or channels "
            "(W4A16, W8A16)"
        )
    return {args["num_bits"] for args in weights}


def _pruned(weight: Tensor) -> tuple[Stored, dict[str, Tensor]] | None:
    """A dense Linear as it is stored; None where too few of its weights are zero.

    A table of exponents shrinks unpruned ones too, but engines build some of these, such as
    gates, where they ask no quantization method.
    """
    found = encode(weight)
    return None if found is None or 16 * found[0].kept > 15 * weight.numel() else found


def _encoded(
    where: str, held: Mapping[str, Tensor], bits: set[int]
) -> tuple[Stored, dict[str, Tensor]]:
    """A pack-quantized Linear as it is stored.

    :param where: file and full name, for errors
    :param held: its tensors by their local names
    :param bits: how many its integers may have
    """
    if missing := [local for local in _QUANTIZED[:3] if local not in held]:
        raise ValueError(f"{where} lacks {missing[0]}: save the checkpoint again")
    words, scale, shape = (held[local] for local in _QUANTIZED[:3])
    rows, columns = shape.tolist()
    known = [each for each in bits if words.shape == (rows, words_for(columns, each))]
    groups = scale.shape[-1]
    if len(known) == 1 and scale.shape == (rows, groups) and columns % groups == 0:
        integers = integers_of_words(words, known[0], columns)
        if torch.equal(words_of_integers(integers, known[0]), words):
            zero = held.get("weight_zero_point")
            size = -1 if groups == 1 else columns // groups
            return encode_integers(integers, scale, zero, bits=known[0], group_size=size)
    found = ", ".join(f"{local} {list(tensor.shape)}" for local, tensor in held.items())
    raise ValueError(
        f"{where} of {rows} x {columns} is not as compressed-tensors packs it ({found}): quantize "
        "it again, or pack the dense checkpoint"
    )


def _size(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())
