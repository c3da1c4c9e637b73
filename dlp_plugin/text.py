"""Text files and datasets to token windows, for calibration and for measuring."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from datasets import Dataset, IterableDataset, load_dataset
from loguru import logger
from transformers import PreTrainedTokenizerBase

__all__ = ["calibration_set", "read_tokens", "token_windows"]


def read_tokens(
    source: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    config: str | None = None,
    split: str = "train",
    column: str = "text",
    limit: int | None = None,
) -> list[int]:
    """Tokens of a text file or of a dataset, as one stream without special tokens.

    Rows of a dataset are joined by a blank line, as is usual for WikiText.

    :param source: a text file, or what ``datasets.load_dataset`` takes: a name on the
        hub or a local folder
    :param config: the dataset's configuration, e.g. ``wikitext-2-raw-v1``
    :param split: the dataset's split
    :param column: the dataset's column that holds the text
    :param limit: tokens wanted; a dataset is then streamed and read no further
    :raises ValueError: if the dataset has no such column
    """

    def encode(text: str) -> list[int]:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return list(ids)

    if Path(source).is_file():
        return encode(Path(source).read_text(encoding="utf-8"))[:limit]
    rows: Dataset | IterableDataset
    if limit is None:
        rows = load_dataset(str(source), config, split=split)
    else:
        rows = load_dataset(str(source), config, split=split, streaming=True)
    if rows.column_names is not None and column not in rows.column_names:
        raise ValueError(f"{source} has no column {column!r}; it has {rows.column_names}")

    # Encoded as one text: tokenizers treat the beginning of a text in their own way.
    texts: list[str] = []
    roughly = 0
    for row in rows:
        texts.append(row[column])
        roughly += 0 if limit is None else len(encode(row[column]))
        if limit is not None and roughly >= limit:
            tokens = encode("\n\n".join(texts))
            if len(tokens) >= limit:
                return tokens[:limit]
    return encode("\n\n".join(texts))


def token_windows(token_ids: Sequence[int], length: int) -> list[torch.Tensor]:
    """Cut a token stream into consecutive windows that do not overlap.

    The last window may be shorter; a single left-over token predicts nothing and is
    dropped.

    :param token_ids: the tokens of the whole text, in order
    :param length: tokens per window, at least 2
    :return: int64 tensors ``[tokens]``, all of ``length`` but perhaps the last
    :raises ValueError: if ``length`` is below 2 or the text has fewer than 2 tokens
    """
    if length < 2:
        raise ValueError(f"length must be at least 2 tokens, got {length}")
    if len(token_ids) < 2:
        raise ValueError(f"the text has {len(token_ids)} tokens, and 2 are the least")
    windows = torch.tensor(token_ids, dtype=torch.int64).split(length)
    return [window for window in windows if len(window) > 1]


def calibration_set(token_ids: Sequence[int], length: int, samples: int) -> Dataset:
    """Full windows of a token stream, evenly spread over it, as ``oneshot()`` takes them.

    :param token_ids: the tokens of the whole text, in order
    :param length: tokens per sample, at least 2
    :param samples: how many, at least 1; fewer (with a log line) if the text is short
    :return: rows of ``input_ids`` and ``attention_mask``
    :raises ValueError: if the text does not fill one window, or ``samples`` is below 1
    """
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    if len(token_ids) < length:
        raise ValueError(
            f"the calibration text has {len(token_ids)} tokens, which is less than one "
            f"sample of {length}: give more text or a smaller length"
        )
    windows = [w for w in token_windows(token_ids, length) if len(w) == length]
    if len(windows) < samples:
        logger.warning("The text gives {} samples instead of {}", len(windows), samples)
        samples = len(windows)
    chosen = [windows[i * len(windows) // samples].tolist() for i in range(samples)]
    return Dataset.from_dict(
        {"input_ids": chosen, "attention_mask": [[1] * length for _ in chosen]}
    )
