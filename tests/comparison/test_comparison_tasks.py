"""The comparison with accuracy on tasks beside perplexity: on a tiny random model."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import TASK, VOCABULARY, command, random_samples, word_tokenizer
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dlp_plugin.checkpoints.loading import apply_recipe
from dlp_plugin.comparison.results import Comparison
from dlp_plugin.comparison.run import compare
from dlp_plugin.comparison.view import markdown, table
from dlp_plugin.comparison.yardstick import Yardstick
from dlp_plugin.evaluation.zeroshot import zero_shot

WINDOWS = [torch.tensor(row) for row in random_samples(4, seed=1)["input_ids"]]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tasks of eight questions of words, and one whose questions are nowhere."""
    folder = tmp_path_factory.mktemp("tasks")
    words = torch.randint(1, VOCABULARY, (16, 6), generator=torch.Generator().manual_seed(0))
    rows = [[str(word) for word in row] for row in words.tolist()]
    for place, name in enumerate(("first", "second", "absent")):
        data = folder / f"{name}.jsonl"
        questions = [
            {"context": " ".join(row[:4]), "choices": row[4:], "answer": number % 2}
            for number, row in enumerate(rows[8 * place :][:8])
        ]
        if questions:
            data.write_text("".join(json.dumps(each) + "\n" for each in questions))
        settings = {"data": data, "cache": folder / "cache", "output_type": "multiple_choice"}
        text = TASK.format(name=name, **settings) + "  - metric: acc\n"
        (folder / f"{name}.yaml").write_text(text)
    return folder


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = word_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = Whitespace()
    tokenizer.eos_token = "0"  # which the harness cannot do without
    return tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> str:
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=VOCABULARY, **sizes, **heads)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def calibration(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    return {
        "tokenizer": tokenizer,
        "dataset": random_samples(),
        "num_calibration_samples": 8,
        "max_seq_length": 32,
        "shuffle_calibration_samples": False,
    }


def compared(
    model: str, calibration: dict[str, Any], folder: Path, yardstick: Yardstick, **settings: Any
) -> Comparison:
    settings = {"methods": ["uniform"], "sparsities": [0.5], **settings}
    return compare(model, calibration, yardstick, folder, **settings)


def test_every_model_is_asked(
    model: str,
    calibration: dict[str, Any],
    tokenizer: PreTrainedTokenizerFast,
    tasks: Path,
    tmp_path: Path,
) -> None:
    yardstick = Yardstick(WINDOWS, ["first", "second"], 6, tasks)
    found = compared(model, calibration, tmp_path, yardstick, bits=[16, 4, 3])
    (cell, four), plain = found.cells, found.plain
    assert (cell.bits, four.bits, list(plain)) == (16, 4, [16, 4, 3])
    (tmp_path / "recipe.yaml").write_text(found.only(["uniform"], ["0.5"], ["wanda"]).recipe())
    pruned = apply_recipe(model, str(tmp_path / "recipe.yaml"), **calibration)
    dense = LlamaForCausalLM.from_pretrained(model)
    for measured, by_hand in ((found.accuracy, dense), (cell.accuracy, pruned)):
        answers = zero_shot(by_hand, tokenizer, ["first", "second"], limit=6, task_folder=tasks)
        assert measured == {task: answers[task]["acc"] for task in ("first", "second")}
    assert plain[16].accuracy == found.accuracy
    assert set(four.accuracy) == set(plain[3].accuracy) == {"first", "second"}

    lines = markdown(found).splitlines()
    assert "| ratio | first | second | acc | MB |" in lines[0]
    share = sum(found.accuracy.values()) / 2
    assert f"| {share:.3f} |" in lines[2]
    assert {line.count("|") for line in lines[:7]} == {lines[0].count("|")}
    assert f"the dense model's is {share:.3f}" in str(table(found).caption)


def test_with_a_distilled_pruner_all_that_is_quantized_is_distilled(
    model: str, calibration: dict[str, Any], tmp_path: Path
) -> None:
    yardstick = Yardstick(WINDOWS)
    found = compared(
        model, calibration, tmp_path, yardstick, pruners=["wanda-distilled"], bits=[16, 4, 2]
    )
    assert [list(rows) for rows in (found.plain, found.distilled)] == [[16, 4, 2], [4, 2]]
    for bits, one in found.distilled.items():
        assert one.perplexity != found.plain[bits].perplexity
        assert one.bytes == found.plain[bits].bytes
    stages = yaml.safe_load(found.only(["uniform"], ["0.5"], ["wanda-distilled"], [4]).recipe())
    modifiers = stages["pruning_stage"]
    assert modifiers["pruning_modifiers"]["WandaPruningModifier"]["distill"] == 2
    assert modifiers["quantization_modifiers"]["MaskedGPTQModifier"]["distill"] == 2
    lines = markdown(found).splitlines()
    assert [line.split(" | ")[2:4] for line in lines[2:7]] == [
        ["16", "dense"],
        ["4", "dense"],
        ["2", "dense"],
        ["4", "dense, distilled"],
        ["2", "dense, distilled"],
    ]
    assert any("Plain 2 bits, distilled: " in line for line in lines)
    again = compared(model, calibration, tmp_path, yardstick, pruners=["wanda"], bits=[4])
    assert (list(again.plain), again.distilled) == ([4], {4: found.distilled[4]})


def test_fewer_than_four_bits_are_for_the_model_that_is_not_pruned(
    model: str, calibration: dict[str, Any], tmp_path: Path
) -> None:
    found = compared(model, calibration, tmp_path, Yardstick(WINDOWS), bits=[4, 3, 2])
    assert [cell.bits for cell in found.cells] == [4]
    sizes = [found.plain[bits].bytes for bits in (4, 3, 2)]
    assert sizes == sorted(sizes, reverse=True)
    errors = [abs(math.log(found.ratio(found.plain[bits]))) for bits in (4, 3, 2)]
    assert errors[0] < errors[2]
    frontier = found.frontier()
    assert frontier == sorted(frontier)
    assert min(value for _, value in frontier) == frontier[-1][1]


def test_tasks_are_asked_later_too(
    model: str, calibration: dict[str, Any], tasks: Path, tmp_path: Path
) -> None:
    before = compared(model, calibration, tmp_path, Yardstick(WINDOWS))
    assert before.accuracy == before.cells[0].accuracy == {}
    found = compared(model, calibration, tmp_path, Yardstick(WINDOWS, ["first"], 6, tasks))
    assert found.cells[0].perplexity == before.cells[0].perplexity
    assert set(found.cells[0].accuracy) == set(found.accuracy) == {"first"}
    again = compared(model, calibration, tmp_path, Yardstick(WINDOWS))
    assert again == found
    with pytest.raises(ValueError, match=r"comparison that differs in: questions per task"):
        compared(model, calibration, tmp_path, Yardstick(WINDOWS, ["first"], 4, tasks))


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("absent", r"the questions of task absent cannot be read \(.*absent.jsonl"),
        ("frist", r"task 'frist' is unknown; did you mean first"),
    ],
)
def test_tasks_are_looked_for_before_any_work(
    model: str, calibration: dict[str, Any], tasks: Path, tmp_path: Path, task: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        compared(model, calibration, tmp_path / "new", Yardstick(WINDOWS, [task], None, tasks))
    assert not (tmp_path / "new").exists()


def test_in_the_terminal(model: str, tasks: Path, tmp_path: Path) -> None:
    text, folder = tmp_path / "text.txt", tmp_path / "found"
    ids = random_samples(16, 32)["input_ids"]
    text.write_text(" ".join(str(each) for row in ids for each in row))
    data = ["--data", text, "--test", text, "--samples", 4, "--length", 32, "--seed", 3]
    asked = ["--tasks", "first,second", "--task-folder", tasks, "--questions", 6]
    chosen = ["--methods", "uniform", "--sparsities", "0.5", "--windows", 2, "--test-length", 16]
    output = command("compare", model, *data, *asked, *chosen, "--output", folder).stdout
    assert re.search(r"wanda +│ uniform +│ +\d\S+ \(\d\.\d\d\) │ 0\.\d{3} │", output)
    found = Comparison.model_validate_json((folder / "results.json").read_text())
    assert (found.questions, set(found.accuracy)) == (6, {"first", "second"})
