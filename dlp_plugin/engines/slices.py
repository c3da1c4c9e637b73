"""A stored Linear in the place of the decoded weight, of which loaders take their slice.

Tensor-parallel engines give every process a slice of a weight; decoding all of it in each would
cost as many times what it has to. Where kernels run the slice is not decoded at all. This module
needs torch alone.
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
"""What a tensor tells without its values."""


class LazyWeight(Tensor):
    """A stored weight in the place of the decoded one: decoded when its values are asked for.

    Narrowing it gives another such weight, so that a loader which narrows before it copies
    decodes its slice alone. What it tells without its values is true but for its device.
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
        """A weight that is not decoded yet.

        :param parts: local names to tensors, as :func:`~.sparse_format.decode` takes them
        :param dtype: what to decode to
        :param name: the Linear's full name, for errors
        :param taken: where what is copied to whole rows goes, by the first of them, in place of
            being decoded into them; without it everything is decoded
        """
        self = torch.empty(stored.shape, dtype=dtype, device="meta").as_subclass(LazyWeight)
        self._stored, self._parts, self._name, self._taken = stored, parts, name, taken
        return self

    def decoded(self) -> Tensor:
        """The weight ``[out, in]``.

        :raises ValueError: as :func:`~.sparse_format.decode` does
        """
        return decode(self._stored, self._parts, self.dtype, self._name)

    def as_layout(self) -> Layout:
        """What kernels run.

        :raises ValueError: as :func:`~.layout.layout_of` does
        """
        return layout_of(self._stored, self._parts, self._name)

    def narrow(self, dim: int, start: int, length: int) -> LazyWeight:  # type: ignore[override]
        """Rows or columns, not decoded yet."""
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
        """Run a function of torch on the decoded weight."""
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
