"""What is really in a checkpoint: zeros per Linear and block, and sizes, from the files."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import zstandard
from safetensors import SafetensorError, safe_open

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme

__all__ = [
    "Checkpoint",
    "Zeros",
    "check_weight_files",
    "inspect_checkpoint",
    "read_config",
    "weight_files",
    "zeros_lost",
    "zstd_bytes",
]

_SINGLE = "model.safetensors"
_INDEX = f"{_SINGLE}.index.json"


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
    :param quantization: format of the quantized weights; None if there are none
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
            block = _block_of(name)
            if block is not None:
                blocks[block] = blocks[block] + zeros if block in blocks else zeros
        return blocks

    @property
    def outside(self) -> dict[str, Zeros]:
        """Zeros of the matrices outside every block: embeddings and head."""
        return {n: zeros for n, zeros in self.linears.items() if _block_of(n) is None}


def inspect_checkpoint(
    folder: str | Path, advance: Callable[[float], Any] = lambda _: None, group: int = 0
) -> Checkpoint:
    """Count the zeros of every weight matrix in a checkpoint's safetensors files.

    The model is not built; one matrix is in memory at a time. Quantized weights count
    as what they stand for: a packed 4-bit weight is zero if it dequantizes to zero.

    :param folder: a checkpoint as transformers or llm-compressor saves it
    :param advance: called with the fraction of matrices done by each step
    :param group: M of a pattern N:M that is to be looked for in every row; 0 for none
    :raises FileNotFoundError: if the folder holds no safetensors file, or lacks one that its
        index names
    :raises ValueError: if a file is damaged, or a quantized weight has no scheme in
        ``config.json``
    """
    folder = Path(folder)
    tensors = _tensors_by_module(folder)
    quantization = _quantization_config(folder)
    linears: dict[str, Zeros] = {}
    sparse_bits = 0
    for module, files in tensors.items():
        state = _read(module, files)
        weight = _dense_weight(module, state, quantization)
        if weight is not None and weight.ndim == 2:
            zeros = _zeros(weight, group)
            linears[module] = zeros
            if _block_of(module) is not None:
                stored = state.pop("weight_packed", None)
                stored = state.pop("weight") if stored is None else stored
                bits = 8 * stored.nbytes // zeros.weights
                sparse_bits += zeros.weights + bits * (zeros.weights - zeros.zeros)
        for local in _fused(module, state):
            stored = state.pop(local)
            zeros = linears[f"{module}.{local}"] = _zeros(stored.flatten(0, 1), 0)
            sparse_bits += zeros.weights + 8 * stored.itemsize * (zeros.weights - zeros.zeros)
        sparse_bits += 8 * sum(tensor.nbytes for tensor in state.values())
        advance(1 / len(tensors))
    return Checkpoint(
        folder,
        linears,
        None if quantization is None else quantization.format,
        sum(file.stat().st_size for file in _files(folder)),
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
    before, after = _tensors_by_module(pruned), _tensors_by_module(other)
    config_before, config_after = _quantization_config(pruned), _quantization_config(other)
    lost = {}
    for module, files in before.items():
        if _block_of(module) is None:
            continue
        state_before = _read(module, files)
        state_after = _read(module, after.get(module, {}))
        pairs = {
            f"{module}.{n}": (state_before[n], state_after.get(n))
            for n in _fused(module, state_before)
        }
        left = _dense_weight(module, state_before, config_before)
        if left is not None and left.ndim == 2:
            pairs[module] = left, _dense_weight(module, state_after, config_after)
        for name, (one, two) in pairs.items():
            if two is None or two.shape != one.shape:
                found = "is missing" if two is None else f"is {list(two.shape)}"
                raise ValueError(
                    f"{name} is {list(one.shape)} in {pruned} and {found} in {other}: they "
                    "are not the same model"
                )
            lost[name] = int(((one == 0) & (two != 0)).sum())
    return lost


def _fused(module: str, state: Mapping[str, torch.Tensor]) -> list[str]:
    """Local names of the weights ``[experts, ...]`` of a block's fused experts."""
    if _block_of(module) is None:
        return []
    others = ("weight", "weight_packed", "weight_scale", "weight_zero_point")
    return [n for n, x in state.items() if x.ndim == 3 and n not in others and "_bias" not in n]


def _zeros(weight: torch.Tensor, group: int) -> Zeros:
    """Count the zeros of a matrix ``[out, in]``."""
    zeros = weight.numel() - int(weight.count_nonzero())
    if not group or weight.shape[1] % group:
        return Zeros(weight.numel(), zeros)
    counts = (weight == 0).unflatten(1, (-1, group)).sum(2)
    return Zeros(weight.numel(), zeros, (int(counts.min()), int(counts.max())))


def zstd_bytes(folder: str | Path) -> int:
    """Size of a checkpoint's safetensors files under zstd at its default level.

    :raises FileNotFoundError: if there is none, or one that the index names is missing
    """
    total = 0
    for file in _files(Path(folder)):
        compressor = zstandard.ZstdCompressor().compressobj()
        with file.open("rb") as opened:
            while chunk := opened.read(1 << 24):
                total += len(compressor.compress(chunk))
        total += len(compressor.flush())
    return total


def weight_files(folder: Path) -> dict[str, Path]:
    """Full name of every tensor of a checkpoint to the file that holds it.

    Files that belong to something else, such as an adapter or a leftover, do not count: where
    there is an index, it says which do, and else ``model.safetensors`` where there is one.

    :raises FileNotFoundError: if there is none, or one that the index names is missing
    :raises ValueError: naming the file, if one is damaged or lacks a tensor that the index names
    """
    held = [(key, file) for file in _files(folder) for key in _keys(file)]
    said = [(key, folder / name) for key, name in _index(folder).items()]
    for key, file in sorted(set(said).difference(held)):
        raise ValueError(
            f"{file} does not hold {key}, as {_INDEX} says: fetch or save the checkpoint again"
        )
    return dict(held + said)


def check_weight_files(folder: str | Path) -> None:
    """Make sure that a folder's safetensors files are all there, and whole, from their headers.

    For what is about to be loaded by others, whose errors do not name the file. A folder
    without such files passes: its weights may be of another kind.

    :raises FileNotFoundError: if one that the index names is missing
    :raises ValueError: naming the file, if one is damaged or lacks a tensor that the index names
    """
    folder = Path(folder)
    if (folder / _INDEX).is_file() or any(folder.glob("*.safetensors")):
        weight_files(folder)


def _files(folder: Path) -> list[Path]:
    files = [folder / name for name in sorted(set(_index(folder).values()))]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(
                f"{file} is missing, which {_INDEX} names: fetch or save the checkpoint again"
            )
    if not files and (folder / _SINGLE).is_file():
        files = [folder / _SINGLE]
    files = files or sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(
            f"{folder} holds no .safetensors file; give the folder of a saved model"
        )
    return files


def _index(folder: Path) -> dict[str, str]:
    """Tensor to file name by the index; empty where there is none."""
    content = _read_json(folder / _INDEX)
    if content is None:
        return {}
    weight_map: Any = content.get("weight_map")
    names = list(weight_map.values()) if isinstance(weight_map, dict) else []
    if not names or not all(isinstance(name, str) for name in names):
        raise ValueError(
            f"{folder / _INDEX} has no weight_map from tensors to files: fetch or save the "
            "checkpoint again"
        )
    return dict(weight_map)


def read_config(folder: Path) -> dict[str, Any] | None:
    """What stands in ``config.json``; None where there is none.

    :raises ValueError: if it is no JSON, or no mapping
    """
    return _read_json(folder / "config.json")


def _read_json(file: Path) -> dict[str, Any] | None:
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{file} is no JSON ({error}): fetch or save the checkpoint again"
        ) from None
    if not isinstance(content, dict):
        raise ValueError(
            f"{file} holds a {type(content).__name__} instead of a mapping: fetch or save the "
            "checkpoint again"
        )
    return content


def _keys(file: Path) -> list[str]:
    try:
        with safe_open(file, framework="pt") as opened:
            return list(opened.keys())
    except SafetensorError as error:
        raise ValueError(
            f"{file} is damaged, or was not written to its end ({error}): fetch or save the "
            "checkpoint again"
        ) from None


def _tensors_by_module(folder: Path) -> dict[str, dict[str, Path]]:
    """Every module's tensors by their local names, with their files, in depth order."""
    tensors: dict[str, dict[str, Path]] = {}
    for key, file in weight_files(folder).items():
        module, _, local = key.rpartition(".")
        tensors.setdefault(module, {})[local] = file
    return {module: tensors[module] for module in sorted(tensors, key=_depth_order)}


def _read(module: str, files: Mapping[str, Path]) -> dict[str, torch.Tensor]:
    state = {}
    for local, file in files.items():
        with safe_open(file, framework="pt") as opened:
            state[local] = opened.get_tensor(f"{module}.{local}" if module else local)
    return state


def _block_of(module: str) -> str | None:
    """A block's name ends in the first number of a full name: ``model.layers.3``."""
    parts = module.split(".")
    place = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return None if place is None else ".".join(parts[: place + 1])


def _depth_order(module: str) -> list[tuple[int, int, str]]:
    """Sort key that puts ``layers.10`` behind ``layers.9``."""
    return [(1, int(part), "") if part.isdigit() else (0, 0, part) for part in module.split(".")]


def _quantization_config(folder: Path) -> QuantizationConfig | None:
    config = (read_config(folder) or {}).get("quantization_config")
    if config is None or config.get("quant_method") != "compressed-tensors":
        return None
    from compressed_tensors.quantization import QuantizationConfig

    return QuantizationConfig.model_validate(config)


def _dense_weight(
    module: str, state: dict[str, torch.Tensor], config: QuantizationConfig | None
) -> torch.Tensor | None:
    """A module's weight as the numbers that it stands for; None if it has none."""
    if "weight_packed" not in state and "weight_scale" not in state:
        return state.get("weight")
    scheme = None if config is None else _scheme(module, config)
    if config is None or scheme is None:
        raise ValueError(
            f"{module} is quantized, but config.json has no quantization_config for it: "
            "the checkpoint is incomplete"
        )
    from compressed_tensors.compressors import BaseCompressor  # seconds, for quantized ones only

    compressor: Any = BaseCompressor.get_value_from_registry(scheme.format or config.format)
    weight: torch.Tensor = compressor.decompress(state, scheme)["weight"]
    return weight


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
