"""The allocation methods: one file each, and a line here."""

from __future__ import annotations

from dlp_plugin.planning.methods.alpha_pruning import AlphaPruning
from dlp_plugin.planning.methods.base import Method, Strength
from dlp_plugin.planning.methods.dlp import DLP
from dlp_plugin.planning.methods.linear import LinearSparsity
from dlp_plugin.planning.methods.owl import OWL

__all__ = [
    "DLP",
    "METHODS",
    "OWL",
    "AlphaPruning",
    "LinearSparsity",
    "Method",
    "Strength",
    "method_of",
    "options",
]

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        DLP,
        OWL,
        AlphaPruning,
        LinearSparsity,
    )
}
"""Name to method; adding one here makes it known to plans, comparison and terminal."""


def options() -> list[str]:
    """The names as the terminal writes them."""
    return [name.replace("_", "-") for name in METHODS]


def method_of(text: str) -> type[Method]:
    """Find a method by its name, which may have dashes or underscores.

    :param text: name of the method
    :return: class of the method
    :raises ValueError: if there is no such method; lists those that exist
    """
    name = text.strip().replace("-", "_")
    if name not in METHODS:
        raise ValueError(f"there is no method {text.strip()!r}; there are {', '.join(options())}")
    return METHODS[name]
