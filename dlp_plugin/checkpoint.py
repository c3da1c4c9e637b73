"""What is really in a checkpoint: zeros per Linear and block, read from the file."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from compressed_tensors.utils import match_name
from safetensors import safe_open

__all__ = ["Checkpoint", "Zeros", "inspect_checkpoint"]


@dataclass(frozen=True)
class Zeros:
    """Zeros among a number of weights."""

    weights: int
    zeros: int

    @property
    def sparsity(self) -> float:
        """Fraction of the weights that are zero."""
        return self.zeros / self.weights

    def __add__(self, other: Zeros) -> Zeros:
        return Zeros(self.weights + other.weights, self.zeros + other.zeros)


@dataclass(frozen=True)
class Checkpoint:
    """What :func:`inspect_checkpoint` found.

    :param folder: where it lies
    :param linears: full name of every weight matrix to its zeros, in name order
    :param quantization: format of the quantized weights; None if there are none
    :param bytes_on_disk: size of all safetensors files
    """

    folder: Path
    linears: Mapping[str, Zeros]
    quantization: str | None
    bytes_on_disk: int

    @property
    def blocks(self) -> dict[str, Zeros]:
        """Zeros of every block, in depth order."""
        blocks: defaultdict[str, Zeros] = defaultdict(lambda: Zeros(0, 0))
        for name, zeros in self.linears.items():
            block = _block_of(name)
            if block is not None:
                blocks[block] += zeros
        return dict(blocks)

    @property
    def outside(self) -> dict[str, Zeros]:
        """Zeros of the matrices outside every block: embeddings and head."""
        return {n: zeros for n, zeros in self.linears.items() if _block_of(n) is None}


def inspect_checkpoint(
    folder: str | Path, advance: Callable[[float], Any] = lambda _: None
) -> Checkpoint:
    """Count the zeros of every weight matrix in a checkpoint's safetensors files.

    The model is not built; one matrix is in memory at a time. Quantized weights count
    as what they stand for: a packed 4-bit weight is zero if it dequantizes to zero.

    :param folder: a checkpoint as transformers or llm-compressor saves it
    :param advance: called with the fraction of matrices done by each step
    :raises FileNotFoundError: if the folder holds no safetensors file
    :raises ValueError: if a quantized weight has no scheme in ``config.json``
    """
    folder = Path(folder)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(
            f"{folder} holds no .safetensors file; give the folder of a saved model"
        )
    tensors: dict[str, dict[str, Path]] = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118 (not a mapping)
                module, _, local = key.rpartition(".")
                tensors.setdefault(module, {})[local] = file
    quantization = _quantization_config(folder)
    linears: dict[str, Zeros] = {}
    for module in sorted(tensors, key=_depth_order):
        weight = _dense_weight(module, tensors[module], quantization)
        if weight is not None and weight.ndim == 2:
            zeros = weight.numel() - int(weight.count_nonzero())
            linears[module] = Zeros(weight.numel(), zeros)
        advance(1 / len(tensors))
    return Checkpoint(
        folder,
        linears,
        None if quantization is None else quantization.format,
        sum(file.stat().st_size for file in files),
    )


def _block_of(module: str) -> str | None:
    """A block's name ends in the first number of a full name: ``model.layers.3``."""
    parts = module.split(".")
    place = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return None if place is None else ".".join(parts[: place + 1])


def _depth_order(module: str) -> list[tuple[int, int, str]]:
    """Sort key that puts ``layers.10`` behind ``layers.9``."""
    return [(1, int(part), "") if part.isdigit() else (0, 0, part) for part in module.split(".")]


def _quantization_config(folder: Path) -> QuantizationConfig | None:
    config_file = folder / "config.json"
    if not config_file.is_file():
        return None
    config = json.loads(config_file.read_text()).get("quantization_config")
    if config is None or config.get("quant_method") != "compressed-tensors":
        return None
    return QuantizationConfig.model_validate(config)


def _dense_weight(
    module: str, files: Mapping[str, Path], config: QuantizationConfig | None
) -> torch.Tensor | None:
    """A module's weight as the numbers that it stands for; None if it has none."""
    quantized = "weight_packed" in files or "weight_scale" in files
    if not quantized and "weight" not in files:
        return None
    state = {}
    for local in files if quantized else ["weight"]:
        with safe_open(files[local], framework="pt") as opened:
            state[local] = opened.get_tensor(f"{module}.{local}")
    if not quantized:
        dense: torch.Tensor = state["weight"]
        return dense
    scheme = None if config is None else _scheme(module, config)
    if config is None or scheme is None:
        raise ValueError(
            f"{module} is quantized, but config.json has no quantization_config for it: "
            "the checkpoint is incomplete"
        )
    compressor: Any = BaseCompressor.get_value_from_registry(scheme.format or config.format)
    weight: torch.Tensor = compressor.decompress(state, scheme)["weight"]
    return weight


def _scheme(module: str, config: QuantizationConfig) -> QuantizationScheme | None:
    """Scheme of a quantized module: by name or pattern first, else by class.

    Without the model a module's class is not known, but what is quantized here was
    matched by one of the groups, and those that go by class nearly always say Linear.
    """
    groups = config.config_groups.values()
    schemes = [group for group in groups if isinstance(group, QuantizationScheme)]
    for scheme in schemes:
        if any(match_name(module, target) for target in scheme.targets):
            return scheme
    by_class = (s for s in schemes if any(t.isidentifier() for t in s.targets))
    return next(by_class, None)
