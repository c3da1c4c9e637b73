"""Counts zeros per Linear and block, and sizes, from the files of a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes  # noqa: F401  # makes bfloat16 known to numpy, which safetensors relies on
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

# Dtypes that safetensors cannot read into numpy, even with ml_dtypes: torch reads them.
_BY_TORCH = ("F8", "F6", "F4")


@dataclass(frozen=True)
class Zeros:
    """How many of a number of weights are zero.

    :param weights: number of weights
    :param zeros: how many of them are zero
    :param in_group: the smallest and the largest number of zeros in any group of M consecutive
        weights of a row; None if groups were not examined, or M does not divide the row length
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
    """The zeros and sizes that :func:`inspect_checkpoint` found.

    :param folder: of the checkpoint
    :param linears: full name of every weight matrix to its zeros, in depth order; fused experts
        have one entry per tensor ``[experts, ...]``
    :param quantization: format of the quantized or packed weights; None if there are none
    :param bytes_on_disk: size of the safetensors files
    :param bytes_if_sparse: estimated size if the blocks' weights were stored as one bit per weight
        plus the nonzero values, and everything else (scales, norms, embeddings) unchanged
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

    The model is not built, and one matrix is in memory at a time. Quantized and packed weights are
    decoded first: a 4-bit weight is zero if it dequantizes to zero.

    :param folder: a checkpoint as transformers or llm-compressor saves it
    :param advance: called after each module with the fraction of the work that it was
    :param group: M of the N:M pattern to look for in every row; 0 for none
    :return: zeros and sizes
    :raises FileNotFoundError: if the folder holds no safetensors file, or lacks one that its
        index names
    :raises ValueError: if a file is damaged, or ``config.json`` does not say how a quantized or
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
    """Count the zeros of a pruned checkpoint that are not zero in a checkpoint made from it.

    :param pruned: folder of the pruned checkpoint
    :param other: folder of the same model after quantization, merging or training
    :return: full name of every Linear inside a block to its number of weights that are
        zero in ``pruned`` and not in ``other``
    :raises FileNotFoundError: as :func:`inspect_checkpoint` does
    :raises ValueError: as :func:`inspect_checkpoint` does, and if a matrix is missing from
        ``other`` or has another shape there
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
    """Reads which weights of a checkpoint are zero, one matrix or fused expert tensor at a time."""

    def __init__(self, folder: Path) -> None:
        self.tensors = _tensors_by_module(folder)
        self.opened = opening()
        self.quantization = _quantization(folder)

    def _read(self, module: str) -> dict[str, Array]:
        return _read(module, self.tensors[module], self.opened)

    def of_module(self, module: str) -> Iterator[tuple[str, Mask]]:
        """Yield full name and zeros of a module's weights; a fused tensor with its expert 0."""
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
        """Return the zeros of the weight with this full name; None if there is no such weight."""
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
    """Remove a matrix's own tensors from its module's ``state``; return its bits per weight."""
    stored = quantization.packed.get(module)
    if stored is not None:
        for part in set(stored.part_shapes()) - {"weight_scale", "weight_zero_point"}:
            del state[part]
        return stored.bits or 8 * stored.dtype.itemsize
    matrix = state.pop("weight_packed", None)
    matrix = state.pop("weight") if matrix is None else matrix
    return 8 * matrix.nbytes // weights


def _is_zero(weights: Array) -> Mask:
    with np.errstate(invalid="ignore"):  # numpy warns when it compares signalling NaNs
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
    """Measure a checkpoint's safetensors files compressed by zstd at its default level.

    :param folder: of the checkpoint
    :return: bytes
    :raises FileNotFoundError: if there is no such file, or one that the index names is missing
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
    """Map every module, in depth order, to its tensors' local names and their files."""
    tensors: dict[str, dict[str, Path]] = {}
    for key, file in weight_files(folder).items():
        module, _, local = key.rpartition(".")
        tensors.setdefault(module, {})[local] = file
    return {module: tensors[module] for module in sorted(tensors, key=_depth_order)}


def _read(module: str, files: Mapping[str, Path], opened: Callable[..., Any]) -> dict[str, Array]:
    """Read a module's tensors by local names: torch tensors if it is quantized, else numpy's."""
    above, quantized = f"{module}." if module else "", _is_quantized(files)
    return {x: _tensor(opened, file, above + x, quantized) for x, file in files.items()}


def _tensor(opened: Callable[..., Any], file: Path, key: str, by_torch: bool) -> Array:
    if not by_torch:
        by_torch = opened(file, "np").get_slice(key).get_dtype().startswith(_BY_TORCH)
    tensor: Array = opened(file, "pt" if by_torch else "np").get_tensor(key)
    return tensor


def _is_quantized(locals_: Container[str]) -> bool:
    """Whether a module is quantized, by the local names of its tensors."""
    return "weight_packed" in locals_ or "weight_scale" in locals_


def block_of(module: str) -> str | None:
    """Return the name of the block that a module is in, such as ``model.layers.3``.

    It ends in the first number of the module's full name. That is the block that
    :func:`dlp_plugin.scoring.blocks.find_blocks` finds in a model.

    :param module: full name
    :return: the block's full name; None if the module is outside all blocks
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

    :param compressed: the configuration, if compressed-tensors quantized the checkpoint
    :param packed: full name of every packed Linear to how it is stored
    :param fused: full name of every packed tensor ``[experts, ...]`` to its number of experts
    :param format: see ``quantization`` of :class:`Checkpoint`
    """

    compressed: QuantizationConfig | None
    packed: Mapping[str, Stored]
    fused: Mapping[str, int]
    format: str | None

    def tensor_of(self, module: str) -> str:
        """Return the full name of the fused tensor that holds a Linear, or the Linear's own."""
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
    if (method := config.get("quant_method")) == "fp8":  # zeros are visible in the stored bits
        return _Quantization(None, {}, {}, method)
    from dlp_plugin.checkpoints.packed import packed_linears
    from dlp_plugin.checkpoints.stored import QUANT_METHOD, read_fused

    if method != QUANT_METHOD:
        raise ValueError(
            f"{folder} is quantized by {method}, whose weights cannot be read: give the "
            "checkpoint that it was made from"
        )
    packed = packed_linears(folder)
    fused = read_fused(config, packed, str(folder))
    source = (config.get("source") or {}).get("format")
    known = [config["quant_method"], *([source] if source else [])] if packed else []
    return _Quantization(None, packed, fused, ", ".join(known) or None)


def _zero_weights(module: str, state: dict[str, Array], quantization: _Quantization) -> Mask | None:
    """Return which of a module's weights are zero once decoded; None if it has no weight."""
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
    """Find the scheme of a quantized module: by name or pattern first, else by class.

    A module's class is unknown without the model. But some group matched the module when it was
    quantized, and targets that are class names are nearly always ``Linear``.
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
