"""Whether a model predicts every token from those before it alone."""

from __future__ import annotations

from typing import Any

import torch
from compressed_tensors.utils import get_execution_device

from dlp_plugin.precision import wide_enough

__all__ = ["check_causal"]

# Of the largest logit: what a later token may change by rounding.
_NOISE = 1e-3


@torch.no_grad()
def check_causal(model: Any, what: str) -> None:
    """Refuse a model whose next-token loss means nothing.

    It is tried: a change of the last of a few tokens must not reach the logits before it.
    Architectures do not tell reliably, as a masked language model can be loaded as a causal
    one (``BertLMHeadModel``) and attends both ways all the same.

    :param model: a model of transformers; its mode is restored
    :param what: what needs a causal model, for the message
    :raises ValueError: naming the model's class and what was found
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
            f"{what}, which takes a causal language model, and {kind} is none: {found}; give a "
            "model that was trained to predict the next token"
        )


def _sees_what_follows(model: Any) -> bool:
    embeddings = model.get_input_embeddings()
    device = get_execution_device(embeddings)
    ids = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 5]], device=device) % embeddings.num_embeddings
    was_training = model.training
    model.eval()
    try:
        with wide_enough(model, device):  # in one batch, in which both rows round alike
            first, second = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    finally:
        model.train(was_training)
    return bool((first - second).abs().max() > _NOISE * first.abs().max())
