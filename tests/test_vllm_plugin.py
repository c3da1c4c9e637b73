"""vLLM with packed checkpoints: slices of what is stored, and what vLLM says with the plugin.

What needs vLLM runs in its environment, which the first run makes (see
``engines/environments.py``), with this package installed beside it without what it requires.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from helpers import ROOT, SHIPPED, linears_of, run
from hypothesis import given
from hypothesis import strategies as st
from llmcompressor.modifiers.quantization import QuantizationModifier
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from dlp_plugin.checkpoints.packing import pack
from dlp_plugin.checkpoints.slices import narrow
from dlp_plugin.checkpoints.sparse_format import (
    PARTS,
    Stored,
    decode,
    encode,
    encode_integers,
    read_stored,
)
from dlp_plugin.engines.slices import LazyWeight

sys.path.append(str(ROOT / "tests" / "engines"))
from environments import call, vllm_python

Packed = tuple[Stored, dict[str, torch.Tensor]]
Tensors = dict[str, torch.Tensor]


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
    with pytest.raises(ValueError, match=r"^a\.weight_fractions is torch\.uint8 \[3\] in place"):
        narrow(stored, short, 1, 0, 2, "a")
    with pytest.raises(ValueError, match=r"^a\.weight_table is missing"):
        narrow(stored, {k: v for k, v in parts.items() if k != "weight_table"}, 0, 0, 1, "a")
    parts["weight_packed"][0, 0] ^= 1
    with pytest.raises(ValueError, match=r"^a\.weight_packed marks another number of weights"):
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


PROMPTS = [list(range(3, 80)), [5, 17, 200, 3000, 45]]
DAMAGED = "model.layers.3.self_attn.q_proj"


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The shipped model at 70 %, and that of 4 bits; of each the dense and the packed folder."""
    folder = tmp_path_factory.mktemp("checkpoints")
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED)

    def shipped() -> Any:
        model = AutoModelForCausalLM.from_pretrained(SHIPPED)
        for name, linear in linears_of(model).items():
            weight = linear.weight.data
            if name != "lm_head":
                dead = weight.float().abs().argsort(1)[:, : int(0.7 * weight.shape[1])]
                weight.scatter_(1, dead, 0)
        # With so many exponents two shards of fused Linears do not shrink: they stay dense.
        for name in ("model.layers.0.self_attn.k_proj", "model.layers.1.mlp.gate_proj"):
            weight = model.get_submodule(name).weight.data
            weight.copy_(torch.randn(weight.shape) * torch.randn(weight.shape).mul(4).exp2() * 0.1)
        model.get_submodule("model.layers.2.mlp.up_proj").weight.data.zero_()
        return model

    shipped().save_pretrained(folder / "dense")
    tokenizer.save_pretrained(folder / "dense")
    args = QuantizationArgs(num_bits=4, strategy="group", group_size=64)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    quantization = QuantizationModifier(ignore=["lm_head"], config_groups={"group_0": scheme})
    run(shipped(), quantization, None, tokenizer=tokenizer, output_dir=str(folder / "quantized"))
    left_dense = pack(folder / "dense", folder / "packed").dense
    assert left_dense == 2
    pack(folder / "quantized", folder / "packed4")
    dequantize(folder / "packed4", folder / "dense4")
    return {path.name: path for path in folder.iterdir()}


def dequantize(packed4: Path, dense4: Path) -> None:
    """A packed folder as an ordinary one: what transformers reads of it is tested elsewhere."""
    shutil.copytree(packed4, dense4)
    config = json.loads((dense4 / "config.json").read_text())
    tensors = load_file(dense4 / "model.safetensors")
    linears = read_stored(config.pop("quantization_config"), "config.json")
    for name, stored in linears.items():
        parts = {part: tensors.pop(f"{name}.{part}", None) for part in PARTS}
        parts = {part: tensor for part, tensor in parts.items() if tensor is not None}
        tensors[f"{name}.weight"] = decode(stored, parts)
    (dense4 / "config.json").write_text(json.dumps(config))
    save_file(tensors, dense4 / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="session")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for PYTHONPATH where this package is installed without what it requires."""
    folder = tmp_path_factory.mktemp("plugin")
    # Built from a copy, since setuptools adds to a wheel what earlier builds left in build/.
    shutil.copytree(ROOT / "dlp_plugin", folder / "source" / "dlp_plugin")
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, folder / "source")
    install = ["-m", "pip", "install", "-q", "--no-deps", "--target", str(folder / "site")]
    call([str(vllm_python()), *install, str(folder / "source")])
    return folder / "site"


def before_others(*folders: Path) -> str:
    """PYTHONPATH with these first; another, such as ``engines/avx2``, may be there already."""
    return os.pathsep.join([*map(str, folders), *filter(None, [os.environ.get("PYTHONPATH")])])


Ask = Callable[..., list[Any]]


@pytest.fixture(scope="session")
def ask(plugin: Path, tmp_path_factory: pytest.TempPathFactory) -> Ask:
    """What vLLM makes of checkpoints, one after another in one process."""
    folder = tmp_path_factory.mktemp("vllm")

    def asked(
        *jobs: dict[str, object], path: tuple[Path, ...] = (), **environment: str
    ) -> list[Any]:
        (folder / "jobs.json").write_text(
            json.dumps({"prompts": PROMPTS, "jobs": jobs}, default=str)
        )
        probe = ROOT / "tests" / "vllm_probe_packed.py"
        command = [vllm_python(), probe, folder / "jobs.json", folder / "result.json"]
        environment["PYTHONPATH"] = before_others(plugin, *path)
        call([str(word) for word in command], HF_HUB_OFFLINE="1", **environment)
        return json.loads((folder / "result.json").read_text())

    return asked


def changed(source: Path, folder: Path, change: Callable[[Tensors, dict], object]) -> Path:
    """A copy of a checkpoint of which ``change(tensors, quantization_config)`` was called."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    change(tensors, config["quantization_config"])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.engines
def test_vllm_says_the_same_with_packed_checkpoints(checkpoints: dict[str, Path], ask: Ask) -> None:
    dense, packed, dense4, packed4, packed4_single = ask(
        {"model": checkpoints["dense"], "dtype": "bfloat16"},
        {"model": checkpoints["packed"], "dtype": "bfloat16"},
        {"model": checkpoints["dense4"], "dtype": "bfloat16"},
        {"model": checkpoints["packed4"], "dtype": "bfloat16"},
        {"model": checkpoints["packed4"], "dtype": "float32"},
    )
    assert [len(prompt) for prompt in dense] == [len(prompt) - 1 + 16 for prompt in PROMPTS]
    assert packed == dense  # tokens and log-probabilities, to the bit
    assert [len(prompt) for prompt in dense4] == [len(prompt) for prompt in dense]
    assert packed4 == dense4 != dense
    assert [len(prompt) for prompt in packed4_single] == [len(prompt) for prompt in dense]
    assert packed4_single != packed4


@pytest.mark.engines
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two processes need two processors")
def test_vllm_says_the_same_in_two_processes(checkpoints: dict[str, Path], ask: Ask) -> None:
    # By itself vLLM has one process for each NUMA node.
    first, second, *_ = sorted(os.sched_getaffinity(0))
    dense, packed = ask(
        {"model": checkpoints["dense"], "dtype": "bfloat16", "tensor_parallel_size": 2},
        {"model": checkpoints["packed"], "dtype": "bfloat16", "tensor_parallel_size": 2},
        VLLM_CPU_OMP_THREADS_BIND=f"{first}|{second}",
    )
    assert isinstance(dense, list)
    assert packed == dense


@pytest.mark.engines
def test_four_bits_serve_where_vllm_has_no_kernel_for_them(
    checkpoints: dict[str, Path], ask: Ask
) -> None:
    """In vLLM's library for processors without AVX-512, see ``engines/avx2``."""
    dense4, packed4, quantized = ask(
        {"model": checkpoints["dense4"], "dtype": "bfloat16"},
        {"model": checkpoints["packed4"], "dtype": "bfloat16"},
        {"model": checkpoints["quantized"], "dtype": "bfloat16"},
        path=(ROOT / "tests" / "engines" / "avx2",),
        ATEN_CPU_CAPABILITY="avx2",
        ONEDNN_MAX_CPU_ISA="AVX2",
    )
    assert isinstance(dense4, list)
    assert packed4 == dense4
    assert "has no attribute 'cpu_gemm_wna16'" in quantized


@pytest.mark.engines
def test_layers_of_every_kind_hold_the_slices_of_every_rank(plugin: Path) -> None:
    probe = ROOT / "tests" / "vllm_probe_layers.py"
    call([str(vllm_python()), str(probe)], PYTHONPATH=before_others(plugin), OMP_NUM_THREADS="1")


def newer(tensors: Tensors, config: dict) -> None:
    config["version"] += 1


def truncated(tensors: Tensors, config: dict) -> None:
    name = f"{DAMAGED}.weight_fractions"
    tensors[name] = tensors[name][:-5].clone()


def lacking(tensors: Tensors, config: dict) -> None:
    del tensors[f"{DAMAGED}.weight_fractions"]
    # The weight of a dense shard, too: the one of layer 0 that did not shrink.
    del tensors["model.layers.0.self_attn.k_proj.weight"]


def miscounted(tensors: Tensors, config: dict) -> None:
    tensors[f"{DAMAGED}.weight_packed"][0, 0] ^= 1


def unlisted(tensors: Tensors, config: dict) -> None:
    del config["linears"][DAMAGED]


WRONG = {
    newer: "config.json is of version 2 of dlp-sparse, and this dlp_plugin reads version 1",
    truncated: f"{DAMAGED}.weight_fractions is torch.uint8 [",
    lacking: "the checkpoint lacks model.layers.0.self_attn.k_proj.weight: fetch it or",
    miscounted: f"{DAMAGED}.weight_packed marks another number of weights than the ",
    unlisted: f"{DAMAGED}.weight_exponents is there, and config.json does not say so",
}


@pytest.mark.engines
def test_what_is_wrong_with_a_checkpoint_is_told(
    checkpoints: dict[str, Path], ask: Ask, tmp_path: Path
) -> None:
    folders = [changed(checkpoints["packed"], tmp_path / c.__name__, c) for c in WRONG]
    found = ask(*({"model": folder, "dtype": "bfloat16"} for folder in folders))
    for told, expected in zip(found, WRONG.values(), strict=True):
        assert expected in told


@pytest.mark.engines
def test_without_the_plugin_vllm_does_not_know_the_format(
    checkpoints: dict[str, Path], ask: Ask
) -> None:
    (told,) = ask({"model": checkpoints["packed"], "dtype": "bfloat16"}, VLLM_PLUGINS="")
    assert "Unknown quantization method: dlp-sparse. Must be one of [" in told
