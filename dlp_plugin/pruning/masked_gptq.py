"""``MaskedGPTQModifier``: GPTQ that keeps every pruned weight at zero.

The host's GPTQ quantizes column by column and spreads each column's error over the
columns to come, pruned weights included, so they come back. Here a pruned weight is
quantized to zero when its column's turn comes, and what it had been given is passed on
like any other error, so that in the end only unpruned weights have compensated. That is
the joint pruning and quantization of SparseGPT (arXiv 2301.00774, section 3.5) with the
mask given. Hessians, observers, ordering, batching and the loop over blocks of columns
are the host's; only the update within a block of columns is replaced, through the
registry of backends that the host keeps for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from copy import copy
from typing import Any

import torch
from compressed_tensors.offload import disable_onloading
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationScheme,
    QuantizationStrategy,
    fake_quantize,
)
from compressed_tensors.utils import match_named_modules, match_targets, patch_attr
from compressed_tensors.utils.impl_backend import ENFORCE_EAGER, ImplBackend
from llmcompressor.core import Event, State
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.gptq.helpers import assign_batches, column_scale_window
from loguru import logger
from pydantic import Field, PrivateAttr, field_serializer
from pydantic_core import to_jsonable_python

from dlp_plugin.experts import save_under_source_names
from dlp_plugin.generation import make_savable
from dlp_plugin.host import (
    block_names,
    check_patterns,
    current_modifiers,
    keep_all_modifiers_when_saved,
    warn_of_lost_zeros,
)
from dlp_plugin.pruning.distillation import Distillation, check_distillable, distillation
from dlp_plugin.pruning.finite import check_inputs
from dlp_plugin.pruning.scales import check_scheme, scales_of
from dlp_plugin.scoring.routers import left_routers

__all__ = ["MaskedGPTQModifier"]

# Rate of distillation, see train().
DISTILLING = 1e-3

_ALIVE: ContextVar[torch.Tensor | None] = ContextVar("alive", default=None)


class MaskedGPTQModifier(GPTQModifier):
    """The host's ``GPTQModifier``, field for field, for models with pruned weights.

    A weight that is zero when it is quantized is zero afterwards, bit for bit, in the
    packed checkpoint too. On a model without zeros the result is the stock modifier's.

    :param distill: epochs of training the scales of the quantized weights, norms and biases, to
        predict what the model predicts before it is quantized; integers and zeros stay. 0 for
        none. It needs memory for 25 bytes per weight

    ```yaml
    quantization_stage:
      quantization_modifiers:
        MaskedGPTQModifier:
          scheme: W4A16
          targets: [Linear]
          ignore: ["re:.*lm_head"]
    ```
    """

    distill: int = Field(default=0, ge=0, strict=True)

    _pruned: int = PrivateAttr(default=0)
    _written: list[str] | None = PrivateAttr(default=None)
    _blocks: list[torch.nn.Module] = PrivateAttr(default_factory=list)
    _distillation: Distillation | None = PrivateAttr(default=None)

    @field_serializer("config_groups", "kv_cache_scheme")
    def _plainly(self, value: Any) -> Any:
        """In a saved recipe enumerations as their values: those of Python are not read again."""
        return to_jsonable_python(value)

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        """Set up quantization as the host does.

        :raises ValueError: if compressed-tensors is told to use no backend but its own, a
            pattern is none, groups do not divide the columns of a module, or ``distill`` cannot
            work
        """
        if ENFORCE_EAGER:
            raise ValueError(
                "CT_ENFORCE_EAGER is set, which keeps MaskedGPTQModifier from masking: unset it"
            )
        keep_all_modifiers_when_saved(state.model)
        warn_of_lost_zeros(state.model, current_modifiers(), self)
        check_patterns(self, targets=self.resolved_targets, ignore=self.ignore)
        self._leave_routers(state.model)
        self._check_groups(state.model)
        if self.distill:
            self._prepare_distilling(state, kwargs.get("sequential_targets"))
        save_under_source_names(state.model)
        make_savable(state.model)
        return bool(super().on_initialize(state, **kwargs))

    def _leave_routers(self, model: torch.nn.Module) -> None:
        """Add to ``ignore`` the routers that no target names: engines build them dense."""
        if not self.has_config():  # it is of a modifier before, which has set up the modules
            return
        found = dict(match_named_modules(model, self.resolved_targets, self.ignore))
        if names := left_routers(model, type(self).__name__, self.resolved_targets, found):
            self._written = self.ignore
            self.ignore = [*self.ignore, *names]
            self.resolved_config.ignore = self.ignore

    def _check_groups(self, model: torch.nn.Module) -> None:
        """Refuse groups that do not divide a row, before modules are set up to be quantized.

        The host lets groups pass that are wider than a row, until it quantizes, and tells others
        once its schemes are on the model, where they would stay. GPTQ cannot do what
        ``bypass_divisibility_checks`` asks for.
        """
        schemes = {
            target: scheme
            for scheme in self.resolved_config.config_groups.values()
            if isinstance(scheme, QuantizationScheme)
            for target in scheme.targets
        }
        wrong = []
        with disable_onloading():
            for name, module in match_named_modules(model, schemes, self.ignore):
                weights = schemes[match_targets(name, module, schemes)[0]].weights
                group = (weights and weights.group_size) or 0
                weight = module._parameters.get("weight")  # what a pattern takes in may have none
                columns = 0 if weight is None else weight.shape[-1]
                if group > 0 and columns % group:
                    wrong.append(f"{name} ({columns} columns, groups of {group})")
        if wrong:
            raise ValueError(
                "MaskedGPTQModifier's groups do not divide the columns of "
                f"{', '.join(wrong)}: give it a scheme whose groups do, or add these to its ignore"
            )

    def _prepare_distilling(self, state: State, sequential_targets: list[str] | None) -> None:
        """Check samples, model and schemes, and find the blocks."""
        field = f"{type(self).__name__}.distill"
        for scheme in self.resolved_config.config_groups.values():
            if isinstance(scheme, QuantizationScheme):
                check_scheme(scheme, field)
        check_distillable(state, field)
        names = block_names(state.model, sequential_targets)
        self._blocks = [state.model.get_submodule(name) for name in names]

    def on_calibration_start(self, state: State, event: Event, **kwargs: Any) -> None:
        """Begin to collect statistics.

        :raises ValueError: if ``distill`` cannot work
        """
        super().on_calibration_start(state, event, **kwargs)
        if self.distill:
            self._distillation = distillation(state, self.distill, f"{type(self).__name__}.distill")

    def on_calibration_end(self, state: State, event: Event, **kwargs: Any) -> None:
        """Distill, and say what was kept."""
        super().on_calibration_end(state, event, **kwargs)
        if self._distillation is not None:
            self._distillation.train(self._blocks, scales_of(self._module_names), DISTILLING)
        self._distillation, self._blocks = None, []
        if self._pruned:
            logger.info("MaskedGPTQModifier kept {:,} pruned weights at zero", self._pruned)
        else:
            logger.info(
                "MaskedGPTQModifier found no pruned weight, and quantized as GPTQModifier does"
            )

    def compress_module_list(self, module_list: list[Any]) -> None:
        """Quantize modules batch by batch, each under its mask.

        :raises ValueError: naming a module whose inputs or weight are not finite
        :raises RuntimeError: if a pruned weight came back, which a change in the host
            could bring about
        """
        check_inputs({m: self._hessians[m] for m in module_list}, self._module_names)
        for batch in assign_batches(module_list, self.batched_quantization, self.block_size):
            alive = torch.stack([module.get_parameter("weight") != 0 for module in batch])
            pruned = alive.numel() - int(alive.sum())
            if not pruned:
                super().compress_module_list(batch)
                continue
            self._pruned += pruned
            ordered = self._in_quantization_order(batch, alive)
            with patch_attr(self, "batched_quantization", len(batch)), _masking(ordered):
                super().compress_module_list(batch)
            for module, mask in zip(batch, alive, strict=True):
                if bool((module.get_parameter("weight")[~mask] != 0).any()):
                    raise RuntimeError(
                        f"pruned weights of {self._module_names[module]} came back: this "
                        "release of llmcompressor quantizes in an order that "
                        "MaskedGPTQModifier does not know"
                    )

    def on_finalize(self, state: State, **kwargs: Any) -> bool:
        """Read as it was written again."""
        done = bool(super().on_finalize(state, **kwargs))
        if self._written is not None:
            self.ignore = self._written
        return done

    def _in_quantization_order(self, batch: Sequence[Any], alive: torch.Tensor) -> torch.Tensor:
        """Sort a mask's columns, ``[batch, rows, columns]``, as the host sorts weights."""
        if not batch[0].quantization_scheme.weights.actorder:
            return alive
        diagonals = torch.stack(
            [self._hessians[m].diagonal() / self._num_samples[m] for m in batch]
        )
        order = diagonals.argsort(dim=-1, descending=True)
        return alive.gather(-1, order.unsqueeze(-2).expand_as(alive))


@contextmanager
def _masking(alive: torch.Tensor) -> Iterator[None]:
    token = _ALIVE.set(alive)
    try:
        yield
    finally:
        _ALIVE.reset(token)


def _is_masking(*_: Any, **__: Any) -> bool:
    return _ALIVE.get() is not None


@ImplBackend.register("gptq_block_update", _is_masking, -1)
def masked_gptq_block_update(
    W1: torch.Tensor,  # noqa: N803 (the host passes it by this name)
    Hinv1: torch.Tensor,  # noqa: N803
    Q1: torch.Tensor,  # noqa: N803
    Err1: torch.Tensor,  # noqa: N803
    losses1: torch.Tensor,
    *,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    global_scale: torch.Tensor | None,
    g_idx: torch.Tensor | None,
    quant_args: QuantizationArgs,
    i1: int,
) -> None:
    """Quantize one block of columns under the mask that is in force.

    :param W1: weights ``[batch, rows, width]`` in float32, used up
    :param Hinv1: the block's part of the inverse Hessian's upper Cholesky factor,
        ``[batch, width, width]``
    :param Q1: where the quantized weights go, ``[batch, rows, width]``
    :param Err1: where each column's error over its diagonal goes, likewise
    :param losses1: where the squares of those go, likewise
    :param scale: as llm-compressor passes it
    :param zero_point: as llm-compressor passes it
    :param global_scale: as llm-compressor passes it
    :param g_idx: group of each column, as llm-compressor passes it
    :param quant_args: scheme of the weights
    :param i1: the block's first column in the order of quantization
    """
    mask = _ALIVE.get()
    assert mask is not None
    width = W1.shape[-1]
    alive = mask[..., i1 : i1 + width]
    eff, zp = column_scale_window(
        scale, zero_point, global_scale, g_idx, quant_args, W1.shape[-2], i1, i1 + width
    )
    by_row = copy(quant_args)
    by_row.strategy = QuantizationStrategy.CHANNEL
    none = W1.new_zeros(())
    for i in range(width):
        w = W1[..., i]
        shift: Any = None if zp is None else zp[..., i].mT
        q = fake_quantize(w.mT, eff[..., i].mT, shift, by_row).mT
        q = torch.where(alive[..., i], q, none)
        error = (w - q) / Hinv1[:, i, i, None]
        Q1[..., i] = q
        Err1[..., i] = error
        W1[..., i:] -= error.unsqueeze(-1) * Hinv1[:, None, i, i:]
    losses1.copy_(Err1.square())
