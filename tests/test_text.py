"""Texts to windows, and perplexity over them."""

import math
from pathlib import Path

import pytest
import torch
from conftest import word_tokenizer
from datasets import Dataset
from tokenizers.pre_tokenizers import WhitespaceSplit

from dlp_plugin.evaluate import perplexity
from dlp_plugin.text import calibration_set, read_tokens, token_windows


def test_windows_do_not_overlap_and_the_last_may_be_short() -> None:
    windows = token_windows(range(11), 4)
    assert [w.tolist() for w in windows] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    assert [w.tolist() for w in token_windows(range(9), 4)] == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_calibration_samples_are_spread_evenly() -> None:
    rows = calibration_set(range(100), 5, 4)  # 20 windows; every fifth
    assert [row["input_ids"][0] for row in rows] == [0, 25, 50, 75]
    assert rows[0] == {"input_ids": [0, 1, 2, 3, 4], "attention_mask": [1] * 5}
    assert len(calibration_set(range(100), 30, 8)) == 3  # as many as the text fills


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: token_windows(range(9), 1), "length must be at least 2 tokens, got 1"),
        (lambda: token_windows([5], 4), "the text has 1 tokens"),
        (lambda: calibration_set(range(3), 4, 1), "has 3 tokens, which is less than one sample"),
        (lambda: calibration_set(range(9), 4, 0), "samples must be at least 1, got 0"),
    ],
)
def test_too_little_is_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_text_file_and_a_dataset_of_its_rows(tmp_path: Path) -> None:
    tokenizer = word_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = WhitespaceSplit()
    (tmp_path / "text.txt").write_text("7 8 9\n\n12 11")
    assert read_tokens(tmp_path / "text.txt", tokenizer) == [7, 8, 9, 12, 11]
    assert read_tokens(tmp_path / "text.txt", tokenizer, limit=2) == [7, 8]
    folder = tmp_path / "rows"
    folder.mkdir()
    Dataset.from_dict({"text": ["7 8 9", "12 11"]}).to_json(folder / "train.jsonl")
    assert read_tokens(folder, tokenizer) == [7, 8, 9, 12, 11]
    assert read_tokens(folder, tokenizer, limit=4) == [7, 8, 9, 12]
    with pytest.raises(ValueError, match=r"has no column 'body'; it has \['text'\]"):
        read_tokens(folder, tokenizer, column="body")


class Table(torch.nn.Module):
    """Predicts the next token by a table of logits."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = torch.nn.Parameter(logits)

    def forward(self, input_ids: torch.Tensor, use_cache: bool):
        return type("Output", (), {"logits": self.logits[input_ids]})


def test_every_token_after_a_windows_first_counts_once() -> None:
    # P(next | 0) = (3/4, 1/4), P(next | 1) = (1/2, 1/2); windows 0 0 1 and 1 0
    model = Table(torch.tensor([[0.75, 0.25], [0.5, 0.5]]).log())
    windows = [torch.tensor([0, 0, 1]), torch.tensor([1, 0])]
    expected = math.exp(-(math.log(0.75) + math.log(0.25) + math.log(0.5)) / 3)
    assert perplexity(model, windows) == pytest.approx(expected, rel=1e-6)


def test_batching_changes_nothing_and_the_mode_comes_back(make_model) -> None:
    model = make_model().train()
    windows = token_windows(torch.arange(2000) * 7 % 256, 64)
    done: list[int] = []
    one_by_one = perplexity(model, windows, 1, done.append)
    assert sum(done) == len(windows)
    assert perplexity(model, windows, 5) == pytest.approx(one_by_one, rel=1e-5)
    assert model.training
    labels = torch.cat([model(w[None], labels=w[None]).loss[None] for w in windows[:-1]])
    last = model(windows[-1][None], labels=windows[-1][None]).loss
    sizes = torch.tensor([len(w) - 1.0 for w in windows])
    mean = (torch.cat([labels, last[None]]) * sizes).sum() / sizes.sum()
    assert one_by_one == pytest.approx(mean.exp().item(), rel=1e-5)
