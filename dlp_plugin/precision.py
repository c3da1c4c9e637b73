"""Float32 on processors that have no arithmetic in a model's own dtype.

Without such instructions torch computes bfloat16 and float16 products in a loop that is many
times slower than float32. So what is loaded here to compute with is float32 there, and is
given the checkpoint's dtypes again before it is saved; and a model that somebody else has
loaded computes in float32 without being changed. float32 is exact for such weights, as every
bfloat16 and float16 number is a float32 number; only products are no longer rounded.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

__all__ = ["Stored", "is_native", "narrow", "wide_enough", "widen", "widest"]

_INSTRUCTIONS = {
    torch.bfloat16: ("avx512_bf16", "amx_bf16", "avx_ne_convert"),
    torch.float16: ("avx512_fp16", "amx_fp16"),
}
# Operations that may mix dtypes, or are about one.
_KEEPING = {"__get__", "__set__", "__getitem__", "__setitem__", "to", "type", "type_as"}


@dataclass(frozen=True)
class Stored:
    """The dtypes that a model's checkpoint has.

    :param dtype: of the weights that were widened; float32 if none was
    :param dtypes: full name of every tensor that was widened to its dtype
    :param wide: names of the tensors that were not
    """

    dtype: torch.dtype
    dtypes: Mapping[str, torch.dtype]
    wide: frozenset[str]


def is_native(dtype: torch.dtype, device: torch.device | str = "cpu") -> bool:
    """Whether a device has instructions for the products of a dtype.

    Accelerators are taken to have them. Of a CPU torch's own kernel library is asked, and on
    x86-64 the processor too, as the library imitates bfloat16 on those that have AVX-512 only.

    :param dtype: of the products
    :param device: that computes them
    """
    if torch.device(device).type != "cpu" or dtype not in _INSTRUCTIONS:
        return True
    if not torch.backends.mkldnn.is_available():
        return False
    short = {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    if not getattr(torch.ops.mkldnn, f"_is_mkldnn_{short}_supported")():
        return False
    has = torch.cpu.get_capabilities()
    return platform.machine() != "x86_64" or any(has.get(name) for name in _INSTRUCTIONS[dtype])


def widest(device: torch.device | str) -> torch.dtype:
    """The dtype to sum in: float64, which Apple's MPS does not have.

    :param device: that sums
    """
    return torch.float32 if str(device).startswith("mps") else torch.float64


def widen(model: torch.nn.Module, device: torch.device | str = "cpu") -> Stored:
    """Make float32 what a device has no arithmetic for.

    :param model: with all its weights in memory; changed in place
    :param device: where it will compute
    :return: what :func:`narrow` needs to undo it
    """
    dtypes: dict[str, torch.dtype] = {}
    for name, tensor in _tensors(model):
        if not is_native(tensor.dtype, device):
            dtypes[name] = tensor.dtype
            tensor.data = tensor.data.float()
    wide = frozenset(name for name, _ in _tensors(model) if name not in dtypes)
    return Stored(next(iter(dtypes.values()), torch.float32), dtypes, wide)


def narrow(model: torch.nn.Module, stored: Stored) -> None:
    """Give a model the dtypes that its checkpoint has, for saving.

    What has come since, such as scales of quantized weights, gets the dtype of the weights
    that were widened.

    :param model: on no device but a CPU, and not offloaded
    :param stored: as :func:`widen` returns it
    """
    for name, tensor in _tensors(model):
        if tensor.dtype == torch.float32 and name not in stored.wide:
            tensor.data = tensor.data.to(stored.dtypes.get(name, stored.dtype))


def _tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


@contextmanager
def wide_enough(model: torch.nn.Module, device: torch.device | str) -> Iterator[None]:
    """Have a model compute in float32 where its own dtype has no arithmetic; it stays as it is.

    Weights are widened one by one as they are used.

    :param model: to compute with
    :param device: where it computes
    """
    from compressed_tensors.offload import disable_onloading  # engines import this without it

    with disable_onloading():  # which would fetch the weight, here the largest one
        dtype = next(model.parameters()).dtype
    if is_native(dtype, device):
        yield
        return
    with _Float32():
        yield


class _Float32(TorchFunctionMode):
    """Embeddings come out in float32, and what meets float32 becomes float32."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in _KEEPING or (name.endswith("_") and not name.endswith("__")):
            return func(*args, **kwargs)
        given = [*args, *kwargs.values()]
        if any(isinstance(one, torch.Tensor) and one.dtype == torch.float32 for one in given):
            args = [_wide(one) for one in args]
            kwargs = {key: _wide(one) for key, one in kwargs.items()}
        found = func(*args, **kwargs)
        return _wide(found) if name == "embedding" else found


def _wide(value: Any) -> Any:
    narrow = isinstance(value, torch.Tensor) and value.dtype in _INSTRUCTIONS
    return value.float() if narrow else value
