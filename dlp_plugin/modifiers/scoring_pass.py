"""One forward pass of the calibration samples that collects norms and scores blocks."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from compressed_tensors.utils import align_module_device
from llmcompressor.modifiers import Modifier
from loguru import logger

from dlp_plugin import host
from dlp_plugin.planning.methods import Method
from dlp_plugin.scoring.blocks import Block
from dlp_plugin.scoring.calibration import Batch
from dlp_plugin.scoring.norms import ChannelNorms
from dlp_plugin.search.masks import Masks

__all__ = ["ScoringPass"]


class ScoringPass:
    """Scores every block by one or several methods, on activation norms of one forward pass.

    The host's pipeline runs the samples block by block, and calls the modifier that started the
    pass when calibration begins and when a part of the model has run:

    - while :attr:`running`, the modifier's ``on_calibration_start`` has nothing to do;
    - its ``on_sequential_epoch_end`` passes the modules on to :meth:`through`.

    A pass may be run again with more samples, which add to the norms. Without a run, blocks are
    scored without activations.

    :param blocks: what to score, in the model's order
    """

    def __init__(self, blocks: Sequence[Block]) -> None:
        self.running = False
        self._blocks = blocks
        self._methods: Collection[Method] = ()
        self._norms: ChannelNorms | None = None
        self._scores: dict[str, dict[Any, float]] = {}
        self._unseen: dict[str, list[str]] = {}

    def run(
        self,
        modifier: Modifier,
        model: torch.nn.Module,
        batches: Sequence[Batch],
        methods: Iterable[Method],
    ) -> None:
        """Run the samples, and score each block by every method once it has run.

        Call it from a modifier's ``on_calibration_start``.

        :param modifier: the modifier, which registers the hooks
        :raises ValueError: if no sample reaches a block, or a norm or weight is not finite
        """
        self._norms = norms = self._norms or ChannelNorms()
        self._expect(methods)
        for block in self._blocks:
            for name, linear in block.linears.items():
                modifier.register_hook(linear, partial(_record, norms, name), "forward_pre")
        self.running = True
        try:
            host.run_once(model, batches)
        finally:
            self.running = False
            modifier.remove_hooks()
        self._score_the_rest()

    def score_weights(self, methods: Iterable[Method]) -> None:
        """Score by methods that need no activations."""
        self._expect(methods)
        self._score_the_rest()

    def through(self, modules: Iterable[torch.nn.Module]) -> None:
        """Score the blocks in the part of the model that has run.

        A block that the model applies several times is scored again after each time, on all its
        inputs so far.
        """
        done = set(modules)
        for depth, block in enumerate(self._blocks):
            if done.issuperset(block.linears.values()):
                self._score(depth, block)

    @property
    def unseen(self) -> list[str]:
        """Full names of the Linears that received no token and were not scored."""
        return [name for block in self._blocks for name in self._unseen[block.name]]

    @property
    def blocks(self) -> list[Block]:
        """The blocks without the Linears that were not scored."""
        return [block.without(self._unseen[block.name]) for block in self._blocks]

    def scores(self, method: Method) -> list[float]:
        """One score per block, by a method of the last run."""
        return [self._scores[block.name][_settings(method)] for block in self._blocks]

    def masks(self, by_magnitude: Collection[str] = ()) -> Masks:
        """Masks at any sparsity, by the norms so far.

        :param by_magnitude: full names of the Linears that magnitude prunes
        """
        linears = {n: linear for block in self.blocks for n, linear in block.linears.items()}
        norms = {} if self._norms is None else self._norms.of(linears)
        return Masks(linears, {n: x for n, x in norms.items() if x is not None}, by_magnitude)

    def _expect(self, methods: Iterable[Method]) -> None:
        self._methods = {_settings(method): method for method in methods}.values()
        self._scores.clear()

    def _score_the_rest(self) -> None:
        for depth, block in enumerate(self._blocks):
            if block.name not in self._scores:
                self._score(depth, block)

    def _score(self, depth: int, block: Block) -> None:
        if self._norms is None:
            norms = dict.fromkeys(block.linears, torch.empty(0))
        else:
            norms = _seen(self._norms.of(block.linears), block)
        with ExitStack() as onloaded, torch.no_grad():
            parts = {}
            for name, norm in norms.items():
                onloaded.enter_context(align_module_device(block.linears[name]))
                parts[name] = (block.linears[name].weight.detach(), norm)
            self._scores[block.name] = {
                _settings(method): method.score(depth, parts) for method in self._methods
            }
        self._unseen[block.name] = [name for name in block.linears if name not in norms]
        logger.info("scored block {} of {}: {}", depth + 1, len(self._blocks), block.name)


def _record(
    norms: ChannelNorms, name: str, _module: torch.nn.Module, args: tuple[torch.Tensor, ...]
) -> None:
    norms.add(name, args[0])


def _settings(method: Method) -> tuple[Any, ...]:
    """The part of a method that its scores depend on."""
    return (method.name, *method.settings.items())


def _seen(norms: Mapping[str, torch.Tensor | None], block: Block) -> dict[str, torch.Tensor]:
    """The norms of the Linears that received a token; warns of the others."""
    seen = {name: norm for name, norm in norms.items() if norm is not None}
    if not seen:
        raise ValueError(
            f"no Linear of block {block.name} received calibration data: the samples never reach "
            "it, or llm-compressor could not trace the model (it then warns of fewer subgraphs "
            f"than expected); to leave such blocks out, add 're:{_kin(block.name)}' to the stage's "
            "ignore, or --ignore"
        )
    if unseen := [name for name in norms if name not in seen]:
        logger.warning(
            "{} Linears of {} received no calibration token, are not scored and stay dense: {}",
            len(unseen),
            block.name,
            unseen,
        )
    return seen


def _kin(block: str) -> str:
    """A pattern for a block and those beside it."""
    return re.escape(block.rpartition(".")[0]) + r"\..*"
