"""Every kernel that this processor can run, beside products in float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from packed_weights import FLOATS, KINDS, PATTERNS, assert_product, every, packed, weight_of

from dlp_plugin.checkpoints.bits import mask_of
from dlp_plugin.checkpoints.stored import Stored
from dlp_plugin.kernels.layout import Layout, layout_of
from dlp_plugin.kernels.library import chosen
from dlp_plugin.kernels.products import linear

ALL = ["portable", "avx2", "avx512", "avx512bf16"]
HERE = ["off", *ALL[: 1 + (-1 if chosen() is None else chosen())]]
SHAPES = [(1, 1), (5, 8), (3, 63), (7, 65), (4, 192), (33, 129)]
ROWS = [1, 2, 3, 4, 5, 7, 12, 32, 70]


@pytest.fixture(params=HERE)
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """One of the kernels, or torch in their place."""
    monkeypatch.setenv("DLP_KERNELS", request.param)
    return request.param


@pytest.fixture
def threads() -> Iterator[None]:
    """The number of threads is as it was, afterwards."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def inputs(count: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, width, generator=generator).to(dtype)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_kind_and_pattern(level: str, shape: tuple[int, int]) -> None:
    for number, found in enumerate(every([shape])):
        layout, weight = layout_of(*found), weight_of(found)
        for count in ROWS[number % 2 :: 2]:
            x = inputs(count, shape[1], FLOATS[number % 3])
            assert_product(linear(x, layout), x, weight)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_numbers_of_rows_of_x(level: str, kind: str, dtype: torch.dtype) -> None:
    found = packed(kind, (37, 150))
    layout, weight = layout_of(*found), weight_of(found)
    bias = inputs(1, 37, dtype)[0]
    for count in (*range(1, 10), 12, 13, 24, 25, 31, 32, 64, 65, 70):
        x = inputs(count, 150, dtype)
        assert_product(linear(x, layout, bias), x, weight, bias)


def test_more_rows_than_a_thread_takes_at_once(level: str) -> None:
    for kind in (torch.bfloat16, "4 asymmetric"):
        found = packed(kind, (700, 40))
        layout, weight = layout_of(*found), weight_of(found)
        for count in (1, 3, 9, 80):
            x = inputs(count, 40, torch.bfloat16)
            assert_product(linear(x, layout), x, weight)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.usefixtures("threads")
def test_the_same_to_the_bit_for_any_number_of_threads(level: str, pattern: str) -> None:
    for kind in (torch.bfloat16, torch.float32, "4"):
        layout = layout_of(*packed(kind, (517, 200), pattern))
        for count in (1, 4, 20):
            x = inputs(count, 200, torch.float32)
            found = []
            for number in (1, 2, 2, 3):
                torch.set_num_threads(number)
                found.append(linear(x, layout))
            if level != "off":
                assert all(torch.equal(one, found[0]) for one in found)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", [name for name in HERE if name.startswith("avx512")])
def test_the_same_to_the_bit_whatever_rows_of_x_are_beside(
    monkeypatch: pytest.MonkeyPatch, name: str, kind: str, dtype: torch.dtype
) -> None:
    """So a text is the same alone and in a batch, as long as prompts are short."""
    monkeypatch.setenv("DLP_KERNELS", name)
    layout = layout_of(*packed(kind, (37, 512)))
    x = inputs(64, 512, dtype)
    alone = torch.cat([linear(row[None], layout) for row in x])
    for count in (2, 4, 5, 7, 24, 25, 64):
        assert torch.equal(linear(x[:count], layout), alone[:count]), count


@pytest.mark.parametrize("shape", [(0, 5), (4, 0), (0, 0)])
def test_of_nothing(level: str, shape: tuple[int, int]) -> None:
    for kind in (torch.bfloat16, "8", "4 unmasked"):
        layout = layout_of(*packed(kind, shape))
        for count in (0, 1, 3, 70):
            found = linear(torch.ones(count, shape[1]), layout, torch.ones(shape[0]))
            assert torch.equal(found, torch.ones(count, shape[0]))


def test_shapes_of_x(level: str) -> None:
    found = packed(torch.bfloat16, (6, 20))
    layout, weight = layout_of(*found), weight_of(found)
    x = inputs(24, 20, torch.bfloat16)
    assert linear(x.view(2, 3, 4, 20), layout).shape == (2, 3, 4, 6)
    assert linear(x[0], layout).shape == (6,)
    assert linear(x[:0].view(2, 0, 20), layout).shape == (2, 0, 6)
    apart = inputs(20, 24, torch.bfloat16).T[::2]
    assert_product(linear(apart, layout), apart, weight)


def test_what_is_not_finite_stays_so(level: str) -> None:
    """As in a dense product: where a zero meets it, too, but in portable C, which skips zeros."""
    stored, parts = packed(torch.bfloat16, (8, 64))
    parts["weight_values"][3] = float("nan")
    layout = layout_of(stored, parts)
    x = torch.ones(1, 64)
    rows = torch.zeros(8, dtype=torch.bool)
    rows[0] = True
    for dtype in FLOATS:
        for count in (1, 6, 66):
            found = linear(x.expand(count, -1).to(dtype), layout)
            assert torch.equal(found.isnan(), rows.expand(count, -1))
            infinite = x.expand(count, -1).clone().to(dtype)
            infinite[:, 1] = float("inf")
            if level != "portable":
                assert not linear(infinite, layout).isfinite().any()


def test_a_row_of_x_that_is_not_finite_leaves_the_others_alone(level: str) -> None:
    for width in (70, 128):
        found = packed(torch.bfloat16, (8, width))
        layout, weight = layout_of(*found), weight_of(found)
        for dtype in FLOATS:
            for count in (2, 4, 7, 30, 66):
                x = inputs(count, width, dtype)
                x[0] = float("inf")
                assert_product(linear(x, layout)[1:], x[1:], weight)


def test_numbers_of_half_precision(level: str) -> None:
    """Every float16 and bfloat16 number comes out as it went in."""
    if level == "off":
        pytest.skip("torch's own conversions")
    for dtype in (torch.float16, torch.bfloat16):
        every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
        every = every[every.isfinite() & (every != 0)]
        if level == "avx512bf16" and dtype == torch.bfloat16:
            every = every[every.abs() >= torch.finfo(dtype).tiny]  # less is taken as zero
        count = len(every)
        parts = {
            "weight_packed": mask_of(torch.ones(count, 1, dtype=torch.bool)),
            "weight_values": every.clone(),
        }
        layout = layout_of(Stored("values", (count, 1), dtype, count), parts)
        one = torch.ones(1, 1, dtype=dtype)
        assert torch.equal(linear(one, layout)[0], every)
        assert torch.equal(linear(one.float(), layout)[0], every.float())
        assert torch.equal(linear(one.expand(7, -1), layout)[6], every)


def test_gradients(level: str) -> None:
    found = packed(torch.float32, (30, 50))
    layout, weight = layout_of(*found), weight_of(found).float()
    for count in (1, 9, 70):
        x, bias = (
            inputs(count, 50, torch.float32).requires_grad_(),
            torch.zeros(30).requires_grad_(),
        )
        grad = inputs(count, 30, torch.float32)
        linear(x, layout, bias).backward(grad)
        torch.testing.assert_close(x.grad, grad @ weight)
        torch.testing.assert_close(bias.grad, grad.sum(0))


def test_torch_knows_the_operator() -> None:
    layout = layout_of(*packed(torch.float32, (12, 40)))
    x, bias = torch.randn(3, 40, requires_grad=True), torch.randn(12, requires_grad=True)
    torch.library.opcheck(
        torch.ops.dlp_plugin.linear.default, (x, list(layout.tensors.values()), layout.said, bias)
    )
    compiled = torch.compile(
        lambda one: linear(one, layout, bias).relu(), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(x), linear(x, layout, bias).relu())
    compiled(x).sum().backward()
    assert x.grad is not None


def test_tensors_that_lie_elsewhere_meanwhile(level: str) -> None:
    """As when an engine gives its module other tensors: no kernel looks where they were."""
    found = packed(torch.bfloat16, (40, 100))
    layout, weight, x = layout_of(*found), weight_of(found), inputs(1, 100, torch.float32)
    assert_product(linear(x, layout), x, weight)
    for one in layout.tensors.values():
        one.data = one.data.clone()
    assert_product(linear(x, layout), x, weight)
    layout.tensors["values"].data = layout.tensors["values"].half()
    with pytest.raises(ValueError, match=r"instead of .*: (keep them as|the file is damaged)"):
        linear(x, layout)


def test_what_cannot_be_multiplied() -> None:
    layout = layout_of(*packed(torch.bfloat16, (6, 20)))
    with pytest.raises(ValueError, match=r"^packed weights \[6, 20\] .* not \[1, 21\] in .*bfloat"):
        linear(torch.ones(1, 21).bfloat16(), layout)
    with pytest.raises(
        ValueError, match=r"take inputs \[\.\.\., 20\] in .* not \[1, 20\] in .*float64"
    ):
        linear(torch.ones(1, 20).double(), layout)
    there = {name: one.to("meta") for name, one in layout.tensors.items()}
    with pytest.raises(
        ValueError, match=r"on the CPU only, but these tensors are on cpu and meta: load"
    ):
        linear(torch.ones(1, 20), Layout(layout.spec, there))
    with pytest.raises(ValueError, match=r"^the bias is \[5\] on cpu, not \[6\]"):
        linear(torch.ones(1, 20), layout, torch.ones(5))
    halved = {name: one.half() for name, one in layout.tensors.items()}
    with pytest.raises(ValueError, match="^the tensors of packed weights are .* keep them as"):
        linear(torch.ones(1, 20), Layout(layout.spec, halved))
