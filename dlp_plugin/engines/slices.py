"""A packed weight that weight loaders can slice before it is decoded.

Tensor-parallel engines give every process a slice of each weight. Without this module every
process would decode the whole weight. If kernels run, the slice is not decoded at all. This module
imports nothing but torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dlp_plugin.checkpoints.slices import narrow
from dlp_plugin.checkpoints.sparse_format import Stored, decode
from dlp_plugin.kernels.layout import Layout, layout_of

__all__ = ["LazyWeight"]


_METADATA = {
    Tensor.dim,
    Tensor.numel,
    Tensor.size,
    *(getattr(Tensor, name).__get__ for name in ("dtype", "ndim", "shape")),
}
"""Functions of a tensor that do not need its values."""


class LazyWeight(Tensor):
    """A packed weight that acts as the dense one, and is decoded when its values are used.

    ``narrow`` returns a packed slice. So a loader that narrows before it copies decodes its slice
    only. Shape and dtype are those of the decoded weight; the device is ``meta``.
    """

    _stored: Stored
    _parts: Mapping[str, Tensor]
    _name: str
    _taken: dict[int, LazyWeight] | None

    @staticmethod
    def of(
        stored: Stored,
        parts: Mapping[str, Tensor],
        dtype: torch.dtype,
        name: str,
        taken: dict[int, LazyWeight] | None = None,
    ) -> LazyWeight:
        """Make a packed weight.

        :param stored: how the weight is stored
        :param parts: local names to tensors, as :func:`~.sparse_format.decode` takes them
        :param dtype: of the decoded weight
        :param name: the Linear's full name, for errors
        :param taken: if given, copying this weight into whole rows of another does not decode it,
            but puts it into this mapping under the index of the first row
        :return: the weight
        """
        self = torch.empty(stored.shape, dtype=dtype, device="meta").as_subclass(LazyWeight)
        self._stored, self._parts, self._name, self._taken = stored, parts, name, taken
        return self

    def decoded(self) -> Tensor:
        """Decode the weight.

        :return: ``[out, in]``
        :raises ValueError: as :func:`~.sparse_format.decode` does
        """
        return decode(self._stored, self._parts, self.dtype, self._name)

    def as_layout(self) -> Layout:
        """Make the execution layout that the kernels multiply by.

        :return: the layout
        :raises ValueError: as :func:`~.layout.layout_of` does
        """
        return layout_of(self._stored, self._parts, self._name)

    def narrow(self, dim: int, start: int, length: int) -> LazyWeight:  # type: ignore[override]
        """Take rows or columns out without decoding them.

        :param dim: 0 for rows, 1 for columns
        :param start: index of the first row or column
        :param length: number of rows or columns
        :return: the packed slice
        """
        if length == self.shape[dim]:
            return self
        stored, parts = narrow(self._stored, self._parts, dim, start, length, self._name)
        return LazyWeight.of(stored, parts, self.dtype, self._name, self._taken)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run a torch function on the decoded weight, except for metadata and noted copies."""
        kwargs = kwargs or {}
        if func in _METADATA:
            return super().__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]
        if func is Tensor.copy_:
            rows, lazy = args[:2]
            taken = lazy._taken if isinstance(lazy, LazyWeight) else None
            if taken is not None and rows.stride(0) == lazy.shape[1]:  # whole rows
                taken[rows.storage_offset() // rows.stride(0)] = lazy
                return rows
        return func(*_decoded(list(args)), **{key: _decoded(kwargs[key]) for key in kwargs})


def _decoded(value: Any) -> Any:
    if isinstance(value, LazyWeight):
        return value.decoded()
    return type(value)(map(_decoded, value)) if isinstance(value, (list, tuple)) else value
