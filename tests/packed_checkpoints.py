"""Pruned checkpoints to pack, and tensors compared bit by bit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from helpers import VOCABULARY, as_if_loaded, linears_of, run
from llmcompressor.modifiers.quantization import QuantizationModifier
from safetensors.torch import load_file
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def prune_rows(model: torch.nn.Module, sparsity: float = 0.7) -> torch.nn.Module:
    """Zero the smallest weights of every row of the blocks' Linears."""
    for name, linear in linears_of(model).items():
        if "layers" in name:
            size = linear.weight.data.abs().float()
            order = size.argsort(dim=1, stable=True)[:, : round(sparsity * size.shape[1])]
            linear.weight.data.scatter_(1, order, 0)
    return model


def quantize(model: torch.nn.Module, folder: Path, **settings: object) -> Path:
    """Save a model as the real ``oneshot()`` packs it, 4 bits in groups of 32."""
    ignore = settings.pop("ignore", ["lm_head"])
    args = QuantizationArgs(**{"num_bits": 4, "strategy": "group", "group_size": 32, **settings})
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    modifier = QuantizationModifier(ignore=ignore, config_groups={"group_0": scheme})
    run(model, modifier, None, output_dir=str(folder))
    return folder


def mixture_of_experts(origin: Path) -> torch.nn.Module:
    """A tiny one, pruned, its experts and routers too."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=4,
        num_experts_per_tok=2,
    )
    model = prune_rows(as_if_loaded(Qwen3MoeForCausalLM(config), origin))
    for name, value in model.named_parameters():
        if "mlp" in name:
            value.data[..., ::2] = 0
    return model


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint."""
    return {
        key: tensor
        for file in sorted(folder.glob("*.safetensors"))
        for key, tensor in load_file(file).items()
    }


def assert_same_bits(
    found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]
) -> None:
    """The same names, dtypes, shapes and bits."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        other = found[name]
        assert (other.dtype, other.shape) == (tensor.dtype, tensor.shape), name
        bits = BITS[tensor.itemsize]
        assert torch.equal(other.contiguous().view(bits), tensor.contiguous().view(bits)), name
