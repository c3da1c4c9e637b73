"""The terminal command on the shipped model, as a user types it."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from helpers import CALIBRATE, CALIBRATION_TEXT, ROOT, SHIPPED, command
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from dlp_plugin.checkpoints.inspect import inspect_checkpoint, zeros_lost
from dlp_plugin.checkpoints.loading import load_model
from dlp_plugin.evaluation.perplexity import perplexity
from dlp_plugin.evaluation.text import read_tokens, token_windows
from dlp_plugin.planning.methods import METHODS, method_of, options
from dlp_plugin.planning.plan import Plan


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
    saved = yaml.safe_load((folder / "recipe.yaml").read_text())
    (stage,) = saved.values()
    plan = Plan.load(stage["pruning_modifiers"]["DLPModifier"]["from_plan"])
    weights = load_file(folder / "model.safetensors")
    for block in plan.blocks:
        weight = weights[f"{block.name}.mlp.up_proj.weight"]
        assert (weight == 0).double().mean().item() == pytest.approx(block.sparsity, abs=0.01)


def test_oneshot_is_calm(pruned: tuple[Path, str]) -> None:
    """No line of the host's, none for every block or Linear, and no warning twice."""
    lines = [line for line in pruned[1].splitlines() if re.match("[A-Z]+: ", line)]
    assert "INFO: Scoring 12 blocks on 8 batches" in lines
    assert len(lines) == len(set(lines)) < 5


def test_oneshot_at_another_sparsity_than_the_recipe_s(tmp_path: Path) -> None:
    """By the names that llm-compressor's own scripts have for these options."""
    recipe = ROOT / "recipes" / "uniform_wanda.yaml"
    data = ["--dataset", CALIBRATE[1], "--num-calibration-samples", 4, "--max-seq-length", 32]
    folder = tmp_path / "pruned"
    chosen = ["--recipe", recipe, "--sparsity", 0.4, "--output-dir", folder]
    command("oneshot", SHIPPED, *chosen, *data)
    weight = load_file(folder / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    assert (weight == 0).double().mean().item() == pytest.approx(0.4, abs=0.01)
    assert "sparsity: 0.4" in (folder / "recipe.yaml").read_text()


def test_inspect_counts_blocks_or_linears(pruned: tuple[Path, str]) -> None:
    folder, _ = pruned
    output = command("inspect", folder).output
    (total,) = re.findall(r"all blocks.*?(0\.\d{4})", output)
    found = inspect_checkpoint(folder).blocks.values()
    assert total == f"{sum(b.zeros for b in found) / sum(b.weights for b in found):.4f}"
    assert float(total) == pytest.approx(0.7, abs=0.01)
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
    for name in ("--strength", "--alpha"):
        assert "target 0.7, alpha 0.2, median" in command("show", file, name, "0.2").output


def test_show_takes_the_plans_of_a_recipe(pruned: tuple[Path, str], tmp_path: Path) -> None:
    """Of the one saved beside a model, and of one with two plans, the second as a file."""
    saved, file, two = pruned[0] / "recipe.yaml", tmp_path / "plan.json", tmp_path / "two.yaml"
    assert "target 0.7, alpha 0.15" in command("show", saved, "--output", file).output
    assert "target 0.6" in command("show", saved, "--sparsity", "0.6").output
    ((name, stage),) = yaml.safe_load(saved.read_text()).items()
    (held,) = stage.values()
    assert Plan.load(file) == Plan.load(held["DLPModifier"]["from_plan"])
    again = {"DLPModifier": {"from_plan": str(file)}}
    two.write_text(yaml.safe_dump({name: {**stage, "more_modifiers": again}}))
    assert command("show", two).output.count("DLP plan for") == 2
    assert "holds 2 plans" in command("show", two, "--output", file, code=1).stderr
    unpruned = ROOT / "recipes" / "dlp_wanda.yaml"
    assert (
        "holds no plan (from_plan): give the recipe.yaml"
        in command("show", unpruned, code=1).stderr
    )
    with pytest.raises(ValueError, match=r"`dlp-plugin show .*recipe.yaml --output plan.json`"):
        Plan.load(saved)


@pytest.mark.parametrize("name", options())
def test_score_by_every_method(tmp_path: Path, name: str) -> None:
    """Without a strength each has its own; with one it is that, whatever it is called there."""
    method, file = method_of(name), tmp_path / "plan.json"
    arguments = ["score", SHIPPED, *CALIBRATE, "--method", name, "--output", file]
    assert f"{method.title} plan for" in command(*arguments).output
    plan = Plan.load(file)
    assert METHODS[plan.method] is method
    strength = method().strength
    assert plan.strength == strength or (strength == "auto" and plan.candidates)
    output = " ".join(command(*arguments, "--strength", "0.05").output.split())
    assert f"target 0.7, {method.strength_field} 0.05" in output
    assert Plan.load(file).strength == 0.05


def test_score_by_the_mean(tmp_path: Path) -> None:
    arguments = ["--statistic", "mean", "--output", tmp_path / "plan.json"]
    output = command("score", SHIPPED, *CALIBRATE, *arguments).output
    assert "target 0.7, alpha 0.15, mean" in output


def test_n_m_from_score_to_inspect(tmp_path: Path) -> None:
    free, fixed = tmp_path / "free.json", tmp_path / "fixed.json"
    command("score", SHIPPED, *CALIBRATE, "--sparsity", 0.5, "--output", free)
    command("show", free, "--mask-structure", "4:8", "--output", fixed)
    plan = Plan.load(fixed)
    assert (str(plan.mask_structure), plan.sparsity) == ("4:8", 0.5)
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
        assert set(zeros_lost(pruned[0], folder).values()) == {0}
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


def test_ppl_is_the_library_s(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(CALIBRATION_TEXT.read_text()[:20_000])
    output = command("ppl", SHIPPED, "--data", text, "--length", "64").output
    tokens = read_tokens(text, AutoTokenizer.from_pretrained(SHIPPED))
    expected = perplexity(load_model(SHIPPED), token_windows(tokens, 64))
    assert f"perplexity {expected:.4f} ({len(tokens):,} tokens" in output


def test_zero_shot_shows_and_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"boolq": {"acc": 0.5, "acc_stderr": 0.0625}, "mean": {"acc": 0.5, "acc_norm": 0.25}}
    asked = []

    def measure(model: object, tokenizer: object, tasks: list[str], **_: object) -> dict:
        asked.extend(tasks)
        return found

    monkeypatch.setattr("dlp_plugin.evaluation.zeroshot.zero_shot", measure)
    file = tmp_path / "found.json"
    output = command("zero-shot", SHIPPED, "boolq,rte", "piqa", "--output", file).output
    assert asked == ["boolq", "rte", "piqa"]
    assert re.search(r"boolq +│ 0\.5000 ± 0\.0625 │ +│", output)
    assert re.search(r"mean +│ +0\.5000 │ +0\.2500 │", output)
    assert json.loads(file.read_text()) == found


def test_compare_shows_and_writes(tmp_path: Path) -> None:
    text, folder, best = tmp_path / "text.txt", tmp_path / "found", tmp_path / "best.yaml"
    text.write_text(CALIBRATION_TEXT.read_text()[:10_000])
    arguments = ["--test", text, "--output", folder, "--methods", "uniform,dlp", "--sparsities"]
    arguments = ["compare", SHIPPED, *CALIBRATE, *arguments, "0.5", "--write-recipe", best]
    output = command(*arguments).stdout  # progress bars go to the other stream
    assert re.search(r"^wanda 0\.5 dlp:0\.15: \d+\.\d{4} \(\d+ s\)$", output, re.MULTILINE)
    assert re.search(r"wanda +│ uniform +│ \d+\.\d\d \(\d\.\d\d\)", output)
    assert re.search(r"^(uniform|dlp:0.15) at 0\.5 with wanda written:", output, re.MULTILINE)
    assert {file.name for file in folder.iterdir()} == {
        "results.json", "table.md", "perplexity.png", "sparsities.png",
    }  # fmt: skip
    assert " at 0.5, wanda: perplexity " in best.read_text()
    line = command(*arguments, "--sparsity", "0.7", code=1).stderr.splitlines()[-1]
    assert line == "error: --sparsity 0.7 is not one of --sparsities 0.5"


class TestProgress:
    """What takes long says how far it is, at the level that the terminal shows."""

    def test_of_scoring_choosing_and_refining(self, tmp_path: Path) -> None:
        arguments = ["--alpha", "auto", "--refine", 2, "--output", tmp_path / "plan.json"]
        told = command("--verbose", "score", SHIPPED, *CALIBRATE, *arguments).stderr
        assert re.search(r"INFO: .*block 12 of 12", told)
        assert re.search(r"INFO: .*alpha 0\.15.*loss", told)
        assert re.search(r"INFO: step 2 of 2: divergence \d", told)


@pytest.mark.parametrize("moment", ["scoring", "saving"])
def test_a_run_that_is_killed_leaves_nothing_broken(
    pruned: tuple[Path, str], tmp_path: Path, moment: str
) -> None:
    """Killed while it scores, or while it writes; the next run gives what was to come."""
    folder = tmp_path / "out" / "pruned"
    folder.parent.mkdir()
    arguments = ["--recipe", ROOT / "recipes" / "dlp_wanda.yaml", *CALIBRATE, "--output", folder]
    text = [sys.executable, "-m", "dlp_plugin.cli", "--verbose", "oneshot", SHIPPED, *arguments]
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
