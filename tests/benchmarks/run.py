"""What scoring costs: python tests/benchmarks/run.py [--json results.json]

Ratios of what is measured side by side in this one run, medians of several rounds.
"""

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from llmcompressor import oneshot
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from loguru import logger
from pydantic import PrivateAttr
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from dlp_plugin import DLPModifier
from dlp_plugin.scores import block_score
from dlp_plugin.text import calibration_set, read_tokens

ROOT = Path(__file__).parents[2]
LLAMA_2_7B_BLOCK = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]
ROUNDS = 5


def block() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Seven Linears with 202 million bf16 weights, and norms of their channels."""
    generator = torch.Generator().manual_seed(0)
    return {
        f"linear{i}": (
            torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator),
            torch.rand(shape[1], generator=generator) * 10,
        )
        for i, shape in enumerate(LLAMA_2_7B_BLOCK)
    }


def naive(parts: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> float:
    scores = [(w.abs().float() * norms).flatten() for w, norms in parts.values()]
    return torch.cat(scores).median().item()


def read_once(parts: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
    for weight, _ in parts.values():
        weight.view(torch.int64).amax()


WAYS: dict[str, Callable] = {
    "naive": naive,
    "median": block_score,
    "mean": lambda parts: block_score(parts, "mean"),
    "read once": read_once,
}


def peak_megabytes(way: str) -> float:
    """Peak memory beyond the weights, in a process of its own."""
    command = [sys.executable, __file__, "--peak", way]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return float(output.split()[-1])


def measure_peak(way: str) -> None:
    parts = block()
    before = reset_peak()
    WAYS[way](parts)
    print(peak() - before)


def reset_peak() -> float:
    """Make this process's peak memory start anew (Linux); what it holds now, in MB."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def peak() -> float:
    """Peak memory of this process since it was last reset, in MB."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status).group(1)) / 1024


def statistic() -> dict[str, dict[str, float]]:
    parts = block()
    assert block_score(parts) == naive(parts)
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(ROUNDS):
        for way, call in WAYS.items():
            started = time.perf_counter()
            call(parts)
            times[way].append(time.perf_counter() - started)
    seconds = {way: statistics.median(values) for way, values in times.items()}
    return {
        way: {
            "seconds": seconds[way],
            "ratio": seconds[way] / seconds["naive"],
            "peak_megabytes": peak_megabytes(way),
        }
        for way in WAYS
    }


class Stamp(Modifier):
    """Notes the time between two epochs."""

    _time: float = PrivateAttr(default=0.0)

    def on_initialize(self, state, **kwargs) -> bool:
        return True

    def on_calibration_start(self, state, event, **kwargs) -> None:
        self._time = time.perf_counter()


class Nothing(Stamp):
    """An epoch of the host in which no modifier does anything: two passes a block."""

    requires_calibration_data: bool = True


def stages() -> dict[str, dict[str, float]]:
    folder = ROOT / "examples" / "small_model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = ROOT / "examples" / "text" / "calibration.txt"
    dataset = calibration_set(read_tokens(text, tokenizer), 256, 128)
    names = ["no modifier", "DLP", "Wanda", "SparseGPT"]
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(ROUNDS):
        common = {"sparsity": 0.7, "targets": ["Linear"], "ignore": ["re:.*lm_head"]}
        stamps = [Stamp() for _ in range(5)]
        work = [
            Nothing(),
            DLPModifier(),
            WandaPruningModifier(**common),
            SparseGPTModifier(**common),
        ]
        recipe = [stamps[0]]
        for modifier, stamp in zip(work, stamps[1:], strict=True):
            recipe += [modifier, stamp]
        oneshot(
            model=str(folder),
            recipe=recipe,
            dataset=dataset,
            tokenizer=tokenizer,
            num_calibration_samples=len(dataset),
            max_seq_length=256,
            shuffle_calibration_samples=False,
        )
        for name, start, end in zip(names, stamps, stamps[1:], strict=False):
            times[name].append(end._time - start._time)
    seconds = {name: statistics.median(values) for name, values in times.items()}
    return {
        name: {"seconds": seconds[name], "ratio": seconds[name] / seconds["Wanda"]}
        for name in names
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="file to write the results to")
    parser.add_argument("--peak", choices=WAYS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak:
        measure_peak(arguments.peak)
        return
    logger.remove()
    results = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
        "statistic": statistic(),
        "stages": stages(),
    }
    console = Console()
    table = Table("way", "seconds", "to naive", "peak MB", title="Llama-2-7B block, one score")
    for way, found in results["statistic"].items():
        ratio, peak = f"{found['ratio']:.3f}", f"{found['peak_megabytes']:.0f}"
        table.add_row(way, f"{found['seconds']:.3f}", ratio, peak)
    console.print(table)
    table = Table("epoch", "seconds", "to Wanda", title="shipped model, 128 samples of 256 tokens")
    for name, found in results["stages"].items():
        table.add_row(name, f"{found['seconds']:.2f}", f"{found['ratio']:.3f}")
    console.print(table, results["machine"])
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
