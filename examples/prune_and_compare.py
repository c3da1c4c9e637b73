"""The full job on one model: dense, uniform 70 %, DLP 70 %, saved, loaded again.

    python examples/prune_and_compare.py                      # the small model shipped here
    python examples/prune_and_compare.py MODEL --calibration a.txt --test b.txt

MODEL is a folder or an id on the hub; the texts are files or datasets.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from llmcompressor import oneshot
from loguru import logger
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from dlp_plugin import last_plans
from dlp_plugin.evaluate import perplexity
from dlp_plugin.text import calibration_set, read_tokens, token_windows

HERE = Path(__file__).parent
RECIPES = HERE.parent / "recipes"
SAMPLES = 128


def sparsity_of(model: torch.nn.Module) -> float:
    """Zeros among the weights of all Linears but the head."""
    head = model.get_output_embeddings()
    linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    zeros = sum(int((linear.weight == 0).sum()) for linear in linears)
    return zeros / sum(linear.weight.numel() for linear in linears)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default=str(HERE / "small_model"))
    parser.add_argument("--calibration", default=str(HERE / "text" / "calibration.txt"))
    parser.add_argument("--test", default=str(HERE / "text" / "test.txt"))
    parser.add_argument("--length", type=int, default=256, help="tokens per sample and window")
    parser.add_argument("--output", type=Path, default=Path("pruned_model"))
    arguments = parser.parse_args()
    if arguments.output.exists():
        parser.error(f"--output {arguments.output} exists already; name another folder")

    logger.disable("llmcompressor.utils.metric_logging")
    logger.remove()
    logger.add(sys.stderr, level="WARNING")  # of the host's log, the warnings
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    tokens = read_tokens(arguments.calibration, tokenizer)
    dataset = calibration_set(tokens, arguments.length, SAMPLES)
    windows = token_windows(read_tokens(arguments.test, tokenizer), arguments.length)

    def load(folder: str | Path) -> torch.nn.Module:
        return AutoModelForCausalLM.from_pretrained(folder, dtype="auto")

    def prune(recipe: str, **save: str) -> torch.nn.Module:
        return oneshot(
            model=arguments.model,
            recipe=str(RECIPES / recipe),
            tokenizer=tokenizer,
            dataset=dataset,
            num_calibration_samples=len(dataset),
            max_seq_length=arguments.length,
            shuffle_calibration_samples=False,
            **save,
        )

    steps = {
        "dense": lambda: load(arguments.model),
        "uniform": lambda: prune("uniform_wanda.yaml"),
        "DLP": lambda: prune("dlp_wanda.yaml", output_dir=str(arguments.output)),
        "DLP, loaded again": lambda: load(arguments.output),
    }
    table = Table("", "sparsity", "perplexity", "to dense", "seconds", title=arguments.model)
    dense = 0.0
    for name, step in steps.items():
        started = time.time()
        model = step()
        seconds = time.time() - started
        value = perplexity(model, windows)
        dense = dense or value
        zeros = sparsity_of(model)
        row = f"{zeros:.4f}", f"{value:.3f}", f"{value / dense:.3f}", f"{seconds:.1f}"
        table.add_row(name, *row)
        if name == "DLP":
            (plan,) = last_plans()
            plan.save(arguments.output / "dlp_plan.json")
            plan.plot(arguments.output / "dlp_plan.png")

    console = Console()
    console.print(plan.table(), table)
    console.print(f"saved in {arguments.output}, with dlp_plan.json and dlp_plan.png")


if __name__ == "__main__":
    main()
