"""The plan: which sparsity every block gets and why, as data that JSON files hold."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    model_validator,
)

from dlp_plugin.files import replacing
from dlp_plugin.planning.allocation import (
    allocate,
    check_sparsity,
    check_strength,
    importances,
)
from dlp_plugin.planning.methods import METHODS, Method
from dlp_plugin.planning.schema_1 import from_schema_1
from dlp_plugin.planning.structure import UNSTRUCTURED, MaskStructure, whole_numbers

__all__ = ["BlockPlan", "Candidate", "Plan", "SearchStep", "package_versions"]

# Longest problem shown, in characters: a number in a plan may have a thousand digits.
_SHOWN = 400
# Largest score: real ones are far smaller, and sums of larger ones overflow.
_LARGEST = 1e40
# Largest rounding error of a mean of numbers in [0, 1].
_ROUNDING = 1e-9

_PACKAGES = (
    "dlp_plugin",
    "llmcompressor",
    "compressed-tensors",
    "transformers",
    "torch",
)


def package_versions() -> dict[str, str]:
    """Versions of the packages that the result depends on."""
    return {package: version(package) for package in _PACKAGES}


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError(f"{value} is not a number")
    return value


Number = Annotated[float, BeforeValidator(_no_bool)]
"""A number; ``true`` and ``false`` are refused."""

_Count = Annotated[int, BeforeValidator(_no_bool), Field(ge=0, lt=1 << 53)]


def _structure(value: Any) -> Any:
    return MaskStructure.parse(value) if isinstance(value, str) else value


_Structure = Annotated[MaskStructure, BeforeValidator(_structure), PlainSerializer(str)]


class BlockPlan(BaseModel):
    """One block's row of a plan.

    :param name: full name of the block in the model
    :param weights: number of weights that the pruning stages prune in it
    :param score: the method's score of the block: DLP's unimportance ``U_b``, OWL's outlier
        ratio, AlphaPruning's exponent, or the depth
    :param importance: ``I_b = 1 - U_b / sum(U)``; for OWL ``U`` is how far the ratio lies
        below the largest
    :param sparsity: fraction of ``weights`` to set to zero
    :param linears: full name to sparsity of every Linear, in a refined plan; their weighted
        mean is ``sparsity``
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: str
    weights: _Count = Field(ge=1)
    score: Number = Field(ge=0, le=_LARGEST)
    importance: Number
    sparsity: Number = Field(ge=0, le=1)
    linears: dict[str, Annotated[Number, Field(ge=0, le=1)]] | None = None

    @model_validator(mode="after")
    def _check(self) -> BlockPlan:
        if self.linears:
            least, most = min(self.linears.values()), max(self.linears.values())
            if not least - _ROUNDING <= self.sparsity <= most + _ROUNDING:
                raise ValueError(
                    f"sparsity of {self.name} is {self.sparsity}, but its linears' lie between "
                    f"{least} and {most}"
                )
        return self


class Candidate(BaseModel):
    """A strength that was tried, and the loss of the model pruned with it.

    :param strength: the method's
    :param loss: mean cross-entropy per token of the held-out samples
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    strength: Number
    loss: Number


class SearchStep(BaseModel):
    """A measurement of the search that refined a plan.

    :param step: steps of the gradient search, or generations of the evolution, so far; 0 is the
        plan that the search started from
    :param evaluations: number of pruned models measured so far
    :param tokens: tokens run through the model so far; a backward pass counts as two forward
        passes
    :param divergence: Kullback-Leibler divergence of the best plan so far from the dense
        model, in nats per token
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    step: _Count
    evaluations: _Count
    tokens: _Count
    divergence: Number

    @model_validator(mode="before")
    @classmethod
    def _read_older(cls, content: Any) -> Any:
        """Up to version 3 of a plan's schema the field was ``generation``."""
        if isinstance(content, dict) and "generation" in content and "step" not in content:
            content = {"step": content["generation"], **content}
            del content["generation"]
        return content


class Plan(BaseModel):
    """The sparsities that a method chose for a model, with all that is needed to choose again.

    :param schema_version: of the JSON
    :param method: a name out of :data:`dlp_plugin.planning.methods.METHODS`
    :param settings: what the scores depend on besides the model: DLP's ``statistic``, OWL's
        ``owl_m``, AlphaPruning's ``tail``
    :param model: the model's name or folder, as transformers knows it
    :param strength: the method's own: DLP's alpha or OWL's lambda, half the range of the
        sparsities before clipping; AlphaPruning's epsilon; the linear one's beta
    :param target: sparsity over all ``weights`` together
    :param mask_structure: ``0:0`` for unstructured; ``N:M`` for a fixed number of zeros in every
        M consecutive weights, by each block's ``sparsity``, and N on average. The total is then
        as near to ``target`` as whole numbers allow
    :param blocks: one row per block, in the model's order
    :param unseen: Linears that received no calibration token: neither scored nor counted in
        ``weights``, and left dense
    :param candidates: the strengths that ``strength`` was selected from, if it was
    :param search: measurements of the search that refined the plan, if there was one
    :param searched_at: the sparsity at which it searched, if that was not ``target``
    :param versions: package versions that made the plan
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    schema_version: Annotated[Literal[4], BeforeValidator(_no_bool)] = 4
    method: str = "dlp"
    settings: dict[str, Number | str] = Field(default_factory=dict)
    model: str
    strength: Number
    target: Number
    mask_structure: _Structure = UNSTRUCTURED
    blocks: tuple[BlockPlan, ...] = Field(min_length=1)
    unseen: tuple[str, ...] = ()
    candidates: tuple[Candidate, ...] = ()
    search: tuple[SearchStep, ...] = ()
    searched_at: Annotated[Number, Field(ge=0, le=1)] | None = None
    versions: dict[str, str] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _read_older(cls, content: Any) -> Any:
        if isinstance(content, dict):
            version = content.get("schema_version", 1 if "alpha" in content else 4)
            if version == 1 and not isinstance(version, bool):
                return from_schema_1(content)
            known = version == 3 or (version == 2 and "searched_at" not in content)
            if known and isinstance(version, int):
                return content | {"schema_version": 4}
        return content

    @model_validator(mode="after")
    def _check(self) -> Plan:
        if self.method not in METHODS:
            raise ValueError(f"method is {self.method!r}; there are {', '.join(METHODS)}")
        check_strength(self.strength, "strength")
        try:
            _ = self.scored_by
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"])
            raise ValueError(f"settings of {self.method}: {field}: {first['msg']}") from None
        check_sparsity(self.target, "target")
        names = [block.name for block in self.blocks]
        if len(set(names)) < len(names):
            raise ValueError("blocks: two have the same name")
        allowed = 1e-6
        if self.mask_structure:
            self.mask_structure.exact_target(self.target, "target")
            allowed += max(b.weights for b in self.blocks) / self.mask_structure.m / self.weights
            for block in self.blocks:
                for name, sparsity in (block.linears or {block.name: block.sparsity}).items():
                    self.mask_structure.number(sparsity, f"blocks: sparsity of {name}")
        if abs(self.deviation) > allowed:
            raise ValueError(
                f"blocks: their sparsities come to {self.sparsity:.6f} of all weights, "
                f"but target is {self.target}"
            )
        return self

    @classmethod
    def make(
        cls,
        blocks: Sequence[tuple[str, int, float]],
        *,
        model: str,
        method: Method,
        target: float,
        strength: float | None = None,
        mask_structure: MaskStructure = UNSTRUCTURED,
        unseen: Sequence[str] = (),
    ) -> Plan:
        """Allocate sparsities to scored blocks.

        :param blocks: name, number of prunable weights and score of every block
        :param method: what scored them, with its settings
        :param strength: by default the method's, which is then no ``auto``
        :raises ValueError: as :func:`dlp_plugin.planning.allocation.allocate` does, or if
            ``target`` is not the sparsity that ``mask_structure`` is on average
        """
        names, weights, scores = zip(*blocks, strict=True)
        target = mask_structure.exact_target(target, "target")
        strength = float(method.strength if strength is None else strength)
        unimportant = method.unimportances(scores)
        half = method.half_range(strength, scores, weights, target)
        sparsities = allocate(unimportant, weights, target, half)
        if mask_structure:
            numbers = whole_numbers(sparsities, weights, mask_structure)
            sparsities = [n / mask_structure.m for n in numbers]
        rows = zip(
            names,
            weights,
            scores,
            importances(unimportant),
            sparsities,
            strict=True,
        )
        return cls(
            method=method.name,
            settings=method.settings,
            model=model,
            strength=strength,
            target=target,
            mask_structure=mask_structure,
            blocks=tuple(
                BlockPlan(name=n, weights=w, score=u, importance=i, sparsity=s)
                for n, w, u, i, s in rows
            ),
            unseen=tuple(unseen),
            versions=package_versions(),
        )

    def at(
        self,
        *,
        target: float | None = None,
        strength: float | None = None,
        mask_structure: MaskStructure | str | None = None,
    ) -> Plan:
        """Allocate the same scores again at another target, strength or structure.

        :param mask_structure: with ``N:M`` the target is N / M and need not be stated
        :return: this very plan if nothing would change
        :raises ValueError: if the plan was refined by a search, which holds for its target,
            or if target and structure contradict one another
        """
        if isinstance(mask_structure, str):
            mask_structure = MaskStructure.parse(mask_structure)
        elif mask_structure is None:
            mask_structure = self.mask_structure
        if target is None:
            target = mask_structure.sparsity if mask_structure else self.target
        strength = self.strength if strength is None else strength
        if (target, strength, mask_structure) == (self.target, self.strength, self.mask_structure):
            return self
        method = METHODS[self.method]
        if self.search:
            raise ValueError(
                f"the plan was refined by a search at target {self.target:g}, "
                f"{method.strength_field} {self.strength:g}, mask_structure "
                f"{self.mask_structure}, and holds for these only: leave them out, or search again"
            )
        return Plan.make(
            [(block.name, block.weights, block.score) for block in self.blocks],
            model=self.model,
            method=method(**self.settings, **{method.strength_field: strength}),
            target=target,
            unseen=self.unseen,
            mask_structure=mask_structure,
        )

    @property
    def scored_by(self) -> Method:
        """The method, with its settings and strength."""
        method = METHODS[self.method]
        return method(**self.settings, **{method.strength_field: self.strength})

    def check_linears(self, weights: Mapping[str, int]) -> None:
        """Check that a refined plan's Linears have the sparsity of their block on average.

        :param weights: full name of every Linear that is to be pruned to its number of weights
        :raises ValueError: naming the block and both sparsities
        """
        for block in self.blocks:
            if block.linears:
                pruned = math.fsum(weights[n] * sparsity for n, sparsity in block.linears.items())
                if abs(pruned / block.weights - block.sparsity) > _ROUNDING:
                    raise ValueError(
                        f"the plan (of {self.model}) says that block {block.name} has sparsity "
                        f"{block.sparsity:g}, and its linears come to {pruned / block.weights:g} "
                        "by their weights: search again, or restore the plan as it was written"
                    )

    @property
    def weights(self) -> int:
        """Number of weights in all blocks together."""
        return sum(block.weights for block in self.blocks)

    @property
    def sparsity(self) -> float:
        """Sparsity over all blocks together, by their numbers of weights."""
        pruned = math.fsum(block.weights * block.sparsity for block in self.blocks)
        return pruned / self.weights

    @property
    def deviation(self) -> float:
        """How far :attr:`sparsity` lies above ``target``; not 0 where N:M cannot meet it."""
        return self.sparsity - self.target

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON; the file appears whole or not at all."""
        with replacing(path) as beside:
            beside.write_text(self.model_dump_json(indent=2) + "\n")

    @classmethod
    def load(cls, source: str | Path | dict[str, Any]) -> Plan:
        """Read a plan that :meth:`save` wrote, or its content as a mapping.

        :raises ValueError: if it is not a sound plan (names the file and the field)
        :raises FileNotFoundError: if there is no such file
        """
        where = "from_plan" if isinstance(source, dict) else str(source)
        try:
            if isinstance(source, dict):
                return cls.model_validate(source)
            return cls.model_validate_json(Path(source).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise FileNotFoundError(
                f"plan {where} does not exist; `dlp-plugin score` makes one"
            ) from None
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"]) or "plan"
            problem = f"{field}: {first['msg']}"
        except UnicodeDecodeError:
            problem = "it is not UTF-8 text"
        except (ValueError, OSError) as error:
            problem = str(error)
        problem = " ".join(problem.split())
        problem = problem if len(problem) <= _SHOWN else f"{problem[:_SHOWN]}..."
        remedy = "score the model again with `dlp-plugin score`"
        if where.endswith((".yaml", ".yml")):
            remedy = f"`dlp-plugin show {where} --output plan.json` takes it out of a recipe"
        raise ValueError(f"{where} is not a sound plan ({problem}); {remedy}")
