"""A packed Linear as the kernels run it: checked, padded, with the start of every row.

A :class:`Layout` is plain tensors and what they mean, so that an engine may keep the tensors as
buffers of a module and build the layout again from them. The tensors are those of the file
(:mod:`dlp_plugin.checkpoints.sparse_format`) under shorter names:

- ``mask`` uint8 ``[out, bytes]``, a row of whole words of 64 bits, and ``starts`` int64
  ``[out + 1]``, the place of each row's first weight among those that are stored, and their end;
- ``values``, or ``integers``, with 64 entries more than there are, as the kernels load whole
  vectors;
- ``scale`` and, of integers that are not symmetric, ``zero`` uint8 ``[out, groups]``.

There are no planes: they are made values here. At 70 % that is 0.36 of bfloat16's bytes for 0.29,
and a product takes 0.75 of the time, as planes ask for more instructions: 0.96 ms for 1.27, of
4096 x 4096 beyond the caches, one row, with one thread of AVX-512 (EPYC Zen 4), and 0.57 for 0.76
with both cores of that machine.

The dense weight is never whole in memory but in :func:`dense`. This module needs torch alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from json import dumps

import torch
from torch import Tensor
from torch.nn.functional import pad

from dlp_plugin.checkpoints.bits import integers_of_words, ones, words_of_integers
from dlp_plugin.checkpoints.slices import narrow
from dlp_plugin.checkpoints.sparse_format import broken, checked, decode, planes_of, values_of
from dlp_plugin.checkpoints.stored import Stored
from dlp_plugin.kernels.joining import joined_parts

__all__ = [
    "Layout",
    "columns",
    "dense",
    "joined",
    "layout_of",
    "parts_of",
    "rows",
    "tensors_of",
]

_PAD = 64  # entries past the end: what the widest vector may load of them
_WORD = 8  # bytes


@dataclass(frozen=True, eq=False)
class Layout:
    """A Linear's weight ``[out, in]`` as the kernels run it.

    :param spec: what the tensors mean: hashable, and JSON by ``spec.to_config()``
    :param tensors: local names to contiguous tensors, of the shapes that :func:`tensors_of` tells;
        they come from this module's functions, which look at every value that is followed
    """

    spec: Stored
    tensors: Mapping[str, Tensor]

    @cached_property
    def said(self) -> str:
        """The ``spec`` as text, for operators that take nothing but tensors and text."""
        return dumps(self.spec.to_config())


def tensors_of(spec: Stored) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Local name of every tensor of a layout to its shape and dtype."""
    found: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    count, width = spec.shape
    if spec.masked:
        found["mask"] = ((count, -(-width // (8 * _WORD)) * _WORD), torch.uint8)
        found["starts"] = ((count + 1,), torch.int64)
    pairs = (spec.kept + 1) // 2
    if spec.kind == "values":
        found["values"] = ((spec.kept + _PAD,), spec.dtype)
    else:
        found["integers"] = (((pairs if spec.bits == 4 else spec.kept) + _PAD,), torch.uint8)
        found["scale"] = ((count, spec.groups), spec.dtype)
        if not spec.symmetric:
            found["zero"] = ((count, spec.groups), torch.uint8)
    return found


def layout_of(stored: Stored, parts: Mapping[str, Tensor], name: str = "") -> Layout:
    """What the kernels run, of the parts of a packed Linear.

    Every part is looked at first, so that no file, however made, has a kernel read outside its
    tensors.

    :param stored: as :meth:`Stored.from_config` gives it
    :param parts: local names to tensors, as the file has them
    :param name: the Linear's full name, for errors
    :raises ValueError: in one line that names the Linear and the part, if one is missing or has
        another shape or dtype than ``stored`` says, the mask marks another number of weights, an
        index is outside the table, or bits that are nobody's are not zero
    """
    checked(stored, parts, name)
    tensors: dict[str, Tensor] = {}
    if stored.masked:
        mask = parts["weight_packed"]
        counts = ones(mask)
        if int(counts.sum()) != stored.kept:
            said = f"marks another number of weights than the {stored.kept} that are stored"
            raise broken(name, "weight_packed", said)
        tensors["mask"] = pad(mask, (0, -mask.shape[1] % _WORD))
        tensors["starts"] = pad(counts.cumsum(0), (1, 0))
    if stored.kind == "integers":
        tensors["integers"] = pad(parts["weight_integers"], (0, _PAD))
        tensors["scale"] = parts["weight_scale"]
    else:
        tensors["values"] = pad(values_of(stored, parts), (0, _PAD))
    if not stored.symmetric:
        words = parts["weight_zero_point"].T
        tensors["zero"] = integers_of_words(words, stored.bits, stored.shape[0]).T
    if stored.kind == "planes":
        stored = replace(stored, kind="values", exponents=0)
    return Layout(stored, {part: tensors[part].contiguous() for part in tensors_of(stored)})


def dense(layout: Layout, dtype: torch.dtype | None = None) -> Tensor:
    """The weight ``[out, in]`` again, to the bits that decoding the file gives.

    :param dtype: what to convert to at the end; by default it is ``layout.spec.dtype``
    """
    return decode(layout.spec, _filed(layout), dtype)


def parts_of(layout: Layout, smallest: bool = True) -> tuple[Stored, dict[str, Tensor]]:
    """What a packed file holds of the Linear: :func:`layout_of` turned back.

    :param smallest: whether what can be planes is, as :func:`~.sparse_format.encode` has it;
        otherwise parts are the layout's own memory, but for zero points
    """
    stored, parts = layout.spec, _filed(layout)
    if smallest and stored.kind == "values" and stored.dtype == torch.bfloat16:
        planes = planes_of(parts["weight_values"].view(torch.int16))
        if planes:
            del parts["weight_values"]
            table = len(planes["weight_table"])
            return replace(stored, kind="planes", exponents=table), parts | planes
    return stored, parts


def rows(layout: Layout, first: int, last: int) -> Layout:
    """Rows of a weight: ``weight[first:last]``.

    :raises ValueError: if there are no such rows
    """
    return _cut(layout, 0, first, last)


def columns(layout: Layout, first: int, last: int) -> Layout:
    """Columns of a weight, packed anew: ``weight[:, first:last]``.

    Columns may begin or end inside a group of integers: groups become as small as that needs.

    :raises ValueError: if there are no such columns
    """
    return _cut(layout, 1, first, last)


def joined(layouts: Sequence[Layout]) -> Layout:
    """Weights one below the other, such as q, k and v: ``torch.cat(weights)``.

    :raises ValueError: if there is none, or they differ in columns, in dtype, or in bits
    """
    alike = {(one.spec.shape[1], one.spec.dtype, one.spec.bits) for one in layouts}
    if len(alike) != 1:
        said = ", ".join(
            f"{list(one.spec.shape)} {one.spec.dtype}"
            + (f" of {one.spec.bits} bits" if one.spec.bits else "")
            for one in layouts
        )
        raise ValueError(
            f"weights that are joined have the same columns, dtype and bits, not {said or 'none'}"
        )
    return layout_of(*joined_parts([(one.spec, _filed(one)) for one in layouts]))


def _cut(layout: Layout, dim: int, first: int, last: int) -> Layout:
    size = layout.spec.shape[dim]
    if not 0 <= first <= last <= size:
        what = ("rows", "columns")[dim]
        raise ValueError(f"there are no {what} {first} to {last}: the weight has {size}")
    return layout_of(*narrow(layout.spec, _filed(layout), dim, first, last - first))


def _filed(layout: Layout) -> dict[str, Tensor]:
    """The parts of the file, of one whose kind is that of the layout; most of them are views."""
    spec, tensors = layout.spec, layout.tensors
    parts: dict[str, Tensor] = {}
    for part, shape in spec.part_shapes().items():
        if part == "weight_packed":
            parts[part] = tensors["mask"][:, : shape[1]]
        elif part == "weight_zero_point":
            parts[part] = words_of_integers(tensors["zero"].T.contiguous(), spec.bits).T
        else:
            tensor = tensors[part.removeprefix("weight_")]
            parts[part] = tensor if tensor.dim() == 2 else tensor[: shape[0]]
    return parts
