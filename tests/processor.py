"""What the tests run on: the processor, what holds them to less than it has, and the host."""

import os
import sys
from importlib.metadata import version
from pathlib import Path

import torch

from dlp_plugin.precision import is_native

sys.path.append(str(Path(__file__).parent / "benchmarks"))
from record import instruction_sets, processor

HOLDING = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA")
"""Variables by which torch's own kernels and oneDNN leave instructions unused."""
HOST = ("llmcompressor", "compressed-tensors", "transformers")


def head() -> list[str]:
    """Lines for the head of every run."""
    held = [f"{name}={os.environ[name]}" for name in HOLDING if os.environ.get(name)]
    if "engines/avx2" in os.environ.get("PYTHONPATH", ""):
        held.append("vLLM's plugin for AVX2")
    computes = "bfloat16" if is_native(torch.bfloat16) else "float32"
    return [
        f"processor: {processor()} ({', '.join(instruction_sets())}), "
        + (f"imitating another by {', '.join(held)}" if held else "as it is"),
        f"torch: kernels for {torch.backends.cpu.get_cpu_capability()}, "
        f"oneDNN for {os.environ.get('ONEDNN_MAX_CPU_ISA') or 'all there is'}, "
        f"models of bfloat16 compute in {computes}",
        "host: " + ", ".join(f"{name} {version(name)}" for name in HOST),
    ]
