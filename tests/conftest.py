"""The fixtures that the tests share; what is no fixture is in ``helpers.py``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from helpers import CALIBRATION_TEXT, SHIPPED, VOCABULARY, Logged, MakeModel, as_if_loaded
from loguru import logger
from processor import head
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from dlp_plugin.evaluation.text import calibration_set, read_tokens


def pytest_report_header() -> list[str]:
    return head()


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> MakeModel:
    """A Llama with three blocks whose importance differs, the same at every call."""

    def make(dtype: torch.dtype = torch.float32, **changes: object) -> LlamaForCausalLM:
        torch.manual_seed(0)
        settings: dict[str, object] = {
            "vocab_size": VOCABULARY,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "attn_implementation": "eager",  # what the host calibrates with
        }
        settings |= changes
        model = LlamaForCausalLM(LlamaConfig(**settings))
        with torch.no_grad():
            for depth, layer in enumerate(model.model.layers):
                for module in layer.modules():
                    if isinstance(module, torch.nn.Linear):
                        module.weight *= 1 + 0.3 * ((depth * 2) % 3)
        key = repr((dtype, settings))
        if key not in origins:  # the same model has the same name
            origins[key] = tmp_path_factory.mktemp("origin")
        return as_if_loaded(model.to(dtype), origins[key])

    origins: dict[str, Path] = {}
    return make


@pytest.fixture(scope="session")
def calibration() -> Dataset:
    """32 samples of 128 tokens of the text that the repository ships."""
    tokens = read_tokens(CALIBRATION_TEXT, AutoTokenizer.from_pretrained(SHIPPED))
    return calibration_set(tokens, 128, 32)


@pytest.fixture
def logged() -> Iterator[Logged]:
    """The messages that a test logs."""
    found = Logged()
    handler = logger.add(lambda message: found.records.append(message.record), level="INFO")
    yield found
    logger.remove(handler)
