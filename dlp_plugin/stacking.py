"""How transformers stacks the experts of a layer when it loads them one by one."""

from __future__ import annotations

from typing import TypeGuard

from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightTransform,
)

__all__ = ["only_stacks"]

# Operation and dimension. Each kind of weight is stacked; gate and up are then concatenated.
_STACKED = [(MergeModulelist, 0), (Concatenate, 1)]


def only_stacks(transform: WeightTransform | None) -> TypeGuard[WeightConverter]:
    """Whether a transform stacks the weights of experts and changes nothing else.

    Weights of several kinds, such as gate and up, are concatenated along the rows.

    :param transform: what transformers does to the weights when it loads them; None for nothing
    """
    if not isinstance(transform, WeightConverter):
        return False
    steps = [(type(step), getattr(step, "dim", None)) for step in transform.operations]
    return steps == _STACKED[: len(transform.source_patterns)]
