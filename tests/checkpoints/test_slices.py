"""Slices of what is stored, which loaders take, and the products of rows of several kinds."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from dlp_plugin.checkpoints.slices import narrow
from dlp_plugin.checkpoints.sparse_format import Stored, decode, encode, encode_integers
from dlp_plugin.engines.rows import pieces_of, product_of
from dlp_plugin.engines.slices import LazyWeight
from dlp_plugin.kernels.layout import Layout, dense

Packed = tuple[Stored, dict[str, torch.Tensor]]


@st.composite
def packed(draw: st.DrawFn) -> Packed:
    """A Linear of any kind, with columns that no byte and no slice of groups divides."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**30)))
    kind = draw(st.sampled_from(["planes", "values", 4, 8]))
    rows, columns = draw(st.integers(1, 20)), draw(st.integers(1, 40))
    living = torch.rand(rows, columns, generator=generator) < draw(st.sampled_from([0, 0.3, 0.6]))
    weight = torch.randn(rows, columns, generator=generator) * living
    if kind == "planes":
        weight = (weight.sign() * (weight.abs() + 0.01) * living).bfloat16()
    if isinstance(kind, str):
        found = encode(weight)
        return found or draw(packed())
    size = draw(st.sampled_from([-1, *(n for n in range(1, columns + 1) if columns % n == 0)]))
    groups = 1 if size == -1 else columns // size
    scale = torch.rand(rows, groups, generator=generator).bfloat16()
    words = None
    if draw(st.booleans()):
        shape = (-(-rows * kind // 32), groups)
        words = torch.randint(-(2**31), 2**31, shape, generator=generator, dtype=torch.int32)
    middle = 1 << (kind - 1)
    integers = torch.randint(2**kind, (rows, columns), generator=generator, dtype=torch.uint8)
    integers = torch.where(living, integers, middle).to(torch.uint8)
    return encode_integers(integers, scale, words, bits=kind, group_size=size)


@given(data=st.data(), linear=packed(), dim=st.sampled_from([0, 1]))
def test_a_slice_of_what_is_stored_is_the_slice_that_is_stored(
    data: st.DataObject, linear: Packed, dim: int
) -> None:
    stored, parts = linear
    start = data.draw(st.integers(0, stored.shape[dim] - 1))
    length = data.draw(st.integers(1, stored.shape[dim] - start))
    sliced, slices = narrow(stored, parts, dim, start, length)
    assert torch.equal(decode(sliced, slices), decode(stored, parts).narrow(dim, start, length))
    assert {name: tuple(part.shape) for name, part in slices.items()} == sliced.part_shapes()


def example() -> Packed:
    weight = torch.tensor([[0, 1.5, 0, 0, -2], [3, 0, 0, 0, 0], [0, 0, 0, 1, 0]])
    found = encode(weight.bfloat16())
    assert found is not None
    return found


def test_a_slice_by_hand() -> None:
    """The last two columns of a weight of three rows; 1.0 is 0x3f80, -2.0 is 0xc000."""
    stored, parts = narrow(*example(), dim=1, start=3, length=2)
    assert (stored.shape, stored.kept) == ((3, 2), 2)
    assert parts["weight_packed"].tolist() == [[0b10], [0], [0b01]]
    assert parts["weight_fractions"].tolist() == [0x80, 0]
    table = parts["weight_table"].tolist()
    low, high = parts["weight_exponents"].item() & 15, parts["weight_exponents"].item() >> 4
    assert [table[low], table[high]] == [128, 127]


def test_a_damaged_linear_gives_no_slice() -> None:
    stored, parts = example()
    short = {**parts, "weight_fractions": parts["weight_fractions"][:-1]}
    with pytest.raises(ValueError, match=r"^a\.weight_fractions is torch\.uint8 \[3\] instead of"):
        narrow(stored, short, 1, 0, 2, "a")
    with pytest.raises(ValueError, match=r"^a\.weight_table is missing"):
        narrow(stored, {k: v for k, v in parts.items() if k != "weight_table"}, 0, 0, 1, "a")
    parts["weight_packed"][0, 0] ^= 1
    with pytest.raises(ValueError, match=r"^a\.weight_packed marks \d+ weights, but"):
        narrow(stored, parts, 0, 0, 1, "a")


class TestLazyWeight:
    """What vLLM's loaders are given: they narrow it and copy it."""

    def lazy(self, dtype: torch.dtype = torch.bfloat16) -> tuple[LazyWeight, torch.Tensor]:
        stored, parts = example()
        return LazyWeight.of(stored, parts, dtype, "a"), decode(stored, parts, dtype)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    def test_it_is_decoded_where_it_is_copied(self, dtype: torch.dtype) -> None:
        lazy, weight = self.lazy(dtype)
        parameter = torch.nn.Parameter(torch.empty(2, 3, dtype=dtype), requires_grad=False)
        parameter.data.copy_(lazy.narrow(0, 1, 2).narrow(1, 0, 3))
        assert torch.equal(parameter, weight[1:, :3])

    def test_it_tells_its_shape_and_dtype_undecoded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        lazy, weight = self.lazy()
        monkeypatch.setattr(LazyWeight, "decoded", None)
        assert lazy.narrow(0, 0, 3) is lazy  # all of it, as one process asks for
        assert lazy.shape == lazy.size() == weight.shape
        assert (lazy.dim(), lazy.ndim, lazy.numel(), lazy.dtype) == (2, 2, 15, torch.bfloat16)

    def test_whatever_else_is_done_to_it_is_done_to_the_weight(self) -> None:
        lazy, weight = self.lazy()
        assert torch.equal(lazy[1:, 2], weight[1:, 2])
        assert torch.equal(torch.cat([lazy, lazy]), torch.cat([weight, weight]))
        assert torch.equal(lazy.view(-1), weight.view(-1))
        assert type(lazy.t()) is torch.Tensor

    def test_whole_rows_are_taken_as_they_are_stored(self) -> None:
        stored, parts = example()
        taken: dict[int, LazyWeight] = {}
        lazy = LazyWeight.of(stored, parts, torch.bfloat16, "a", taken)
        weight = torch.full((5, 3), torch.inf).bfloat16()
        weight.narrow(0, 2, 2).copy_(lazy.narrow(0, 1, 2).narrow(1, 0, 3))  # rows and columns
        weight[:, :2].narrow(0, 0, 2).copy_(lazy.narrow(0, 0, 2).narrow(1, 3, 2))  # not whole
        assert torch.equal(weight[:2, :2], decode(stored, parts)[:2, 3:])
        assert weight[2:4].isinf().all()
        assert taken.keys() == {2}
        assert torch.equal(dense(taken[2].as_layout()), decode(stored, parts)[1:, :3])


@settings(deadline=None)  # the first builds the kernels
@given(linears=st.lists(st.none() | packed(), min_size=1, max_size=4), data=st.data())
def test_rows_of_every_kind_are_multiplied_side_by_side(
    linears: list[Packed | None], data: st.DataObject
) -> None:
    """None is a dense one; all have the columns of the first."""
    columns = min([one[0].shape[1] for one in linears if one] or [7])
    weights, taken, first = [], {}, 0
    for linear in linears:
        if linear is None:
            weights.append(torch.randn(3, columns))
        else:
            lazy = LazyWeight.of(*linear, torch.float32, "a").narrow(1, 0, columns)
            weights.append(lazy.decoded())
            taken[first] = lazy
        first += len(weights[-1])
    weight = torch.cat(weights)
    held = weight.clone()
    for place, lazy in taken.items():
        held[place : place + lazy.shape[0]] = torch.nan  # never read
    pieces = pieces_of(held, taken)
    alike = [(one.spec.dtype, one.spec.bits) if isinstance(one, Layout) else None for one in pieces]
    assert all(one != other for one, other in itertools.pairwise(alike))

    product = product_of(pieces, lambda rows: lambda x, bias: functional.linear(x, rows, bias))
    x, bias = torch.randn(2, columns), torch.randn(len(weight))
    torch.testing.assert_close(product(x, None), x @ weight.T, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(product(x, bias), x @ weight.T + bias, rtol=1e-4, atol=1e-4)
