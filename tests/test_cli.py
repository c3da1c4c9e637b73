"""The terminal command on the shipped model, as a user types it."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import CALIBRATION_TEXT, ROOT, SHIPPED
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner, Result

from dlp_plugin.checkpoint import zeros_lost
from dlp_plugin.cli import app
from dlp_plugin.plan import Plan

CALIBRATE = ["--data", str(CALIBRATION_TEXT), "--samples", "8", "--length", "64"]


def command(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("cli") / "pruned"
    recipe = ROOT / "recipes" / "dlp_wanda.yaml"
    result = command("oneshot", SHIPPED, "--recipe", recipe, *CALIBRATE, "--output", folder)
    return folder, result.output


def test_oneshot_prunes_saves_and_shows(pruned: tuple[Path, str]) -> None:
    folder, output = pruned
    assert "DLP plan for" in output
    assert "Zeros in" in output
    assert {"config.json", "model.safetensors", "tokenizer.json", "recipe.yaml"} <= {
        file.name for file in folder.iterdir()
    }
    assert [entry.name for entry in folder.parent.iterdir()] == ["pruned"]
    weight = load_file(folder / "model.safetensors")["model.layers.3.mlp.up_proj.weight"]
    assert 0.4 < (weight == 0).float().mean() < 1


def test_inspect_counts_blocks_or_linears(pruned: tuple[Path, str]) -> None:
    folder, _ = pruned
    output = command("inspect", folder).output
    (total,) = re.findall(r"all blocks.*?(0\.\d{4})", output)
    assert 0.68 < float(total) <= 0.7
    assert "model.layers.11 " in output
    assert "model.embed_tokens" in output
    assert "self_attn.k_proj" in command("inspect", folder, "--linears").output
    assert "k_proj" not in output


def test_inspect_tells_sizes_and_lost_zeros(pruned: tuple[Path, str]) -> None:
    folder, _ = pruned
    output = " ".join(command("inspect", folder, "--against", folder).output.split())
    assert re.search(r"not quantized; \d\.\d\d MB on disk, \d\.\d\d MB under zstd", output)
    assert "lost: 0" in output
    result = command("inspect", SHIPPED, "--against", folder, code=1)
    assert "model.layers.11.mlp.down_proj" in result.output


def test_a_4_bit_recipe_and_its_gptq_export(tmp_path: Path) -> None:
    recipe = ROOT / "recipes" / "dlp_wanda_w4a16.yaml"
    packed, exported = tmp_path / "packed", tmp_path / "exported"
    output = command("oneshot", SHIPPED, "--recipe", recipe, *CALIBRATE, "--output", packed).output
    assert "pack-quantized" in output
    command("export-gptq", packed, exported)
    settings = json.loads((exported / "quantize_config.json").read_text())
    assert (settings["bits"], settings["group_size"], settings["sym"]) == (4, 128, True)
    assert "model.layers.0.mlp.up_proj.qweight" in load_file(exported / "model.safetensors")


def test_score_then_show_at_another_target(tmp_path: Path) -> None:
    file, picture = tmp_path / "plan.json", tmp_path / "plan.png"
    output = command("score", SHIPPED, *CALIBRATE, "--output", file, "--alpha", "0.1").output
    assert "target 0.7, alpha 0.1, median" in output
    assert len(Plan.load(file).blocks) == 12
    shown = command("show", file, "--sparsity", "0.5", "--plot", picture).output
    assert "target 0.5, alpha 0.1, median" in shown
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert Plan.load(file).target == 0.7


def test_n_m_from_score_to_inspect(tmp_path: Path) -> None:
    free, fixed = tmp_path / "free.json", tmp_path / "fixed.json"
    command("score", SHIPPED, *CALIBRATE, "--sparsity", 0.5, "--output", free)
    command("show", free, "--mask-structure", "4:8", "--output", fixed)
    plan = Plan.load(fixed)
    assert (plan.mask_structure, plan.sparsity) == ("4:8", 0.5)
    again = tmp_path / "again.json"
    output = command("score", SHIPPED, *CALIBRATE, "--mask-structure", "4:8", "--output", again)
    assert Plan.load(again) == plan
    assert "4:8 on average" in " ".join(output.output.split())

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        (ROOT / "recipes" / "dlp_wanda_4of8.yaml")
        .read_text()
        .replace("alpha: auto", f"from_plan: {fixed}")
    )
    folder = tmp_path / "pruned"
    command("oneshot", SHIPPED, "--recipe", recipe, *CALIBRATE, "--output", folder)
    output = command("inspect", folder, "--group", 8).output
    found = re.findall(r"model.layers.\d+ .*(\d) │$", output, re.MULTILINE)
    assert [int(number) for number in found] == [round(8 * b.sparsity) for b in plan.blocks]


class TestMerge:
    @pytest.fixture
    def adapter(self, pruned: tuple[Path, str], tmp_path: Path) -> Path:
        model = AutoModelForCausalLM.from_pretrained(pruned[0], dtype="auto")
        adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj", "up_proj"]))
        torch.manual_seed(0)
        for name, value in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(value, std=0.1)
        adapted.save_pretrained(tmp_path / "adapter")
        return tmp_path / "adapter"

    def test_every_zero_is_kept(
        self, pruned: tuple[Path, str], adapter: Path, tmp_path: Path
    ) -> None:
        folder = tmp_path / "merged"
        assert "Zeros in" in command("merge", adapter, folder).output
        assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
            file.name for file in folder.iterdir()
        }
        assert not any(zeros_lost(pruned[0], folder).values())
        before, after = (load_file(f / "model.safetensors") for f in (pruned[0], folder))
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert {name.split(".")[-2] for name in changed} == {"q_proj", "up_proj"}
        assert "give a new one" in command("merge", adapter, folder, code=1).output

    def test_into_a_model_that_was_never_pruned(self, adapter: Path, tmp_path: Path) -> None:
        arguments = ["merge", adapter, tmp_path / "merged", "--base", SHIPPED]
        output = " ".join(command(*arguments, code=1).output.split())
        assert "model.layers.0.self_attn.q_proj" in output
        assert "were never pruned" in output
        assert sorted(file.name for file in tmp_path.iterdir()) == ["adapter"]
        command(*arguments, "--allow-dense")

    def test_an_adapter_of_a_larger_vocabulary(
        self, pruned: tuple[Path, str], tmp_path: Path
    ) -> None:
        """Its tokenizer lies beside it, and the embeddings are trained with it."""
        model = AutoModelForCausalLM.from_pretrained(pruned[0], dtype="auto")
        tokenizer = AutoTokenizer.from_pretrained(pruned[0])
        tokenizer.add_tokens(["<one>", "<two>"])
        model.resize_token_embeddings(len(tokenizer))
        adapted = get_peft_model(
            model, LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"])
        )
        adapted.save_pretrained(tmp_path / "adapter")
        tokenizer.save_pretrained(tmp_path / "adapter")
        command("merge", tmp_path / "adapter", tmp_path / "merged", "--base", pruned[0])
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        assert merged.get_input_embeddings().weight.shape[0] == len(tokenizer)
        assert "<two>" in AutoTokenizer.from_pretrained(tmp_path / "merged").get_vocab()

    def test_a_folder_without_an_adapter(self, tmp_path: Path) -> None:
        output = command("merge", SHIPPED, tmp_path / "merged", code=1).output
        assert "holds no adapter_config.json" in " ".join(output.split())


def test_ppl_is_that_of_the_model_card(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(CALIBRATION_TEXT.read_text()[:20_000])
    output = command("ppl", SHIPPED, "--data", text, "--length", "64").output
    assert 5 < float(re.search(r"perplexity (\d+\.\d+)", output).group(1)) < 60


@pytest.mark.parametrize(
    "name", ["oneshot", "score", "show", "inspect", "export-gptq", "ppl", "zero-shot", "compare"]
)
def test_help_teaches(name: str) -> None:
    assert name in command("--help").output
    assert len(command(name, "--help").output.splitlines()) > 10


class TestMistakesAreToldInOneMessage:
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


@pytest.mark.parametrize("moment", ["scoring", "saving"])
def test_a_run_that_is_killed_leaves_nothing_broken(
    pruned: tuple[Path, str], tmp_path: Path, moment: str
) -> None:
    """Killed while it scores, or while it writes; the next run gives what was to come."""
    folder = tmp_path / "out" / "pruned"
    folder.parent.mkdir()
    arguments = ["--recipe", ROOT / "recipes" / "dlp_wanda.yaml", *CALIBRATE, "--output", folder]
    text = [sys.executable, "-m", "dlp_plugin.cli", "oneshot", SHIPPED, *arguments]
    process = subprocess.Popen([str(word) for word in text], stderr=subprocess.PIPE, text=True)
    for line in process.stderr:  # the host's progress bars
        if {"scoring": "(3/13): Calibrating", "saving": "Writing model shards"}[moment] in line:
            break
    process.kill()
    process.wait()
    process.stderr.close()
    assert not folder.exists()
    command("oneshot", SHIPPED, *arguments)
    assert [entry.name for entry in folder.parent.iterdir()] == ["pruned"]
    for name in ("model.safetensors", "recipe.yaml", "config.json"):
        assert (folder / name).read_bytes() == (pruned[0] / name).read_bytes()
