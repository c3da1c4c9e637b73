"""DLP's peers: other ways to score a block, with the same life in a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from pydantic import Field, field_validator

from dlp_plugin.modifiers.base import AllocationModifier, Strength, checked_strength
from dlp_plugin.planning.allocation import Method, check_alpha
from dlp_plugin.planning.plan import Plan
from dlp_plugin.scoring.scores import Part
from dlp_plugin.scoring.spectra import Tail, block_exponent, outlier_ratio

__all__ = ["AlphaPruningModifier", "LinearSparsityModifier", "OWLModifier"]


class OWLModifier(AllocationModifier):
    """Outlier Weighed Layerwise sparsity (arXiv 2310.05175).

    The blocks with more outliers among their weight scores are pruned less. What
    ``sparsity_profile: owl`` of the stock stages is meant to be, which raises an error in
    llm-compressor 0.14; the fields have the same names.

    :param owl_m: a score is an outlier above so many times the block's mean; more than 0
    :param owl_lmbda: half the range of the blocks' sparsities, at least 0, or ``auto``
    """

    owl_m: float = Field(default=5.0, gt=0, allow_inf_nan=False)
    owl_lmbda: Strength = 0.08

    method: ClassVar[Method] = "owl"
    strength_field: ClassVar[str] = "owl_lmbda"

    @field_validator("owl_lmbda")
    @classmethod
    def _check_lmbda(cls, value: float | str) -> float | str:
        return checked_strength(value, "owl_lmbda")

    @property
    def statistic_name(self) -> str:
        """The outlier ratio."""
        return f"% of scores above {self.owl_m:g} x mean"

    def score(self, depth: int, parts: Mapping[str, Part]) -> float:
        """Share of outliers, in percent."""
        return outlier_ratio(parts, self.owl_m)

    def _check_settings(self, plan: Plan) -> None:
        if "owl_m" in self.model_fields_set and self.statistic_name != plan.statistic:
            raise ValueError(
                f"owl_m is {self.owl_m:g}, but the plan's scores are {plan.statistic}: "
                "leave owl_m out, or from_plan to score again"
            )

    def _read_as(self, plan: Plan) -> None:
        super()._read_as(plan)
        self.owl_m = float(plan.statistic.removeprefix("% of scores above ").split()[0])


class AlphaPruningModifier(AllocationModifier):
    """AlphaPruning (arXiv 2410.10912): the heavier a block's spectra, the less it is pruned.

    Needs no calibration data of its own.

    :param epsilon: half the range of the blocks' sparsities in proportion to their mean,
        from 0 to 1
    :param tail: where a spectrum's tail starts: at the best fit up to its ``peak`` (the
        released code's default) or at its ``median``
    """

    epsilon: float = 0.3
    tail: Tail = "peak"

    method: ClassVar[Method] = "alpha_pruning"
    strength_field: ClassVar[str] = "epsilon"
    scores_activations: ClassVar[bool] = False

    @field_validator("epsilon")
    @classmethod
    def _check_epsilon(cls, value: float) -> float:
        if value > 1:
            raise ValueError(f"epsilon must be at most 1, got {value}; the paper's is 0.3")
        return check_alpha(value, "epsilon")

    @property
    def statistic_name(self) -> str:
        """The power-law exponent."""
        return f"power-law exponent, tail from the {self.tail}"

    def score(self, depth: int, parts: Mapping[str, Part]) -> float:
        """Mean exponent of the block's Linears."""
        return block_exponent({name: weight for name, (weight, _) in parts.items()}, self.tail)

    def _check_settings(self, plan: Plan) -> None:
        if "tail" in self.model_fields_set and self.statistic_name != plan.statistic:
            raise ValueError(
                f"tail is {self.tail}, but the plan's scores are {plan.statistic}: "
                "leave tail out, or from_plan to score again"
            )

    def _read_as(self, plan: Plan) -> None:
        super()._read_as(plan)
        self.tail = "median" if plan.statistic.endswith("median") else "peak"


class LinearSparsityModifier(AllocationModifier):
    """Sparsities in arithmetic progression over depth, one slope (arXiv 2502.14770).

    Needs no calibration data of its own, unless ``beta`` is chosen. The paper names no
    slope that fits all models: it searches for one, as ``auto`` does.

    :param beta: step from each block to the next, at least 0, or ``auto``
    """

    beta: Strength = "auto"

    method: ClassVar[Method] = "linear"
    strength_field: ClassVar[str] = "beta"
    scores_activations: ClassVar[bool] = False

    @field_validator("beta")
    @classmethod
    def _check_beta(cls, value: float | str) -> float | str:
        return checked_strength(value, "beta")

    @property
    def statistic_name(self) -> str:
        """The depth."""
        return "depth"

    def score(self, depth: int, parts: Mapping[str, Part]) -> float:
        """The block's place."""
        return float(depth)
