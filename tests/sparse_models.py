"""Tiny packed models that run as they are packed, and the dense ones that they stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import SIZES, make
from helpers import word_tokenizer
from packed_checkpoints import prune_rows
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from dlp_plugin import SparseConfig, pack
from dlp_plugin.engines.linear import SparseLinear
from dlp_plugin.kernels.products import available

needs_kernels = pytest.mark.skipif(available() is not None, reason=str(available()))
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="it would go to the GPU")
UP = "model.layers.0.mlp.up_proj"
REMEDY = r"load (the model|it) with quantization_config=dlp_plugin\.SparseConfig\(dequantize=True\)"
IDS = torch.arange(48).reshape(3, 16)


def load(folder: Path, **arguments: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, **arguments)


def dense(folder: Path, **arguments: Any) -> PreTrainedModel:
    return load(folder, quantization_config=SparseConfig(dequantize=True), **arguments)


def sparse_of(model: torch.nn.Module) -> dict[str, SparseLinear]:
    return {n: module for n, module in model.named_modules() if isinstance(module, SparseLinear)}


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(IDS).logits


def llama(folder: Path, dtype: torch.dtype = torch.bfloat16, **changes: object) -> PreTrainedModel:
    """Three blocks with biases, of columns that are no whole words."""
    settings = {**SIZES, "intermediate_size": 100, "attention_bias": True, **changes}
    return prune_rows(make(LlamaConfig(**settings), folder)).to(dtype)


def packed_llama(folder: Path) -> Path:
    """It, with a tokenizer, in ``folder / "packed"`` beside ``folder / "source"``."""
    llama(folder / "origin").save_pretrained(folder / "source")
    word_tokenizer().save_pretrained(folder / "source")
    pack(folder / "source", folder / "packed")
    return folder / "packed"
