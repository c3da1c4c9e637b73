"""vLLM with packed checkpoints: what it says with the plugin.

It runs in its environment, which the first run makes (see ``engines/environments.py``), with this
package installed beside it without what it requires.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from families import DEEPSEEK, EXPERTS, SIZES, SMALL_EXPERTS, make
from helpers import ROOT, SHIPPED, linears_of, random_samples, run
from llmcompressor.modifiers.quantization import QuantizationModifier
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DeepseekV3Config,
    GptOssConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen3MoeConfig,
)

from dlp_plugin import WandaPruningModifier
from dlp_plugin.checkpoints.packing import pack
from dlp_plugin.checkpoints.sparse_format import PARTS, decode, read_stored

sys.path.append(str(ROOT / "tests" / "engines"))
from environments import call, vllm_python

Tensors = dict[str, torch.Tensor]

PROMPTS = [list(range(3, 80)), [5, 17, 200, 3000, 45]]
# With this one the most likely token leads the second by 0.13 at the least, wherever one is
# generated: with most seeds two come within rounding of each other, and either may be chosen.
SEED = 37
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
        generator = torch.Generator().manual_seed(SEED)
        for name in ("model.layers.0.self_attn.k_proj", "model.layers.1.mlp.gate_proj"):
            weight = model.get_submodule(name).weight.data
            noise, exponents = torch.randn(2, *weight.shape, generator=generator)
            weight.copy_(noise * exponents.mul(4).exp2() * 0.1)
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
    built = shutil.ignore_patterns("_products.so")
    shutil.copytree(ROOT / "dlp_plugin", folder / "source" / "dlp_plugin", ignore=built)
    for file in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
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
        *jobs: dict[str, object],
        path: tuple[Path, ...] = (),
        prompts: list[list[int]] = PROMPTS,
        **environment: str,
    ) -> list[Any]:
        (folder / "jobs.json").write_text(
            json.dumps({"prompts": prompts, "jobs": jobs}, default=str)
        )
        probe = ROOT / "tests" / "engines" / "vllm_probe_packed.py"
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


# By how much a log-probability of the sparse run may miss that of the dense one. Sums are of the
# same float32 products in another order: 1.3e-5 was measured in float32 and 0 in bfloat16, which
# rounds them alike nearly always, and is 0.11 from float32 itself.
ROUNDING = {"float32": 1e-4, "bfloat16": 0.05}


def same(found: dict[str, Any], expected: dict[str, Any], dtype: str) -> bool:
    """Whether two runs chose the same tokens, with the same log-probabilities but for rounding."""
    pairs = [
        pair for said in zip(found["said"], expected["said"], strict=True) for pair in zip(*said)
    ]
    gaps = [abs(one - other) for (_, one), (_, other) in pairs]
    return all(one == other for (one, _), (other, _) in pairs) and max(gaps) < ROUNDING[dtype]


@pytest.mark.engines
def test_vllm_says_the_same_with_packed_checkpoints(checkpoints: dict[str, Path], ask: Ask) -> None:
    def job(name: str, dtype: str, **more: object) -> dict[str, object]:
        return {"model": checkpoints[name], "dtype": dtype, **more}

    dense, decoded, packed, single, packed_single, compiled, single4, packed4 = ask(
        job("dense", "bfloat16"),
        job("packed", "bfloat16", kernels="off"),
        job("packed", "bfloat16"),
        job("dense", "float32"),
        job("packed", "float32"),
        job("packed", "float32", enforce_eager=False),
        job("dense4", "float32"),
        job("packed4", "float32"),
        VLLM_CPU_CI_ENV="1",  # compiled means traced, which is where an operator fails
    )
    assert [len(prompt) for prompt in dense["said"]] == [len(ids) - 1 + 16 for ids in PROMPTS]
    assert decoded["said"] == dense["said"]  # to the bit
    assert same(packed, dense, "bfloat16")
    assert same(packed_single, single, "float32")
    assert same(compiled, single, "float32")
    assert same(packed4, single4, "float32")
    assert not same(packed4, single, "float32")
    assert share(decoded) < 0.01  # as of dense ones: in vLLM's own, out of sight
    assert 0.3 < share(packed) < 0.4
    assert 0.1 < share(packed4) < 0.2


def share(found: dict[str, Any]) -> float:
    """Of bfloat16, what the tensors of the Linears take, but for blocks that hold dense shards."""
    sizes = [of for name, of in found["bytes"].items() if not re.search(r"layers\.[01]\.", name)]
    return sum(held for held, _ in sizes) / sum(dense for _, dense in sizes)


# Of sizes that its kernels take
MIXTURE = {**SIZES, "hidden_size": 128, "head_dim": 32, "num_hidden_layers": 2}
LATENT = {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "kv_lora_rank": 512}
MIXTURES: dict[str, PreTrainedConfig] = {
    "mixtral": MixtralConfig(**MIXTURE, **EXPERTS),
    "qwen3_moe": Qwen3MoeConfig(**MIXTURE, **SMALL_EXPERTS),
    "deepseek_v3": DeepseekV3Config(
        **{**DEEPSEEK, **LATENT, "hidden_size": 128, "num_hidden_layers": 2, "n_group": 1},
        topk_method="noaux_tc",
    ),
    "gpt_oss": GptOssConfig(**{**MIXTURE, "head_dim": 64}, **EXPERTS),
}


@pytest.fixture(scope="session")
def mixtures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Mixtures as ``oneshot()`` prunes them to 70 %; in each folder ``pruned`` and ``packed``."""
    ignore = ["re:.*lm_head", "re:.*kv_b_proj"]
    found = {}
    for name, config in MIXTURES.items():
        folder = found[name] = tmp_path_factory.mktemp(name)
        make(config, folder / "origin").save_pretrained(folder / "source")
        model = AutoModelForCausalLM.from_pretrained(folder / "source", dtype=torch.bfloat16)
        stage = WandaPruningModifier(sparsity=0.7, targets=["Linear"], ignore=ignore)
        run(model, stage, random_samples(4), output_dir=str(folder / "pruned"))
        pack(folder / "pruned", folder / "packed")
    return found


def without_an_expert(tensors: Tensors, config: dict) -> None:
    for key in [key for key in tensors if ".experts.2.w1." in key]:
        del tensors[key]


@pytest.mark.engines
def test_vllm_says_the_same_with_packed_experts(
    mixtures: dict[str, Path], ask: Ask, tmp_path: Path
) -> None:
    """Linears are decoded too, so that it is the same to the bit."""
    prompts = [[3, 4, 5, 6, 7, 8, 9, 10], [5, 17, 200, 45]]
    folders = [folder / kind for folder in mixtures.values() for kind in ("pruned", "packed")]
    lacking = changed(mixtures["mixtral"] / "packed", tmp_path / "lacking", without_an_expert)
    *found, told = ask(
        *({"model": each, "dtype": "bfloat16", "kernels": "off"} for each in [*folders, lacking]),
        prompts=prompts,
    )
    for name, dense, packed in zip(mixtures, found[::2], found[1::2], strict=True):
        assert packed["said"] == dense["said"], name
    expert = "model.layers.0.block_sparse_moe.experts.2.w1"
    assert f"the checkpoint lacks {expert}.weight_packed, {expert}.weight_fractions" in told


@pytest.mark.engines
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two processes need two processors")
def test_vllm_says_the_same_in_two_processes(checkpoints: dict[str, Path], ask: Ask) -> None:
    # By itself vLLM has one process for each NUMA node.
    first, second, *_ = sorted(os.sched_getaffinity(0))
    dense, packed = ask(
        {"model": checkpoints["dense"], "dtype": "float32", "tensor_parallel_size": 2},
        {"model": checkpoints["packed"], "dtype": "float32", "tensor_parallel_size": 2},
        VLLM_CPU_OMP_THREADS_BIND=f"{first}|{second}",
    )
    assert same(packed, dense, "float32")
    assert 0.3 < share(packed) < 0.45  # with columns of half the length


@pytest.mark.engines
def test_processors_without_avx512_run_packed_checkpoints(
    checkpoints: dict[str, Path], ask: Ask
) -> None:
    """In vLLM's library for them, see ``engines/avx2``, which has no kernel for four bits."""
    dense, packed, dense4, decoded4, packed4, quantized = ask(
        {"model": checkpoints["dense"], "dtype": "bfloat16"},
        {"model": checkpoints["packed"], "dtype": "bfloat16", "kernels": "avx2"},
        {"model": checkpoints["dense4"], "dtype": "bfloat16"},
        {"model": checkpoints["packed4"], "dtype": "bfloat16", "kernels": "off"},
        {"model": checkpoints["packed4"], "dtype": "bfloat16", "kernels": "avx2"},
        {"model": checkpoints["quantized"], "dtype": "bfloat16"},
        path=(ROOT / "tests" / "engines" / "avx2",),
        ATEN_CPU_CAPABILITY="avx2",
        ONEDNN_MAX_CPU_ISA="AVX2",
    )
    assert same(packed, dense, "bfloat16")
    assert decoded4["said"] == dense4["said"]
    assert same(packed4, dense4, "bfloat16")
    assert 0.3 < share(packed) < 0.4
    assert 0.1 < share(packed4) < 0.2
    assert "has no attribute 'cpu_gemm_wna16'" in quantized


@pytest.mark.engines
def test_layers_of_every_kind_hold_the_slices_of_every_rank(plugin: Path) -> None:
    probe = ROOT / "tests" / "engines" / "vllm_probe_layers.py"
    call([str(vllm_python()), str(probe)], PYTHONPATH=before_others(plugin), OMP_NUM_THREADS="1")


def newer(tensors: Tensors, config: dict) -> None:
    config["version"] = 3


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
    newer: "config.json has version 3 of dlp-sparse, but this dlp_plugin reads up to version 2",
    truncated: f"{DAMAGED}.weight_fractions is torch.uint8 [",
    lacking: "the checkpoint lacks model.layers.0.self_attn.k_proj.weight: fetch it or",
    miscounted: f"{DAMAGED}.weight_packed marks ",
    unlisted: f"{DAMAGED}.weight_exponents, which config.json does not list",
}


TWICE = "the checkpoint is packed (dlp-sparse) and cannot be quantized when it is loaded "
ASKED = {
    f"{TWICE}(--quantization fp8): leave that out, or unpack": {"quantization": "fp8"},
    f"{TWICE}(quantization_config of model.layers.0.self_attn.qkv_proj)": {
        "quantization_config": {"linear": "fp8_per_tensor"}
    },
}


@pytest.mark.engines
def test_what_is_wrong_with_a_checkpoint_or_what_is_asked_of_it_is_told(
    checkpoints: dict[str, Path], ask: Ask, tmp_path: Path
) -> None:
    folders = [changed(checkpoints["packed"], tmp_path / c.__name__, c) for c in WRONG]
    found = ask(
        *({"model": folder, "dtype": "bfloat16"} for folder in folders),
        *({"model": checkpoints["packed"], **one} for one in ASKED.values()),
    )
    for told, expected in zip(found, [*WRONG.values(), *ASKED], strict=True):
        assert expected in told


@pytest.mark.engines
def test_without_the_plugin_vllm_does_not_know_the_format(
    checkpoints: dict[str, Path], ask: Ask
) -> None:
    (told,) = ask({"model": checkpoints["packed"], "dtype": "bfloat16"}, VLLM_PLUGINS="")
    assert "Unknown quantization method: dlp-sparse. Must be one of [" in told
