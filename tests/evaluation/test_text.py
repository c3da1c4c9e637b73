"""Texts to windows, and perplexity over them."""

import math
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from helpers import MakeModel, word_tokenizer
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing

from dlp_plugin.evaluation.perplexity import perplexity
from dlp_plugin.evaluation.text import (
    beginning,
    calibration_set,
    evenly_spread,
    read_tokens,
    token_windows,
)


def test_windows_do_not_overlap_and_the_last_may_be_short() -> None:
    windows = token_windows(range(11), 4)
    assert [w.tolist() for w in windows] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    assert [w.tolist() for w in token_windows(range(9), 4)] == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_calibration_samples_are_spread_evenly() -> None:
    rows = calibration_set(range(100), 5, 4)  # 20 windows; every fifth
    assert [row["input_ids"][0] for row in rows] == [0, 25, 50, 75]
    assert rows[0] == {"input_ids": [0, 1, 2, 3, 4], "attention_mask": [1] * 5}
    assert len(calibration_set(range(100), 30, 8)) == 3  # as many as the text fills
    assert evenly_spread(list("abcdefgh"), 3) == ["a", "c", "f"]
    assert evenly_spread(["a"], 3) == ["a"]


def test_a_seed_draws_calibration_samples() -> None:
    def begins(seed: int) -> list[int]:
        return [row["input_ids"][0] for row in calibration_set(range(100), 5, 6, seed=seed)]

    assert begins(1) == begins(1) != begins(2)
    assert set(begins(1)) < set(range(0, 100, 5))
    assert len(set(begins(1))) == 6


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: token_windows(range(9), 1), "length must be at least 2 tokens, got 1"),
        (lambda: token_windows([5], 4), "at least 2 tokens, got 1"),
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


def test_the_mark_that_windows_puts_before_a_text_is_none_of_it(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_bytes(b"\xef\xbb\xbf7 8\r\n9")
    tokenizer = word_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = WhitespaceSplit()
    assert read_tokens(tmp_path / "text.txt", tokenizer) == [7, 8, 9]


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


def test_batching_changes_nothing_and_the_mode_comes_back(make_model: MakeModel) -> None:
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


@pytest.mark.parametrize(("length", "together"), [(256, [8, 1]), (1500, [1] * 9), (4000, [1] * 9)])
def test_as_many_windows_are_run_together_as_hold_2048_tokens(
    length: int, together: list[int]
) -> None:
    """Whose logits are in memory at once."""
    done: list[int] = []
    windows = [torch.zeros(length, dtype=torch.int64)] * 9
    perplexity(Table(torch.zeros(2, 2)), windows, advance=done.append)
    assert done == together


def test_a_collapsed_model_has_no_finite_perplexity() -> None:
    logits = torch.zeros(4, 4)
    logits[:, 0] = 1e4  # sure of token 0, which never comes
    assert perplexity(Table(logits), [torch.tensor([1, 2, 3, 1])]) == math.inf


def test_long_windows_are_widened_in_pieces() -> None:
    model = Table(torch.randn(8, 8, generator=torch.Generator().manual_seed(0)))
    ids = torch.arange(600) * 3 % 8
    logits = model.logits.detach()[ids[:-1]].double()
    expected = torch.nn.functional.cross_entropy(logits, ids[1:])
    assert perplexity(model, [ids]) == pytest.approx(math.exp(expected), rel=1e-6)


class TestTheBeginningOfATokenizer:
    def test_one_that_puts_none(self) -> None:
        assert beginning(word_tokenizer()) is None

    def test_one_that_puts_it_before_every_text(self) -> None:
        tokenizer = word_tokenizer()
        tokenizer.bos_token = "7"
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="7 $A", special_tokens=[("7", 7)]
        )
        assert beginning(tokenizer) == 7

    def test_every_window_and_sample_begins_with_it(self) -> None:
        windows = token_windows(range(10, 17), 4, 7)
        assert [w.tolist() for w in windows] == [[7, 10, 11, 12], [7, 13, 14, 15], [7, 16]]
        rows = calibration_set(range(10, 17), 4, 2, 7)
        assert rows["input_ids"][:] == [[7, 10, 11, 12], [7, 13, 14, 15]]
        assert len(calibration_set(range(3), 4, 1, 7)) == 1  # with it they fill a sample

    def test_it_is_seen_but_not_counted(self) -> None:
        """Every token of the text counts once, its first one given the beginning."""
        model = Table(torch.randn(8, 8, generator=torch.Generator().manual_seed(0)))
        log = model.logits.detach().log_softmax(-1)
        expected = -(log[7, 1] + log[1, 2] + log[2, 3]) / 3
        value = perplexity(model, token_windows([1, 2, 3], 4, 7))
        assert value == pytest.approx(math.exp(expected), rel=1e-6)


class TestSourcesThatCannotBeRead:
    def test_a_file_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"no file or folder .*gone\.txt: check"):
            read_tokens(tmp_path / "gone.txt", word_tokenizer())
        with pytest.raises(FileNotFoundError, match="no file or folder gone.txt"):
            read_tokens("gone.txt", word_tokenizer())

    def test_a_file_that_is_no_text(self, tmp_path: Path) -> None:
        (tmp_path / "text.txt").write_bytes(b"ab\xff")
        with pytest.raises(ValueError, match=r"text\.txt is not UTF-8 text \(byte 2\)"):
            read_tokens(tmp_path / "text.txt", word_tokenizer())

    def test_a_dataset_of_several_columns_that_tells_none_before_it_is_read(
        self, tmp_path: Path
    ) -> None:
        (tmp_path / "train.csv").write_text("title,body\n7,8 9\n")
        with pytest.raises(ValueError, match=r"no column 'text'; it has \['title', 'body'\]"):
            read_tokens(tmp_path, word_tokenizer(), limit=2)

    def test_a_hub_that_refuses_in_a_class_of_its_own(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class RefusedError(OSError):
            def __init__(self, reason: str, *, response: object) -> None:
                super().__init__(reason)

        def refuse(*_: object, **__: object) -> None:
            raise RefusedError("401 Unauthorized", response=None)

        monkeypatch.setattr("dlp_plugin.evaluation.sources.load_dataset", refuse)
        with pytest.raises(OSError, match=r"cannot be read as a dataset \(401 Unauthorized\)"):
            read_tokens("some/dataset", word_tokenizer())

    def test_a_folder_that_holds_no_dataset(self, tmp_path: Path) -> None:
        with pytest.raises(OSError, match=r"cannot be read as a dataset"):
            read_tokens(tmp_path, word_tokenizer())

    def test_a_row_without_text(self, tmp_path: Path) -> None:
        Dataset.from_dict({"text": ["7 8 9", None]}).to_json(tmp_path / "train.jsonl")
        with pytest.raises(ValueError, match=r"'text' of row 1 is None instead of text"):
            read_tokens(tmp_path, word_tokenizer())
