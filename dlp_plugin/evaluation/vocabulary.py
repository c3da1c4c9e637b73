"""Checks that a model has an embedding for every token of a text."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

__all__ = ["check_tokens", "check_vocabulary"]


def check_tokens(model: Any, ids: Iterable[torch.Tensor]) -> None:
    """Refuse token ids that a model has no embedding for; torch's own error does not name them.

    :param model: a transformers model
    :param ids: int64 tensors of any shape
    :raises ValueError: if the model has no embedding for an id
    """
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    rows = getattr(embeddings, "num_embeddings", None)
    if rows is not None:
        largest = max((int(each.max()) for each in ids if each.numel()), default=0)
        check_vocabulary(largest, rows, model.name_or_path or type(model).__name__)


def check_vocabulary(largest: int, rows: int, model: str) -> None:
    """Refuse token ids that are larger than a model's vocabulary.

    :param largest: the largest token id of a text or tokenizer
    :param rows: number of rows of the model's embeddings
    :param model: name of the model, for the error
    :raises ValueError: if the model has no embedding for the largest id
    """
    if largest >= rows:
        raise ValueError(
            f"the tokenizer gives token {largest}, but the embeddings of {model} have {rows} rows: "
            "take the tokenizer that the model was trained with, or enlarge the embeddings "
            "(resize_token_embeddings) and train them"
        )
