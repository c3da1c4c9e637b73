"""What scoring, pruning and training cost: python tests/benchmarks/run.py [--only PART]

The statistic of one large block, its pruning by magnitude, the epochs of the stages, how the
cost of an epoch grows, a step of training under masks, and three parts without times: scoring
on fewer samples, steps and tokens of a refined plan, and searches from several starts; the
gradient with other constants, and what a step of it costs; one Linear pruned. Ratios of what is
measured side by side in this one run, medians of several rounds. Where there is a CUDA device,
the epochs, on a larger model, the training and the one Linear run on it.
"""

import argparse
from pathlib import Path

from block import magnitude, statistic
from epochs import growth, stages_by_length, stages_that_repair
from gradient import step_costs, tuning
from loguru import logger
from plans import fewer_samples, refining, search
from pruning import one_linear
from record import add, here
from recovery import recovery
from rich.console import Console
from rich.table import Table
from training import training

PARTS = {
    "statistic": statistic,
    "magnitude": magnitude,
    "stages": stages_by_length,
    "stages that repair": stages_that_repair,
    "growth": growth,
    "training": training,
    "samples": fewer_samples,
    "refining": refining,
    "search": search,
    "tuning": tuning,
    "steps": step_costs,
    "one Linear": one_linear,
    "recovery by pruner": recovery,
}
BASES = {
    "statistic": "naive",
    "magnitude": "sorting",
    "stages": "bare forward pass",
    "stages that repair": "SparseGPT",
    "training": "LoRA",
}


def show(console: Console, title: str, results: dict, base: str) -> None:
    """One row per result, one column per quantity, and its ratio to the base."""
    if title == "search":
        for start, path in results.items():
            ends = [path[place]["divergence"] for place in (0, -1)]
            console.print(f"{start}: divergence {ends[0]:.3f} -> {ends[1]:.3f}")
        return
    names = list(next(iter(results.values())))
    if base in names:  # ratios within a row
        table = Table("", *names, title=title)
        for row, found in results.items():
            cells = [
                f"{found[n]:.2f} s ({found[n] / found[base]:.2f})" if n in found else ""
                for n in names
            ]
            table.add_row(row, *cells)
    elif "seconds" not in names:
        table = Table("", *names, title=title)
        for row, found in results.items():
            table.add_row(row, *(f"{value:.4f}" for value in found.values()))
    else:  # ratios of the first column to a row's
        table = Table("", *names, f"to {base}", title=title)
        for row, found in results.items():
            ratio = found["seconds"] / results[base]["seconds"]
            table.add_row(row, *(f"{value:.2f}" for value in found.values()), f"{ratio:.2f}")
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--json",
        type=Path,
        help="file to add the results to, e.g. tests/benchmarks/results/run.json",
    )
    parser.add_argument("--only", choices=PARTS, help="one part of the suite")
    arguments = parser.parse_args()
    logger.remove()
    console = Console()
    for part in [arguments.only] if arguments.only else PARTS:
        facts, found = here(), PARTS[part]()
        show(console, part, found, BASES.get(part, next(iter(found))))
        if arguments.json:
            add(arguments.json, {part: {**facts, "results": found}})
    console.print(", ".join(str(facts[key]) for key in ("processor", "cores", "threads", "commit")))


if __name__ == "__main__":
    main()
