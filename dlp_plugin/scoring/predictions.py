"""What a model predicts, kept small, and how far another model's predictions lie from it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from compressed_tensors.offload import disable_offloading, disable_onloading
from compressed_tensors.utils import get_execution_device

from dlp_plugin.precision import wide_enough, widest
from dlp_plugin.scoring.calibration import Batch

__all__ = [
    "LIKELIEST",
    "WIDE",
    "Predictions",
    "device_of",
    "divergences",
    "gradient",
    "keep",
    "loaded",
    "logits_of",
]

# Tokens whose logits are widened to float32 together.
WIDE = 256
# Tokens of the vocabulary that the dense model's predictions are kept for, the likeliest
# ones; the others are one class.
LIKELIEST = 512
# Of a GPU's free memory, how much a model's weights may take to stay on it.
ROOM = 0.6


class Predictions(NamedTuple):
    """A model's predictions for ``n`` tokens.

    :param places: int32 ``[n, likeliest]``, ids of the likeliest tokens
    :param logs: float32 ``[n, likeliest + 1]``, their log-probabilities; the last is of all other
        tokens
    """

    places: torch.Tensor
    logs: torch.Tensor


def device_of(model: torch.nn.Module) -> torch.device:
    """The device that a language model takes its token ids on.

    :param model: a causal language model
    """
    return torch.device(get_execution_device(model.get_input_embeddings()))  # type: ignore[operator]


@contextmanager
def loaded(model: torch.nn.Module) -> Iterator[None]:
    """Have weights stay on the GPU that they are fetched to, if it has room for all of them.

    The host fetches every weight at every use.

    :param model: whose weights are fetched
    """
    device = device_of(model)
    if device.type != "cuda":
        yield
        return
    with disable_onloading():
        needed = sum(weight.nbytes for weight in model.parameters())
    if needed > ROOM * torch.cuda.mem_get_info(device)[0]:
        yield
        return
    with disable_offloading():
        yield


def logits_of(model: torch.nn.Module, batch: Batch, device: torch.device) -> torch.Tensor:
    """Logits of a causal language model for a batch, ``[samples, tokens, vocabulary]``.

    :param model: a causal language model
    :param batch: keyword arguments of its forward pass
    :param device: of the token ids
    """
    known = inspect.signature(type(model).forward).parameters
    inputs: dict[str, Any] = {
        key: value.to(device) if isinstance(value, torch.Tensor) else value
        for key, value in batch.items()
        if key in known and key != "labels"
    }
    with wide_enough(model, device):
        logits: torch.Tensor = model(**inputs, use_cache=False).logits
    return logits


@torch.no_grad()
def keep(logits: torch.Tensor) -> Predictions:
    """Keep the likeliest tokens one by one, and what is left as one class.

    :param logits: ``[n, vocabulary]``
    """
    likeliest = min(LIKELIEST, logits.shape[1])
    places, logs = [], []
    for few in logits.split(WIDE):
        every = few.float().log_softmax(-1)
        top = every.topk(likeliest)
        places.append(top.indices.int().cpu())
        logs.append(torch.cat([top.values, _rest(top.values)], dim=1).cpu())
    return Predictions(torch.cat(places), torch.cat(logs))


def divergences(logits: torch.Tensor, kept: Predictions) -> torch.Tensor:
    """Kullback-Leibler divergences from what was kept, summed over a few tokens at a time.

    A lower bound of the divergences over the whole vocabulary.

    :param logits: ``[n, vocabulary]``
    :param kept: predictions of the dense model for the same tokens
    :return: one sum per ``WIDE`` tokens, as wide as the device can
    """
    return torch.stack([_divergence(*few) for few in _portions(logits, kept)])


def gradient(logits: torch.Tensor, kept: Predictions) -> torch.Tensor:
    """Gradient of the divergences' sum with respect to the logits.

    As large as these; what is computed in float32 on the way is of a few tokens at a time.

    :param logits: ``[n, vocabulary]``
    :param kept: predictions of the dense model for the same tokens
    """
    found = torch.empty_like(logits)
    for part, few in zip(found.split(WIDE), _portions(logits.detach(), kept), strict=True):
        few[0].requires_grad_()
        with torch.enable_grad():
            total = _divergence(*few)
        part.copy_(*torch.autograd.grad(total, few[0]))
    return found


def _portions(
    logits: torch.Tensor, kept: Predictions
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """``WIDE`` tokens' logits, and what was kept for them."""
    return zip(logits.split(WIDE), kept.places.split(WIDE), kept.logs.split(WIDE), strict=True)


def _divergence(logits: torch.Tensor, places: torch.Tensor, logs: torch.Tensor) -> torch.Tensor:
    every = logits.float().log_softmax(-1)
    top = every.gather(1, places.long().to(every.device))
    other = torch.cat([top, _rest(top)], dim=1)
    logs = logs.to(every.device)
    differences = logs.exp() * (logs - other)
    return differences.to(widest(logs.device)).sum()


def _rest(logs: torch.Tensor) -> torch.Tensor:
    """Logarithm of what probabilities leave, ``[n, 1]``."""
    left = 1 - logs.to(widest(logs.device)).exp().sum(1, keepdim=True)
    return left.clamp_min(1e-12).log().float()
