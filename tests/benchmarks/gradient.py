"""What a step of the gradient costs, and what its constants are worth.

No part of the plans depends on time; the seconds are those of one thread beside nothing else.
Run by run.py; on its own only for a step of one case: python gradient.py CASE ROUNDS
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from common import DEVICE, ROUNDS, peak, reset_peak
from plans import plan
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3MoeConfig

from dlp_plugin.scoring.blocks import Block
from dlp_plugin.search import gradient, slopes
from dlp_plugin.search.masks import Masks
from dlp_plugin.search.slopes import Slopes

STEPS = 16
SIZES = {
    "vocab_size": 4096,
    "hidden_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 64,
}
# One row a variant: constant to value, everything else as it is
VARIANTS: dict[str, dict[str, float]] = {
    "as it is": {},
    "band 1.5 %": {"BAND": 0.015},
    "band 3 %": {"BAND": 0.03},
    "band 12 %": {"BAND": 0.12},
    "rate 0.02": {"RATE": 0.02},
    "rate 0.08": {"RATE": 0.08},
    "no momentum": {"MOMENTUM": 0.0, "RATE": 0.12},
    "momentum 0.85": {"MOMENTUM": 0.85, "RATE": 0.02},
    "512 tokens a step": {"TOKENS": 512, "TOGETHER": 512},
    "2048 tokens a step": {"TOKENS": 2048},
    "8 steps": {"STEPS": 8},
    "48 steps": {"STEPS": 48},
    "from DLP's plan, alpha 0.15": {"alpha": 0.15},
}


@contextmanager
def constants(values: Mapping[str, float]) -> Iterator[None]:
    """The search with other constants."""
    before = []
    for name, value in values.items():
        for module in (gradient, slopes):
            if hasattr(module, name):
                before.append((module, name, getattr(module, name)))
                setattr(module, name, value)
    try:
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


def tuning() -> dict[str, dict[str, float]]:
    """Divergence on the samples kept for it, and tokens run, on the shipped model at 70 %."""
    results = {}
    for variant, values in VARIANTS.items():
        with constants(values):
            steps = int(values.get("STEPS", STEPS))
            found = plan(alpha=values.get("alpha", 0.0), refine=steps).search
        results[variant] = {"divergence": found[-1].divergence, "tokens": found[-1].tokens}
    return results


def cases() -> dict[str, tuple[LlamaConfig | Qwen3MoeConfig, int]]:
    """Configurations, and tokens a step."""
    llama = {**SIZES, "intermediate_size": 1536}
    experts = {**SIZES, "moe_intermediate_size": 192, "num_experts_per_tok": 2}
    return {
        "dense": (LlamaConfig(**llama), 1024),
        "dense, 512 tokens": (LlamaConfig(**llama), 512),
        "dense, 2,048 tokens": (LlamaConfig(**llama), 2048),
        "dense, twice the blocks": (LlamaConfig(**llama | {"num_hidden_layers": 8}), 1024),
        "8 experts": (Qwen3MoeConfig(**experts, num_experts=8), 1024),
        "32 experts, a quarter as wide": (
            Qwen3MoeConfig(**experts | {"moe_intermediate_size": 48}, num_experts=32),
            1024,
        ),
        "32 experts": (Qwen3MoeConfig(**experts, num_experts=32), 1024),
        "128 experts": (Qwen3MoeConfig(**experts, num_experts=128), 1024),
    }


def step_costs() -> dict[str, dict[str, float]]:
    """Seconds and peak memory of a step, with the number of Linears and of weights."""
    results = {}
    for case in cases():
        found = {}
        # What malloc keeps of freed memory would count as held; giving it back takes time
        for rounds, environment in ((ROUNDS, {}), (0, {"MALLOC_MMAP_THRESHOLD_": "65536"})):
            output = subprocess.run(
                [sys.executable, __file__, case, str(rounds)],
                check=True,
                capture_output=True,
                text=True,
                env=os.environ | environment,
            ).stdout
            found |= json.loads(output.splitlines()[-1])
        results[case] = found
    return results


def measured(config: LlamaConfig | Qwen3MoeConfig, tokens: int, rounds: int) -> dict[str, float]:
    """One configuration with random weights: seconds, or without rounds the peak of memory."""
    from llmcompressor.modeling.moe.linearize import linearize_moe

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval().to(DEVICE)
    linearize_moe(model)
    blocks = [
        Block(
            f"model.layers.{place}",
            {
                f"model.layers.{place}.{name}": module
                for name, module in layer.named_modules()
                if isinstance(module, torch.nn.Linear)
            },
        )
        for place, layer in enumerate(model.model.layers)
    ]
    linears = {name: linear for block in blocks for name, linear in block.linears.items()}
    masks = Masks(linears, {name: torch.ones(m.in_features) for name, m in linears.items()})
    ids = torch.randint(config.vocab_size, (tokens // 256, 256))
    step = Slopes(model, blocks, masks, [{"input_ids": ids}])
    seconds, before = [], reset_peak()
    for number in range(rounds + 1):  # the first one warms up
        started = time.perf_counter()
        step.at(dict.fromkeys(linears, 0.5 + 0.01 * number), [0])
        seconds.append(time.perf_counter() - started)
    if not rounds:
        return {"peak megabytes": peak() - before}
    weights = sum(linear.weight.numel() for linear in linears.values())
    return {
        "seconds": statistics.median(seconds[1:]),
        "Linears": len(linears),
        "million weights": weights / 1e6,
    }


if __name__ == "__main__":
    case, rounds = sys.argv[1:]
    print(json.dumps(measured(*cases()[case], int(rounds))))
