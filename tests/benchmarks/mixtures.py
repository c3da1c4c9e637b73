"""What the number of experts costs: python tests/benchmarks/mixtures.py

One block of a Qwen3-MoE of random weights, with 8, 64 and 128 experts of one width, of which a
token is sent to 4: seconds and peak memory of every stage, in a process each, through the real
``oneshot()``, and of loading the packed checkpoint in transformers. With one width the work grows
with the experts, so what an expert costs must not. With one total of weights it would: every
narrower expert still has a Gram matrix of its own. Seconds as in ``costs.py``.
"""

import argparse
import json
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from costs import cost_of, in_a_process, random_model, timed_call
from llmcompressor.modeling.moe.linearize import linearize_moe
from loguru import logger
from record import add, here
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import dlp_plugin

PART = "experts"
EXPERTS = (8, 64, 128)
SIZES = {
    "vocab_size": 256,
    "hidden_size": 256,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 4,
}
STAGES = ("scoring", "a step of refine", "Wanda", "SparseGPT", "ADMM", "loading packed")
SAMPLES = 2


def measured(stage: str, experts: int) -> dict[str, float]:
    """What a stage costs on a block with so many experts."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        config = Qwen3MoeConfig(num_experts=experts, dtype=torch.bfloat16, **SIZES)
        model = random_model(Qwen3MoeForCausalLM, config, folder / "origin")
        if stage != "loading packed":
            return cost_of(stage, linearize_moe(model), SAMPLES, folder)
        for weight in model.model.layers.parameters():
            if weight.ndim > 1:
                weight.data.masked_fill_(weight.abs() < 0.0168, 0)  # 60 %
        model.save_pretrained(folder / "source")
        del model
        dlp_plugin.pack(folder / "source", folder / "packed")
        return timed_call(lambda: AutoModelForCausalLM.from_pretrained(folder / "packed"))


def show(results: dict[str, dict[str, dict[str, float]]]) -> Table:
    """A row per stage: seconds, milliseconds an expert and peak of each number of experts."""
    columns = [f"{experts} experts" for experts in EXPERTS]
    rows = Table("s (ms an expert), peak MB", *columns, title=PART)
    for stage, found in results.items():
        cells = [
            f"{one['seconds']:.2f} ({1000 * one['seconds'] / int(experts):.0f}), "
            f"{one['peak megabytes']:.0f}"
            for experts, one in found.items()
        ]
        rows.add_row(stage, *cells)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="file to add the results to")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    logger.remove()
    torch.set_num_threads(1)
    if arguments.measure:
        stage, experts = arguments.measure
        print(json.dumps(measured(stage, int(experts))))
        return
    facts = here(threads=1)
    results = {
        stage: {str(n): in_a_process(stage, n, script=__file__) for n in EXPERTS}
        for stage in STAGES
    }
    Console().print(show(results))
    if arguments.json:
        add(arguments.json, {PART: {**facts, "results": results}})


if __name__ == "__main__":
    main()
