"""What the benchmarks share: models and samples to measure on, times and peaks of memory."""

import time
from pathlib import Path

import torch
from datasets import Dataset
from llmcompressor.modifiers import Modifier
from pydantic import PrivateAttr
from transformers import AutoTokenizer

from dlp_plugin.comparison import memory
from dlp_plugin.evaluation.text import calibration_set, read_tokens

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "examples" / "small_model"
TEXT = ROOT / "examples" / "text" / "calibration.txt"
TEST_TEXT = ROOT / "examples" / "text" / "test.txt"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROUNDS = 3
# A Llama of 1.1 billion parameters
LLAMA = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
}


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
    """Make the peak of memory start anew; what is held now, in MB."""
    memory.reset_peak()
    return peak()


def peak() -> float:
    """Peak memory of the GPU, or without one of this process, since it was last reset, in MB."""
    found = memory.peak()
    assert found is not None, "peaks of memory are told by Linux"
    return found / 2**20
