"""What a comparison is made of, as it is written in the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from pydantic import ValidationError

from dlp_plugin.planning.allocation import check_sparsity
from dlp_plugin.planning.methods import Method, method_of, options
from dlp_plugin.planning.methods.dlp import DLP
from dlp_plugin.planning.structure import UNSTRUCTURED, MaskStructure
from dlp_plugin.pruning import admm, calibrated, magnitude  # noqa: F401 (which declare stages)
from dlp_plugin.pruning.base import PruningStage, declared
from dlp_plugin.search.decide import Search, where_judged, where_to_search

__all__ = [
    "EVERY",
    "FEWEST",
    "Contender",
    "Pruner",
    "Scope",
    "Way",
    "bits_named",
    "contender_named",
    "plan_name",
    "pruner_named",
    "target_named",
    "target_of",
]

FEWEST = 4
"""Bits of a weight that an engine multiplies; with fewer a model is measured, but not pruned."""

# What a pruner's name may end in, to the fields that it stands for.
_REPAIRS: dict[str, dict[str, Any]] = {
    "-polished": {"polish": True},
    "-reconstructed": {"reconstruct": 2},
}


class Way(NamedTuple):
    """How plans are judged, by what prunes by them.

    :param by_magnitude: by magnitude's masks, and not by Wanda's
    :param easier: how much less than the target is pruned while they are refined
    """

    by_magnitude: bool = False
    easier: float = 0.0


class Scope(NamedTuple):
    """What of a model is pruned, as a stage's fields say it.

    :param targets: class names, names or ``re:`` patterns of modules
    :param ignore: names or patterns of those that stay dense, and are not quantized either
    """

    targets: tuple[str, ...] = ("Linear",)
    ignore: tuple[str, ...] = ()


EVERY = Scope()
"""Every Linear."""


@dataclass(frozen=True)
class Pruner:
    """A pruning stage that takes part.

    :param kind: its class
    :param fields: those that differ from their defaults
    """

    kind: type[PruningStage]
    fields: Mapping[str, Any]

    @property
    def modifier(self) -> str:
        """What recipes call it."""
        return self.kind.__name__

    @property
    def way(self) -> Way:
        """How plans for it are judged."""
        repairs = bool(self.fields) or self.kind.model_fields["polish"].default
        return Way(self.kind.by_magnitude, where_judged(self.kind.compensates, repairs))


def plan_name(method: str, way: Way) -> str:
    """What a plan is kept under.

    :param method: full name
    :param way: what of it matters to the method's plans
    """
    searched = f", {way.easier:g} easier" if way.easier else ""
    return method + ", by magnitude" * way.by_magnitude + searched


def pruner_named(text: str) -> Pruner:
    """A pruner as it is written, ``name[-polished][-reconstructed]``, e.g. ``wanda-polished``.

    :raises ValueError: naming ``text`` and what there is
    """
    name, fields = text, dict[str, Any]()
    for ending in reversed(_REPAIRS):
        if name.endswith(ending):
            name = name.removesuffix(ending)
            fields |= _REPAIRS[ending]
    stages = declared()
    if name not in stages:
        raise ValueError(
            f"there is no pruner {text!r}; there are {', '.join(stages)}, each also with "
            f"{' or '.join(_REPAIRS)} behind it"
        )
    return Pruner(stages[name], fields)


@dataclass(frozen=True)
class Contender:
    """A method that takes part.

    :param name: full name, with the strength
    :param method: with its strength and settings
    :param refine: steps or generations of the search that refines its plans; 0 for none
    :param search: how
    """

    name: str
    method: Method
    refine: int = 0
    search: Search = "gradient"

    @property
    def judges(self) -> bool:
        """Whether it judges pruned models, on a quarter of the samples at most."""
        return self.method.strength == "auto" or self.refine > 0

    def way(self, way: Way, target: str) -> Way:
        """What of a way of judging matters to its plans."""
        sparsity, structure = target_of(target)
        lower = self.refine > 0 and where_to_search(sparsity, structure, way.easier) < sparsity
        return Way(way.by_magnitude and self.judges, way.easier if lower else 0.0)


def contender_named(text: str, refine: int = 16, evolve: int = 40) -> Contender:
    """A method as it is written, ``name[-refined|-evolved][:strength]``, e.g. ``dlp:0.1``.

    ``dlp`` has its own default strength, ``dlp:auto`` (or ``dlp-auto``) one that is chosen;
    ``dlp-refined`` is improved by the gradient, ``dlp-evolved`` by evolution, and ``uniform``
    is DLP at strength 0.

    :param refine: steps of the gradient
    :param evolve: generations of the evolution
    :raises ValueError: naming ``text`` and what there is
    """
    name, _, strength = text.strip().partition(":")
    searched = next((way for way in ("refined", "evolved") if name.endswith(f"-{way}")), "")
    name = name.removesuffix(f"-{searched}")
    if name.endswith("-auto") and not strength:
        name, strength = name.removesuffix("-auto"), "auto"
    name = name.replace("_", "-")
    try:
        method = _method(name, strength)
    except ValueError as error:
        problem = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
        raise ValueError(
            f"method {text!r}: {problem}. Methods are uniform, {', '.join(options())}; all but "
            "uniform take a strength (dlp:0.1) or choose one (dlp:auto), and all can be refined "
            "(dlp-refined:0.1) or evolved (dlp-evolved:0.1)"
        ) from None
    if name != "uniform":
        value = method.strength
        name += f":{value if value == 'auto' else format(value, 'g')}"
    if searched == "refined":
        return Contender(f"{name} refined {refine}", method, refine)
    if searched == "evolved":
        return Contender(f"{name} evolved {evolve}", method, evolve, "evolution")
    return Contender(name, method)


def _method(name: str, strength: str) -> Method:
    if name not in ("uniform", *options()):
        raise ValueError(f"there is no {name!r}")
    if name == "uniform":
        if strength:
            raise ValueError("uniform has no strength")
        return DLP(alpha=0.0)
    kind = method_of(name)
    if not strength:
        return kind()
    return kind(**{kind.strength_field: strength if strength == "auto" else float(strength)})


def bits_named(bits: int | str) -> int:
    """How many bits a weight shall have: 2, 3, 4, 8, or 16 for those of the checkpoint.

    :raises ValueError: if it is none of these
    """
    text = str(bits).strip()
    if text not in ("2", "3", "4", "8", "16"):
        raise ValueError(
            f"bits: {bits!r} is none of 4 and 8, of 16, which leaves weights as the checkpoint has "
            "them, and of 3 and 2, for the model that is not pruned"
        )
    return int(text)


def target_named(target: float | str) -> str:
    """A target as it is written: a sparsity, or N:M for N of every M weights on average.

    :raises ValueError: if it is neither
    """
    if isinstance(target, str) and ":" in target:
        structure = MaskStructure.parse(target.strip())
        check_sparsity(structure.sparsity if structure else 0, "sparsities")
        return str(structure)
    try:
        value = float(target)
    except ValueError:
        raise ValueError(
            f"sparsities: {target!r} is no number; give e.g. 0.5, 0.7 or 4:8"
        ) from None
    return str(check_sparsity(value, "sparsities"))


def target_of(name: str) -> tuple[float, MaskStructure]:
    """Sparsity and structure of a target as :func:`target_named` writes it."""
    if ":" not in name:
        return float(name), UNSTRUCTURED
    structure = MaskStructure.parse(name)
    return structure.sparsity, structure
