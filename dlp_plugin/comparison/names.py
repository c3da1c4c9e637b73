"""Parses the names of methods, pruners, targets and bits in a comparison."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from pydantic import ValidationError

from dlp_plugin.planning.allocation import check_sparsity
from dlp_plugin.planning.methods import Method, method_of, options
from dlp_plugin.planning.methods.dlp import DLP
from dlp_plugin.planning.structure import UNSTRUCTURED, MaskStructure
from dlp_plugin.pruning import admm, calibrated, magnitude  # noqa: F401 (they declare stages)
from dlp_plugin.pruning.base import PruningStage, declared
from dlp_plugin.search.decide import Search, search_offset, where_to_search

__all__ = [
    "DISTILLING",
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
"""Smallest number of bits for pruned models; below it only the dense model is measured."""

DISTILLING = 2
"""Epochs of distillation, of pruned and of quantized models."""

# Suffixes of a pruner's name to the fields that they set.
_REPAIRS: dict[str, dict[str, Any]] = {
    "-polished": {"polish": True},
    "-reconstructed": {"reconstruct": 2},
    "-distilled": {"distill": DISTILLING},
}


class Way(NamedTuple):
    """How the search simulates pruning when it judges plans; it depends on the pruning stage.

    :param by_magnitude: whether the masks are those of magnitude pruning instead of Wanda's
    :param offset: how far below the target the sparsity is while a plan is refined
    """

    by_magnitude: bool = False
    offset: float = 0.0


class Scope(NamedTuple):
    """Which modules are pruned, as in a stage's fields.

    :param targets: class names, full names or ``re:`` patterns of modules
    :param ignore: names or patterns of modules that are neither pruned nor quantized
    """

    targets: tuple[str, ...] = ("Linear",)
    ignore: tuple[str, ...] = ()


EVERY = Scope()
"""Every Linear."""


@dataclass(frozen=True)
class Pruner:
    """A pruning stage in a comparison.

    :param kind: class of the stage
    :param fields: values of its fields that differ from the defaults
    """

    kind: type[PruningStage]
    fields: Mapping[str, Any]

    @property
    def modifier(self) -> str:
        """The stage's name in recipes."""
        return self.kind.__name__

    @property
    def way(self) -> Way:
        """How plans for this stage are judged."""
        repairs = bool(self.fields) or self.kind.model_fields["polish"].default
        return Way(self.kind.by_magnitude, search_offset(self.kind.compensates, repairs))


def plan_name(method: str, way: Way) -> str:
    """Return the key under which a plan is stored in the results.

    :param method: full name of the method
    :param way: how the plan was judged, as :meth:`Contender.way` returns it
    :return: the key, such as ``dlp:0.15 refined 16, 0.2 easier``
    """
    searched = f", {way.offset:g} easier" if way.offset else ""
    return method + ", by magnitude" * way.by_magnitude + searched


def pruner_named(text: str) -> Pruner:
    """Parse a pruner's name.

    :param text: ``pruner[-polished][-reconstructed][-distilled]``, e.g. ``wanda-polished``
    :return: the pruner
    :raises ValueError: if there is no such pruner; lists those that exist
    """
    name, fields = text, dict[str, Any]()
    for ending in reversed(_REPAIRS):
        if name.endswith(ending):
            name = name.removesuffix(ending)
            fields |= _REPAIRS[ending]
    stages = declared()
    if name not in stages:
        raise ValueError(
            f"there is no pruner {text!r}; there are {', '.join(stages)}, and each may end in "
            f"{' or '.join(_REPAIRS)}"
        )
    return Pruner(stages[name], fields)


@dataclass(frozen=True)
class Contender:
    """A method in a comparison.

    :param name: full name, including the strength
    :param method: the method with its strength and settings
    :param refine: steps or generations of the search that refines its plans; 0 for none
    :param search: ``gradient`` or ``evolution``
    """

    name: str
    method: Method
    refine: int = 0
    search: Search = "gradient"

    @property
    def judges(self) -> bool:
        """Whether its plans are selected on held-out samples."""
        return self.method.strength == "auto" or self.refine > 0

    def way(self, way: Way, target: str) -> Way:
        """Reduce a stage's way to what changes this method's plans at a target.

        :param way: of the pruning stage
        :param target: name of the target
        :return: the way, with defaults for everything that has no effect
        """
        sparsity, structure = target_of(target)
        lower = self.refine > 0 and where_to_search(sparsity, structure, way.offset) < sparsity
        return Way(way.by_magnitude and self.judges, way.offset if lower else 0.0)


def contender_named(text: str, refine: int = 16, evolve: int = 40) -> Contender:
    """Parse a method's name.

    ``dlp`` has its default strength. ``dlp:auto`` (or ``dlp-auto``) selects the strength on
    held-out samples. Plans of ``dlp-refined`` are improved by the gradient search, those of
    ``dlp-evolved`` by evolution. ``uniform`` is DLP at strength 0.

    :param text: ``method[-refined|-evolved][:strength]``, e.g. ``dlp:0.1``
    :param refine: steps of the gradient search
    :param evolve: generations of the evolution
    :return: the contender
    :raises ValueError: if there is no such method; lists those that exist
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
            "uniform take a strength (dlp:0.1) or select it (dlp:auto), and all can be refined "
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
    """Parse a number of bits per weight.

    :param bits: 2, 3, 4, 8, or 16 for weights as in the checkpoint
    :return: the number
    :raises ValueError: if ``bits`` is another number
    """
    text = str(bits).strip()
    if text not in ("2", "3", "4", "8", "16"):
        raise ValueError(
            f"bits must be 16 (as in the checkpoint), 8, 4, or 3 or 2 (dense model only), got "
            f"{bits!r}"
        )
    return int(text)


def target_named(target: float | str) -> str:
    """Write a target in its canonical form.

    :param target: a sparsity, or ``N:M`` for N zeros in every M weights on average
    :return: the target's name, which :func:`target_of` reads
    :raises ValueError: if ``target`` is neither
    """
    if isinstance(target, str) and ":" in target:
        structure = MaskStructure.parse(target.strip())
        check_sparsity(structure.sparsity if structure else 0, "sparsities")
        return str(structure)
    try:
        value = float(target)
    except ValueError:
        raise ValueError(
            f"sparsities: {target!r} is not a number; give e.g. 0.5, 0.7 or 4:8"
        ) from None
    return str(check_sparsity(value, "sparsities"))


def target_of(name: str) -> tuple[float, MaskStructure]:
    """Read a target's name.

    :param name: as :func:`target_named` writes it
    :return: sparsity and mask structure
    """
    if ":" not in name:
        return float(name), UNSTRUCTURED
    structure = MaskStructure.parse(name)
    return structure.sparsity, structure
