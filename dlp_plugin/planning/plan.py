"""The plan: which sparsity every block gets and why; JSON in and out, table, picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dlp_plugin.files import replacing
from dlp_plugin.planning.allocation import (
    Method,
    allocate,
    check_alpha,
    check_sparsity,
    check_target,
    check_whole,
    half_range,
    importances,
    split_structure,
    unimportances,
    whole_numbers,
)

__all__ = ["BlockPlan", "Candidate", "Plan", "SearchStep", "package_versions"]

_TITLES: dict[Method, str] = {
    "dlp": "DLP",
    "owl": "OWL",
    "alpha_pruning": "AlphaPruning",
    "linear": "Linear",
}

# Characters of what is wrong with a plan: a number in it may have a thousand digits.
_SHOWN = 400
# Scores are far smaller, and sums with greater ones overflow.
_LARGEST = 1e40
# What a mean of numbers in [0, 1] is off by rounding, at most.
_ROUNDING = 1e-9

_PACKAGES = (
    "dlp_plugin",
    "llmcompressor",
    "compressed-tensors",
    "transformers",
    "torch",
)


def package_versions() -> dict[str, str]:
    """Versions of the packages that decide what comes out."""
    return {package: version(package) for package in _PACKAGES}


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError(f"{value} is no number")
    return value


Number = Annotated[float, BeforeValidator(_no_bool)]
"""A number that is written as one: ``true`` is none."""

_Count = Annotated[int, BeforeValidator(_no_bool), Field(ge=0, lt=1 << 53)]


class BlockPlan(BaseModel):
    """One block's row of a plan.

    :param name: full name of the block in the model
    :param weights: number of weights that the pruning stages prune in it
    :param score: what the method makes of the block: DLP's unimportance ``U_b``, OWL's
        outlier ratio, AlphaPruning's exponent, the depth
    :param importance: ``I_b = 1 - U_b / sum(U)``; for OWL ``U`` is how far the ratio lies
        below the largest
    :param sparsity: fraction of ``weights`` to set to zero
    :param linears: full name of a Linear to its own sparsity, where a search went down to
        single Linears; their mean by weights is ``sparsity``
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

    :param alpha: the method's strength
    :param loss: mean cross-entropy per token of calibration samples that were not scored on
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    alpha: Number
    loss: Number


class SearchStep(BaseModel):
    """One generation of the search that refined a plan.

    :param generation: counted from 1; 0 is the plan that the search set out from
    :param evaluations: pruned models measured so far, on however many tokens
    :param tokens: tokens that went through the model so far
    :param divergence: Kullback-Leibler divergence of the best plan so far from the dense
        model, in nats per token
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    generation: _Count
    evaluations: _Count
    tokens: _Count
    divergence: Number


class Plan(BaseModel):
    """What DLP (or a peer) decided for a model, and all it takes to decide again.

    :param method: ``dlp``, ``owl``, ``alpha_pruning`` or ``linear``
    :param model: the model's name or folder, as transformers knows it
    :param statistic: what a block's ``score`` is, in words
    :param alpha: the method's strength: DLP's alpha or OWL's lambda, half the range of the
        sparsities before clipping; AlphaPruning's epsilon; the linear one's beta
    :param target: sparsity over all ``weights`` together
    :param mask_structure: ``0:0`` if weights are pruned wherever they are least; ``N:M`` if
        of every M consecutive weights as many are pruned as a block's ``sparsity`` says, N on
        average. The total is then as near to ``target`` as whole numbers allow
    :param blocks: one row per block, in the model's order
    :param unseen: Linears that saw no calibration token: neither scored nor counted
        in ``weights``, and left dense
    :param candidates: the strengths that ``alpha`` was chosen from, if it was
    :param search: the path of the search that refined the sparsities, if there was one
    :param versions: package versions that made the plan
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    schema_version: Annotated[Literal[1], BeforeValidator(_no_bool)] = 1
    method: Method = "dlp"
    model: str
    statistic: str
    alpha: Number
    target: Number
    mask_structure: str = "0:0"
    blocks: tuple[BlockPlan, ...] = Field(min_length=1)
    unseen: tuple[str, ...] = ()
    candidates: tuple[Candidate, ...] = ()
    search: tuple[SearchStep, ...] = ()
    versions: dict[str, str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check(self) -> Plan:
        check_alpha(self.alpha)
        check_sparsity(self.target, "target")
        names = [block.name for block in self.blocks]
        if len(set(names)) < len(names):
            raise ValueError("blocks: a name stands twice")
        allowed = 1e-6
        if m := self.group:
            check_target(self.target, self.mask_structure, "target")
            allowed += max(b.weights for b in self.blocks) / m / self._weights
            for block in self.blocks:
                for name, sparsity in (block.linears or {block.name: block.sparsity}).items():
                    check_whole(sparsity, m, f"blocks: sparsity of {name}")
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
        statistic: str,
        alpha: float,
        target: float,
        unseen: Sequence[str] = (),
        method: Method = "dlp",
        mask_structure: str = "0:0",
    ) -> Plan:
        """Allocate sparsities to scored blocks.

        :param blocks: name, number of prunable weights and score of every block
        :raises ValueError: as :func:`dlp_plugin.planning.allocation.allocate` does, or if
            ``target`` is not the sparsity that ``mask_structure`` is on average
        """
        names, weights, scores = zip(*blocks, strict=True)
        target = check_target(target, mask_structure, "target")
        unimportant = unimportances(method, scores)
        half = half_range(method, alpha, scores, weights, target)
        sparsities = allocate(unimportant, weights, target, half)
        if m := split_structure(mask_structure)[1]:
            sparsities = [n / m for n in whole_numbers(sparsities, weights, target, m)]
        rows = zip(
            names,
            weights,
            scores,
            importances(unimportant),
            sparsities,
            strict=True,
        )
        return cls(
            method=method,
            model=model,
            statistic=statistic,
            alpha=alpha,
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
        alpha: float | None = None,
        mask_structure: str | None = None,
    ) -> Plan:
        """Allocate the same scores again at another target, strength or structure.

        :param mask_structure: with ``N:M`` the target is N / M and need not be stated
        :return: this very plan if nothing would change
        :raises ValueError: if the plan was refined by a search, which holds for its target,
            or if target and structure contradict one another
        """
        if mask_structure is None:
            mask_structure = self.mask_structure
        n, m = split_structure(mask_structure)
        if target is None:
            target = n / m if m else self.target
        alpha = self.alpha if alpha is None else alpha
        if (target, alpha, mask_structure) == (self.target, self.alpha, self.mask_structure):
            return self
        if self.search:
            raise ValueError(
                f"the plan was refined by a search at target {self.target:g}, alpha "
                f"{self.alpha:g}, mask_structure {self.mask_structure}, and holds for these only: "
                "leave them out, or search again"
            )
        return Plan.make(
            [(block.name, block.weights, block.score) for block in self.blocks],
            model=self.model,
            statistic=self.statistic,
            alpha=alpha,
            target=target,
            unseen=self.unseen,
            method=self.method,
            mask_structure=mask_structure,
        )

    def check_linears(self, weights: Mapping[str, int]) -> None:
        """Make sure that what a refined plan says of Linears comes to what it says of blocks.

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
    def _weights(self) -> int:
        return sum(block.weights for block in self.blocks)

    @property
    def sparsity(self) -> float:
        """Sparsity over all blocks together, by their numbers of weights."""
        pruned = math.fsum(block.weights * block.sparsity for block in self.blocks)
        return pruned / self._weights

    @property
    def deviation(self) -> float:
        """How far :attr:`sparsity` lies above ``target``; N:M may not come nearer."""
        return self.sparsity - self.target

    @property
    def group(self) -> int:
        """M of ``N:M``; 0 without structure."""
        return split_structure(self.mask_structure)[1]

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
            problem = "it is no UTF-8 text"
        except (ValueError, OSError) as error:
            problem = str(error)
        problem = " ".join(problem.split())
        problem = problem if len(problem) <= _SHOWN else f"{problem[:_SHOWN]}..."
        raise ValueError(
            f"{where} is not a sound plan ({problem}); score the model again with "
            "`dlp-plugin score`"
        )

    def table(self) -> Table:
        """The plan as a table for the terminal (rich)."""
        table = Table(
            title=f"{_TITLES[self.method]} plan for {escape(self.model)}",
            caption=self._caption,
        )
        for column in ("block", "weights", "score", "importance", "sparsity"):
            table.add_column(column, justify="left" if column == "block" else "right")
        for block in self.blocks:
            table.add_row(
                block.name,
                f"{block.weights:,}",
                f"{block.score:.4g}",
                f"{block.importance:.4f}",
                f"{block.sparsity:.4f}{self._pattern(block)}",
            )
        table.add_section()
        table.add_row("all", f"{self._weights:,}", "", "", f"{self.sparsity:.4f}")
        return table

    def _pattern(self, block: BlockPlan) -> str:
        """A block's N:M, where it has one."""
        if not self.group:
            return ""
        numbers = sorted({round(s * self.group) for s in (block.linears or {}).values()})
        if len(numbers) > 1:
            return f" ({numbers[0]} to {numbers[-1]}:{self.group})"
        return f" ({round(block.sparsity * self.group)}:{self.group})"

    @property
    def _caption(self) -> str:
        text = f"target {self.target:g}, alpha {self.alpha:g}, {self.statistic}"
        if self.group:
            text += (
                f"; {self.mask_structure} on average over all weights, off by {self.deviation:+.4%}"
            )
        if self.candidates:
            tried = ", ".join(f"{c.alpha:g}: {c.loss:.4f}" for c in self.candidates)
            text += f"; chosen by loss ({tried})"
        if self.search:
            first, last = self.search[0], self.search[-1]
            text += (
                f"; refined in {last.generation} generations, divergence from the dense model "
                f"{first.divergence:.4f} -> {last.divergence:.4f}"
            )
        return text

    def __str__(self) -> str:
        text = StringIO()
        Console(file=text, width=100).print(self.table())
        return text.getvalue().rstrip()

    def plot(self, path: str | Path) -> None:
        """Draw sparsity and score over depth.

        :param path: file to write; its suffix chooses the format, e.g. ``plan.png``
        :raises ValueError: if ``path`` has no suffix
        :raises ImportError: if matplotlib is not installed
        """
        if not Path(path).suffix:
            raise ValueError(f"{path} has no suffix to tell the format; name it {path}.png")
        try:
            from matplotlib.figure import Figure
        except ImportError:
            raise ImportError(
                "drawing a plan needs matplotlib: pip install 'dlp_plugin[plot]'"
            ) from None
        depth = range(len(self.blocks))
        figure = Figure(figsize=(8, 4), layout="constrained")
        axes = figure.subplots()
        axes.bar(depth, [b.sparsity for b in self.blocks], color="#4c72b0")
        axes.axhline(self.target, color="black", linewidth=1, linestyle="--")
        axes.set_xlabel("block")
        axes.set_ylabel("sparsity (bars; dashed: target)")
        axes.set_ylim(0, 1)
        axes.set_title(
            f"{self.model}: {_TITLES[self.method]}, target "
            f"{self.mask_structure if self.group else format(self.target, 'g')}, "
            f"alpha {self.alpha:g}"
        )
        scores = axes.twinx()
        scores.plot(depth, [b.score for b in self.blocks], color="#c44e52", marker="o")
        scores.set_ylabel(f"score ({self.statistic}; line)")
        scores.set_ylim(bottom=0)
        with replacing(path) as beside:
            figure.savefig(beside, dpi=150)
