"""Folders of every kind that people bring, tiny, each with a tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from families import EXPERTS, NO_HEAD_DIM, SIZES, llava
from helpers import EVERY, prune, word_tokenizer
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GptOssConfig,
    LlamaConfig,
    MixtralConfig,
    PreTrainedConfig,
)

from dlp_plugin import MaskedGPTQModifier, WandaPruningModifier, pack
from dlp_plugin.checkpoints.gptq_format import export_gptq

LLAMA = {**SIZES, "hidden_size": 128, "intermediate_size": 128, "head_dim": 32}
LLAMA |= {"num_hidden_layers": 2}


def saved(config: PreTrainedConfig, folder: Path, kind: Any = AutoModelForCausalLM) -> Path:
    """A half empty model with random weights in bfloat16, and a tokenizer that knows numbers."""
    torch.manual_seed(0)
    model = kind.from_config(config).to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape)
        if parameter.ndim == 2 and "layers" in name:
            parameter.data[:, ::2] = 0
    model.save_pretrained(folder)
    tokenizer = word_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.eos_token = "1"  # which lm-evaluation-harness asks for
    tokenizer.save_pretrained(folder)
    return folder


def dense(folder: Path) -> Path:
    return saved(LlamaConfig(**LLAMA), folder)


def sharded(folder: Path) -> Path:
    dense(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="100kB")
    return folder


def tied(folder: Path) -> Path:
    return saved(LlamaConfig(**LLAMA, tie_word_embeddings=True), folder)


def pruned(folder: Path) -> Path:
    dense(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    prune(model, WandaPruningModifier(sparsity=0.7, **EVERY)).save_pretrained(folder)
    return folder


def packed(folder: Path) -> Path:
    pack(pruned(folder.with_name("pruned")), folder)
    return folder


def four_bits(folder: Path) -> Path:
    pruned(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    prune(model, MaskedGPTQModifier(scheme="W4A16", **EVERY)).save_pretrained(folder)
    return folder


def gptq(folder: Path) -> Path:
    export_gptq(four_bits(folder.with_name("for_gptq")), folder)
    return folder


def fp8(folder: Path) -> Path:
    """Blocks of 128 x 128 weights with a scale each, as DeepSeek publishes its models."""
    dense(folder)
    tensors = {}
    for key, tensor in load_file(folder / "model.safetensors").items():
        tensors[key] = tensor
        if tensor.ndim == 2 and "layers" in key:
            scale = tensor.float().abs().max() / 448
            tensors[key] = (tensor.float() / scale).to(torch.float8_e4m3fn)
            tensors[f"{key}_scale_inv"] = scale.expand(1, 1).clone()
    settings = {"activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    return quantized(folder, tensors, quant_method="fp8", **settings)


def mxfp4(folder: Path) -> Path:
    """Experts in 4-bit floats, as GPT-OSS is published."""
    saved(GptOssConfig(**{**SIZES, "intermediate_size": 64}, **EXPERTS, sliding_window=16), folder)
    tensors = {}
    generator = torch.Generator().manual_seed(0)
    for key, tensor in load_file(folder / "model.safetensors").items():
        if key.endswith(("experts.gate_up_proj", "experts.down_proj")):
            experts, columns, rows = tensor.shape
            shape = (experts, rows, columns // 32, 16)
            blocks = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
            tensors[f"{key}_blocks"] = blocks
            tensors[f"{key}_scales"] = torch.full(shape[:3], 122, dtype=torch.uint8)
        else:
            tensors[key] = tensor
    return quantized(folder, tensors, quant_method="mxfp4")


def bitsandbytes(folder: Path) -> Path:
    return quantized(dense(folder), quant_method="bitsandbytes", load_in_4bit=True)


def unknown(folder: Path) -> Path:
    return quantized(dense(folder), quant_method="of-tomorrow")


def vision_language(folder: Path) -> Path:
    return saved(llava(), folder, AutoModelForImageTextToText)


def mixture(folder: Path) -> Path:
    return saved(MixtralConfig(**NO_HEAD_DIM, **EXPERTS), folder)


def custom_code(folder: Path) -> Path:
    """A Llama by another name, whose code lies beside it."""
    dense(folder)
    (folder / "modeling_own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    code = {"AutoConfig": "OwnConfig", "AutoModelForCausalLM": "OwnForCausalLM"}
    changed(
        folder,
        model_type="own",
        architectures=["OwnForCausalLM"],
        auto_map={auto: f"modeling_own.{name}" for auto, name in code.items()},
    )
    return folder


def damaged(folder: Path) -> Path:
    file = dense(folder) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    return folder


def quantized(
    folder: Path, tensors: dict[str, torch.Tensor] | None = None, **settings: object
) -> Path:
    if tensors is not None:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    changed(folder, quantization_config=settings)
    return folder


def changed(folder: Path, **fields: object) -> None:
    """Other fields in a folder's config.json."""
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}, indent=2))


KINDS: dict[str, Callable[[Path], Path]] = {
    "dense": dense,
    "sharded": sharded,
    "tied": tied,
    "packed": packed,
    "4 bits": four_bits,
    "GPTQ": gptq,
    "FP8": fp8,
    "MXFP4": mxfp4,
    "bitsandbytes": bitsandbytes,
    "unknown": unknown,
    "vision-language": vision_language,
    "mixture": mixture,
    "custom code": custom_code,
    "damaged": damaged,
}
