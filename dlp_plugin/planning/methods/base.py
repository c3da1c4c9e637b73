"""What an allocation method is: how it scores a block, and how scores become sparsities."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator

from dlp_plugin.planning.allocation import check_strength

if TYPE_CHECKING:
    from dlp_plugin.scoring.scores import Part

__all__ = ["Method", "Strength"]

Strength = float | Literal["auto"]
"""How far the blocks' sparsities differ; ``auto`` selects it by loss on held-out samples."""


class Method(BaseModel):
    """A method with its strength and settings, as a recipe writes them.

    A subclass is one file. Its fields are the strength and the settings. Plans, comparisons and
    the terminal find it in the registry (:data:`dlp_plugin.planning.methods.METHODS`); a modifier
    makes it a part of recipes.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: ClassVar[str]
    """As plans write it; the terminal writes dashes for underscores."""
    title: ClassVar[str]
    """As people write it."""
    modifier: ClassVar[str]
    """Name of the modifier, as recipes write it."""
    strength_field: ClassVar[str]
    """Name of the field that holds the strength."""
    sees_activations: ClassVar[bool] = True
    """Whether blocks are scored on calibration data."""

    @field_validator("*", mode="before")
    @classmethod
    def _check_no_bool(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse YAML's true and yes, which pydantic takes for 1."""
        kind = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and kind is not bool:
            raise ValueError(f"{value} is neither a number nor a name")
        return value

    @field_validator("*")
    @classmethod
    def _check_strength(cls, value: Any, info: ValidationInfo) -> Any:
        if info.field_name == cls.strength_field and not isinstance(value, str):
            return check_strength(value, cls.strength_field)
        return value

    @property
    def strength(self) -> Strength:
        """The method's own strength, whatever its name."""
        value: Strength = getattr(self, self.strength_field)
        return value

    @property
    def settings(self) -> dict[str, float | str]:
        """All fields but the strength: what the scores depend on besides the model."""
        names = type(self).model_fields
        return {name: getattr(self, name) for name in names if name != self.strength_field}

    @property
    @abstractmethod
    def score_name(self) -> str:
        """What a block's score is, in words."""

    @abstractmethod
    def score(self, depth: int, parts: Mapping[str, Part]) -> float:
        """Score one block.

        :param depth: the block's place, from 0
        :param parts: full name to a Linear's weight ``[out, in]`` and the l2 norms of its
            input channels, ``[in]`` (empty if the method needs no activations)
        """

    def unimportances(self, scores: Sequence[float]) -> list[float]:
        """Scores as unimportances: a larger one gets a larger sparsity."""
        return list(scores)

    def half_range(
        self, strength: float, scores: Sequence[float], weights: Sequence[int], sparsity: float
    ) -> float:
        """Half the range of the sparsities (before clipping) from the method's own strength.

        :param scores: one per block, as the method makes them
        :param weights: number of prunable weights per block
        :param sparsity: target over all blocks together
        """
        return strength

    def strength_of(
        self, half_range: float, scores: Sequence[float], weights: Sequence[int], sparsity: float
    ) -> float:
        """The strength that gives a half range, the inverse of :meth:`half_range`."""
        return half_range
