"""What the benchmarks share: models and samples to measure on, times and peaks of memory."""

import re
import time
from pathlib import Path

import torch
from datasets import Dataset
from llmcompressor.modifiers import Modifier
from pydantic import PrivateAttr
from transformers import AutoTokenizer

from dlp_plugin.evaluation.text import calibration_set, read_tokens

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "examples" / "small_model"
TEXT = ROOT / "examples" / "text" / "calibration.txt"
TEST_TEXT = ROOT / "examples" / "text" / "test.txt"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROUNDS = 3


class Stamp(Modifier):
    """Notes the time between two epochs."""

    _time: float = PrivateAttr(default=0.0)

    def on_initialize(self, state, **kwargs) -> bool:
        return True

    def on_calibration_start(self, state, event, **kwargs) -> None:
        self._time = time.perf_counter()


def samples(count: int, length: int) -> Dataset:
    tokens = read_tokens(TEXT, AutoTokenizer.from_pretrained(SHIPPED))
    return calibration_set(tokens * (count * length // len(tokens) + 1), length, count)


def finish() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def reset_peak() -> float:
    """Make this process's peak memory start anew (Linux); what it holds now, in MB."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def peak() -> float:
    """Peak memory of this process since it was last reset, in MB."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status).group(1)) / 1024
