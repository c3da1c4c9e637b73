"""Zeros of checkpoints on disk, dense and packed, against the models in memory."""

import json
from pathlib import Path

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from conftest import linears_of, random_samples, run, zeros
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.pruning import WandaPruningModifier
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dlp_plugin import DLPModifier
from dlp_plugin.checkpoint import Zeros, inspect_checkpoint


def stage() -> WandaPruningModifier:
    return WandaPruningModifier(sparsity=0.6, targets=["Linear"], ignore=["re:.*lm_head"])


def test_a_dense_checkpoint(make_model, tmp_path: Path) -> None:
    dlp = DLPModifier()
    model = make_model(torch.bfloat16)
    run(model, [dlp, stage()], random_samples(), output_dir=str(tmp_path))
    done: list[float] = []
    found = inspect_checkpoint(tmp_path, done.append)
    assert sum(done) == pytest.approx(1)
    assert found.quantization is None
    assert found.bytes_on_disk == (tmp_path / "model.safetensors").stat().st_size
    assert list(found.blocks) == [block.name for block in dlp.plan.blocks]
    for name, linear in linears_of(model).items():
        if name != "lm_head":
            assert found.linears[name] == Zeros(linear.weight.numel(), zeros(linear))
    for block in dlp.plan.blocks:
        assert found.blocks[block.name].weights == block.weights
        assert found.blocks[block.name].sparsity == pytest.approx(block.sparsity, abs=0.02)
    assert found.outside["lm_head"].zeros == 0


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "strategy", "group"), [(4, "group", 64), (8, "channel", None)])
def test_a_packed_checkpoint_counts_what_it_stands_for(
    make_model, tmp_path: Path, symmetric: bool, bits: int, strategy: str, group: int | None
) -> None:
    weights = QuantizationArgs(
        num_bits=bits, symmetric=symmetric, strategy=strategy, group_size=group
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    gptq = GPTQModifier(ignore=["lm_head"], config_groups={"group_0": scheme})
    run(
        make_model(torch.bfloat16),
        [DLPModifier(), stage(), gptq],
        random_samples(),
        output_dir=str(tmp_path),
    )
    found = inspect_checkpoint(tmp_path)
    assert found.quantization == "pack-quantized"
    assert "model.layers.0.mlp.up_proj.weight_packed" in load_file(tmp_path / "model.safetensors")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    loaded(torch.zeros(1, 4, dtype=torch.int64))  # decompresses on the way
    for name, linear in linears_of(loaded).items():
        if name != "lm_head":
            assert found.linears[name] == Zeros(linear.weight.numel(), zeros(linear)), name
            assert found.linears[name].zeros > 0


def test_shards_and_ten_blocks_come_in_depth_order(tmp_path: Path) -> None:
    for shard in range(2):
        tensors = {f"model.layers.{i}.up.weight": torch.eye(2) for i in range(shard, 12, 2)} | {
            f"model.layers.{i}.norm.weight": torch.ones(2) for i in range(shard, 12, 2)
        }
        save_file(tensors, tmp_path / f"model-0000{shard + 1}-of-00002.safetensors")
    found = inspect_checkpoint(tmp_path)
    assert list(found.blocks) == [f"model.layers.{i}" for i in range(12)]
    assert set(found.blocks.values()) == {Zeros(4, 2)}


def test_a_folder_without_safetensors_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no .safetensors file"):
        inspect_checkpoint(tmp_path)


def test_a_quantized_weight_without_a_scheme_is_refused(tmp_path: Path) -> None:
    packed = {"model.layers.0.up.weight_packed": torch.zeros(2, 2, dtype=torch.int32)}
    save_file(packed, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ValueError, match="model.layers.0.up is quantized, but config.json"):
        inspect_checkpoint(tmp_path)
