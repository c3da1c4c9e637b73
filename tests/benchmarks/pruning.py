"""One Linear of each kind of a 7B model: what SparseGPT, ADMM and polish after Wanda take of it.

Run by run.py; on its own only for one way and shape: python pruning.py WAY OUT IN
"""

import json
import subprocess
import sys
import time

import torch
from common import DEVICE, finish, peak, reset_peak
from llmcompressor.modifiers.pruning.sparsegpt.sgpt_sparsify import sparsify_weight

from dlp_plugin.planning.structure import UNSTRUCTURED
from dlp_plugin.pruning.grams import DAMPENING
from dlp_plugin.pruning.least_squares import LeastSquares

SHAPES = {"attention": (4096, 4096), "up, gate": (11008, 4096), "down": (4096, 11008)}
SPARSITY = 0.7


def sparsegpt(linear: torch.nn.Linear, gram: torch.Tensor) -> None:
    sparsify_weight(linear, {linear: gram}, SPARSITY, 0, 0, 128, DAMPENING, False)


def admm(linear: torch.nn.Linear, gram: torch.Tensor) -> None:
    problem = LeastSquares(gram, DAMPENING)
    problem.polished(linear.weight, problem.pruned(linear.weight, SPARSITY, UNSTRUCTURED))


def polish(linear: torch.nn.Linear, gram: torch.Tensor) -> None:
    scores = linear.weight.abs() * gram.diagonal().sqrt()
    going = int(linear.in_features * SPARSITY)
    kept = scores > scores.kthvalue(going, dim=1, keepdim=True).values
    LeastSquares(gram, DAMPENING).polished(linear.weight, linear.weight * kept)


WAYS = {"SparseGPT": sparsegpt, "ADMM": admm, "polish": polish}


def one_linear() -> dict[str, dict[str, float]]:
    """Seconds and peak memory beyond weight and Gram matrix, each way in a process of its own."""
    results = {}
    for kind, shape in SHAPES.items():
        for way in WAYS:
            command = [sys.executable, __file__, way, *map(str, shape)]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            results[f"{kind}, {way}"] = json.loads(output.splitlines()[-1])
    return results


@torch.no_grad()
def measure(way: str, out: int, columns: int) -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(columns, out, bias=False, dtype=torch.bfloat16, device=DEVICE)
    inputs = torch.randn(2 * columns, columns, device=DEVICE)
    inputs += inputs.roll(1, 1) + inputs.mean(1, keepdim=True)  # neighbours alike, as in models
    gram = inputs.T @ inputs / len(inputs)
    del inputs
    small = torch.nn.Linear(256, 256, bias=False, dtype=torch.bfloat16, device=DEVICE)
    WAYS[way](small, gram[:256, :256].contiguous())  # kernels are loaded at first use
    finish()
    before, started = reset_peak(), time.perf_counter()
    WAYS[way](linear, gram)
    finish()
    print(json.dumps({"seconds": time.perf_counter() - started, "peak megabytes": peak() - before}))


if __name__ == "__main__":
    measure(sys.argv[1], *map(int, sys.argv[2:]))
