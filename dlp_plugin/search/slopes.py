"""How the pruned model's divergence changes with every Linear's sparsity, by one backward pass.

A Linear's sparsity sets a threshold for the scores of its weights. So the derivative of the
divergence with respect to the sparsity depends on the weights at the threshold only: with ``G`` the
gradient with respect to the masked weight (at masked weights too), pruning one more weight costs
about the mean of ``- W_ij G_ij`` over them. ``G`` exists only during its own Linear's backward
pass. One number per Linear remains: the gradient of a probe, a scalar input of the Linear's
forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from compressed_tensors.distributed import is_distributed
from compressed_tensors.utils import patch_attr
from torch import distributed as dist
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from dlp_plugin.planning.structure import UNSTRUCTURED, MaskStructure
from dlp_plugin.precision import wide_enough, widest
from dlp_plugin.scoring.blocks import Block
from dlp_plugin.scoring.calibration import Batch, together
from dlp_plugin.scoring.predictions import device_of, gradient, keep, logits_of
from dlp_plugin.search.masks import Masks

__all__ = ["Slopes"]

# Tokens that are run together; longer samples are cut.
TOGETHER = 1024
# Rows of a weight that a slope is read off, evenly spread. With 256 on SmolLM2 (half of its rows) a
# step took three quarters of the time, and sixteen steps led less far.
ROWS = 1024
# Of the weights that are ranked together, the share on either side of the threshold that a
# slope is read off. Half of it is noisier, and twice as much no better.
BAND = 0.06


class Slopes:
    """Slopes of the divergence from the dense model, at any sparsities.

    At most 1,024 tokens are run together, and of their activations one block's are in memory:
    blocks are run again in the backward pass. No weight needs a gradient, and none is kept.

    :param model: a causal language model of transformers
    :param blocks: the model's blocks, with the Linears that are to be pruned
    :param masks: of these Linears
    :param batches: token ids to run, as
        :func:`dlp_plugin.scoring.calibration.scoring_batches` makes them
    """

    def __init__(
        self,
        model: torch.nn.Module,
        blocks: Sequence[Block],
        masks: Masks,
        batches: Sequence[Batch],
    ) -> None:
        self._model = model
        self._blocks = [model.get_submodule(block.name) for block in blocks]
        self._masks = masks
        self._batches = together(batches, TOGETHER, cut=True)

    @property
    def _device(self) -> torch.device:
        return device_of(self._model)

    def portion(self, number: int, tokens: int) -> list[int]:
        """The numbers of a step's batches: at least so many tokens, after those of the step before.

        :param number: of the step, from 0
        """
        found: list[int] = []
        place = 0
        for _ in range(number + 1):
            found, run = [], 0
            while run < tokens and len(found) < len(self._batches):
                found.append(place % len(self._batches))
                run += self._batches[place % len(self._batches)]["input_ids"].numel()
                place += 1
        return found

    def at(
        self,
        sparsities: Mapping[str, float],
        portion: Sequence[int],
        structure: MaskStructure = UNSTRUCTURED,
    ) -> tuple[dict[str, float], int]:
        """Cost of one more pruned weight in every Linear, in nats per token.

        :param sparsities: full name to sparsity of every Linear
        :param portion: numbers of the batches to run
        :param structure: as :meth:`dlp_plugin.search.judge.Judge.loss` takes it
        :return: full name to cost, 0 for a Linear that saw no token, and the number of tokens
            on all processes
        :raises ValueError: if the divergence has no gradient
        :raises MemoryError: if there is no room for the activations
        """
        costs = torch.zeros(len(sparsities), dtype=widest(self._device), device=self._device)
        tokens = 0
        was_training = self._model.training
        self._model.eval()
        try:
            for place in portion:
                more, run = self._of(self._batches[place], sparsities, structure)
                costs += more
                tokens += run
        except RuntimeError as error:
            if not isinstance(error, torch.OutOfMemoryError) and "allocate" not in str(error):
                raise
            raise MemoryError(
                "there is no room for the activations of a sample's backward pass: take shorter "
                "samples (max_seq_length), or search: evolution"
            ) from error
        finally:
            self._model.train(was_training)
        if is_distributed():
            counted = torch.tensor(tokens, device=self._device)
            dist.all_reduce(costs)
            dist.all_reduce(counted)
            tokens = int(counted)
        return dict(zip(sparsities, (costs / tokens).tolist(), strict=True)), tokens

    def _of(
        self, batch: Batch, sparsities: Mapping[str, float], structure: MaskStructure
    ) -> tuple[torch.Tensor, int]:
        """Costs of a batch, summed over its tokens, and their number."""
        with torch.no_grad():
            dense = keep(logits_of(self._model, batch, self._device).flatten(0, 1))
        probes = [torch.zeros((), device=self._device, requires_grad=True) for _ in sparsities]
        by_name = dict(zip(sparsities, probes, strict=True))
        with (
            self._probed(by_name, sparsities, structure),
            self._repeatable(),
            torch.enable_grad(),
        ):
            logits = logits_of(self._model, batch, self._device).flatten(0, 1)
            if not logits.requires_grad:
                raise ValueError(
                    f"{type(self._model).__name__} has no gradient with respect to its Linears' "
                    "weights: take search: evolution"
                )
            slope = gradient(logits, dense)
            found = torch.autograd.grad(  # which keeps no other's
                logits, probes, slope, allow_unused=True
            )
        costs = [
            torch.zeros_like(p) if cost is None else cost
            for p, cost in zip(probes, found, strict=True)
        ]
        return torch.stack(costs), len(logits)

    def _repeatable(self) -> AbstractContextManager[object]:
        """Have attention's backward pass add up in one order, which fused kernels do not."""
        return nullcontext() if self._device.type == "cpu" else sdpa_kernel(SDPBackend.MATH)

    @contextmanager
    def _probed(
        self,
        probes: Mapping[str, torch.Tensor],
        sparsities: Mapping[str, float],
        structure: MaskStructure,
    ) -> Iterator[None]:
        """Have Linears compute with masked weights and carry probes, and blocks run again."""
        with ExitStack() as stack:
            for name, sparsity in sparsities.items():
                linear = self._masks.linears[name]
                count = self._masks.count(name, sparsity, structure)
                masked = _ProbedLinear(linear, self._masks, name, count, structure)
                forward = partial(_probe, masked, probes[name])
                stack.enter_context(patch_attr(linear, "forward", forward))
            for block in self._blocks:
                run = partial(checkpoint, self._wide(block.forward), use_reentrant=False)
                stack.enter_context(patch_attr(block, "forward", run))
            yield

    def _wide(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Have a block compute as wide when it is run again, within a backward pass."""

        def run(*arguments: Any, **named: Any) -> Any:
            with wide_enough(self._model, self._device):
                return forward(*arguments, **named)

        return run


class _ProbedLinear:
    """A Linear with some weights at zero, and the weights at the threshold, where it is probed."""

    def __init__(
        self,
        linear: torch.nn.Linear,
        masks: Masks,
        name: str,
        count: int,
        structure: MaskStructure,
    ) -> None:
        self.linear = linear
        self._masks = masks
        self._at = name, count, structure

    def weight(self, like: torch.Tensor) -> torch.Tensor:
        """The masked weight ``[out, in]`` where and as wide as what it is multiplied with."""
        return self._masks.masked(*self._at, self.linear.weight.to(like.device), like.dtype)

    @property
    def rows(self) -> slice:
        """The rows to read the slope off."""
        return slice(None, None, max(1, self.linear.out_features // ROWS))

    def cost(self, gradient: torch.Tensor) -> torch.Tensor:
        """Cost of one more pruned weight.

        :param gradient: of :attr:`rows` of the weight, float32 ``[n, in]``
        """
        weight = self.linear.weight[self.rows].to(gradient.device)
        near = self._masks.near(*self._at, self.rows, weight, BAND)
        return -(weight.to(gradient.dtype) * gradient)[near].mean()


def _probe(masked: _ProbedLinear, probe: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    outputs: torch.Tensor = _MaskedLinear.apply(inputs, probe, masked)  # type: ignore[no-untyped-call]
    bias = masked.linear.bias
    return outputs if bias is None else outputs + bias.to(outputs)


class _MaskedLinear(torch.autograd.Function):
    """``x @ (W * mask)^T``, whose backward gives a probe the cost of one more pruned weight."""

    @staticmethod
    def forward(
        ctx: Any, inputs: torch.Tensor, probe: torch.Tensor, masked: _ProbedLinear
    ) -> torch.Tensor:
        """Multiply."""
        weight = masked.weight(inputs)
        ctx.save_for_backward(inputs, weight)  # which live while their block is run backward
        ctx.masked = masked
        return functional.linear(inputs, weight)

    @staticmethod
    def backward(
        ctx: Any, *gradients: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor, None]:
        """Gradients of the inputs, and the probe's."""
        (inputs, weight), (outputs,) = ctx.saved_tensors, gradients
        masked: _ProbedLinear = ctx.masked
        passed = outputs @ weight if ctx.needs_input_grad[0] else None
        rows = outputs.flatten(0, -2)[:, masked.rows].float()
        gradient = rows.T @ inputs.flatten(0, -2).float()
        return passed, masked.cost(gradient), None
