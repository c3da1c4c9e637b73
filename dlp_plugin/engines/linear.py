"""A Linear for transformers whose weight stays packed, and is multiplied without decoding it all.

Its buffers are the tensors of an execution layout (:mod:`dlp_plugin.kernels.layout`). Floats among
them are held as integers with the same bits, so that ``model.to(dtype)`` does not convert them.
Its state dict holds the parts of a packed checkpoint instead, with floats as kind ``values``.
Loading a state dict checks these parts again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dlp_plugin.checkpoints.stored import PARTS, Stored
from dlp_plugin.kernels.layout import Layout, dense, layout_of, parts_of, tensors_of
from dlp_plugin.kernels.products import linear

__all__ = ["DTYPES", "REMEDY", "PackedWeight", "SparseLinear"]

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""The dtypes of inputs and of stored weights that can be multiplied."""
REMEDY = "load the model with quantization_config=dlp_plugin.SparseConfig(dequantize=True)"
"""What errors advise if a dense weight is needed."""
_TOLD = {
    Tensor.dim,
    Tensor.is_floating_point,
    Tensor.numel,
    Tensor.size,
    *(
        getattr(Tensor, name).__get__
        for name in ("device", "dtype", "ndim", "requires_grad", "shape")
    ),
}
"""Functions of a tensor that do not need its values."""
_BITS = {2: torch.int16, 4: torch.int32}  # bytes of a float to integer dtype


class PackedWeight(Tensor):
    """Stand-in for a packed weight: has shape, dtype and device, but raises if its values are used.

    peft and models read these attributes from a Linear's weight.
    """

    _name: str
    _is_hf_initialized: bool

    @staticmethod
    def of(spec: Stored, name: str) -> PackedWeight:
        """Make the stand-in for a packed weight.

        :param spec: how the weight is stored
        :param name: the Linear's full name, for the error
        :return: the stand-in
        """
        self = (
            torch.zeros((), dtype=spec.dtype, device="cpu")
            .expand(spec.shape)
            .as_subclass(PackedWeight)
        )
        self._name = name
        self._is_hf_initialized = True  # otherwise transformers would initialize it
        return self

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if func in _TOLD:
            return super().__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]
        names = [one._name for one in args if isinstance(one, PackedWeight)]
        raise ValueError(
            f"{names[0] if names else 'a Linear'} is packed: to read, train or prune its weight, "
            f"{REMEDY}"
        )


class SparseLinear(torch.nn.Linear):
    """Computes ``x W^T + bias`` with a packed and frozen W.

    :param layout: execution layout of W
    :param bias: of the Linear that this one replaces; it can be trained
    :param name: full name in the model, for errors
    """

    def __init__(self, layout: Layout, bias: torch.nn.Parameter | None, name: str) -> None:
        torch.nn.Module.__init__(self)  # Linear.__init__ would allocate a dense weight
        self.name = name
        self.register_parameter("bias", bias)
        self._hold(layout)
        self.register_state_dict_post_hook(_add_parts)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_take_parts)  # type: ignore[no-untyped-call]

    def _hold(self, layout: Layout) -> None:
        for held in [name for name, _ in self.named_buffers()]:
            delattr(self, held)
        self.spec = layout.spec
        self.out_features, self.in_features = layout.spec.shape
        for held, tensor in layout.tensors.items():
            bits = tensor.view(_BITS[tensor.itemsize]) if tensor.is_floating_point() else tensor
            self.register_buffer(held, bits)
        self._lay_out()

    def _lay_out(self) -> None:
        """Make the layout from the buffers, and ``said`` in advance, for compiled code."""
        expected = tensors_of(self.spec)
        held = {name: getattr(self, name).view(dtype) for name, (_, dtype) in expected.items()}
        self.layout = Layout(self.spec, held)
        _ = self.layout.said

    @property
    def weight(self) -> PackedWeight:  # type: ignore[override]
        """A stand-in for W without values."""
        return PackedWeight.of(self.spec, self.name)

    def decoded(self) -> Tensor:
        """Return the dense weight ``[out, in]``, a copy."""
        return dense(self.layout)

    def forward(self, input: Tensor) -> Tensor:
        """Compute the product, summed in float32.

        :param input: ``[..., in]``
        :return: ``[..., out]`` in the dtype of the input
        """
        return linear(input, self.layout, self.bias)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "layout"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._lay_out()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        device = fn(torch.empty(0)).device
        if device.type != "cpu":
            raise ValueError(
                f"{self.name} is packed, runs on the CPU only and cannot move to {device}; modules "
                f"before it may have moved already: load the model again to run it on the CPU; to "
                f"run it elsewhere, {REMEDY}"
            )
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._lay_out()
        return self


def _add_parts(module: Any, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    """Replace the layout's tensors in a state dict by the parts of a packed checkpoint."""
    for held, _ in module.named_buffers():
        del state[f"{prefix}{held}"]
    parts = parts_of(module.layout, smallest=False)[1]
    state.update((f"{prefix}{part}", tensor) for part, tensor in parts.items())


def _take_parts(
    module: Any,
    state: dict[str, Any],
    prefix: str,
    _metadata: Any,
    _strict: bool,
    missing: list[str],
    _unexpected: list[str],
    errors: list[str],
) -> None:
    """Load the parts of a packed checkpoint from a state dict, and replace them by the layout's."""
    given = {part: state.pop(f"{prefix}{part}") for part in PARTS if f"{prefix}{part}" in state}
    if not given:
        missing.extend(f"{prefix}{part}" for part in module.spec.part_shapes())
    try:
        if given:
            module._hold(layout_of(module.spec, given, prefix.removesuffix(".")))
    except ValueError as error:
        errors.append(str(error))
    state.update((f"{prefix}{held}", tensor) for held, tensor in module.named_buffers())
