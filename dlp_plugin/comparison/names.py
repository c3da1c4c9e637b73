"""What a comparison is made of, as it is written in the terminal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from dlp_plugin.planning.allocation import check_sparsity
from dlp_plugin.planning.methods import Method, method_of, options
from dlp_plugin.planning.methods.dlp import DLP
from dlp_plugin.planning.structure import UNSTRUCTURED, MaskStructure

__all__ = ["PRUNERS", "Contender", "contender_named", "target_named", "target_of"]

PRUNERS = {
    "wanda": "WandaPruningModifier",
    "sparsegpt": "SparseGPTModifier",
    "magnitude": "OneShotMagnitudeModifier",
}


@dataclass(frozen=True)
class Contender:
    """A method that takes part.

    :param name: full name, with the strength
    :param method: with its strength and settings
    :param generations: of the search that refines its plans; 0 for none
    """

    name: str
    method: Method
    generations: int = 0

    @property
    def judges(self) -> bool:
        """Whether it judges pruned models, on a quarter of the samples."""
        return self.method.strength == "auto" or self.generations > 0


def contender_named(text: str, generations: int = 0) -> Contender:
    """A method as it is written, ``name[-refined][:strength]``, e.g. ``dlp:0.1``.

    ``dlp`` has its own default strength, ``dlp:auto`` (or ``dlp-auto``) one that is chosen;
    ``dlp-refined`` is improved by a search, and ``uniform`` is DLP at strength 0.

    :param generations: of the search, where one is asked for
    :raises ValueError: naming ``text`` and what there is
    """
    name, _, strength = text.strip().partition(":")
    refined = name.endswith("-refined")
    name = name.removesuffix("-refined")
    if name.endswith("-auto") and not strength:
        name, strength = name.removesuffix("-auto"), "auto"
    name = name.replace("_", "-")
    try:
        if name not in ("uniform", *options()):
            raise ValueError(f"there is no {name!r}")
        if name == "uniform" and strength:
            raise ValueError("uniform has no strength")
        if refined and generations < 1:
            raise ValueError("say by how many generations it is refined, e.g. --refine 20")
        if name == "uniform":
            method: Method = DLP(alpha=0.0)
        else:
            kind = method_of(name)
            fields: dict[str, Any] = {}
            if strength:
                fields[kind.strength_field] = strength if strength == "auto" else float(strength)
            method = kind(**fields)
    except ValueError as error:
        problem = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
        raise ValueError(
            f"method {text!r}: {problem}. Methods are uniform, {', '.join(options())}; all but "
            "uniform take a strength (dlp:0.1) or choose one (dlp:auto), and all can be refined "
            "(dlp-refined:0.1)"
        ) from None
    if name != "uniform":
        value = method.strength
        name += f":{value if value == 'auto' else format(value, 'g')}"
    if refined:
        return Contender(f"{name} refined {generations}", method, generations)
    return Contender(name, method)


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
