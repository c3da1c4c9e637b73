"""Packs whole checkpoints into :mod:`~dlp_plugin.checkpoints.sparse_format`, and unpacks them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from loguru import logger
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from dlp_plugin.checkpoints.bits import words_of_integers
from dlp_plugin.checkpoints.encoding import LOCALS, pruned, pruned_experts, quantized
from dlp_plugin.checkpoints.files import (
    INDEX,
    copy_others,
    opening,
    read_config,
    read_index,
    weight_files,
    write_json,
)
from dlp_plugin.checkpoints.inspect import block_of
from dlp_plugin.checkpoints.names import SourceNames, check_experts, linears_of_blocks
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
    size_of,
)
from dlp_plugin.checkpoints.stored import read_fused
from dlp_plugin.files import check_vacant, replacing, reserved
from dlp_plugin.scoring.routers import unnamed_routers

__all__ = ["Packed", "pack", "unpack"]

_KNOWN = ("compressed-tensors", "pack-quantized")
_WORDS = f".{LOCALS[0]}"

Advance = Callable[[float], Any]


@dataclass(frozen=True)
class Packed:
    """Which Linears :func:`pack` packed, and how much smaller they became.

    :param linears: full name of every packed Linear to how it is stored
    :param dense: number of Linears inside blocks that were left unchanged
    :param bytes_before: size of the packed Linears' weights in the source
    :param bytes_after: size of the same weights in the packed checkpoint
    """

    linears: Mapping[str, Stored]
    dense: int
    bytes_before: int
    bytes_after: int

    @property
    def weights(self) -> int:
        """Number of weights of the packed Linears, zeros included."""
        return sum(stored.weights for stored in self.linears.values())


@dataclass(frozen=True)
class _Source:
    """A checkpoint that is read tensor by tensor."""

    folder: Path
    config: dict[str, Any]
    places: Mapping[str, Path]
    opened: Callable[..., Any] = field(default_factory=opening)

    def tensor(self, key: str) -> Tensor:
        tensor: Tensor = self.opened(self.places[key]).get_tensor(key)
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

    A Linear inside a block is packed if that makes it smaller. It may be dense or pack-quantized
    (W4A16, W8A16), and may be an expert. Embeddings, heads and routers that are not quantized stay
    as they are. Shards are processed one after the other, so that one is in memory at a time.
    Other files are copied, and ``README.md`` gets a note on how to load the packed checkpoint.

    :param source: folder of a saved model; or the model that ``oneshot()`` returned, which is
        saved to a temporary folder first and then packed without a tokenizer
    :param output: folder to write; it is made, or may exist if it is empty
    :param advance: called after each tensor with the fraction of the work that it was
    :return: which Linears were packed, and their sizes before and after
    :raises FileNotFoundError: if ``source`` has no config or weights or lacks a shard, or the
        parent of ``output`` is missing
    :raises FileExistsError: if ``output`` is not empty
    :raises BlockingIOError: if another run is writing ``output``
    :raises ValueError: if a file is damaged, experts are missing or differ in shape, ``source``
        is packed already, a quantized module or its scheme does not fit the format, or no Linear
        would become smaller
    """
    output = Path(output)
    with reserved(output):
        check_vacant(output)
        if not isinstance(source, PreTrainedModel):
            return _pack(Path(source), output, advance)
        if quantization_of(source.config).get("quant_method") == QUANT_METHOD:
            raise ValueError("the model is packed already; its save_pretrained() writes it packed")
        with tempfile.TemporaryDirectory() as folder:
            source.save_pretrained(folder)
            return _pack(Path(folder), output, advance)


def _pack(source: Path, output: Path, advance: Advance) -> Packed:
    opened = _opened(source)
    bits = _bits(opened)
    model = built(opened.folder)
    known = SourceNames(model)
    experts, stacked = _experts(opened, known)
    names = linears_of_blocks(model, opened.places) | experts
    integers = {k.removesuffix(_WORDS) for k in opened.places if k.endswith(_WORDS)}
    if outside := sorted(integers - names):
        raise ValueError(
            f"{outside[0]} of {opened.folder} is quantized, but the sparse format holds Linears "
            "inside blocks only: put it on the ignore list, or pack the dense checkpoint"
        )
    packable = names - _routers(model, known, names - integers)
    linears: dict[str, Stored] = {}
    fused: dict[str, int] = {}
    before = after = 0

    def convert(key: str) -> dict[str, Tensor] | None:
        nonlocal before, after
        if key in stacked:
            tensor = opened.tensor(key)
            made = {f"{key}.{i}": one for i, one in enumerate(pruned_experts(tensor) or ())}
            if not made:
                return None
            fused[key] = len(made)
            linears.update((name, stored) for name, (stored, _) in made.items())
            before += tensor.nbytes
            after += sum(size_of(parts) for _, parts in made.values())
            return {f"{n}.{part}": x for n, (_, parts) in made.items() for part, x in parts.items()}
        name, _, local = key.rpartition(".")
        if name not in packable or local not in ("weight", *LOCALS):
            return None
        if local not in ("weight", LOCALS[0]):
            return {}
        held = opened.parts(name, LOCALS if name in integers else ("weight",))
        where = f"{opened.places[key]}: {name}"
        found = quantized(where, held, bits) if name in integers else pruned(held["weight"])
        if found is None:
            return None
        linears[name], parts = found
        before += size_of(held)
        after += size_of(parts)
        return {f"{name}.{part}": tensor for part, tensor in parts.items()}

    def config() -> dict[str, Any]:
        if not linears:
            raise ValueError(
                f"no Linear of {opened.folder} would shrink by packing: prune it first, half of "
                "the weights or more"
            )
        settings = {
            "quant_method": QUANT_METHOD,
            "version": VERSION if fused or experts & linears.keys() else 1,
            "linears": {name: stored.to_config() for name, stored in linears.items()},
            **({"fused": fused} if fused else {}),
            "source": opened.config.get("quantization_config"),
        }
        return {**opened.config, "quantization_config": settings}

    _write(opened, output, convert, config, with_card, advance)
    logger.info(f"{len(linears)} Linears of {opened.folder} packed to {output}")
    total = len(names) + sum(stacked.values())
    return Packed(linears, total - len(linears), before, after)


def unpack(source: str | Path, output: str | Path, advance: Advance = lambda _: None) -> None:
    """Restore the checkpoint that was packed, with the same tensors bit for bit.

    :param source: folder that :func:`pack` wrote
    :param output: folder to write; it is made, or may exist if it is empty
    :param advance: called after each tensor with the fraction of the work that it was
    :raises FileNotFoundError: as :func:`pack` does
    :raises FileExistsError: as :func:`pack` does
    :raises BlockingIOError: as :func:`pack` does
    :raises ValueError: naming file and tensor if a file is damaged; also if ``source`` is not
        packed, or was packed by a newer version
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
    fused = read_fused(opened.config["quantization_config"], linears, str(source))

    def dense(name: str) -> Tensor:
        where = f"{opened.places[f'{name}.{PARTS[0]}']}: {name}"
        return decode(linears[name], opened.parts(name, PARTS), name=where)

    def convert(key: str) -> dict[str, Tensor] | None:
        name, _, part = key.rpartition(".")
        if name not in linears or part not in PARTS:
            return None
        stored = linears[name]
        if part != next(iter(stored.part_shapes())):
            return {}
        whole, _, number = name.rpartition(".")
        if whole in fused:
            names = [f"{whole}.{each}" for each in range(fused[whole])]
            return {} if int(number) else {whole: torch.stack([dense(each) for each in names])}
        if stored.kind != "integers":
            return {f"{name}.weight": dense(name)}
        parts = opened.parts(name, PARTS)
        where = f"{opened.places[key]}: {name}"
        words = words_of_integers(decode_integers(stored, parts, where), stored.bits)
        restored = parts | {"weight_packed": words, "weight_shape": torch.tensor(stored.shape)}
        return {f"{name}.{local}": restored[local] for local in LOCALS if local in restored}

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
    """Write a checkpoint with some tensors replaced, shard by shard.

    :param convert: maps a tensor's full name to the tensors, by full names, that are written in
        its place; None keeps the tensor
    :param config: returns the new ``config.json``; called once all tensors are converted
    :param card: maps the content of README.md to the new content
    """
    with replacing(output) as beside:
        beside.mkdir()
        weight_map: dict[str, str] = {}
        size = 0
        for shard in sorted(set(source.places.values())):
            tensors: dict[str, Tensor] = {}
            metadata = source.opened(shard).metadata()
            for key in (key for key, place in source.places.items() if place == shard):
                made = convert(key)
                tensors.update({key: source.tensor(key)} if made is None else made)
                advance(1 / len(source.places))
            if tensors:
                save_file(tensors, beside / shard.name, metadata=metadata or {"format": "pt"})
            weight_map |= dict.fromkeys(tensors, shard.name)
            size += size_of(tensors)
        write_json(beside / "config.json", config())
        if content := read_index(source.folder):
            total = {**(content.get("metadata") or {}), "total_size": size}
            write_json(beside / INDEX, {**content, "metadata": total, "weight_map": weight_map})
        readme = source.folder / README
        if text := card(readme.read_bytes() if readme.is_file() else b""):
            (beside / README).write_bytes(text)
        copy_others(source.folder, beside, [README])


def _bits(source: _Source) -> set[int]:
    """Return the bit widths of a checkpoint's quantized Linears; empty if it is not quantized.

    :raises ValueError: if it is packed already, or quantized in a way that cannot be packed
    """
    quantization = source.config.get("quantization_config")
    if quantization is None:
        return set()
    method = quantization.get("quant_method")
    if method == QUANT_METHOD:
        raise ValueError(
            f"{source.folder} is packed already; `dlp-plugin unpack` restores its source"
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
            f"{source.folder} is quantized in a way that cannot be packed ({', '.join(other)}): "
            "give a dense checkpoint, or a weight-only one of 4 or 8 bits in groups or channels "
            "(W4A16, W8A16)"
        )
    return {args["num_bits"] for args in weights}


def _routers(model: PreTrainedModel, names: SourceNames, linears: Iterable[str]) -> set[str]:
    """Find the routers among a checkpoint's Linears; engines load routers as dense weights only.

    :param linears: full names of the Linears in the files
    """
    routers = {f"{router}.weight" for router in unnamed_routers(model, [])}
    return {name for name in linears if names.weight(f"{name}.weight") in routers}


def _experts(source: _Source, names: SourceNames) -> tuple[set[str], dict[str, int]]:
    """Find the experts of a checkpoint, stored as one Linear each or as fused tensors.

    :return: full names of the experts that are Linears; name of every fused tensor
        ``[experts, ...]`` to its number of experts
    :raises ValueError: as :func:`~.names.check_experts` does
    """
    linears: set[str] = set()
    stacked: dict[str, int] = {}
    shapes: dict[str, Sequence[int]] = {}
    for key in source.places:
        name, _, local = key.rpartition(".")
        weight = f"{name}.weight" if local == LOCALS[0] else key
        if block_of(name) is None or names.experts(weight) is None:
            continue
        shape = source.opened(source.places[key]).get_slice(key).get_shape()
        if local == LOCALS[0] and (said := f"{name}.weight_shape") in source.places:
            shape = source.tensor(said).tolist()
        if len(shape) == 3:
            stacked[key] = shape[0]
        elif local in ("weight", LOCALS[0]):
            linears.add(name)
        shapes[weight] = shape
    check_experts(names, shapes, str(source.folder))
    return linears, stacked
