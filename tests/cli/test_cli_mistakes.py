"""The terminal tells a mistake in one message, before the work where that can be."""

import json
import sys
from pathlib import Path

import pytest
import torch
from helpers import CALIBRATE, CALIBRATION_TEXT, ROOT, SHIPPED, command
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from dlp_plugin.cli import app
from dlp_plugin.cli.common import joined_processes


def test_more_processes_than_accelerators(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    with (
        pytest.raises(ValueError, match="started 2 processes, but this machine has 1 acc"),
        joined_processes(),
    ):
        pass


class TestMistakesAreToldInOneMessage:
    def one_line(self, *arguments: object) -> str:
        """The message, which is one, and names no place in the code."""
        result = command(*arguments, code=1)
        assert "Traceback" not in result.output
        (line,) = [line for line in result.stderr.splitlines() if line.startswith("error:")]
        return line

    def pruning(self, recipe: Path, *more: object, output: str = "out") -> str:
        data = [*CALIBRATE, "--output", recipe.with_name(output)]
        line = self.one_line("oneshot", SHIPPED, "--recipe", recipe, *data, *more)
        assert not recipe.with_name(output).exists()
        return line

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "is empty, and a recipe"),
            ("s_stage: {p_modifiers: {NoModifier: {}}}", "No modifier of type 'NoModifier'"),
            ("s_stage: {p_modifiers: {DLPModifier: {beta: 1}}}", "beta"),
        ],
    )
    def test_a_recipe_that_is_none(self, tmp_path: Path, text: str, message: str) -> None:
        (tmp_path / "recipe.yaml").write_text(text)
        assert message in self.pruning(tmp_path / "recipe.yaml")

    def test_more_tokens_than_positions(self, tmp_path: Path) -> None:
        line = self.one_line("ppl", SHIPPED, "--data", CALIBRATION_TEXT, "--length", 300)
        assert "--length 300 is more than the 256 positions" in line

    def test_a_model_or_text_that_is_not_there(self, tmp_path: Path) -> None:
        assert "does not exist" in self.one_line("ppl", tmp_path / "x", "--data", CALIBRATION_TEXT)
        line = self.one_line("ppl", SHIPPED, "--data", tmp_path / "gone.txt")
        assert "no file or folder" in line

    def test_outputs_that_cannot_be_written_are_found_before_the_work(self, tmp_path: Path) -> None:
        gone = tmp_path / "gone" / "file"
        assert "gone" in self.one_line("score", "./no-model", *CALIBRATE, "--output", gone)
        assert "gone" in self.one_line("zero-shot", "./no-model", "boolq", "--output", gone)
        compare = ["--data", CALIBRATION_TEXT, "--test", CALIBRATION_TEXT, "--output", tmp_path]
        assert "gone" in self.one_line("compare", "./no-model", *compare, "--write-recipe", gone)

    def test_nothing_to_draw_a_comparison_with(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        texts = ["--data", CALIBRATION_TEXT, "--test", CALIBRATION_TEXT]
        line = self.one_line("compare", "./no-model", *texts, "--output", tmp_path / "out")
        assert "needs matplotlib: pip install 'dlp_plugin[plot]'" in line

    def test_a_number_that_is_none(self, tmp_path: Path) -> None:
        output = ["--output", tmp_path / "plan.json"]
        line = self.one_line("score", SHIPPED, *CALIBRATE, *output, "--alpha", "much")
        assert "--strength is 'much': give a number, or auto" in line

    def test_a_method_that_is_none_or_has_no_statistic(self, tmp_path: Path) -> None:
        arguments = ["score", "./no-model", *CALIBRATE, "--output", tmp_path / "plan.json"]
        line = self.one_line(*arguments, "--method", "best")
        assert "there is no method 'best'; there are dlp, owl, alpha-pruning, linear" in line
        line = self.one_line(*arguments, "--method", "owl", "--statistic", "median")
        assert "--statistic is for DLP only, not for OWL: leave it out, or use --method dlp" in line

    def test_debug_shows_where(self, tmp_path: Path) -> None:
        result = CliRunner().invoke(app, ["--debug", "show", str(tmp_path / "gone.json")])
        assert isinstance(result.exception, FileNotFoundError)
        result = CliRunner().invoke(app, ["show", str(tmp_path / "gone.json")])
        assert isinstance(result.exception, SystemExit)

    def test_a_damaged_adapter(self, tmp_path: Path) -> None:
        (tmp_path / "adapter_config.json").write_text("{}")
        (tmp_path / "adapter_model.safetensors").write_bytes(b"garbage")
        line = self.one_line("merge", tmp_path, tmp_path / "merged", "--base", SHIPPED)
        assert "adapter_model.safetensors is damaged or incomplete" in line

    def test_an_adapter_for_a_model_of_another_shape(self, tmp_path: Path) -> None:
        config = LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
            num_attention_heads=2,
        )  # fmt: skip
        adapted = get_peft_model(LlamaForCausalLM(config), LoraConfig(target_modules=["q_proj"]))
        adapted.save_pretrained(tmp_path / "adapter")
        adapter, merged = tmp_path / "adapter", tmp_path / "merged"
        line = self.one_line("merge", adapter, merged, "--base", SHIPPED)
        assert "does not fit" in line
        assert "size mismatch" in line
        assert not merged.exists()

    @pytest.mark.parametrize(("layers", "unlike"), [(11, 11), (13, 12)])
    def test_an_adapter_for_a_model_of_another_depth(
        self, tmp_path: Path, layers: int, unlike: int
    ) -> None:
        """Of which peft loads what fits."""
        config = AutoConfig.from_pretrained(SHIPPED, num_hidden_layers=layers)
        adapted = get_peft_model(LlamaForCausalLM(config), LoraConfig(target_modules=["q_proj"]))
        adapted.save_pretrained(tmp_path / "adapter")
        adapter, merged = tmp_path / "adapter", tmp_path / "merged"
        line = self.one_line("merge", adapter, merged, "--base", SHIPPED, "--allow-dense")
        assert "does not fit" in line
        assert f"layers.{unlike}.self_attn.q_proj.lora_A" in line
        assert not merged.exists()

    def test_a_field_out_of_bounds(self, tmp_path: Path) -> None:
        result = command(
            "score", SHIPPED, *CALIBRATE, "--output", tmp_path / "p", "--alpha", "-1", code=1
        )
        assert "alpha must be finite and at least 0, got -1.0" in " ".join(result.stderr.split())

    def test_an_output_folder_in_use(self, tmp_path: Path) -> None:
        (tmp_path / "mine").write_text("precious")
        recipe = ROOT / "recipes" / "dlp_wanda.yaml"
        arguments = ["oneshot", SHIPPED, "--recipe", recipe, *CALIBRATE]
        result = command(*arguments, "--output", tmp_path, code=1)
        assert "is not an empty folder" in " ".join(result.stderr.split())
        assert [file.name for file in tmp_path.iterdir()] == ["mine"]

    def test_a_failed_run_leaves_nothing(self, tmp_path: Path) -> None:
        recipe = tmp_path / "recipe.yaml"
        text = (ROOT / "recipes" / "dlp_wanda.yaml").read_text()
        recipe.write_text(text.replace("sparsity: 0.7", "sparsity: 7"))
        arguments = ["oneshot", SHIPPED, "--recipe", recipe, *CALIBRATE]
        result = command(*arguments, "--output", tmp_path / "out", code=1)
        assert "WandaPruningModifier.sparsity must be" in " ".join(result.stderr.split())
        assert [file.name for file in tmp_path.iterdir()] == ["recipe.yaml"]

    def test_a_text_that_is_too_short(self, tmp_path: Path) -> None:
        (tmp_path / "short.txt").write_text("Three words only.")
        arguments = ["--data", tmp_path / "short.txt", "--output", tmp_path / "p.json"]
        result = command("score", SHIPPED, *arguments, code=1)
        assert "less than one sample of 256" in " ".join(result.stderr.split())

    def test_an_export_of_what_is_not_packed(self, tmp_path: Path) -> None:
        result = command("export-gptq", SHIPPED, tmp_path / "out", code=1)
        assert "is not pack-quantized" in " ".join(result.stderr.split())
        assert list(tmp_path.iterdir()) == []

    def test_a_damaged_plan(self, tmp_path: Path) -> None:
        (tmp_path / "plan.json").write_text(json.dumps({"alpha": 1}))
        result = command("show", tmp_path / "plan.json", code=1)
        assert "is not a sound plan" in " ".join(result.stderr.split())
