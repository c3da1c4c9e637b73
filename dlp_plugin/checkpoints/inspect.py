"""What is really in a checkpoint: zeros per Linear and block, and sizes, from the files."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes  # noqa: F401  # by which numpy knows bfloat16 when safetensors asks it
import numpy as np
import zstandard

from dlp_plugin.checkpoints.files import bytes_on_disk, opening, read_config, shards, weight_files

if TYPE_CHECKING:  # torch and compressed-tensors take seconds, which only quantized weights need
    import torch
    from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
    from numpy.typing import NDArray

    from dlp_plugin.checkpoints.stored import Stored

    Array = NDArray[Any] | torch.Tensor
    Mask = NDArray[np.bool_]

__all__ = ["Checkpoint", "Zeros", "block_of", "inspect_checkpoint", "zeros_lost", "zstd_bytes"]

# safetensors looks for these among numpy's own attributes, where ml_dtypes puts none.
_BY_TORCH = ("F8", "F6", "F4")


@dataclass(frozen=True)
class Zeros:
    """Zeros among a number of weights.

    :param in_group: the least and the most zeros in any group of M consecutive weights of a
        row; None where groups were not looked at, or do not fill the rows
    """

    weights: int
    zeros: int
    in_group: tuple[int, int] | None = None

    @property
    def sparsity(self) -> float:
        """Fraction of the weights that are zero."""
        return self.zeros / self.weights

    def __add__(self, other: Zeros) -> Zeros:
        both = None
        if self.in_group is not None and other.in_group is not None:
            both = (
                min(self.in_group[0], other.in_group[0]),
                max(self.in_group[1], other.in_group[1]),
            )
        return Zeros(self.weights + other.weights, self.zeros + other.zeros, both)


@dataclass(frozen=True)
class Checkpoint:
    """What :func:`inspect_checkpoint` found.

    :param folder: where it lies
    :param linears: full name of every weight matrix to its zeros, in name order; of fused
        experts full name of all experts' weights
    :param quantization: format of the quantized or packed weights; None if there are none
    :param bytes_on_disk: size of its safetensors files
    :param bytes_if_sparse: what the blocks' weights would take in an engine that stores
        one bit for every weight and the values that are not zero, with everything else
        (scales, norms, embeddings) as it is; no such engine reads these files today
    """

    folder: Path
    linears: Mapping[str, Zeros]
    quantization: str | None
    bytes_on_disk: int
    bytes_if_sparse: int

    @property
    def blocks(self) -> dict[str, Zeros]:
        """Zeros of every block, in depth order."""
        blocks: dict[str, Zeros] = {}
        for name, zeros in self.linears.items():
            block = block_of(name)
            if block is not None:
                blocks[block] = blocks[block] + zeros if block in blocks else zeros
        return blocks

    @property
    def outside(self) -> dict[str, Zeros]:
        """Zeros of the matrices outside every block: embeddings and head."""
        return {n: zeros for n, zeros in self.linears.items() if block_of(n) is None}


def inspect_checkpoint(
    folder: str | Path, advance: Callable[[float], Any] = lambda _: None, group: int = 0
) -> Checkpoint:
    """Count the zeros of every weight matrix in a checkpoint's safetensors files.

    The model is not built; one matrix is in memory at a time. Quantized and packed weights count
    as what they stand for: a 4-bit weight is zero if it dequantizes to zero.

    :param folder: a checkpoint as transformers or llm-compressor saves it
    :param advance: called with the fraction of matrices done by each step
    :param group: M of a pattern N:M that is to be looked for in every row; 0 for none
    :raises FileNotFoundError: if the folder holds no safetensors file, or lacks one that its
        index names
    :raises ValueError: if a file is damaged, or ``config.json`` does not tell how a quantized or
        packed weight is stored
    """
    folder = Path(folder)
    tensors, opened = _tensors_by_module(folder), opening()
    quantization = _quantization(folder)
    linears: dict[str, Zeros] = {}
    sparse_bits = 0
    for module, files in tensors.items():
        state = _read(module, files, opened)
        zero = _zero_weights(module, state, quantization)
        if zero is not None and zero.ndim == 2:
            name = quantization.tensor_of(module)
            zeros = _zeros(zero, group if name == module else 0)
            linears[name] = linears[name] + zeros if name in linears else zeros
            if block_of(module) is not None:
                bits = _take_bits(module, state, quantization, zeros.weights)
                sparse_bits += zeros.weights + bits * (zeros.weights - zeros.zeros)
        for local in _fused(module, state):
            stored = state.pop(local)
            zeros = linears[f"{module}.{local}"] = _zeros(_is_zero(stored), 0)
            sparse_bits += zeros.weights + 8 * stored.itemsize * (zeros.weights - zeros.zeros)
        sparse_bits += 8 * sum(tensor.nbytes for tensor in state.values())
        advance(1 / len(tensors))
    return Checkpoint(
        folder,
        linears,
        quantization.format,
        bytes_on_disk(folder),
        sparse_bits // 8,
    )


def zeros_lost(pruned: str | Path, other: str | Path) -> dict[str, int]:
    """Count what became of a checkpoint's zeros in one that was made from it.

    :param pruned: folder of the pruned checkpoint
    :param other: folder of the same model afterwards: quantized, merged, trained on
    :return: full name of every Linear inside a block to its number of weights that are
        zero in ``pruned`` and not in ``other``
    :raises FileNotFoundError: as :func:`inspect_checkpoint` does
    :raises ValueError: likewise, and if a matrix is missing from ``other`` or has another shape
    """
    pruned, other = Path(pruned), Path(other)
    before, after = _Masks(pruned), _Masks(other)
    lost: dict[str, int] = {}
    for module in before.tensors:
        if block_of(module) is None:
            continue
        for name, one in before.of_module(module):
            two = after.of(name)
            if two is None or two.shape != one.shape:
                found = "is missing" if two is None else f"is {list(two.shape)}"
                raise ValueError(
                    f"{name} is {list(one.shape)} in {pruned} and {found} in {other}: they "
                    "are not the same model"
                )
            lost[name] = int(np.count_nonzero(one & ~two))
    return lost


class _Masks:
    """Which weights of a checkpoint are zero, a matrix or all experts of a layer at a time."""

    def __init__(self, folder: Path) -> None:
        self.tensors = _tensors_by_module(folder)
        self.opened = opening()
        self.quantization = _quantization(folder)

    def _read(self, module: str) -> dict[str, Array]:
        return _read(module, self.tensors[module], self.opened)

    def of_module(self, module: str) -> Iterator[tuple[str, Mask]]:
        """What a module holds, by full names; of fused experts with the first of them."""
        name = self.quantization.tensor_of(module)
        if name != module:
            if module == f"{name}.0":
                yield name, self._stacked(name)
            return
        state = self._read(module)
        for local in _fused(module, state):
            yield f"{module}.{local}", _is_zero(state[local])
        own = _zero_weights(module, state, self.quantization)
        if own is not None and own.ndim == 2:
            yield module, own

    def of(self, name: str) -> Mask | None:
        """What has a full name; None if nothing has."""
        if name in self.quantization.fused:
            return self._stacked(name)
        if name in self.tensors:
            return _zero_weights(name, self._read(name), self.quantization)
        holder, _, local = name.rpartition(".")
        place = self.tensors.get(holder, {}).get(local)
        return None if place is None else _is_zero(_tensor(self.opened, place, name, False))

    def _stacked(self, name: str) -> Mask:
        experts = [f"{name}.{each}" for each in range(self.quantization.fused[name])]
        states = {each: self._read(each) for each in experts}
        masks = [_zero_weights(n, state, self.quantization) for n, state in states.items()]
        return np.stack([mask for mask in masks if mask is not None])


def _fused(module: str, state: Mapping[str, Array]) -> list[str]:
    """Local names of the weights ``[experts, ...]`` of a block's fused experts."""
    if block_of(module) is None:
        return []
    others = ("weight", "weight_packed", "weight_scale", "weight_zero_point")
    return [n for n, x in state.items() if x.ndim == 3 and n not in others and "_bias" not in n]


def _take_bits(
    module: str, state: dict[str, Array], quantization: _Quantization, weights: int
) -> int:
    """Take a matrix's own tensors out of its module's; how many bits has a weight of it?"""
    stored = quantization.packed.get(module)
    if stored is not None:
        for part in set(stored.part_shapes()) - {"weight_scale", "weight_zero_point"}:
            del state[part]
        return stored.bits or 8 * stored.dtype.itemsize
    matrix = state.pop("weight_packed", None)
    matrix = state.pop("weight") if matrix is None else matrix
    return 8 * matrix.nbytes // weights


def _is_zero(weights: Array) -> Mask:
    with np.errstate(invalid="ignore"):  # numpy warns of signalling NaNs, which are no zeros
        return np.asarray(weights == 0)


def _zeros(zero: Mask, group: int) -> Zeros:
    """Count the zeros of a matrix ``[out, in]``.

    :param zero: which of its weights are zero
    """
    zeros = int(np.count_nonzero(zero))
    if not group or zero.shape[1] % group:
        return Zeros(zero.size, zeros)
    counts = zero.reshape(len(zero), -1, group).sum(2)
    return Zeros(zero.size, zeros, (int(counts.min()), int(counts.max())))


def zstd_bytes(folder: str | Path) -> int:
    """Size of a checkpoint's safetensors files under zstd at its default level.

    :raises FileNotFoundError: if there is none, or one that the index names is missing
    """
    total = 0
    for file in shards(Path(folder)):
        compressor = zstandard.ZstdCompressor().compressobj()
        with file.open("rb") as opened:
            while chunk := opened.read(1 << 24):
                total += len(compressor.compress(chunk))
        total += len(compressor.flush())
    return total


def _tensors_by_module(folder: Path) -> dict[str, dict[str, Path]]:
    """Every module's tensors by their local names, with their files, in depth order."""
    tensors: dict[str, dict[str, Path]] = {}
    for key, file in weight_files(folder).items():
        module, _, local = key.rpartition(".")
        tensors.setdefault(module, {})[local] = file
    return {module: tensors[module] for module in sorted(tensors, key=_depth_order)}


def _read(module: str, files: Mapping[str, Path], opened: Callable[..., Any]) -> dict[str, Array]:
    """A module's tensors by their local names: torch's if it is quantized."""
    keys = {local: f"{module}.{local}" if module else local for local in files}
    return {
        local: _tensor(opened, file, keys[local], _is_quantized(files))
        for local, file in files.items()
    }


def _tensor(opened: Callable[..., Any], file: Path, key: str, by_torch: bool) -> Array:
    found = opened(file, "pt" if by_torch else "np")
    if by_torch or not found.get_slice(key).get_dtype().startswith(_BY_TORCH):
        tensor: Array = found.get_tensor(key)
        return tensor
    return _tensor(opened, file, key, by_torch=True)


def _is_quantized(locals_: Container[str]) -> bool:
    """Whether a module is quantized, by the local names of its tensors."""
    return "weight_packed" in locals_ or "weight_scale" in locals_


def block_of(module: str) -> str | None:
    """A block's name ends in the first number of a full name: ``model.layers.3``.

    As :func:`dlp_plugin.scoring.blocks.find_blocks` finds them where there is a model.
    """
    parts = module.split(".")
    place = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return None if place is None else ".".join(parts[: place + 1])


def _depth_order(module: str) -> list[tuple[int, int, str]]:
    """Sort key that puts ``layers.10`` behind ``layers.9``."""
    return [(1, int(part), "") if part.isdigit() else (0, 0, part) for part in module.split(".")]


@dataclass(frozen=True)
class _Quantization:
    """How ``config.json`` says that quantized and packed modules are stored.

    :param compressed: what compressed-tensors reads; None if it is not its
    :param packed: full name of every packed Linear to how it is stored
    :param fused: full names of the tensors of which experts are packed Linears
    :param format: as :class:`Checkpoint` tells it
    """

    compressed: QuantizationConfig | None
    packed: Mapping[str, Stored]
    fused: Mapping[str, int]
    format: str | None

    def tensor_of(self, module: str) -> str:
        """Full name of the experts' tensor that a packed Linear is one of, or its own."""
        whole = module.rpartition(".")[0]
        return whole if whole in self.fused else module


def _quantization(folder: Path) -> _Quantization:
    config = (read_config(folder) or {}).get("quantization_config") or {}
    if config.get("quant_method") == "compressed-tensors":
        from compressed_tensors.quantization import QuantizationConfig

        compressed = QuantizationConfig.model_validate(config)
        return _Quantization(compressed, {}, {}, compressed.format)
    if not config:
        return _Quantization(None, {}, {}, None)
    if (method := config.get("quant_method")) == "fp8":  # a weight is 0 where its 8 bits are
        return _Quantization(None, {}, {}, method)
    from dlp_plugin.checkpoints.packed import packed_linears
    from dlp_plugin.checkpoints.stored import QUANT_METHOD, read_fused

    if method != QUANT_METHOD:
        raise ValueError(
            f"{folder} is quantized by {method}, whose weights are not read here: give the "
            "checkpoint that it was made from"
        )
    packed = packed_linears(folder)
    fused = read_fused(config, packed, str(folder))
    source = (config.get("source") or {}).get("format")
    known = [config["quant_method"], *([source] if source else [])] if packed else []
    return _Quantization(None, packed, fused, ", ".join(known) or None)


def _zero_weights(module: str, state: dict[str, Array], quantization: _Quantization) -> Mask | None:
    """Which of a module's weights stand for zero; None if it has none."""
    if module in quantization.packed:
        from dlp_plugin.checkpoints.sparse_format import decode

        parts: Any = state
        return _is_zero(decode(quantization.packed[module], parts, name=module))
    if not _is_quantized(state):
        return _is_zero(state["weight"]) if "weight" in state else None
    config = quantization.compressed
    scheme = None if config is None else _scheme(module, config)
    if config is None or scheme is None:
        raise ValueError(
            f"{module} is quantized, but config.json has no quantization_config for it: "
            "the checkpoint is incomplete"
        )
    from compressed_tensors.compressors import BaseCompressor

    compressor: Any = BaseCompressor.get_value_from_registry(scheme.format or config.format)
    return _is_zero(compressor.decompress(state, scheme)["weight"])


def _scheme(module: str, config: QuantizationConfig) -> QuantizationScheme | None:
    """Scheme of a quantized module: by name or pattern first, else by class.

    Without the model a module's class is not known, but what is quantized here was
    matched by one of the groups, and those that go by class nearly always say Linear.
    """
    from compressed_tensors.quantization import QuantizationScheme
    from compressed_tensors.utils import match_name

    groups = config.config_groups.values()
    schemes = [group for group in groups if isinstance(group, QuantizationScheme)]
    for scheme in schemes:
        if any(match_name(module, target) for target in scheme.targets):
            return scheme
    by_class = (s for s in schemes if any(t.isidentifier() for t in s.targets))
    return next(by_class, None)
