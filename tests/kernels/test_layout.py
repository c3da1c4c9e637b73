"""What kernels run: the weight of the file, joined and cut; damaged files are refused before."""

from __future__ import annotations

import re
from dataclasses import replace
from json import loads

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from packed_weights import FLOATS, KINDS, assert_product, every, packed

from dlp_plugin.checkpoints.sparse_format import Stored, decode
from dlp_plugin.kernels.layout import (
    Layout,
    columns,
    dense,
    joined,
    layout_of,
    parts_of,
    rows,
    tensors_of,
)
from dlp_plugin.kernels.products import linear

SHAPES = [(1, 1), (5, 8), (3, 63), (16, 64), (7, 65), (6, 100)]


def kinds(shape: tuple[int, int]) -> list[Layout]:
    return [layout_of(*packed(kind, shape, dtype=torch.float16)) for kind in KINDS]


def test_the_weight_and_the_file_come_back() -> None:
    for stored, parts in every(SHAPES):
        layout = layout_of(stored, parts)
        found = {name: (tuple(one.shape), one.dtype) for name, one in layout.tensors.items()}
        assert found == tensors_of(layout.spec)
        assert torch.equal(dense(layout), decode(stored, parts))
        assert dense(layout, torch.float64).dtype == torch.float64
        assert torch.equal(decode(*parts_of(layout)), decode(stored, parts))


@pytest.mark.parametrize("kind", ["planes", torch.float16, "4 asymmetric", "8 unmasked"], ids=str)
def test_what_a_file_holds_again(kind: str) -> None:
    """So a model that runs packed is saved packed."""
    stored, parts = packed(kind, (9, 100), group_size=20)
    again, held = parts_of(layout_of(stored, parts))
    assert again == stored
    assert {name: one.tolist() for name, one in held.items()} == {
        name: one.tolist() for name, one in parts.items()
    }


def test_planes_become_values() -> None:
    stored, parts = packed("planes", (9, 100))
    layout = layout_of(stored, parts)
    assert layout.spec == Stored("values", (9, 100), torch.bfloat16, stored.kept)
    assert [*layout.tensors] == ["mask", "starts", "values"]


def test_a_layout_is_built_again_of_its_tensors_and_a_description() -> None:
    for layout in kinds((6, 20)):
        spec = Stored.from_config("a", loads(layout.said))
        assert spec == layout.spec
        assert hash(spec) == hash(layout.spec)
        again = Layout(spec, {name: one.clone() for name, one in layout.tensors.items()})
        assert torch.equal(dense(again), dense(layout))


@pytest.mark.parametrize("shape", SHAPES)
def test_cut(shape: tuple[int, int]) -> None:
    count, width = shape
    for layout in kinds(shape):
        weight = dense(layout)
        for first, last in ((0, count), (count // 3, count - count // 3), (count, count)):
            assert torch.equal(dense(rows(layout, first, last)), weight[first:last])
        for first, last in ((0, width), (width // 3, width - width // 3), (0, 0)):
            part = columns(layout, first, last)
            assert torch.equal(dense(part), weight[:, first:last])
            x = torch.ones(2, last - first)
            assert_product(linear(x, part), x, weight[:, first:last])


def test_there_are_no_such_rows() -> None:
    layout = layout_of(*packed(torch.bfloat16, (6, 20)))
    with pytest.raises(ValueError, match="^there are no rows 2 to 7: the weight has 6$"):
        rows(layout, 2, 7)
    with pytest.raises(ValueError, match="^there are no columns -1 to 3: the weight has 20$"):
        columns(layout, -1, 3)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_joined_floats(dtype: torch.dtype) -> None:
    layouts = [layout_of(*packed(dtype, (count, 70))) for count in (3, 1, 8)]
    if dtype == torch.bfloat16:
        layouts.append(layout_of(*packed("planes", (5, 70))))
    weight = torch.cat([dense(one) for one in layouts])
    whole = joined(layouts)
    assert torch.equal(dense(whole), weight)
    x = torch.ones(1, 70)
    assert_product(linear(x, whole), x, weight)


@pytest.mark.parametrize("bits", ["4", "8"])
def test_joined_integers(bits: str) -> None:
    """Of all groups, with and without zero points and masks, of odd numbers of integers."""
    alone = [f"{bits}{rest}" for rest in ("", " asymmetric", " unmasked")]
    for size in (-1, 15):
        layouts = [layout_of(*packed(kind, (3, 45), group_size=size)) for kind in alone]
        layouts += [layout_of(*packed(bits, (1, 45), group_size=9))]
        for some in (layouts[:1], layouts[2:3] * 2, layouts):
            whole = joined(some)
            weight = torch.cat([dense(one) for one in some])
            assert torch.equal(dense(whole), weight)
            x = torch.ones(1, 45)
            assert_product(linear(x, whole), x, weight)


def test_what_cannot_be_joined() -> None:
    first = layout_of(*packed(torch.bfloat16, (6, 20)))
    for kind, shape in ((torch.bfloat16, (6, 21)), (torch.float16, (6, 20)), ("4", (6, 20))):
        with pytest.raises(ValueError, match="^weights can be joined only if they have the same"):
            joined([first, layout_of(*packed(kind, shape))])
    with pytest.raises(ValueError, match="^weights can be joined only"):
        joined([])


@pytest.mark.parametrize("part", ["weight_packed", "weight_exponents", "weight_table"])
def test_what_is_damaged_is_told_by_its_name(part: str) -> None:
    stored, parts = packed("planes", (9, 100))
    with pytest.raises(ValueError, match=rf"^block.q_proj.{part} is missing: the file is damaged"):
        layout_of(
            stored, {name: one for name, one in parts.items() if name != part}, "block.q_proj"
        )
    short = parts | {part: parts[part][:-1]}
    with pytest.raises(ValueError, match=rf"^block.q_proj.{part} is .* instead of"):
        layout_of(stored, short, "block.q_proj")


def test_a_mask_that_marks_more_than_there_is() -> None:
    stored, parts = packed(torch.bfloat16, (9, 64))
    parts["weight_packed"] = torch.full_like(parts["weight_packed"], 255)
    with pytest.raises(ValueError, match=r"^a\.weight_packed marks \d+ weights, but"):
        layout_of(stored, parts, "a")


@st.composite
def damaged(draw: st.DrawFn) -> tuple[Stored, dict[str, torch.Tensor]]:
    """A part with a byte changed, cut, of another dtype or shape; or another description."""
    kind = draw(st.sampled_from(KINDS))
    shape = draw(st.integers(5, 9)), 4 * draw(st.integers(5, 20))
    stored, parts = packed(kind, shape, group_size=4)
    part = draw(st.sampled_from(sorted(parts)))
    how = draw(st.sampled_from(["byte", "cut", "dtype", "shape", "kept", "exponents"]))
    if how == "byte" and parts[part].numel():
        raw = parts[part].contiguous().clone()
        place = draw(st.integers(0, raw.nbytes - 1))
        raw.flatten().view(torch.uint8)[place] = draw(st.integers(0, 255))
        parts[part] = raw
    elif how == "cut":
        parts[part] = parts[part][: draw(st.integers(0, len(parts[part])))]
    elif how == "dtype":
        parts[part] = parts[part].to(draw(st.sampled_from([torch.int64, torch.float64])))
    elif how == "shape":
        parts[part] = parts[part].flatten()
    elif how == "kept":
        stored = replace(stored, kept=max(0, stored.kept + draw(st.integers(-3, 3))))
    else:
        stored = replace(stored, exponents=draw(st.integers(0, 16)))
    return stored, parts


@given(damaged())
def test_no_kernel_runs_on_what_decoding_refuses(found: tuple[Stored, dict]) -> None:
    stored, parts = found
    said, weight = "", torch.empty(0)
    try:
        weight = decode(stored, parts, name="a")
    except ValueError as error:
        said = str(error)
    if said:
        with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
            layout_of(stored, parts, "a")
    else:
        layout = layout_of(stored, parts, "a")
        assert torch.equal(dense(layout).view(torch.uint8), weight.view(torch.uint8))
        assert linear(torch.ones(1, stored.shape[1]), layout).shape == (1, stored.shape[0])
