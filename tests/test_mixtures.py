"""Packed mixtures of experts: small, and the model that was pruned, in every family's own names."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from families import FAMILIES, make
from helpers import random_samples, run
from packed_checkpoints import assert_same_bits, tensors_of
from transformers import PreTrainedModel

from dlp_plugin import MaskedGPTQModifier, SparseConfig, WandaPruningModifier, pack, unpack
from dlp_plugin.checkpoints.inspect import inspect_checkpoint, zeros_lost
from dlp_plugin.checkpoints.loading import load_stored
from dlp_plugin.checkpoints.packing import Packed

# Family to names in its files: of an expert's Linear, or of a layer's experts
EXPERT = {
    "mixtral": "model.layers.0.block_sparse_moe.experts.3.w1",
    "qwen3_moe": "model.layers.0.mlp.experts.3.gate_proj",
    "deepseek_v3": "model.layers.1.mlp.experts.3.gate_proj",
    "gpt_oss": "model.layers.0.mlp.experts.gate_up_proj",
}
ONE_BY_ONE = [name for name in EXPERT if name != "gpt_oss"]
W4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Checkpoints of families as the real ``oneshot()`` saves them in bfloat16, once each."""
    made: dict[tuple[str, bool], Path] = {}

    def of(name: str, quantized: bool = False) -> Path:
        if (name, quantized) not in made:
            folder = tmp_path_factory.mktemp(name)
            family = FAMILIES[name]
            make(family.config(), folder / "origin", family.kind).save_pretrained(folder / "source")
            model = family.kind.from_pretrained(folder / "source", dtype=torch.bfloat16)
            ignore = ["re:.*lm_head", *family.ignore]
            stages: list[object] = [
                WandaPruningModifier(sparsity=0.7, targets=["Linear"], ignore=ignore)
            ]
            if quantized:
                groups = {"group_0": {"targets": ["Linear"], "weights": W4}}
                stages.append(MaskedGPTQModifier(config_groups=groups, ignore=ignore))
            made[name, quantized] = folder / "pruned"
            run(model, stages, random_samples(4), output_dir=str(folder / "pruned"))
        return made[name, quantized]

    return of


def load(folder: Path, **arguments: object) -> PreTrainedModel:
    """All of a checkpoint, which is an error otherwise."""
    return load_stored(folder, attn_implementation="eager", **arguments)


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(torch.arange(48).reshape(3, 16)).logits


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def packed_of(source: Path, folder: Path) -> tuple[Path, Packed]:
    return folder / "packed", pack(source, folder / "packed")


@pytest.mark.parametrize("name", EXPERT)
def test_a_family_comes_back(name: str, pruned: Callable[..., Path], tmp_path: Path) -> None:
    source = pruned(name)
    packed, found = packed_of(source, tmp_path)
    # Named as in the source, a fused tensor's expert by its number
    fused = {f"{EXPERT[name]}.{i}" for i in range(4)} if name == "gpt_oss" else {EXPERT[name]}
    assert fused <= found.linears.keys()
    assert not any(re.search(r"\.(gate|router)$", linear) for linear in found.linears)
    assert found.dense == (3 if name == "deepseek_v3" else 0)  # kv_b_proj, which is ignored
    # A bit a weight, and a byte and a half for three in ten: 4.6 of 16 bits.
    assert found.bytes_after / found.bytes_before < 0.32
    assert config_of(packed)["version"] == 2  # which releases without packed experts refuse

    unpack(packed, tmp_path / "unpacked")
    assert_same_bits(tensors_of(tmp_path / "unpacked"), tensors_of(source))
    before, after = inspect_checkpoint(source, group=4), inspect_checkpoint(packed, group=4)
    assert after.linears == before.linears
    assert after.bytes_if_sparse == before.bytes_if_sparse
    for pair in ((source, packed), (packed, source)):
        assert set(zeros_lost(*pair).values()) == {0}

    expected = load(source)
    dense = load(packed, quantization_config=SparseConfig(dequantize=True))
    assert_same_bits(dense.state_dict(), expected.state_dict())
    assert torch.equal(logits(dense), logits(expected))
    dense.save_pretrained(tmp_path / "again")
    assert_same_bits(tensors_of(tmp_path / "again"), tensors_of(source))


def test_it_is_small_with_experts_counted(pruned: Callable[..., Path], tmp_path: Path) -> None:
    """All Linears of blocks take 0.30 of bfloat16, which attention alone would not bring about."""
    source = pruned("mixtral")
    packed, _ = packed_of(source, tmp_path)
    sizes = [
        sum(x.nbytes for key, x in tensors_of(folder).items() if "layers" in key and x.ndim)
        for folder in (source, packed)
    ]
    assert sizes[1] / sizes[0] < 0.32
