"""Packed weights of every kind, and the products that they should have."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from dlp_plugin.checkpoints.bits import mask_of, words_of_integers
from dlp_plugin.checkpoints.sparse_format import Stored, decode, encode, encode_integers

Packed = tuple[Stored, dict[str, torch.Tensor]]
FLOATS = [torch.bfloat16, torch.float16, torch.float32]
BITS = {2: torch.int16, 4: torch.int32}
KINDS = ["planes", *FLOATS, "4", "4 asymmetric", "4 unmasked", "8", "8 asymmetric", "8 unmasked"]
PATTERNS = ["pruned", "none stored", "all stored", "empty rows"]


def packed(
    kind: str | torch.dtype,
    shape: tuple[int, int],
    pattern: str = "pruned",
    group_size: int = -1,
    dtype: torch.dtype = torch.bfloat16,
) -> Packed:
    """A Linear of a kind, with seven in ten weights pruned or another pattern."""
    generator = torch.Generator().manual_seed(0)
    present = torch.rand(shape, generator=generator) > {"none stored": 1, "all stored": -1}.get(
        pattern, 0.7
    )
    if pattern == "empty rows":
        present[::2] = False
    weight = torch.randn(shape, generator=generator)
    weight = weight.sign() * weight.abs().clamp(0.01, 4)  # no more than 16 exponents
    if kind == "planes":
        found = encode((weight * present).bfloat16())
        assert found is not None
        return found
    if isinstance(kind, torch.dtype):
        weight = (weight * present).to(kind)
        stored = weight.view(BITS[kind.itemsize]) != 0
        parts = {"weight_packed": mask_of(stored), "weight_values": weight[stored]}
        return Stored("values", shape, kind, int(stored.sum())), parts
    bits = int(kind[0])
    rows, columns = shape
    groups = 1 if group_size == -1 else columns // group_size
    integers = torch.randint(1 << bits, shape, dtype=torch.uint8, generator=generator)
    zero = torch.full((rows, groups), 1 << (bits - 1), dtype=torch.uint8)
    if "asymmetric" in kind:
        zero = torch.randint(1 << bits, zero.shape, dtype=torch.uint8, generator=generator)
    if "unmasked" not in kind:
        each = zero.repeat_interleave(columns // max(1, groups), 1)
        integers = torch.where(present, integers, each)
    scale = torch.rand((rows, groups), generator=generator).to(dtype) * 0.1
    words = words_of_integers(zero.T.contiguous(), bits).T if "asymmetric" in kind else None
    return encode_integers(integers, scale, words, bits=bits, group_size=group_size)


def every(shapes: list[tuple[int, int]]) -> Iterator[Packed]:
    """Kinds, patterns, shapes; groups of four and of all columns, scales of each dtype."""
    for shape in shapes:
        for kind in KINDS:
            for pattern in PATTERNS:
                if kind == "planes" and pattern == "all stored":
                    continue  # small ones would not shrink
                if isinstance(kind, str) and kind != "planes":
                    for size in (-1, 4) if shape[1] % 4 == 0 else (-1,):
                        for dtype in FLOATS:
                            yield packed(kind, shape, pattern, size, dtype)
                else:
                    yield packed(kind, shape, pattern)


def assert_product(
    found: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> None:
    """A product is right to the last bits of float32 sums, and to a rounding to its dtype."""
    x, weight = x.double(), weight.double()
    expected, size = x @ weight.T, x.abs() @ weight.abs().T
    if bias is not None:
        expected, size = expected + bias.double(), size + bias.double().abs()
    allowed = 1e-6 * size + torch.finfo(found.dtype).eps / 2 * expected.abs()
    error = (found.double() - expected).abs()
    assert (error <= allowed + torch.finfo(found.dtype).tiny).all(), (error / allowed).max()


def weight_of(linear: Packed) -> torch.Tensor:
    """The dense weight in float64, by the format's own decoder."""
    return decode(*linear).double()
