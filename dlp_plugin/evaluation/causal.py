"""Checks that a model predicts every token only from the tokens before it."""

from __future__ import annotations

from typing import Any

import torch
from compressed_tensors.utils import get_execution_device

from dlp_plugin.precision import wide_enough

__all__ = ["check_causal"]

# Fraction of the largest logit by which rounding may change logits when a later token changes.
_NOISE = 1e-3


@torch.no_grad()
def check_causal(model: Any, what: str) -> None:
    """Refuse a model that is not causal, because its next-token loss is meaningless.

    The model is run: a change of the last token must not change the logits before it. Its class
    is not a reliable sign, because a masked language model can be loaded as a causal one
    (``BertLMHeadModel``) and still attends in both directions.

    :param model: a transformers model; its training mode is restored
    :param what: what needs a causal model, as a clause for the error
    :raises ValueError: naming the model's class and the reason
    """
    kind = type(model).__name__
    found = ""
    if getattr(model, "get_output_embeddings", lambda: None)() is None:
        found = "it has no head that predicts tokens"
    elif model.config.is_encoder_decoder:
        found = "it has an encoder"
    elif _sees_what_follows(model):
        found = "its predictions change with later tokens"
    if found:
        raise ValueError(
            f"{what}, which needs a causal language model, but {kind} is not one: {found}; give a "
            "model that was trained to predict the next token"
        )


def _sees_what_follows(model: Any) -> bool:
    embeddings = model.get_input_embeddings()
    device = get_execution_device(embeddings)
    ids = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 5]], device=device) % embeddings.num_embeddings
    was_training = model.training
    model.eval()
    try:
        with wide_enough(model, device):  # in one batch, so that both rows round the same way
            first, second = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    finally:
        model.train(was_training)
    return bool((first - second).abs().max() > _NOISE * first.abs().max())
