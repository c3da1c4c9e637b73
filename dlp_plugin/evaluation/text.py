"""Files and datasets to token windows, for calibration and for measuring."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from loguru import logger
from transformers import PreTrainedTokenizerBase

from dlp_plugin.evaluation.sources import read_pieces

__all__ = [
    "beginning",
    "calibrate_on",
    "calibration_set",
    "evenly_spread",
    "read_tokens",
    "token_windows",
]


def beginning(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Token that a tokenizer puts in front of every text; None if it puts none.

    Models that were always trained with it (Gemma) make little sense of text without.
    """
    bos = tokenizer.bos_token_id
    begins = [
        tokenizer("a", add_special_tokens=special)["input_ids"][:1] for special in (False, True)
    ]
    return bos if begins[1] == [bos] != begins[0] else None


def read_tokens(
    source: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    config: str | None = None,
    split: str | None = None,
    usual_split: str = "train",
    column: str = "text",
    limit: int | None = None,
) -> list[int]:
    """Tokens of a file or of a dataset, as one stream without special tokens.

    JSON, CSV, Parquet and Arrow files are read as datasets, by their ending; every other file
    is a text. Both may be compressed. Rows of a dataset are joined by a blank line, as is usual
    for WikiText; a text file in a folder is one row. Conversations (lists of ``role`` and
    ``content``, or ShareGPT's ``from`` and ``value``) become what the tokenizer's chat template
    makes of them.

    :param source: a file, a local folder, or a dataset: by its name on the hub, or one of
        llm-compressor's names such as ``open_platypus``
    :param config: the dataset's configuration, e.g. ``wikitext-2-raw-v1``
    :param split: the dataset's split; None for ``usual_split``, or for the only one that a
        file or local folder has
    :param usual_split: the split to take where none is asked for, and there are several
    :param column: the dataset's column that holds the text; a text file has none
    :param limit: tokens wanted; a dataset is then streamed and read no further
    :raises FileNotFoundError: if there is neither such a file nor such a dataset
    :raises ValueError: if it cannot be read or holds white space only; if a text is not UTF-8;
        if a dataset has no such split or column, or no text in one of its rows
    """

    def encode(text: str) -> list[int]:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return list(ids)

    # Encoded as one text: tokenizers treat the beginning of a text in their own way.
    pieces: list[str] = []
    roughly = 0
    for piece in read_pieces(
        source,
        tokenizer,
        config=config,
        split=split,
        usual_split=usual_split,
        column=column,
        streaming=limit is not None,
    ):
        pieces.append(piece)
        roughly += 0 if limit is None else len(encode(piece))
        if limit is not None and roughly >= limit:
            tokens = encode("".join(pieces))
            if len(tokens) >= limit:
                return tokens[:limit]
    text = "".join(pieces)
    if not text.strip():
        raise ValueError(f"{source} holds nothing but white space: give one with text in it")
    return encode(text)


def token_windows(
    token_ids: Sequence[int], length: int, first: int | None = None
) -> list[torch.Tensor]:
    """Cut a token stream into consecutive windows that do not overlap.

    The last window may be shorter; one that predicts nothing is dropped.

    :param token_ids: the tokens of the whole text, in order
    :param length: tokens per window, at least 2, ``first`` included
    :param first: token that every window begins with, as :func:`beginning` finds it
    :return: int64 tensors ``[tokens]``, all of ``length`` but perhaps the last
    :raises ValueError: if ``length`` is below 2 or the text has fewer than 2 tokens
    """
    if length < 2:
        raise ValueError(f"length must be at least 2 tokens, got {length}")
    if len(token_ids) < 2:
        raise ValueError(f"the text has {len(token_ids)} tokens, and 2 are the least")
    begin = torch.tensor([] if first is None else [first], dtype=torch.int64)
    pieces = torch.as_tensor(token_ids, dtype=torch.int64).split(length - len(begin))
    windows = [torch.cat([begin, piece]) for piece in pieces]
    return [window for window in windows if len(window) > 1]


def evenly_spread(windows: Sequence[torch.Tensor], count: int) -> list[torch.Tensor]:
    """Some of a text's windows, in its order; all of them if it has no more than ``count``."""
    count = min(count, len(windows))
    return [windows[i * len(windows) // count] for i in range(count)]


def calibration_set(
    token_ids: Sequence[int],
    length: int,
    samples: int,
    first: int | None = None,
    seed: int | None = None,
) -> Dataset:
    """Full windows of a token stream, evenly spread over it, as ``oneshot()`` takes them.

    :param token_ids: the tokens of the whole text, in order
    :param length: tokens per sample, at least 2, ``first`` included
    :param first: token that every sample begins with, as :func:`beginning` finds it
    :param samples: how many, at least 1; fewer (with a log line) if the text is short
    :param seed: draws the samples at random, each once, in place of spreading them evenly
    :return: rows of ``input_ids`` and ``attention_mask``
    :raises ValueError: if the text does not fill one window, or ``samples`` is below 1
    """
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    if len(token_ids) < length - (first is not None):
        raise ValueError(
            f"the calibration text has {len(token_ids)} tokens, which is less than one "
            f"sample of {length}: give more text or a smaller length"
        )
    windows = [w for w in token_windows(token_ids, length, first) if len(w) == length]
    if len(windows) < samples:
        logger.warning("The text gives {} samples instead of {}", len(windows), samples)
    if seed is not None:
        drawn = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
        windows = [windows[place] for place in drawn[:samples]]
    chosen = [window.tolist() for window in evenly_spread(windows, samples)]
    return Dataset.from_dict(
        {"input_ids": chosen, "attention_mask": [[1] * length for _ in chosen]}
    )


def calibrate_on(dataset: Dataset, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Arguments of ``oneshot()`` to calibrate on all of a data set, in its order.

    :param dataset: rows of ``input_ids`` and ``attention_mask``, as :func:`calibration_set`
        makes them
    """
    return {
        "tokenizer": tokenizer,
        "dataset": dataset,
        "num_calibration_samples": len(dataset),
        "max_seq_length": max(map(len, dataset["input_ids"])),
        "shuffle_calibration_samples": False,
    }
