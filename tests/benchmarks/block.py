"""One large block: what its statistic and its pruning by magnitude cost.

Run by run.py; on its own only for the peak memory of one way: python block.py WAY
"""

import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from common import ROUNDS, peak, reset_peak

from dlp_plugin.pruning.smallest import smallest
from dlp_plugin.scoring.scores import block_score

LLAMA_2_7B_BLOCK = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]


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


def sort(parts: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
    for weight, _ in parts.values():
        order = weight.abs().flatten().float().sort()
        mask = torch.zeros(weight.numel(), dtype=torch.bool)
        mask[order.indices[: int(weight.numel() * 0.7)]] = True


def select(parts: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
    for weight, _ in parts.values():
        smallest(weight, int(weight.numel() * 0.7))


STATISTIC: dict[str, Callable] = {
    "naive": naive,
    "median": block_score,
    "mean": lambda parts: block_score(parts, "mean"),
    "read once": read_once,
}
MAGNITUDE: dict[str, Callable] = {"sorting": sort, "OneShotMagnitudeModifier": select}
WAYS = STATISTIC | MAGNITUDE


def peak_megabytes(way: str) -> float:
    """Peak memory beyond the weights, in a process of its own."""
    command = [sys.executable, __file__, way]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return float(output.split()[-1])


def measure_peak(way: str) -> None:
    parts = block()
    before = reset_peak()
    WAYS[way](parts)
    print(peak() - before)


def statistic() -> dict[str, dict[str, float]]:
    parts = block()
    assert block_score(parts) == naive(parts)
    return side_by_side(STATISTIC, parts)


def magnitude() -> dict[str, dict[str, float]]:
    return side_by_side(MAGNITUDE, block())


def side_by_side(ways: dict[str, Callable], parts: dict) -> dict[str, dict[str, float]]:
    times: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(ROUNDS):
        for way, call in ways.items():
            started = time.perf_counter()
            call(parts)
            times[way].append(time.perf_counter() - started)
    seconds = {way: statistics.median(values) for way, values in times.items()}
    return {
        way: {
            "seconds": seconds[way],
            "peak megabytes": peak_megabytes(way),
        }
        for way in ways
    }


if __name__ == "__main__":
    measure_peak(sys.argv[1])
