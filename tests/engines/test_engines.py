"""Checkpoints in the engines that are to run them, each in an environment of its own.

The first run makes the environments (see ``environments.py``): minutes and gigabytes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from environments import auto_gptq_python, call, vllm_python
from helpers import ROOT, SHIPPED, TEST_TEXT, linears_of, run
from llmcompressor.modifiers.pruning import WandaPruningModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from dlp_plugin import DLPModifier, MaskedGPTQModifier
from dlp_plugin.checkpoints.gptq_format import export_gptq
from dlp_plugin.checkpoints.inspect import zeros_lost
from dlp_plugin.evaluation.text import read_tokens, token_windows
from dlp_plugin.recovery import mask_updates, sparse_merge

pytestmark = pytest.mark.engines

HERE = Path(__file__).parent
NEW_TOKENS = 32


def shipped_model(dtype: torch.dtype | str = "auto") -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(SHIPPED, dtype=dtype)


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(SHIPPED)


@pytest.fixture(scope="session")
def prompts(tokenizer) -> torch.Tensor:
    """Eight windows of held-out text, ``[8, 64]``."""
    windows = token_windows(read_tokens(TEST_TEXT, tokenizer), 64)
    return torch.stack([window.flatten() for window in windows[:32:4]])


@pytest.fixture(scope="session")
def checkpoints(
    calibration: Dataset, tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """The shipped model pruned to 70 %, then packed to W4A16, then exported; and recovered."""
    folder = tmp_path_factory.mktemp("checkpoints")
    ignore = ["re:.*lm_head"]

    def quantization() -> MaskedGPTQModifier:
        return MaskedGPTQModifier(scheme="W4A16", targets=["Linear"], ignore=ignore)

    for name, last in {"pruned": [], "packed": [quantization()]}.items():
        pruning = WandaPruningModifier(sparsity=0.7, targets=["Linear"], ignore=ignore)
        run(
            shipped_model(),
            [DLPModifier(), pruning, *last],
            calibration,
            tokenizer=tokenizer,
            output_dir=str(folder / name),
        )
    export_gptq(folder / "packed", folder / "gptq")
    recover(folder / "pruned", folder / "merged", calibration, tokenizer)
    run(
        AutoModelForCausalLM.from_pretrained(folder / "merged", dtype="auto"),
        [quantization()],
        calibration,
        tokenizer=tokenizer,
        output_dir=str(folder / "recovered"),
    )
    return {name: folder / name for name in ("pruned", "packed", "gptq", "recovered")}


def recover(pruned: Path, output: Path, calibration: Dataset, tokenizer) -> None:
    """Train LoRA on a pruned checkpoint under its masks, merge and save."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(pruned, dtype=torch.float32)
    adapted = get_peft_model(model, LoraConfig(target_modules="all-linear"))
    mask_updates(adapted)
    adapters = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(adapters, lr=1e-3)
    for start in range(0, len(calibration), 8):
        ids = torch.tensor(calibration[start : start + 8]["input_ids"])
        adapted(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    sparse_merge(adapted).bfloat16().save_pretrained(output)
    tokenizer.save_pretrained(output)


@torch.inference_mode()
def reference(checkpoint: Path, token_ids: torch.Tensor) -> torch.Tensor:
    """Logits by transformers in float32, weights dequantized without rounding."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    return model(input_ids=token_ids).logits


def of_tokens(logits: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """Log-probability of every token but the first, ``[prompts, length - 1]``."""
    logprobs = logits[:, :-1].log_softmax(-1)
    return logprobs.gather(-1, token_ids[:, 1:, None])[..., 0]


Probe = Callable[[str, str], list[dict[str, list]]]

# vLLM's CPU build carries a library for every kind of x86-64 processor; the one for those
# without AVX-512 lacks the operator that multiplies by 4-bit weights.
FOUR_BITS = "cpu_gemm_wna16"
NO_FOUR_BITS = f"AttributeError: '_OpNamespace' '_C' object has no attribute '{FOUR_BITS}'"


@pytest.fixture(scope="session")
def vllm(
    checkpoints: dict[str, Path],
    prompts: torch.Tensor,
    tmp_path_factory: pytest.TempPathFactory,
) -> Probe:
    """What vLLM makes of a checkpoint in a dtype, in a process of its own.

    Where vLLM itself says that it has no 4-bit kernel for this processor, a 4-bit checkpoint
    must fail for want of it, and the test is expected to fail.
    """
    python, folder = vllm_python(), tmp_path_factory.mktemp("vllm")
    token_ids = folder / "prompts.json"
    token_ids.write_text(json.dumps(prompts.tolist()))

    def ask(script: str, *arguments: object, result: Path) -> Any:
        command = [python, HERE / script, *arguments, result]
        call([str(part) for part in command], HF_HUB_OFFLINE="1")
        return json.loads(result.read_text())

    has_four_bits = ask("vllm_kernel_probe.py", FOUR_BITS, result=folder / "kernel.json")

    @cache
    def found(name: str, dtype: str) -> list[dict[str, list]] | None:
        can = has_four_bits or name == "pruned"  # the others have 4 bits
        with nullcontext() if can else pytest.raises(RuntimeError, match=NO_FOUR_BITS):
            arguments = checkpoints[name], dtype, token_ids, NEW_TOKENS
            return ask("vllm_probe.py", *arguments, result=folder / f"{name}-{dtype}.json")
        return None

    def probe(name: str, dtype: str) -> list[dict[str, list]]:
        result = found(name, dtype)
        if result is None:
            pytest.xfail(f"vLLM's library for this processor has no 4-bit kernel ({FOUR_BITS})")
        return result

    return probe


def test_the_example_serves_with_its_options() -> None:
    script = ROOT / "examples" / "serve_with_vllm.py"
    line = [str(part) for part in (vllm_python(), script, SHIPPED, "--gpu-memory-utilization")]
    call([*line, "0.2", "--dtype", "float32"], HF_HUB_OFFLINE="1")
    with pytest.raises(RuntimeError, match=r"gpu_memory_utilization\n.* less than or equal to 1"):
        call([*line, "2"], HF_HUB_OFFLINE="1")


# How far vLLM may be from float32: mean and largest gap of a prompt token's
# log-probability, and by how much a greedy token's logit may miss the best one.
# Measured in the libraries for AVX2, AVX-512 and AVX-512 with bf16: float16 0.0019, 0.014
# and 0. bfloat16, which has three bits less, 0.017, 0.13 and 0.047 for dense weights, 0.021,
# 0.17 and 0.025 for 4-bit ones; there 0.035, 0.36 and 0.064 with AMX, where vLLM rounds the
# activations to 8 bits too (VLLM_CPU_INT4_W4A8). Other weights show: packed and pruned are
# 0.14 (mean) and 1.1 (largest) apart.
TOLERANCE = {"float16": (0.005, 0.05, 0.01), "bfloat16": (0.07, 0.8, 0.25)}


CASES = [(name, dtype) for name in ("pruned", "packed", "gptq") for dtype in TOLERANCE]


@pytest.mark.parametrize(("name", "dtype"), [*CASES, ("recovered", "float16")])
def test_vllm_agrees_with_transformers(
    checkpoints: dict[str, Path], prompts: torch.Tensor, vllm: Probe, name: str, dtype: str
) -> None:
    # The export is compared to what it was made from.
    source = checkpoints["packed" if name == "gptq" else name]
    mean, largest, margin = TOLERANCE[dtype]
    found = vllm(name, dtype)
    generated = torch.tensor([prompt["generated"] for prompt in found])
    assert generated.shape == (len(prompts), NEW_TOKENS)
    logits = reference(source, torch.cat([prompts, generated], dim=1))

    logprobs = torch.tensor([prompt["prompt_logprobs"] for prompt in found])
    gap = (logprobs - of_tokens(logits[:, : prompts.shape[1]], prompts)).abs()
    assert gap.mean() < mean
    assert gap.max() < largest

    # Greedy token by greedy token, given the same tokens before it: from a near tie on,
    # two free runs could differ for good.
    given = logits[:, prompts.shape[1] - 1 : -1]
    chosen = given.gather(-1, generated[..., None])[..., 0]
    best = given.max(dim=-1).values
    assert (best - chosen).max() <= margin
    assert (best == chosen).float().mean() > 0.95


def test_recovering_lost_no_zero_and_changed_the_rest(checkpoints: dict[str, Path]) -> None:
    lost = zeros_lost(checkpoints["pruned"], checkpoints["recovered"])
    assert len(lost) == 84
    assert not any(lost.values())
    merged = load_file(checkpoints["recovered"].with_name("merged") / "model.safetensors")
    pruned = load_file(checkpoints["pruned"] / "model.safetensors")
    name = "model.layers.5.mlp.up_proj.weight"
    assert (merged[name] != pruned[name]).any()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_vllm_runs_the_export_as_it_runs_its_source(vllm: Probe, dtype: str) -> None:
    assert vllm("gptq", dtype) == vllm("packed", dtype)


def test_the_tolerance_tells_other_weights(
    checkpoints: dict[str, Path], prompts: torch.Tensor
) -> None:
    pruned, packed = (
        of_tokens(reference(checkpoints[name], prompts), prompts) for name in ("pruned", "packed")
    )
    gap = (pruned - packed).abs()
    for mean, *_ in TOLERANCE.values():
        assert gap.mean() > 1.5 * mean


@pytest.fixture(scope="session")
def auto_gptq(
    prompts: torch.Tensor, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Path], torch.Tensor]:
    """Logits of a checkpoint by AutoGPTQ in float32."""
    python, folder = auto_gptq_python(), tmp_path_factory.mktemp("auto_gptq")
    token_ids, result = folder / "prompts.json", folder / "logits.safetensors"
    token_ids.write_text(json.dumps(prompts.tolist()))

    def probe(checkpoint: Path) -> torch.Tensor:
        script = str(HERE / "auto_gptq_probe.py")
        call(
            [str(python), script, str(checkpoint), str(token_ids), str(result)], HF_HUB_OFFLINE="1"
        )
        return load_file(result)["logits"]

    return probe


# Equal to the bit as measured; a matrix product may add up in another order elsewhere.
# The same weights rounded to bfloat16 are 0.04 away.
LOGIT_TOLERANCE = 1e-3


def test_auto_gptq_agrees_with_transformers(
    checkpoints: dict[str, Path], prompts: torch.Tensor, auto_gptq
) -> None:
    expected = reference(checkpoints["packed"], prompts)
    logits = auto_gptq(checkpoints["gptq"])
    torch.testing.assert_close(logits, expected, rtol=0, atol=LOGIT_TOLERANCE)


@pytest.mark.parametrize(
    ("dtype", "weights"),
    [
        # float32 scales, which float16 would round
        ("float32", {"num_bits": 4, "strategy": "group", "group_size": 64}),
        ("bfloat16", {"num_bits": 4, "symmetric": False, "strategy": "group", "group_size": 32}),
        ("bfloat16", {"num_bits": 8, "symmetric": False, "strategy": "channel"}),
        ("bfloat16", {"num_bits": 8, "strategy": "group", "group_size": 128}),
    ],
    ids=["float32 scales", "zero points", "zero points of 8 bits", "8 bits"],
)
def test_auto_gptq_reads_every_scheme(
    prompts: torch.Tensor, tokenizer, auto_gptq, tmp_path: Path, dtype: str, weights: dict
) -> None:
    model = shipped_model(getattr(torch, dtype))
    for linear in linears_of(model).values():
        linear.weight.data[:4].abs_()  # rows whose zero point is 0
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights))
    quantization = QuantizationModifier(ignore=["lm_head"], config_groups={"group_0": scheme})
    source = tmp_path / "packed"
    run(model, quantization, None, tokenizer=tokenizer, output_dir=str(source))
    export_gptq(source, tmp_path / "gptq")
    torch.testing.assert_close(
        auto_gptq(tmp_path / "gptq"), reference(source, prompts), rtol=0, atol=LOGIT_TOLERANCE
    )


def test_an_install_that_fails_says_why() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)failed with 1:.*no-such-requirement"):
        call([sys.executable, "-m", "pip", "install", "--no-index", "no-such-requirement"])
