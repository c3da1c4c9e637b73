"""The execution layout: a packed Linear in the form that the kernels read.

A :class:`Layout` consists of tensors and a description of them. So an engine can keep the tensors
as buffers of a module, and make the layout from them again. The tensors are those of the file
(:mod:`dlp_plugin.checkpoints.sparse_format`) with these changes:

- ``mask`` uint8 ``[out, bytes]``: rows are padded to whole words of 64 bits;
- ``starts`` int64 ``[out + 1]``: index of each row's first kept weight, and the number of all
  kept weights at the end;
- ``values`` or ``integers``: padded by 64 entries, because the kernels load whole vectors;
- ``scale`` and, for integers that are not symmetric, ``zero`` uint8 ``[out, groups]``.

Kind ``planes`` is converted to ``values``, because planes need more instructions. At 70 % sparsity
this takes 0.36 of bfloat16's bytes instead of 0.29, but a product takes 0.75 of the time: 0.96
instead of 1.27 ms with one thread, 0.57 instead of 0.76 ms with two (4096 x 4096, larger than the
caches, one row of inputs, AVX-512 on a 2-core EPYC Zen 4).

Only :func:`dense` makes the whole dense weight. This module imports nothing but torch.
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

_PAD = 64  # entries that the widest vector load may read past the end
_WORD = 8  # bytes


@dataclass(frozen=True, eq=False)
class Layout:
    """A Linear's weight ``[out, in]`` in the form that the kernels read.

    Make it with the functions of this module: they check every value that kernels use as an index.

    :param spec: how the weight is stored; hashable, and JSON by ``spec.to_config()``
    :param tensors: local names to contiguous tensors, of the shapes that :func:`tensors_of` returns
    """

    spec: Stored
    tensors: Mapping[str, Tensor]

    @cached_property
    def said(self) -> str:
        """The ``spec`` as JSON, because torch operators take tensors and strings only."""
        return dumps(self.spec.to_config())


def tensors_of(spec: Stored) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Return the shapes and dtypes of a layout's tensors.

    :param spec: how the weight is stored, not as ``planes``
    :return: local name of every tensor to its shape and dtype
    """
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
    """Make the layout of a packed Linear.

    Every part is checked first, so that no file can make a kernel read outside its tensors.

    :param stored: as :meth:`Stored.from_config` returns it
    :param parts: local names to tensors, as the file has them
    :param name: the Linear's full name, for errors
    :return: the layout
    :raises ValueError: as :func:`dlp_plugin.checkpoints.sparse_format.decode` does
    """
    checked(stored, parts, name)
    tensors: dict[str, Tensor] = {}
    if stored.masked:
        mask = parts["weight_packed"]
        counts = ones(mask)
        if int(counts.sum()) != stored.kept:
            said = f"marks {int(counts.sum())} weights, but {stored.kept} are stored"
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
    """Decode a layout to the same bits as decoding the file.

    :param layout: of the weight
    :param dtype: of the result; ``layout.spec.dtype`` by default
    :return: ``[out, in]``
    """
    return decode(layout.spec, _filed(layout), dtype)


def parts_of(layout: Layout, smallest: bool = True) -> tuple[Stored, dict[str, Tensor]]:
    """Convert a layout back to the parts of a packed file; the inverse of :func:`layout_of`.

    :param layout: of the weight
    :param smallest: whether to use kind ``planes`` if possible, as :func:`~.sparse_format.encode`
        does. Otherwise the parts share the layout's memory, except for zero points
    :return: how the Linear is stored, and its parts by local names
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
    """Take rows out of a weight, as ``weight[first:last]`` does.

    :param layout: of the weight
    :param first: index of the first row
    :param last: index after the last row
    :return: layout of the rows
    :raises ValueError: if the weight does not have these rows
    """
    return _cut(layout, 0, first, last)


def columns(layout: Layout, first: int, last: int) -> Layout:
    """Take columns out of a weight, as ``weight[:, first:last]`` does.

    If the columns begin or end inside a group of integers, groups are split into smaller ones.

    :param layout: of the weight
    :param first: index of the first column
    :param last: index after the last column
    :return: layout of the columns
    :raises ValueError: if the weight does not have these columns
    """
    return _cut(layout, 1, first, last)


def joined(layouts: Sequence[Layout]) -> Layout:
    """Concatenate weights by rows, as ``torch.cat(weights)`` does, for instance q, k and v.

    :param layouts: of the weights, at least one
    :return: layout of the result
    :raises ValueError: if there are none, or they differ in number of columns, dtype or bits
    """
    alike = {(one.spec.shape[1], one.spec.dtype, one.spec.bits) for one in layouts}
    if len(alike) != 1:
        said = ", ".join(
            f"{list(one.spec.shape)} {one.spec.dtype}"
            + (f" of {one.spec.bits} bits" if one.spec.bits else "")
            for one in layouts
        )
        raise ValueError(
            "weights can be joined only if they have the same number of columns, dtype and bits; "
            f"got {said or 'none'}"
        )
    return layout_of(*joined_parts([(one.spec, _filed(one)) for one in layouts]))


def _cut(layout: Layout, dim: int, first: int, last: int) -> Layout:
    size = layout.spec.shape[dim]
    if not 0 <= first <= last <= size:
        what = ("rows", "columns")[dim]
        raise ValueError(f"there are no {what} {first} to {last}: the weight has {size}")
    return layout_of(*narrow(layout.spec, _filed(layout), dim, first, last - first))


def _filed(layout: Layout) -> dict[str, Tensor]:
    """Return the parts of a packed file of the layout's own kind; most of them are views."""
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
