"""Blocks that are trained to give what they gave before they were pruned.

Layer by layer a pruning stage keeps every Linear's outputs near; what they add up to in a block
still drifts. So after a block is pruned, its surviving weights, norms and biases are trained until
the block's outputs, on the pruned model's activations, come nearest to the dense model's: those
of the dense block on the dense model's activations. (EBFT, arXiv 2402.12419, has the dense block's
on the pruned activations; measured side by side, that left more of the damage.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from compressed_tensors.distributed import is_distributed
from compressed_tensors.utils import get_execution_device
from llmcompressor.modifiers.utils.hooks import HooksMixin
from llmcompressor.utils.dev import get_main_device
from loguru import logger
from torch import distributed as dist
from torch.nn import functional
from transformers import Cache

from dlp_plugin.precision import widest
from dlp_plugin.pruning.training import Training, survivors, train

__all__ = ["Reconstruction"]

Module = torch.nn.Module

# Adam's; see train(). The best lay between 2e-3 and 5e-4 on the models that were measured.
RATE = 1e-3


@dataclass(frozen=True)
class _Call:
    """What a block was called with, and returned; on the CPU."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: torch.Tensor

    @property
    def hidden(self) -> torch.Tensor:
        """The hidden states that the block was given, ``[..., tokens, hidden]``."""
        found: torch.Tensor = self.args[0] if self.args else self.kwargs["hidden_states"]
        return found

    def given(self, hidden: torch.Tensor) -> _Call:
        """The same call with other hidden states."""
        if self.args:
            return replace(self, args=(hidden, *self.args[1:]))
        return replace(self, kwargs={**self.kwargs, "hidden_states": hidden})

    def run(self, block: Module, hidden: torch.Tensor, *, wide: bool = False) -> torch.Tensor:
        """Call a block likewise with other hidden states.

        :param wide: compute in float32
        """
        device = get_execution_device(block)

        def placed(value: torch.Tensor) -> torch.Tensor:
            value = value.to(device)
            return value.float() if wide and value.is_floating_point() else value

        given = self.given(hidden)
        return _first(block(*_mapped(placed, given.args), **_mapped(placed, given.kwargs)))


class Reconstruction:
    """Watches blocks run dense, and trains them once they are pruned.

    :param blocks: full name to block
    :param epochs: passes over the samples
    """

    def __init__(self, blocks: Mapping[str, Module], epochs: int) -> None:
        self._names = {block: name for name, block in blocks.items()}
        self._epochs = epochs
        self._calls: dict[Module, list[_Call]] = {}
        self._done: set[Module] = set()
        # What the dense model's last block returned for every sample, and the pruned one's
        # for the first
        self._dense: list[torch.Tensor] = []
        self._returned: torch.Tensor | None = None

    def record(
        self, block: Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """Take in a call of a block that is not yet pruned; a forward hook.

        A block that is applied again (ALBERT's are) is dense no longer, and has no target.
        """
        if block in self._done:
            return
        call = _Call(*_mapped(_put_by, (args, kwargs, _first(output))))
        self._calls.setdefault(block, []).append(call)

    @contextmanager
    def around(self, pruned: Collection[Module]) -> Iterator[None]:
        """Reconstruct the blocks that have run and are pruned within.

        :param pruned: the modules that the stage prunes
        """
        blocks = list(self._calls)
        self._done.update(blocks)
        with HooksMixin.disable_hooks():
            targets = {block: self._targets(block) for block in blocks}
        yield
        outputs: list[torch.Tensor] = []
        with HooksMixin.disable_hooks():
            for block in blocks:
                calls, (wanted, follows) = self._calls.pop(block), targets.pop(block)
                if follows and block is not blocks[0]:  # what was pruned beside it came before it
                    calls = [call.given(h) for call, h in zip(calls, outputs, strict=True)]
                self._train(block, calls, wanted, pruned)
                needed = calls if block is not blocks[-1] else calls[:1]
                outputs = [call.run(block, call.hidden).cpu() for call in needed]
                self._returned = outputs[0]

    def _targets(self, block: Module) -> tuple[list[torch.Tensor], bool]:
        """What the dense block returns on the dense model's activations, and whether it follows.

        These are what the dense block before returned, if the block is given what that one
        returns. Where it is not (the first one; a decoder's after an encoder's), they are what
        the block is given.
        """
        calls = self._calls[block]
        follows = (
            self._returned is not None
            and len(self._dense) == len(calls)
            and self._returned.shape == calls[0].hidden.shape
            and torch.allclose(self._returned, calls[0].hidden, rtol=1e-2, atol=1e-5)
        )
        if follows:
            streams = zip(calls, self._dense, strict=True)
            self._dense = [call.run(block, hidden).cpu() for call, hidden in streams]
        else:
            self._dense = [call.output for call in calls]
        self._returned = calls[0].output  # what the next block was given if both run dense
        return self._dense, follows

    def _train(
        self,
        block: Module,
        calls: Sequence[_Call],
        targets: Sequence[torch.Tensor],
        pruned: Collection[Module],
    ) -> None:
        """Train a block, and keep the weights of least error on the samples kept for it."""
        weights = survivors(m for m in block.modules() if m in pruned)
        if not weights:
            return
        start, least = train(
            Training(block, set(block.modules()), weights),
            list(zip(calls, targets, strict=True)),
            partial(_gradients, block),
            partial(_error, block),
            RATE,
            self._epochs,
        )
        logger.info(
            "reconstructed {}: relative squared error of its outputs {:.4f} -> {:.4f}",
            self._names[block],
            start,
            least,
        )
        if not math.isfinite(start):
            logger.warning(
                "{} returned numbers that are not finite and was left as it is: load the model "
                "in a wider dtype",
                self._names[block],
            )


def _gradients(
    block: Module, sample: tuple[_Call, torch.Tensor], weights: Sequence[torch.Tensor]
) -> Sequence[torch.Tensor | None]:
    """Of the mean squared error of a block's outputs."""
    call, target = sample
    found = call.run(block, call.hidden, wide=True)
    loss = functional.mse_loss(found, target.to(found.device).to(found))
    return torch.autograd.grad(loss, weights, allow_unused=True)


@torch.no_grad()
def _error(block: Module, samples: Iterable[tuple[_Call, torch.Tensor]]) -> float:
    """Squared error of a block's outputs to the targets' squares, over all processes."""
    device = get_main_device()
    sums = torch.zeros(2, dtype=widest(device), device=device)
    for call, target in samples:
        wanted = target.to(device).float()
        found = call.run(block, call.hidden, wide=True).to(device)
        sums += torch.stack([(found - wanted).square().sum(), wanted.square().sum()]).to(sums)
    if is_distributed():
        dist.all_reduce(sums)
    return float(sums[0] / sums[1]) if sums[1] else math.nan


def _put_by(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu()


def _first(output: Any) -> torch.Tensor:
    """The hidden states that a block returns, alone or before something else."""
    found: torch.Tensor = output if isinstance(output, torch.Tensor) else output[0]
    return found


def _mapped(change: Callable[[torch.Tensor], torch.Tensor], value: Any) -> Any:
    """Change the tensors of a nest of tuples, lists and dicts; a cache would grow, and goes."""
    if isinstance(value, Cache):
        return None
    if isinstance(value, torch.Tensor):
        return change(value)
    if type(value) in (tuple, list):
        return type(value)(_mapped(change, one) for one in value)
    if isinstance(value, dict):
        return {key: _mapped(change, one) for key, one in value.items()}
    return value
