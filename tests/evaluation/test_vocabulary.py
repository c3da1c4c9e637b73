"""A tokenizer larger than the embeddings is told before the work, by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import EVERY, MakeModel, command, refuses
from input_kinds import KINDS

from dlp_plugin import DLPModifier, WandaPruningModifier
from dlp_plugin.evaluation.perplexity import perplexity
from dlp_plugin.evaluation.vocabulary import check_vocabulary

MESSAGE = r"gives token 2\d\d, but the embeddings of \S+ have 200 rows: take the tokenizer"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Embeddings for 200 tokens, a tokenizer of 256."""
    folder = KINDS["dense"](tmp_path_factory.mktemp("small") / "model")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(200)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["ppl", "score", "oneshot", "compare"])
def test_the_terminal(name: str, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("7 " * 50 + "249")
    (tmp_path / "recipe.yaml").write_text(
        "a_stage: {b_modifiers: {OneShotMagnitudeModifier: {sparsity: 0.5, targets: [Linear]}}}"
    )
    more = {
        "ppl": [],
        "score": ["--output", tmp_path / "out"],
        "oneshot": ["--recipe", tmp_path / "recipe.yaml", "--output", tmp_path / "out"],
        "compare": ["--test", tmp_path / "text.txt", "--output", tmp_path / "out"],
    }
    line = [name, folder, "--data", tmp_path / "text.txt", "--length", 16, *more[name]]
    output = " ".join(command(*line, code=1).output.split())
    assert "gives token 249, but the embeddings of" in output
    assert not (tmp_path / "out").exists()


def test_zero_shot(folder: Path, tmp_path: Path) -> None:
    question = {"context": "2 249", "choices": ["3", "4"], "answer": 0}
    (tmp_path / "questions.jsonl").write_text(json.dumps(question) + "\n")
    files = {"data_files": {"test": str(tmp_path / "questions.jsonl")}}
    task = {
        "task": "tiny",
        "dataset_path": "json",
        "dataset_kwargs": {**files, "cache_dir": str(tmp_path / "cache")},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "context",
        "doc_to_target": "answer",
        "doc_to_choice": "choices",
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "tiny.yaml").write_text(json.dumps(task))
    output = command("zero-shot", folder, "tiny", "--task-folder", tmp_path, code=1).output
    assert "gives token 255, but the embeddings of" in " ".join(output.split())


def test_an_allocation_modifier(make_model: MakeModel) -> None:
    """llm-compressor itself speaks of an "Autowrapped LlamaModel"."""
    model = make_model(vocab_size=200)
    stage = WandaPruningModifier(sparsity=0.5, **EVERY)
    refuses(model, MESSAGE, DLPModifier(), stage)


def test_perplexity(make_model: MakeModel) -> None:
    with pytest.raises(ValueError, match=r"gives token 200, but"):
        perplexity(make_model(vocab_size=200), [torch.tensor([1, 199]), torch.tensor([1, 200])])


def test_the_last_row_counts() -> None:
    check_vocabulary(199, 200, "model")
