"""Zero-shot accuracy: lm-evaluation-harness against the same choices made by hand, offline."""

import json
import math
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import datasets
import pytest
import torch
from helpers import SHIPPED, assert_same, weights_of
from lm_eval.tasks import TaskManager
from lm_tasks import questions, write_task
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from dlp_plugin.evaluation.zeroshot import TASK_SETS, zero_shot


@torch.no_grad()
def naive_accuracy(model: LlamaForCausalLM, tokenizer: object) -> dict[str, float]:
    """One choice at a time, without padding, its log-probabilities summed in float64."""
    hits = {"acc": [], "acc_norm": []}
    for question in questions():
        sums = []
        start = len(tokenizer(question["context"])["input_ids"])
        for choice in question["choices"]:
            ids = torch.tensor(tokenizer(f"{question['context']} {choice}")["input_ids"])
            scores = model(input_ids=ids[None]).logits[0].double().log_softmax(dim=-1)
            sums.append(sum(scores[i - 1, ids[i]].item() for i in range(start, len(ids))))
        norms = [s / len(choice) for s, choice in zip(sums, question["choices"], strict=True)]
        hits["acc"].append(sums.index(max(sums)) == question["answer"])
        hits["acc_norm"].append(norms.index(max(norms)) == question["answer"])
    result = {}
    for metric, values in hits.items():
        p = sum(values) / len(values)
        result[metric] = p
        result[f"{metric}_stderr"] = math.sqrt(p * (1 - p) / (len(values) - 1))
    return result


@pytest.fixture(scope="module")
def tokenizer() -> object:
    return AutoTokenizer.from_pretrained(SHIPPED)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32)


@pytest.fixture
def task_folder(tmp_path: Path) -> Path:
    write_task(tmp_path)
    return tmp_path


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fail a test whose code asked for a host, also where the code swallowed the refusal."""
    asked = []

    def refuse(*address: object, **_: object) -> None:
        asked.append(address)
        raise OSError(f"no network here, {address}")

    # datasets reports to its makers that its reader of JSON was used
    monkeypatch.setattr(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", False)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    yield
    assert asked == []


@pytest.mark.usefixtures("no_network")
def test_a_task_of_ones_own_is_measured_as_by_hand(
    model: LlamaForCausalLM, tokenizer: object, task_folder: Path
) -> None:
    results = zero_shot(model, tokenizer, "continuation", task_folder=task_folder)
    expected = naive_accuracy(model, tokenizer)
    assert results["continuation"] == pytest.approx(expected, abs=1e-12)
    assert results["mean"] == {"acc": expected["acc"]}
    assert json.loads(json.dumps(results)) == results
    # Chance is 1/4. Some are missed, and length matters, so that equality above says something.
    for metric in ("acc", "acc_norm"):
        assert 0.25 + 4 * expected[f"{metric}_stderr"] < expected[metric] < 1
    assert expected["acc"] != expected["acc_norm"]


def test_batches_repeats_sets_and_what_the_model_was_do_not_matter(
    model: LlamaForCausalLM, tokenizer: object, task_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(7)
    model.train()
    first = zero_shot(model, tokenizer, ["continuation"], task_folder=task_folder)
    assert model.training
    model.eval()
    monkeypatch.setitem(TASK_SETS, "mine", ("continuation",))
    names = ["continuation", "mine", "continuation"]
    again = zero_shot(model, tokenizer, names, batch_size=3, task_folder=task_folder)
    assert again == first
    assert not model.training


def test_the_tokenizer_and_the_weights_stay_as_they_are(
    model: LlamaForCausalLM, task_folder: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED, pad_token=None)
    before = weights_of(model)
    zero_shot(model, tokenizer, "continuation", limit=2, task_folder=task_folder)
    assert tokenizer.pad_token is None
    assert_same(weights_of(model), before)


def test_limit_takes_the_first_questions_and_the_mean_is_over_tasks(
    model: LlamaForCausalLM, tokenizer: object, task_folder: Path
) -> None:
    write_task(task_folder, "other", metrics=("acc",))
    names = ["continuation", "other"]
    results = zero_shot(model, tokenizer, names, limit=1, task_folder=task_folder)
    assert set(results) == {"continuation", "other", "mean"}
    # Of one question there is no standard error.
    assert set(results["continuation"]) == {"acc", "acc_norm"}
    assert set(results["other"]) == {"acc"}
    assert results["mean"]["acc"] in (0, 1)


class TestScoresThatNoChoiceCanBeMadeBy:
    """The harness takes the first of several NaN for the best."""

    @pytest.fixture
    def model(self) -> LlamaForCausalLM:
        found = AutoModelForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32)
        found.lm_head.weight = torch.nn.Parameter(found.lm_head.weight.detach().clone())
        return found

    def test_of_any_text(
        self, model: LlamaForCausalLM, tokenizer: object, task_folder: Path
    ) -> None:
        with torch.no_grad():
            model.model.layers[3].mlp.up_proj.weight[0, 0] = torch.nan
        message = r"perplexity of .* on a few tokens is nan; model\.layers\.3\.mlp\.up_proj\.weigh"
        with pytest.raises(ValueError, match=message):
            zero_shot(model, tokenizer, "continuation", task_folder=task_folder)

    def test_of_one_token(
        self, model: LlamaForCausalLM, tokenizer: object, task_folder: Path
    ) -> None:
        token = tokenizer(questions()[0]["choices"][0], add_special_tokens=False)["input_ids"][-2]
        with torch.no_grad():
            model.get_input_embeddings().weight[token] = torch.nan
        message = r"log-probability of a choice by .* is nan; model\.embed_tokens\.weight holds"
        with pytest.raises(ValueError, match=message):
            zero_shot(model, tokenizer, "continuation", limit=1, task_folder=task_folder)


def test_the_papers_seven_are_known_to_the_harness() -> None:
    names = TASK_SETS["paper7"]
    assert len(set(names)) == len(names) == 7
    manager = TaskManager()
    configs = {name: manager.task_index[name].cfg for name in names}
    assert {config["output_type"] for config in configs.values()} == {"multiple_choice"}
    measured = {name: {m["metric"] for m in c["metric_list"]} for name, c in configs.items()}
    assert all("acc" in metrics for metrics in measured.values())


class TestMistakesAreToldBeforeAnyEvaluation:
    @pytest.fixture(autouse=True)
    def _no_evaluation(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: object, **__: object) -> None:
            raise AssertionError("evaluated")

        monkeypatch.setattr(LlamaForCausalLM, "forward", fail)

    def test_an_unknown_task(
        self, model: LlamaForCausalLM, tokenizer: object, task_folder: Path
    ) -> None:
        names = ["continuation", "contination"]
        with pytest.raises(
            ValueError, match="'contination' is unknown; did you mean continuation.*lm-eval ls"
        ):
            zero_shot(model, tokenizer, names, task_folder=task_folder)

    def test_no_task(self, model: LlamaForCausalLM, tokenizer: object) -> None:
        with pytest.raises(ValueError, match="no task given; .* paper7"):
            zero_shot(model, tokenizer, [])

    def test_a_task_without_accuracy(
        self, model: LlamaForCausalLM, tokenizer: object, task_folder: Path
    ) -> None:
        write_task(task_folder, "modelled", metrics=("perplexity",), output_type="loglikelihood")
        with pytest.raises(ValueError, match="modelled is not measured by accuracy but by perpl"):
            zero_shot(model, tokenizer, "modelled", task_folder=task_folder)

    def test_a_task_folder_that_is_none(
        self, model: LlamaForCausalLM, tokenizer: object, tmp_path: Path
    ) -> None:
        with pytest.raises(ValueError, match="missing is not a folder; give one of YAML files"):
            zero_shot(model, tokenizer, "a", task_folder=tmp_path / "missing")

    @pytest.mark.parametrize("name", ["batch_size", "limit"])
    def test_a_number_out_of_bounds(
        self, model: LlamaForCausalLM, tokenizer: object, name: str
    ) -> None:
        with pytest.raises(ValueError, match=f"^{name} must be at least 1, got 0"):
            zero_shot(model, tokenizer, "boolq", **{name: 0})

    def test_the_extra_is_missing(
        self, model: LlamaForCausalLM, tokenizer: object, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
        with pytest.raises(ImportError, match=r"pip install 'dlp_plugin\[eval\]'"):
            zero_shot(model, tokenizer, "boolq")
