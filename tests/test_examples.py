"""The examples, run as scripts on the small trained model that the repository ships."""

import os
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import yaml
from helpers import CALIBRATION_TEXT, ROOT, SHIPPED, TEST_TEXT
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from dlp_plugin.checkpoints import loading


def beginning_of(text: Path, characters: int, file: Path) -> str:
    file.write_text(text.read_text()[:characters])
    return str(file)


@pytest.fixture
def few(tmp_path: Path) -> list[str]:
    """Options of an example that calibrates: a fourth of its samples, a half of the time."""
    return ["--calibration", beginning_of(CALIBRATION_TEXT, 3_500, tmp_path / "calibration.txt")]


@pytest.fixture
def example(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Runs an example on a short text, into ``tmp_path / "out"``; what it printed."""

    def run_example(name: str, *arguments: str) -> str:
        test = beginning_of(TEST_TEXT, 30_000, tmp_path / "test.txt")
        script, output = str(ROOT / "examples" / name), str(tmp_path / "out")
        short_run = ["--output", output, "--test", test, "--length", "32"]
        monkeypatch.setattr(sys, "argv", [script, *short_run, *arguments])
        with patch.dict(os.environ):  # where they set whether there are progress bars
            runpy.run_path(script, run_name="__main__")
        return capsys.readouterr().out

    return run_example


def test_the_job_of_the_readme(example: Callable[..., str], few: list[str], tmp_path: Path) -> None:
    output = example("prune_and_compare.py", *few)
    assert "pruned weights that came back with 4 bits: 0" in output
    assert (tmp_path / "out" / "plan.png").read_bytes().startswith(b"\x89PNG")
    rows = {row[1]: row[2:5] for line in output.splitlines() if len(row := cells(line)) == 7}
    assert rows["dense"][0] == "0.0000"
    refined, packed = rows["DLP, alpha auto, refined"], rows["the same + W4A16"]
    assert refined == rows["the same, loaded"]
    loaded = rows["the same + W4A16, loaded"]
    assert packed[0] == loaded[0]
    # where the processor has no bfloat16, scales were float32 until they were saved
    assert float(packed[1]) == pytest.approx(float(loaded[1]), rel=1e-3)
    assert packed[0] >= refined[0] >= "0.69"
    best = rows["the best, loaded"]
    assert best[0] >= "0.69"
    assert float(best[1]) < float(refined[1]) < float(rows["uniform"][1])


@pytest.fixture
def one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> list[PreTrainedModel]:
    """The models that were loaded, each after the weights of those before had been freed."""
    found: list[PreTrainedModel] = []
    load = loading.load_stored

    def watched(*arguments: Any, **named: Any) -> PreTrainedModel:
        assert {w.device.type for model in found for w in model.parameters()} <= {"meta"}
        found.append(load(*arguments, **named))
        return found[-1]

    monkeypatch.setattr(loading, "load_stored", watched)
    return found


@pytest.fixture
def narrow(tmp_path: Path) -> str:
    """The folder of a model whose columns groups of 128 do not divide."""
    config = AutoConfig.from_pretrained(SHIPPED)
    config.update({"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 2})
    AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(SHIPPED).save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_the_same_on_a_model_that_groups_of_128_do_not_fit(
    example: Callable[..., str],
    few: list[str],
    narrow: str,
    tmp_path: Path,
    one_at_a_time: list[PreTrainedModel],
) -> None:
    output = example("prune_and_compare.py", narrow, *few)
    assert len(one_at_a_time) == 9
    assert "pruned weights that came back with 4 bits: 0" in output
    for folder in ("w4a16", "best"):
        saved = AutoConfig.from_pretrained(tmp_path / "out" / folder).quantization_config
        (group,) = saved["config_groups"].values()
        assert group["weights"]["group_size"] == 32
    recipe = yaml.safe_load((tmp_path / "out" / "best" / "recipe.yaml").read_text())
    modifiers = recipe["pruning_stage"]
    assert modifiers["pruning_modifiers"]["ADMMPruningModifier"]["distill"] == 2
    assert modifiers["quantization_modifiers"]["MaskedGPTQModifier"]["distill"] == 2


def test_the_job_shows_what_it_has_where_distillation_has_no_memory(
    example: Callable[..., str],
    few: list[str],
    narrow: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("dlp_plugin.pruning.distillation.NEEDED", 10**12)
    with pytest.raises(SystemExit, match=r"best: ADMM .* W4A16: .*distill needs .* GB"):
        example("prune_and_compare.py", narrow, *few)
    assert "the same + W4A16, loaded" in capsys.readouterr().out


def test_recovery(example: Callable[..., str], few: list[str]) -> None:
    wanda = str(ROOT / "recipes" / "dlp_wanda.yaml")
    settings = ["--steps", "12", "--rate", "2e-3", "--recipe", wanda]
    output = example("recover_with_lora.py", *few, "--train", str(CALIBRATION_TEXT), *settings)
    rows = {row[1]: row[2:4] for line in output.splitlines() if len(row := cells(line)) == 6}
    values = {name: float(value) for name, (value, _) in rows.items()}
    lost = {name: lost for name, (_, lost) in rows.items()}
    assert int(lost["LoRA: merge_and_unload"].replace(",", "")) > 2_000_000
    for name in ("LoRA: sparse_merge", "LoRA, masked: sparse_merge", "all weights, masked"):
        assert lost[name] == "0"
        assert values["dense"] < values[name] < values["pruned"]
    assert lost["LoRA, masked: sparse_merge, W4A16"] == "0"
    trained, merged = values["LoRA, masked: trained"], values["LoRA, masked: sparse_merge"]
    assert merged == pytest.approx(trained, rel=2e-3)  # in bf16; the unmasked one is far off:
    assert values["LoRA: sparse_merge"] > 1.01 * values["LoRA: trained"]


def cells(line: str) -> list[str]:
    """Cells of a row of a table that rich drew."""
    return [cell.strip() for cell in line.split("│")]


def test_a_small_mixture_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A few steps, by which its loss falls."""
    train = beginning_of(TEST_TEXT, 30_000, tmp_path / "train.txt")
    valid = beginning_of(TEST_TEXT, 3_000, tmp_path / "valid.txt")
    script, out = str(ROOT / "examples" / "train_small_model.py"), tmp_path / "out"
    size = ["--tokens", str(2 * 16 * 256), "--experts", "4"]
    arguments = [script, "--train", train, "--valid", valid, "--out", str(out), *size]
    monkeypatch.setattr(sys, "argv", arguments)
    runpy.run_path(script, run_name="__main__")
    said = capsys.readouterr().out
    first, last = (float(each) for each in re.findall(r"loss ([\d.]+)", said))
    assert last < first
    least, most = re.findall(r"chosen ([\d.]+) to ([\d.]+) times", said)[0]
    assert 0 <= float(least) < 1 < float(most) <= 2
    config = loading.load_model(out).config
    assert (config.num_local_experts, config.output_router_logits) == (4, False)


def test_a_mixture_of_one_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = str(ROOT / "examples" / "train_small_model.py")
    files = ["--train", "a", "--valid", "b", "--out", "c"]
    monkeypatch.setattr(sys, "argv", [script, *files, "--experts", "1"])
    with pytest.raises(SystemExit):
        runpy.run_path(script, run_name="__main__")
    assert "--experts is 1: write 2 or more, or leave it out" in capsys.readouterr().err
