"""What is saved is the source but for what has changed, and nothing of it is lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import QWEN3_NEXT, SIZES
from helpers import EVERY, ROOT, SHIPPED, Logged, MakeModel, command, prune, word_tokenizer
from input_kinds import changed, dense, fp8, saved, sharded
from packed_checkpoints import assert_same_bits, tensors_of
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    LlamaForCausalLM,
    Qwen3_5Config,
    Qwen3NextConfig,
)

from dlp_plugin import OneShotMagnitudeModifier, WandaPruningModifier
from dlp_plugin.checkpoints.inspect import inspect_checkpoint

MAGNITUDE = """
pruning_stage:
  pruning_modifiers:
    OneShotMagnitudeModifier: {sparsity: 0.5, targets: [Linear], ignore: ["re:.*lm_head"]}
"""
FOUR_BITS = """
    MaskedGPTQModifier:
      config_groups:
        all: {targets: [Linear], weights: {num_bits: 4, strategy: group, group_size: 32}}
      ignore: ["re:.*lm_head", "re:.*gate$"]
"""
REFUSED = {"do_sample": False, "temperature": 0.6, "top_p": 0.9, "eos_token_id": 2}
"""Generation settings that transformers does not save."""


@pytest.fixture
def oneshot(tmp_path: Path):
    """Runs the command on a folder and gives what it wrote; ``told`` is what it said."""

    def run(folder: Path, recipe: str = MAGNITUDE) -> Path:
        (tmp_path / "recipe.yaml").write_text(recipe)
        (tmp_path / "text.txt").write_text(" ".join(str(i * 7 % 250) for i in range(200)))
        data = ["--data", tmp_path / "text.txt", "--samples", 4, "--length", 16]
        output = tmp_path / "out"
        line = ["oneshot", folder, "--recipe", tmp_path / "recipe.yaml", *data]
        run.told = command(*line, "--output", output).output
        return output

    return run


@pytest.fixture
def adapter(tmp_path: Path):
    """Trains nothing, and saves an adapter of a folder's model."""

    def make(folder: Path, tokenizer: bool = False) -> Path:
        model = AutoModelForCausalLM.from_pretrained(folder)
        lora = LoraConfig(r=2, target_modules=["o_proj"], init_lora_weights=False)
        get_peft_model(model, lora).save_pretrained(tmp_path / "adapter")
        if tokenizer:
            word_tokenizer().save_pretrained(tmp_path / "adapter")
        return tmp_path / "adapter"

    return make


def with_extra_layers(folder: Path) -> Path:
    """A model beside whose blocks lie layers for predicting several tokens, in its first shard."""
    saved(Qwen3NextConfig(**QWEN3_NEXT), folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["mtp.fc.weight"] = torch.randn(64, 128).bfloat16()
    tensors["mtp.layers.0.mlp.up_proj.weight"] = torch.randn(96, 64).to(torch.float8_e4m3fn)
    tensors["mtp.norm.weight"] = torch.ones(64)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def extra(folder: Path) -> dict[str, torch.Tensor]:
    return {key: one for key, one in tensors_of(folder).items() if key.startswith("mtp.")}


class TestTensorsWithoutAPlace:
    def test_oneshot_carries_them_over(self, oneshot, tmp_path: Path) -> None:
        source = with_extra_layers(tmp_path / "source")
        output = oneshot(source)
        assert_same_bits(extra(output), extra(source))
        assert tensors_of(output).keys() == tensors_of(source).keys()
        index = json.loads((output / "model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == tensors_of(source).keys()
        again, info = AutoModelForCausalLM.from_pretrained(output, output_loading_info=True)
        assert not info["missing_keys"]
        assert int((again.model.layers[0].linear_attn.out_proj.weight == 0).sum()) == 64 * 64 // 2

    def test_engines_are_told_that_they_are_not_quantized(self, oneshot, tmp_path: Path) -> None:
        output = oneshot(with_extra_layers(tmp_path / "source"), MAGNITUDE + FOUR_BITS)
        config = json.loads((output / "config.json").read_text())
        ignored = config["quantization_config"]["ignore"]
        assert {"mtp.fc", "mtp.layers.0.mlp.up_proj"} <= set(ignored)
        assert "mtp.norm" not in ignored
        assert "mtp.layers.0.mlp.up_proj" in inspect_checkpoint(output).linears

    def test_quantized_ones_of_a_base_that_is_made_dense_are_told(
        self, oneshot, tmp_path: Path
    ) -> None:
        source = fp8(tmp_path / "source")
        tensors = load_file(source / "model.safetensors")
        tensors["mtp.fc.weight"] = torch.ones(4, 4).to(torch.float8_e4m3fn)
        tensors["mtp.fc.weight_scale_inv"] = torch.ones(1, 1)
        tensors["mtp.norm.weight"] = torch.ones(4)
        save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
        with pytest.MonkeyPatch.context() as patch:  # of a family that has such layers
            patch.setattr(LlamaForCausalLM, "_keys_to_ignore_on_load_unexpected", [r"^mtp\."])
            output = oneshot(source)
        assert extra(output).keys() == {"mtp.norm.weight"}
        assert "mtp.fc ...; to keep them, start from the dense" in oneshot.told

    def test_merge_carries_them_over(self, adapter, tmp_path: Path) -> None:
        source = with_extra_layers(tmp_path / "source")
        command("merge", adapter(source), tmp_path / "merged", "--allow-dense")
        assert_same_bits(extra(tmp_path / "merged"), extra(source))

    def test_the_class_that_the_configuration_names_is_loaded(
        self, oneshot, tmp_path: Path
    ) -> None:
        """transformers' class for causal language models leaves the vision tower out."""
        layers = {key: QWEN3_NEXT[key] for key in QWEN3_NEXT if key.startswith(("linear", "layer"))}
        vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2}
        config = Qwen3_5Config(
            text_config={**SIZES, **layers},
            vision_config={**vision, "out_hidden_size": 64, "patch_size": 8},
            image_token_id=255,
        )
        source = saved(config, tmp_path / "source", AutoModelForImageTextToText)
        output = oneshot(source, MAGNITUDE.replace("lm_head", "(lm_head|visual).*"))
        before, after = tensors_of(source), tensors_of(output)
        assert before.keys() == after.keys()
        visual = {key for key in before if "visual" in key}
        assert len(visual) > 30
        assert_same_bits({k: after[k] for k in visual}, {k: before[k] for k in visual})


class TestWhatLiesBeside:
    OTHERS = ("LICENSE", "README.md", "chat_template.json", "preprocessor_config.json")

    def with_others(self, folder: Path) -> Path:
        dense(folder)
        for name in self.OTHERS:
            (folder / name).write_text(f"{name} of the source\n")
        (folder / "pytorch_model.bin").write_bytes(b"weights of another kind")
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        old = {**settings, "tokenizer_class": "LlamaTokenizer", "some": {"order": [2, 1]}}
        (folder / "tokenizer_config.json").write_text(json.dumps(old))
        return folder

    def assert_same_bytes(self, one: Path, other: Path, *names: str) -> None:
        for name in names:
            assert (one / name).read_bytes() == (other / name).read_bytes(), name

    def test_oneshot_takes_it_along_byte_for_byte(self, oneshot, tmp_path: Path) -> None:
        source = self.with_others(tmp_path / "source")
        output = oneshot(source)
        names = {path.name for path in source.iterdir()} - {"model.safetensors"}
        assert {path.name for path in output.iterdir()} == {
            *names - {"pytorch_model.bin"},
            "model.safetensors",
            "recipe.yaml",
        }
        self.assert_same_bytes(source, output, *names - {"pytorch_model.bin", "README.md"})

    def test_the_model_card_says_once_that_it_is_the_source_s(
        self, oneshot, tmp_path: Path
    ) -> None:
        """After the front matter; pruned, then packed and unpacked, then pruned again."""
        source = dense(tmp_path / "source")
        (source / "README.md").write_text("---\nlicense: mit\n---\n\n# A model\n")
        pruned = oneshot(source).rename(tmp_path / "pruned")
        card = (pruned / "README.md").read_text()
        before, note, after = card.partition(
            "> This card describes the model before it was changed by dlp_plugin. Its figures do "
            "not hold for\n> these weights.\n\n"
        )
        assert (before, after) == ("---\nlicense: mit\n---\n\n", "# A model\n")
        command("pack", pruned, tmp_path / "packed")
        assert (tmp_path / "packed" / "README.md").read_text().count(note) == 1
        command("unpack", tmp_path / "packed", tmp_path / "unpacked")
        self.assert_same_bytes(pruned, tmp_path / "unpacked", "README.md")
        self.assert_same_bytes(pruned, oneshot(tmp_path / "packed"), "README.md")

    def test_merge_takes_the_tokenizer_that_was_trained_with(self, adapter, tmp_path: Path) -> None:
        source = self.with_others(tmp_path / "source")
        trained = adapter(source, tokenizer=True)
        command("merge", trained, tmp_path / "merged", "--allow-dense")
        tokenizer = ("tokenizer.json", "tokenizer_config.json")
        self.assert_same_bytes(trained, tmp_path / "merged", *tokenizer)
        self.assert_same_bytes(source, tmp_path / "merged", "LICENSE", "preprocessor_config.json")
        assert not (tmp_path / "merged" / "chat_template.json").exists()
        assert not (tmp_path / "merged" / "adapter_config.json").exists()

    def test_fields_that_only_old_readers_know_stay(self, adapter, tmp_path: Path) -> None:
        """Those of transformers 4 take 10000 where there is no rope_theta of its own."""
        source = dense(tmp_path / "source")
        config = json.loads((source / "config.json").read_text())
        del config["rope_parameters"], config["dtype"]
        old = {**config, "rope_theta": 500000.0, "torch_dtype": "bfloat16", "unknown_to_us": 1}
        (source / "config.json").write_text(json.dumps(old))
        command("merge", adapter(source), tmp_path / "merged", "--allow-dense")
        assert json.loads((tmp_path / "merged" / "config.json").read_text()) == old


def test_a_model_of_the_hub(tmp_path: Path) -> None:
    """Its files come from the cache, where a run before has put them; nothing is asked for."""
    source = with_extra_layers(tmp_path / "source")
    (source / "LICENSE").write_text("free")
    repository = tmp_path / "hub" / "models--some--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    (repository / "snapshots").mkdir()
    source.rename(repository / "snapshots" / "abc")
    (tmp_path / "recipe.yaml").write_text(MAGNITUDE)
    (tmp_path / "text.txt").write_text("7 8 9 " * 30)
    line = [sys.executable, "-m", "dlp_plugin", "oneshot", "some/model", "--recipe", "recipe.yaml"]
    line += ["--data", "text.txt", "--samples", "2", "--length", "16", "--output", "out"]
    offline = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    path = {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        line, cwd=tmp_path, env={**os.environ, **offline, **path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "LICENSE").read_text() == "free"
    assert len(extra(tmp_path / "out")) == 3


def test_what_has_changed_in_a_configuration_is_written(adapter, tmp_path: Path) -> None:
    """An adapter with a larger vocabulary."""
    source = dense(tmp_path / "source")
    changed(source, rope_theta=500000.0)
    model = AutoModelForCausalLM.from_pretrained(source)
    model.resize_token_embeddings(300)
    lora = LoraConfig(r=2, target_modules=["o_proj"], init_lora_weights=False)
    adapted = get_peft_model(model, lora)
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    tokenizer = word_tokenizer()
    tokenizer.add_tokens([f"new{i}" for i in range(300 - len(tokenizer))])
    tokenizer.save_pretrained(tmp_path / "adapter")
    command("merge", tmp_path / "adapter", tmp_path / "merged", "--allow-dense")
    before, after = (
        json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "merged")
    )
    assert after == {**before, "vocab_size": 300}


class TestGenerationSettings:
    """Many published checkpoints have some that transformers reads and will not save."""

    def test_oneshot_takes_them_along(self, oneshot, tmp_path: Path) -> None:
        source = dense(tmp_path / "source")
        (source / "generation_config.json").write_text(json.dumps(REFUSED))
        output = oneshot(source)
        assert json.loads((output / "generation_config.json").read_text()) == REFUSED

    @pytest.mark.parametrize("modifier", [WandaPruningModifier, OneShotMagnitudeModifier])
    def test_the_host_saves_what_has_an_effect(
        self, modifier: type, make_model: MakeModel, tmp_path: Path, logged: Logged
    ) -> None:
        model = make_model()
        for field, value in REFUSED.items():
            setattr(model.generation_config, field, value)
        prune(model, modifier(sparsity=0.5, **EVERY), output_dir=str(tmp_path / "out"))
        kept = json.loads((tmp_path / "out" / "generation_config.json").read_text())
        assert kept["eos_token_id"] == 2
        assert "temperature" not in kept
        assert "temperature 0.6, top_p 0.9" in logged("WARNING", "dlp_plugin")[0]

    def test_others_are_refused_before_the_work(
        self, make_model: MakeModel, tmp_path: Path
    ) -> None:
        model = make_model()
        model.generation_config.num_return_sequences = 3
        with pytest.raises(ValueError, match="cannot be saved .*Greedy methods.*generation_config"):
            prune(model, OneShotMagnitudeModifier(sparsity=0.5, **EVERY))
        assert int((model.model.layers[0].mlp.up_proj.weight == 0).sum()) == 0


class TestWhichFileHoldsTheWeights:
    """A single file beside an index: transformers takes the file, and so does all here."""

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        other = sharded(tmp_path / "other")
        source = SHIPPED
        folder = tmp_path / "model"
        folder.mkdir()
        for file in other.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        for name in ("config.json", "model.safetensors"):
            (folder / name).write_bytes((source / name).read_bytes())
        return folder

    def test_it_is_the_single_file(self, folder: Path, tmp_path: Path, logged: Logged) -> None:
        found = inspect_checkpoint(folder)
        assert found.linears == inspect_checkpoint(SHIPPED).linears
        assert "an index of other files" in logged("WARNING")[0]
        for file in folder.glob("model-*"):
            file.unlink()  # nobody needs them
        assert inspect_checkpoint(folder).linears == found.linears

    def test_pack_writes_that_model(self, folder: Path, oneshot, tmp_path: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        for key, tensor in tensors.items():
            if "proj" in key:
                tensor[:, ::2] = 0
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        command("pack", folder, tmp_path / "packed")
        assert not list((tmp_path / "packed").glob("*.index.json"))
        command("unpack", tmp_path / "packed", tmp_path / "unpacked")
        assert_same_bits(tensors_of(tmp_path / "unpacked"), tensors)
