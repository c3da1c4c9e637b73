"""A Linear of transformers that keeps its weight as it is packed, and multiplies by it.

What it holds are the tensors of an execution layout (:mod:`dlp_plugin.kernels.layout`), floats
among them by their bits, as integers: whoever converts a model to another dtype converts
activations and what is dense, and leaves these alone. Its state are the parts of a packed
checkpoint, floats as ``values``; they are looked at again when a state is loaded.
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
"""What is multiplied, and what stored weights may be of."""
REMEDY = "load the model with quantization_config=dlp_plugin.SparseConfig(dequantize=True)"
"""What to do where a dense weight is wanted."""
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
"""What a tensor tells without its values."""
_BITS = {2: torch.int16, 4: torch.int32}  # by bytes of a float


class PackedWeight(Tensor):
    """What stands for the weight: its shape, dtype and device, and an error for its values.

    peft and models ask a Linear's weight for these.
    """

    _name: str
    _is_hf_initialized: bool

    @staticmethod
    def of(spec: Stored, name: str) -> PackedWeight:
        """A weight whose values are asked for in vain.

        :param name: the Linear's full name, for the error
        """
        self = (
            torch.zeros((), dtype=spec.dtype, device="cpu")
            .expand(spec.shape)
            .as_subclass(PackedWeight)
        )
        self._name = name
        self._is_hf_initialized = True  # transformers would draw random values
        return self

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if func in _TOLD:
            return super().__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]
        names = [one._name for one in args if isinstance(one, PackedWeight)]
        raise ValueError(
            f"{names[0] if names else 'a Linear'} is multiplied as it is packed: to read, train "
            f"or prune its weight, {REMEDY}"
        )


class SparseLinear(torch.nn.Linear):
    """``x W^T + bias`` with W as it is packed; W is frozen.

    :param layout: of W
    :param bias: the Linear's own, which trains as ever
    :param name: full name in the model, for errors
    """

    def __init__(self, layout: Layout, bias: torch.nn.Parameter | None, name: str) -> None:
        torch.nn.Module.__init__(self)  # the Linear's own would make a dense weight
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
        """Have the layout made of the buffers, and what it says: compiled code only reads it."""
        expected = tensors_of(self.spec)
        held = {name: getattr(self, name).view(dtype) for name, (_, dtype) in expected.items()}
        self.layout = Layout(self.spec, held)
        _ = self.layout.said

    @property
    def weight(self) -> PackedWeight:  # type: ignore[override]
        """What stands for W, without its values."""
        return PackedWeight.of(self.spec, self.name)

    def decoded(self) -> Tensor:
        """The dense weight ``[out, in]``, a copy."""
        return dense(self.layout)

    def forward(self, input: Tensor) -> Tensor:
        """The product, summed in float32, in the dtype of the input."""
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
                f"{self.name} is multiplied as it is packed, on the CPU only, and cannot move to "
                f"{device}, where modules before it may be now: load the model again to run it on "
                f"the CPU; to run it elsewhere, {REMEDY}"
            )
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._lay_out()
        return self


def _add_parts(module: Any, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    """Put what a packed file may hold into a state, in place of the layout's tensors."""
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
    """Take it out of one, and leave the layout's tensors there."""
    given = {part: state.pop(f"{prefix}{part}") for part in PARTS if f"{prefix}{part}" in state}
    if not given:
        missing.extend(f"{prefix}{part}" for part in module.spec.part_shapes())
    try:
        if given:
            module._hold(layout_of(module.spec, given, prefix.removesuffix(".")))
    except ValueError as error:
        errors.append(str(error))
    state.update((f"{prefix}{held}", tensor) for held, tensor in module.named_buffers())
