"""The sparse format: every bit comes back, and what is damaged is told by its name."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from unittest.mock import patch

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize
from helpers import DTYPES
from hypothesis import given, settings
from hypothesis import strategies as st

from dlp_plugin.checkpoints.bits import integers_of_words, words_of_integers
from dlp_plugin.checkpoints.sparse_format import (
    PARTS,
    Stored,
    decode,
    decode_integers,
    encode,
    encode_integers,
)

INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
SPECIAL = [-0.0, float("nan"), -float("inf"), 1e-40, 1.0]


def bits_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(INTEGERS[tensor.itemsize])


def small_chunks(size: int) -> patch:
    return patch("dlp_plugin.checkpoints.sparse_format._CHUNK", size)


@st.composite
def weights(draw: st.DrawFn, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Any bits, few exponents or all; zero and dense rows among them."""
    dtype = dtype or draw(st.sampled_from(DTYPES))
    rows, columns = draw(st.integers(0, 12)), draw(st.integers(0, 40))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**30)))
    if draw(st.booleans()):
        shape = (rows, columns, dtype.itemsize)
        raw = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
        weight = raw.flatten(1).view(dtype) if raw.numel() else torch.zeros(rows, columns).to(dtype)
    else:
        weight = torch.randn(rows, columns, generator=generator).to(dtype)
    sparsity = draw(st.sampled_from([0.0, 0.3, 0.7, 0.95, 1.0]))
    weight[torch.rand(rows, columns, generator=generator) < sparsity] = 0
    if weight.numel() and draw(st.booleans()):
        weight[draw(st.integers(0, rows - 1))] = 0
        weight[draw(st.integers(0, rows - 1))] = draw(st.sampled_from(SPECIAL))
    return weight


def naive_parts(weight: torch.Tensor) -> dict[str, list]:
    """What is stored of a bfloat16 or other weight, number by number."""
    rows = bits_of(weight).tolist()
    columns = weight.shape[1]
    mask = [
        [
            sum(1 << (j - first) for j in range(first, min(first + 8, columns)) if row[j])
            for first in range(0, columns, 8)
        ]
        for row in rows
    ]
    living = [number % (1 << 8 * weight.itemsize) for row in rows for number in row if number]
    exponents = [number >> 7 & 255 for number in living]
    table = sorted(set(exponents))
    if weight.dtype != torch.bfloat16 or len(table) > 16:
        return {"weight_packed": mask, "weight_values": living}
    indices = [table.index(exponent) for exponent in exponents] + [0]
    return {
        "weight_packed": mask,
        "weight_fractions": [number >> 15 << 7 | number & 127 for number in living],
        "weight_exponents": [
            indices[place] + 16 * indices[place + 1] for place in range(0, len(living), 2)
        ],
        "weight_table": table,
    }


class TestFloats:
    @given(weight=weights(), chunk=st.sampled_from([1, 50, 1 << 19]))
    def test_every_bit_comes_back(self, weight: torch.Tensor, chunk: int) -> None:
        with small_chunks(chunk):
            found = encode(weight)
            if found is None:
                return
            stored, parts = found
            assert sum(part.nbytes for part in parts.values()) < weight.nbytes
            again = decode(stored, parts)
        assert (again.dtype, again.shape) == (weight.dtype, weight.shape)
        assert torch.equal(bits_of(again), bits_of(weight))
        assert {name: tuple(part.shape) for name, part in parts.items()} == stored.part_shapes()
        assert {name: part.dtype for name, part in parts.items()} == stored.part_dtypes()
        assert parts.keys() <= set(PARTS)
        assert Stored.from_config("a", stored.to_config()) == stored

    @given(weight=weights())
    def test_it_is_what_is_stored_number_by_number(self, weight: torch.Tensor) -> None:
        found = encode(weight)
        expected = naive_parts(weight)
        if found is None:
            sizes = {"weight_values": weight.itemsize}
            naive = sum(
                sizes.get(name, 1) * torch.tensor(part, dtype=torch.uint64).numel()
                for name, part in expected.items()
            )
            assert naive >= weight.nbytes
            return
        stored, parts = found
        whole = (1 << 8 * weight.itemsize) - 1
        if stored.kind == "values":
            values = bits_of(parts["weight_values"]).tolist()
            assert [number & whole for number in values] == expected.pop("weight_values")
        assert {name: parts[name].tolist() for name in expected} == expected
        assert stored.kept == int((bits_of(weight) != 0).sum())

    def test_the_example_of_the_docstring(self) -> None:
        weight = torch.tensor([[0, 1.5, 0], [-2, 0, 0]], dtype=torch.bfloat16)
        stored, parts = encode(torch.cat((weight, torch.zeros(2, 3)), dim=0).bfloat16())
        assert (stored.kind, stored.kept, stored.exponents) == ("planes", 2, 2)
        assert {name: part.flatten().tolist() for name, part in parts.items()} == {
            "weight_packed": [2, 1, 0, 0],
            "weight_fractions": [0x40, 0x80],
            "weight_exponents": [0x10],
            "weight_table": [127, 128],
        }

    @pytest.mark.parametrize(("count", "kind"), [(16, "planes"), (17, "values")])
    def test_a_table_of_sixteen_exponents(self, count: int, kind: str) -> None:
        weight = torch.zeros(8, 64, dtype=torch.bfloat16)
        weight[0, :count] = 2.0 ** torch.arange(count).bfloat16()
        stored, parts = encode(weight)
        assert (stored.kind, stored.kept) == (kind, count)
        assert torch.equal(decode(stored, parts), weight)

    def test_bits_of_a_weight(self) -> None:
        """As the issue has them: a bit, a byte and a half for each of the living."""
        torch.manual_seed(0)
        weight = torch.randn(512, 1024)
        weight[weight.abs() < weight.abs().quantile(0.7, dim=1, keepdim=True)] = 0
        _, parts = encode(weight.bfloat16())
        bits = 8 * sum(part.nbytes for part in parts.values()) / weight.numel()
        assert bits == pytest.approx(1 + 0.3 * 12, abs=0.01)

    @pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
    def test_other_dtypes_stay_as_they_are(self, dtype: torch.dtype) -> None:
        assert encode(torch.zeros(64, 64).to(dtype)) is None

    def test_what_would_not_shrink(self) -> None:
        assert encode(torch.ones(64, 64, dtype=torch.float16)) is None
        assert encode(torch.ones(0, 64)) is None
        assert encode(torch.zeros(64, 64)) is not None

    def test_another_dtype_at_the_end(self) -> None:
        weight = torch.randn(8, 64).bfloat16()
        weight[:, ::2] = 0
        for dtype in (torch.float32, torch.float16):
            assert torch.equal(decode(*encode(weight), dtype), weight.to(dtype))

    @pytest.mark.parametrize("inference", [False, True])
    def test_on_several_cores(self, inference: bool) -> None:
        weight = torch.randn(40, 64).bfloat16()
        weight[:, ::2] = 0
        before = torch.get_num_threads()
        try:
            torch.set_num_threads(3)
            with small_chunks(100), torch.inference_mode(inference):
                assert torch.equal(decode(*encode(weight)), weight)
            assert torch.get_num_threads() == 3
        finally:
            torch.set_num_threads(before)

    def test_columns_that_do_not_lie_together(self) -> None:
        weight = torch.randn(40, 8).bfloat16().T
        weight[:, ::2] = 0
        assert torch.equal(decode(*encode(weight)), weight)


@st.composite
def quantized(draw: st.DrawFn) -> dict[str, object]:
    """A Linear's integers, scales and zero points as compressed-tensors has them in memory."""
    bits, size = draw(st.sampled_from([4, 8])), draw(st.sampled_from([-1, 1, 4, 6, 32]))
    rows = draw(st.integers(1, 12))
    columns = draw(st.integers(1, 40)) if size == -1 else size * draw(st.integers(1, 5))
    groups = 1 if size == -1 else columns // size
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**30)))
    half = 1 << (bits - 1)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randint(-half, half, shape, dtype=torch.int8, generator=generator)

    zero = None if draw(st.booleans()) else numbers(rows, groups)
    living = torch.rand(rows, columns, generator=generator) > draw(st.sampled_from([0, 0.7, 1.0]))
    middle = torch.zeros(rows, groups, dtype=torch.int8) if zero is None else zero
    middle = middle.repeat_interleave(columns // groups, dim=1)
    dtype = draw(st.sampled_from([torch.bfloat16, torch.float16, torch.float32]))
    return {
        "bits": bits,
        "size": size,
        "numbers": torch.where(living, numbers(rows, columns), middle),
        "zero": zero,
        "scale": torch.randn(rows, groups, generator=generator).to(dtype),
    }


class TestIntegers:
    @given(linear=quantized(), chunk=st.sampled_from([1, 50, 1 << 19]))
    @settings(deadline=None)
    def test_the_integers_and_the_weight_of_compressed_tensors(
        self, linear: dict, chunk: int
    ) -> None:
        bits, size, numbers, zero = (linear[key] for key in ("bits", "size", "numbers", "zero"))
        words = pack_to_int32(numbers, bits)
        zeros = None if zero is None else pack_to_int32(zero, bits, packed_dim=0).contiguous()
        integers = integers_of_words(words, bits, numbers.shape[1])
        assert torch.equal(integers.int(), numbers.int() + (1 << bits - 1))
        assert torch.equal(words_of_integers(integers, bits), words)
        with small_chunks(chunk):
            stored, parts = encode_integers(
                integers, linear["scale"], zeros, bits=bits, group_size=size
            )
            assert torch.equal(decode_integers(stored, parts), integers)
            weight = decode(stored, parts)
        strategy = {"strategy": "channel"} if size == -1 else {"group_size": size}
        args = QuantizationArgs(num_bits=bits, symmetric=zero is None, **strategy)
        expected = dequantize(numbers, linear["scale"], zero, args)
        assert weight.dtype == expected.dtype
        assert torch.equal(bits_of(weight), bits_of(expected))
        assert {name: tuple(part.shape) for name, part in parts.items()} == stored.part_shapes()
        assert {name: part.dtype for name, part in parts.items()} == stored.part_dtypes()
        assert Stored.from_config("a", stored.to_config()) == stored
        assert stored.masked == ("weight_packed" in parts)

    def test_a_mask_only_where_it_saves(self) -> None:
        scale = torch.ones(4, 1)
        for bits in (4, 8):
            middle = 1 << bits - 1
            integers = torch.full((4, 64), middle + 1, dtype=torch.uint8)
            stored, parts = encode_integers(integers, scale, None, bits=bits, group_size=-1)
            assert (stored.masked, stored.kept) == (False, 256)
            assert parts["weight_integers"].nbytes == 32 * bits
            integers[:, ::2] = middle
            stored, parts = encode_integers(integers, scale, None, bits=bits, group_size=-1)
            assert (stored.masked, stored.kept) == (True, 128)
            assert parts["weight_integers"].nbytes == 16 * bits


Change = Callable[[dict[str, torch.Tensor]], object]


def damaged(weight: torch.Tensor, change: Change) -> tuple[Stored, dict[str, torch.Tensor]]:
    stored, parts = encode(weight)
    change(parts)
    return stored, parts


class TestDamage:
    """In a Linear of 5 x 12 with 13 weights kept."""

    @pytest.fixture(params=[torch.bfloat16, torch.float16])
    def weight(self, request: pytest.FixtureRequest) -> torch.Tensor:
        weight = torch.zeros(5, 12, dtype=request.param)
        weight.view(-1)[::5] = 1.5
        weight[0, 0] = -3
        weight[4, 11] = 1
        return weight

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda parts: parts.pop("weight_packed"), r"up\.weight_packed is missing: the file"),
            (
                lambda parts: parts.update(weight_packed=parts["weight_packed"][:4]),
                r"up\.weight_packed is torch\.uint8 \[4, 2\] instead of torch\.uint8 \[5, 2\]",
            ),
            (
                lambda parts: parts.update(weight_packed=parts["weight_packed"].int()),
                r"up\.weight_packed is torch\.int32 \[5, 2\] instead of torch\.uint8",
            ),
            (
                lambda parts: parts["weight_packed"][0, 0].fill_(255),
                r"up\.weight_packed marks \d+ weights, but 13 are stored",
            ),
            (
                lambda parts: parts["weight_packed"][4].fill_(0),
                r"up\.weight_packed marks \d+ weights, but 13 are stored",
            ),
            (
                lambda parts: parts["weight_packed"][2, 1].fill_(16),
                r"up\.weight_packed marks columns after the last",
            ),
        ],
        ids=["missing", "short", "dtype", "more", "fewer", "outside"],
    )
    @pytest.mark.parametrize("chunk", [12, 1 << 19])
    def test_the_mask(self, weight: torch.Tensor, change: Change, message: str, chunk: int) -> None:
        with small_chunks(chunk), pytest.raises(ValueError, match=message):
            decode(*damaged(weight, change), name="layers.0.up")

    @pytest.mark.parametrize(
        ("part", "change", "message"),
        [
            ("weight_fractions", lambda x: x[:-1], r"weight_fractions is .* \[12\] instead of"),
            ("weight_exponents", lambda x: x[:-1], r"weight_exponents is .* \[6\] instead of"),
            ("weight_table", lambda x: x[:1], r"weight_table is .* \[1\] instead of .* \[2\]"),
            ("weight_exponents", lambda x: x | 2, r"points outside the 2 entries of weight_table"),
            ("weight_exponents", lambda x: x | 16, r"has a value after the last"),
        ],
    )
    def test_planes(self, part: str, change: Callable, message: str) -> None:
        weight = torch.zeros(5, 12, dtype=torch.bfloat16)
        weight.view(-1)[::5] = 1.5
        weight[0, 0], weight[4, 11] = -3, 1
        stored, parts = encode(weight)
        parts[part] = change(parts[part])
        with pytest.raises(
            ValueError, match=rf"^layers\.0\.up\.{part}.*{message.split(' ', 1)[1]}"
        ):
            decode(stored, parts, name="layers.0.up")
        with pytest.raises(ValueError, match=rf"^{part} "):
            decode(stored, parts)

    def test_values_and_integers(self) -> None:
        stored, parts = encode(torch.eye(16, dtype=torch.float16))
        parts["weight_values"] = parts["weight_values"].float()
        with pytest.raises(ValueError, match=r"weight_values is torch\.float32 \[16\] instead of"):
            decode(stored, parts)
        integers = torch.full((8, 8), 8, dtype=torch.uint8)
        integers[0, :3] = 3
        scale = torch.ones(8, 2)
        stored, parts = encode_integers(integers, scale, None, bits=4, group_size=4)
        for read in (decode, decode_integers):
            with pytest.raises(ValueError, match=r"weight_scale is .* \[8, 1\] instead of"):
                read(stored, {**parts, "weight_scale": scale[:, :1]})
            with pytest.raises(ValueError, match=r"up\.weight_integers has a value after"):
                read(stored, {**parts, "weight_integers": parts["weight_integers"] | 32}, name="up")


def test_it_needs_torch_alone() -> None:
    """As engines import it, beside which neither the host nor its packages are."""
    code = (
        "import sys, dlp_plugin.checkpoints.sparse_format\n"
        "others = {'llmcompressor', 'compressed_tensors', 'transformers', 'safetensors'}\n"
        "print(others & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "set()"
