"""Turns files and datasets into token windows, for calibration and evaluation."""

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
    """Find the token that a tokenizer puts in front of every text.

    Models that were always trained with this token, such as Gemma, predict poorly without it.

    :param tokenizer: of the model
    :return: id of the token; None if the tokenizer adds none
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
    """Read a file or dataset as one stream of tokens, without special tokens.

    JSON, CSV, Parquet and Arrow files are recognized by their suffix and read as datasets. Every
    other file is read as text. Both may be compressed. Rows of a dataset are joined by a blank
    line, as is usual for WikiText. A text file in a folder is one row. Conversations (lists of
    ``role`` and ``content``, or ShareGPT's ``from`` and ``value``) are written as text by the
    tokenizer's chat template.

    :param source: a file, a local folder, the name of a dataset on the hub, or one of
        llm-compressor's names such as ``open_platypus``
    :param tokenizer: of the model
    :param config: the dataset's configuration, e.g. ``wikitext-2-raw-v1``
    :param split: the dataset's split; None for ``usual_split``, or for the only split that a
        file or local folder has
    :param usual_split: the split to take if ``split`` is None and there are several
    :param column: the dataset's column that holds the text; not used for text files
    :param limit: largest number of tokens; a dataset is then streamed, and not read further
    :return: token ids
    :raises FileNotFoundError: if there is neither such a file nor such a dataset
    :raises ValueError: if the source cannot be read or holds white space only; if a text is not
        UTF-8; if a dataset has no such split or column, or no text in one of its rows
    """

    def encode(text: str) -> list[int]:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return list(ids)

    # All pieces are encoded as one text, because tokenizers treat the start of a text differently.
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

    The last window may be shorter. It is dropped if it has only one token.

    :param token_ids: the tokens of the whole text, in order
    :param length: tokens per window, at least 2, including ``first``
    :param first: token that every window begins with, as :func:`beginning` returns it
    :return: int64 tensors ``[tokens]``, all of ``length`` except perhaps the last
    :raises ValueError: if ``length`` is below 2 or the text has fewer than 2 tokens
    """
    if length < 2:
        raise ValueError(f"length must be at least 2 tokens, got {length}")
    if len(token_ids) < 2:
        raise ValueError(f"the text must have at least 2 tokens, got {len(token_ids)}")
    begin = torch.tensor([] if first is None else [first], dtype=torch.int64)
    pieces = torch.as_tensor(token_ids, dtype=torch.int64).split(length - len(begin))
    windows = [torch.cat([begin, piece]) for piece in pieces]
    return [window for window in windows if len(window) > 1]


def evenly_spread(windows: Sequence[torch.Tensor], count: int) -> list[torch.Tensor]:
    """Choose windows that are evenly spread over a text.

    :param windows: of the text, in order
    :param count: how many to choose
    :return: the chosen windows, in order; all of them if there are no more than ``count``
    """
    count = min(count, len(windows))
    return [windows[i * len(windows) // count] for i in range(count)]


def calibration_set(
    token_ids: Sequence[int],
    length: int,
    samples: int,
    first: int | None = None,
    seed: int | None = None,
) -> Dataset:
    """Make a calibration data set for ``oneshot()`` from full windows, evenly spread over a text.

    :param token_ids: the tokens of the whole text, in order
    :param length: tokens per sample, at least 2, including ``first``
    :param samples: number of samples, at least 1; fewer, with a warning, if the text is short
    :param first: token that every sample begins with, as :func:`beginning` returns it
    :param seed: if given, samples are drawn at random without replacement instead of evenly
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
    """Return the arguments that make ``oneshot()`` calibrate on all of a data set, in its order.

    :param dataset: rows of ``input_ids`` and ``attention_mask``, as :func:`calibration_set`
        makes them
    :param tokenizer: of the model
    :return: keyword arguments
    """
    return {
        "tokenizer": tokenizer,
        "dataset": dataset,
        "num_calibration_samples": len(dataset),
        "max_seq_length": max(map(len, dataset["input_ids"])),
        "shuffle_calibration_samples": False,
    }
