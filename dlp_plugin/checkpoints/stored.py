"""Reads from ``config.json`` how the Linears of a packed checkpoint are stored.

:mod:`dlp_plugin.checkpoints.sparse_format` says what their tensors mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from dlp_plugin.checkpoints.bits import words_for

__all__ = [
    "FLOATS",
    "PARTS",
    "QUANT_METHOD",
    "TABLE",
    "VERSION",
    "Stored",
    "read_fused",
    "read_stored",
]

QUANT_METHOD = "dlp-sparse"
"""The ``quant_method`` of packed checkpoints in ``config.json``."""
VERSION = 2
"""The newest version that can be read. Checkpoints without packed experts are written as 1."""
PARTS = (
    "weight_packed",
    "weight_fractions",
    "weight_exponents",
    "weight_table",
    "weight_values",
    "weight_integers",
    "weight_scale",
    "weight_zero_point",
)
"""Local names of all tensors that a packed Linear may have."""

FLOATS = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64)
}
TABLE = 16  # different exponents that a 4-bit index can tell apart
# Kind to the further fields of its entry
_FIELDS = {
    "planes": ("exponents",),
    "values": (),
    "integers": ("bits", "group_size", "symmetric", "masked"),
}


@dataclass(frozen=True)
class Stored:
    """How a Linear's weight is stored: its entry in ``config.json``.

    :param kind: ``planes``, ``values`` or ``integers``
    :param shape: ``[out, in]``
    :param dtype: of the decoded weight; for integers the dtype of their scales
    :param kept: number of weights that are stored
    :param bits: for integers: 4 or 8
    :param group_size: for integers: columns that share a scale; -1 for one scale per row
    :param symmetric: for integers: whether there are no zero points
    :param masked: whether there is a mask; only integers may have none
    :param exponents: for planes: number of different exponents
    """

    kind: str
    shape: tuple[int, int]
    dtype: torch.dtype
    kept: int
    bits: int = 0
    group_size: int = 0
    symmetric: bool = True
    masked: bool = True
    exponents: int = 0

    @classmethod
    def from_config(cls, name: str, config: Mapping[str, Any]) -> Stored:
        """Read the entry of one Linear.

        :param name: the Linear's full name, for errors
        :param config: the entry
        :return: how the Linear is stored
        :raises ValueError: if a field is missing or has an invalid value
        """
        try:
            rows, columns = config["shape"]
            stored = cls(
                config["kind"],
                (rows, columns),
                FLOATS[config["dtype"]],
                config["kept"],
                **{field: config[field] for field in _FIELDS[config["kind"]]},
            )
            sound = _is_sound(stored)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{name} has a damaged entry in quantization_config "
                f"({type(error).__name__}: {error}): pack the checkpoint again"
            ) from None
        if not sound:
            raise ValueError(
                f"{name} has an invalid entry in quantization_config ({dict(config)}): "
                "pack the checkpoint again"
            )
        return stored

    def to_config(self) -> dict[str, Any]:
        """Return the entry that :meth:`from_config` reads, as plain JSON types."""
        return {
            "kind": self.kind,
            "shape": list(self.shape),
            "dtype": str(self.dtype).removeprefix("torch."),
            "kept": self.kept,
            **{field: getattr(self, field) for field in _FIELDS[self.kind]},
        }

    def part_shapes(self) -> dict[str, tuple[int, ...]]:
        """Map the local name of each of the Linear's tensors to its shape."""
        rows, columns = self.shape
        pairs = (self.kept + 1) // 2
        shapes: dict[str, tuple[int, ...]] = {}
        if self.masked:
            shapes["weight_packed"] = (rows, (columns + 7) // 8)
        if self.kind == "planes":
            shapes["weight_fractions"] = (self.kept,)
            shapes["weight_exponents"] = (pairs,)
            shapes["weight_table"] = (self.exponents,)
        elif self.kind == "values":
            shapes["weight_values"] = (self.kept,)
        else:
            groups = self.groups
            shapes["weight_integers"] = (pairs if self.bits == 4 else self.kept,)
            shapes["weight_scale"] = (rows, groups)
            if not self.symmetric:
                shapes["weight_zero_point"] = (words_for(rows, self.bits), groups)
        return shapes

    def part_dtypes(self) -> dict[str, torch.dtype]:
        """Map the local name of each of the Linear's tensors to its dtype."""
        others = {
            "weight_values": self.dtype,
            "weight_scale": self.dtype,
            "weight_zero_point": torch.int32,
        }
        return {part: others.get(part, torch.uint8) for part in self.part_shapes()}

    @property
    def groups(self) -> int:
        """For integers: number of scales per row."""
        return 1 if self.group_size == -1 else self.shape[1] // self.group_size

    @property
    def weights(self) -> int:
        """Number of weights of the Linear, zeros included."""
        return self.shape[0] * self.shape[1]


def _is_sound(stored: Stored) -> bool:
    numbers = (*stored.shape, stored.kept, stored.bits, stored.group_size, stored.exponents)
    if any(type(number) is not int for number in numbers):
        return False
    if type(stored.symmetric) is not bool or type(stored.masked) is not bool:
        return False
    if min(stored.shape) < 0 or not 0 <= stored.kept <= stored.weights:
        return False
    if stored.kind == "integers":
        size = stored.group_size
        grouped = size == -1 or (size > 0 and stored.shape[1] % size == 0)
        whole = stored.masked or stored.kept == stored.weights
        return stored.bits in (4, 8) and grouped and whole
    planes = stored.dtype == torch.bfloat16 and 0 <= stored.exponents <= TABLE
    return planes or stored.kind == "values"


def read_stored(config: Mapping[str, Any], where: str) -> dict[str, Stored]:
    """Read how every packed Linear is stored from a ``quantization_config``.

    :param config: the ``quantization_config`` of ``config.json``
    :param where: the file or folder that it is from, for errors
    :return: full name of every packed Linear to how it is stored
    :raises ValueError: if the ``quantization_config`` is damaged, of another format, or of a
        newer version
    """
    method, version, linears = (config.get(key) for key in ("quant_method", "version", "linears"))
    if method != QUANT_METHOD:
        raise ValueError(f"{where} is not packed: its quant_method is {method}, not {QUANT_METHOD}")
    if type(version) is int and version > VERSION:
        raise ValueError(
            f"{where} has version {version} of {QUANT_METHOD}, but this dlp_plugin reads "
            f"up to version {VERSION}: update dlp_plugin"
        )
    if version not in range(1, VERSION + 1) or not isinstance(linears, Mapping):
        raise ValueError(
            f"{where} has a damaged quantization_config (version {version}): pack the checkpoint "
            "again"
        )
    return {name: Stored.from_config(f"{name} of {where}", one) for name, one in linears.items()}


def read_fused(
    config: Mapping[str, Any], linears: Mapping[str, Stored], where: str
) -> dict[str, int]:
    """Read which fused tensors ``[experts, ...]`` are packed.

    Each expert is packed as a Linear of its own: expert 3 of ``NAME`` is ``NAME.3``.

    :param config: the ``quantization_config`` of ``config.json``
    :param linears: as :func:`read_stored` returns them
    :param where: the file or folder that it is from, for errors
    :return: full name of every packed fused tensor to its number of experts
    :raises ValueError: if an expert is missing, or has another shape or dtype than the others
    """
    fused = config.get("fused") or {}
    for name, count in fused.items():
        found = [linears.get(f"{name}.{expert}") for expert in range(count)]
        alike = {each and (each.shape, each.dtype) for each in found}
        if len(alike) != 1 or None in alike:
            raise ValueError(
                f"{name} of {where} has a damaged entry in quantization_config (some of its "
                f"{count} experts are missing or differ in shape): pack the checkpoint again"
            )
    return dict(fused)
