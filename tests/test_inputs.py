"""Every command on every kind of folder: it works, or refuses in one line before it loads.

What each does stands in examples/inputs.md, "Checkpoints that come in", and is read from there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from compressed_tensors.offload import remove_dispatch
from helpers import ROOT, command
from input_kinds import KINDS
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer

from dlp_plugin.checkpoints.loading import apply_recipe, load_dense, load_model
from dlp_plugin.checkpoints.trust import trusting_remote_code
from dlp_plugin.evaluation.text import calibrate_on, calibration_set

SECTION = (ROOT / "examples" / "inputs.md").read_text().partition("## Checkpoints that come in")[2]
HEAD, _, *ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in SECTION.partition("\n## ")[0].splitlines()
    if line.startswith("|")
]
CELLS = {(row[0], heads): cell for row in ROWS for heads, cell in zip(HEAD[1:], row[1:])}
"""Kind and commands to what the table says."""
RECIPE = """
pruning_stage:
  pruning_modifiers:
    DLPModifier: {}
    WandaPruningModifier:
      sparsity: 0.5
      targets: [Linear]
      ignore: ["re:.*lm_head", "re:.*vision_tower.*", "re:.*multi_modal.*"]
"""
IGNORE = ["--ignore", "re:.*vision_tower.*"]
TASK = """
task: tiny
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}, cache_dir: CACHE}
output_type: multiple_choice
test_split: test
doc_to_text: context
doc_to_target: answer
doc_to_choice: choices
metric_list: [{metric: acc}]
"""


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """One folder of a kind, made once."""
    made: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in made:
            made[kind] = KINDS[kind](tmp_path_factory.mktemp("inputs") / "model")
        return made[kind]

    return get


@pytest.fixture(scope="module")
def materials(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text, a recipe and a task."""
    folder = tmp_path_factory.mktemp("materials")
    (folder / "text.txt").write_text(" ".join(str(i * 7 % 250) for i in range(300)))
    (folder / "recipe.yaml").write_text(RECIPE)
    question = {"context": "1 2", "choices": ["3", "4"], "answer": 0}
    (folder / "questions.jsonl").write_text(json.dumps(question) + "\n")
    task = TASK.replace("DATA", str(folder / "questions.jsonl"))
    (folder / "tiny.yaml").write_text(task.replace("CACHE", str(folder / "cache")))
    return folder


def adapter_for(folder: Path, target: Path) -> Path:
    """One for a folder's own model, or for any that cannot be loaded."""
    try:
        with trusting_remote_code():
            model = load_dense(folder)
    except (ValueError, OSError):
        model = load_dense(KINDS["dense"](target.with_name("stand_in")))
    lora = LoraConfig(r=2, target_modules=r".*layers\.0\.self_attn\.q_proj")
    get_peft_model(model, lora).save_pretrained(target)
    return target


def lines_of(name: str, folder: Path, materials: Path, output: Path) -> list[list[object]]:
    """The command lines behind a head of the table."""
    text = ["--data", materials / "text.txt", "--length", 16]
    samples = [*text, "--samples", 4]
    lines: dict[str, Callable[[], list[list[object]]]] = {
        "ppl, zero-shot": lambda: [
            ["ppl", folder, *text],
            ["zero-shot", folder, "tiny", "--task-folder", materials],
        ],
        "oneshot": lambda: [
            ["oneshot", folder, "--recipe", materials / "recipe.yaml", *samples, "--output", output]
        ],
        "score, compare": lambda: [
            ["score", folder, *samples, *IGNORE, "--output", output.with_name("plan.json")],
            ["compare", folder, *samples, *IGNORE, "--test", materials / "text.txt", "--output",
             output, "--methods", "uniform", "--sparsities", 0.5, "--pruners", "magnitude"],
        ],
        "merge": lambda: [
            ["merge", adapter_for(folder, output.with_name("adapter")), output, "--base", folder]
        ],
        "inspect": lambda: [["inspect", folder]],
        "pack": lambda: [["pack", folder, output]],
        "unpack": lambda: [["unpack", folder, output]],
        "export-gptq": lambda: [["export-gptq", folder, output]],
    }  # fmt: skip
    return lines[name]()


def test_the_table_has_every_kind_and_command() -> None:
    assert [row[0] for row in ROWS] == list(KINDS)
    assert set(CELLS.values()) == {"works", "saved dense", "refused", "its package"}


@pytest.mark.parametrize(("kind", "name"), CELLS)
def test_cell(
    kind: str, name: str, folder_of: Callable[[str], Path], materials: Path, tmp_path: Path
) -> None:
    folder, said, output = folder_of(kind), CELLS[kind, name], tmp_path / "output"
    for line in lines_of(name, folder, materials, output):
        trust = name not in ("inspect", "unpack") and kind == "custom code"
        options = ["--trust-remote-code"] if trust else []
        refused = said in ("refused", "its package")  # which the tests go without
        code = 1 if refused else 0
        result = command(*line, *options, code=code)
        if refused:
            told = result.output.strip()
            assert re.fullmatch("error: .*", told), told
            assert str(folder) in told
            assert re.search("[:;] ", told.removeprefix("error: ")), "no remedy"
            assert not output.exists()
        if said == "saved dense":
            config = json.loads((output / "config.json").read_text())
            assert "quantization_config" not in config


@pytest.mark.parametrize(
    "kind", [k for (k, n), cell in CELLS.items() if n == "oneshot" and cell == "saved dense"]
)
def test_what_was_measured_is_what_is_saved(kind: str, folder_of: Callable, tmp_path: Path) -> None:
    folder = folder_of(kind)
    dataset = calibration_set(list(range(100)), 16, 4)
    calibration = calibrate_on(dataset, AutoTokenizer.from_pretrained(folder))
    pruned = apply_recipe(folder, RECIPE, tmp_path / "out", **calibration)
    ids = torch.tensor(dataset["input_ids"])
    loaded = load_model(tmp_path / "out").float()
    with torch.no_grad():
        found, expected = loaded(ids).logits, remove_dispatch(pruned).float()(ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (next(loaded.model.layers[0].mlp.parameters()) == 0).float().mean() > 0.4


@pytest.mark.parametrize("kind", ["GPTQ", "bitsandbytes", "unknown"])
def test_it_is_refused_before_weights_are_read(
    kind: str, folder_of: Callable[[str], Path], materials: Path, tmp_path: Path
) -> None:
    folder = folder_of(kind)
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(b"no weights")
    try:
        for name in ("oneshot", "score, compare", "merge"):
            for line in lines_of(name, folder, materials, tmp_path / "output"):
                assert "is quantized by" in command(*line, code=1).output
    finally:
        weights.write_bytes(content)


@pytest.mark.parametrize("name", ["ppl, zero-shot", "oneshot", "score, compare", "merge", "pack"])
def test_code_of_others_is_not_run_unless_it_is_trusted(
    name: str, folder_of: Callable[[str], Path], materials: Path, tmp_path: Path
) -> None:
    folder = folder_of("custom code")
    for line in lines_of(name, folder, materials, tmp_path / "output"):
        output = command(*line, code=1).output.strip()
        assert re.fullmatch(r"error: \S+ comes with code of its own.*--trust-remote-code.*", output)
