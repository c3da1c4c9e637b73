"""Recipes in YAML, checked before a model is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from dlp_plugin.planning.plan import Plan

__all__ = ["check_recipe", "plans_of", "with_sparsity"]


# Its sparsity is the share of whole experts that it removes.
_OF_EXPERTS = "REAPPruningModifier"


class _UniqueKeys(yaml.SafeLoader):  # type: ignore[misc]
    """Loads YAML, but refuses duplicate keys, of which YAML would keep only the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key.value!r} stands twice in one mapping", key.start_mark
                )
            seen.add(key.value)
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping


def check_recipe(path: str | Path) -> None:
    """Check that a file holds a recipe: stages of groups of modifiers.

    :param path: of the file
    :raises ValueError: naming the file, if it is not a recipe; naming the line too, if it is not
        YAML or has a duplicate key
    """
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), _UniqueKeys)
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text: give a recipe in YAML") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = "" if mark is None else f", line {mark.line + 1}"
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ValueError(
            f"{path}{line}: {problem}; mend the YAML (of two stages of one kind give each a group "
            "of its own)"
        ) from None
    if not isinstance(content, dict):
        kind = "empty" if content is None else f"a {type(content).__name__}"
        raise ValueError(f"{path} is {kind}, and a recipe is a mapping of stages: see recipes/")
    stages = {key: value for key, value in content.items() if key != "args"}
    for stage, groups in _named(stages, "_stage", f"{path}"):
        for group, modifiers in _named(groups, "_modifiers", f"{path}: {stage}"):
            for name, fields in _named(modifiers, "Modifier", f"{path}: {stage}.{group}"):
                _named(fields, "", f"{path}: {stage}.{group}.{name}")


def with_sparsity(path: str | Path, sparsity: float) -> str:
    """Replace the sparsity of every modifier in a recipe that states one.

    :param path: of a file that :func:`check_recipe` has passed
    :param sparsity: to write instead
    :return: the recipe as YAML
    :raises ValueError: if no modifier states a sparsity
    """
    import dlp_plugin

    content = yaml.load(Path(path).read_text(encoding="utf-8"), _UniqueKeys)
    modifiers = list(_modifiers(content))
    stated = [fields for name, fields in modifiers if "sparsity" in fields and name != _OF_EXPERTS]
    if not stated:
        classes = (getattr(dlp_plugin, name, None) for name, _ in modifiers)
        prunes = any("sparsity" in getattr(one, "model_fields", ()) for one in classes)
        why = "where no modifier states one" if prunes else "which prunes nothing"
        remedy = (
            "give its pruning stage sparsity: 0.5, which is then replaced; with N:M change "
            "mask_structure instead"
            if prunes
            else "leave it out"
        )
        raise ValueError(f"sparsity: {sparsity} has no place in {path}, {why}: {remedy}")
    for fields in stated:
        fields["sparsity"] = sparsity
    return str(yaml.safe_dump(content, sort_keys=False, width=100))


def plans_of(path: str | Path) -> list[Plan]:
    """Read the plans that the allocation modifiers of a recipe hold or name.

    :param path: of the file
    :return: plans in recipe order, at least one
    :raises FileNotFoundError: if there is no such file
    :raises ValueError: as :func:`check_recipe` does, if no modifier has a plan, or one is not sound
    """
    check_recipe(path)
    content = yaml.load(Path(path).read_text(encoding="utf-8"), _UniqueKeys)
    found = [fields["from_plan"] for _, fields in _modifiers(content) if fields.get("from_plan")]
    if not found:
        raise ValueError(
            f"{path} holds no plan (from_plan): give the recipe.yaml that oneshot saved beside a "
            "model with a plan, or make a plan with `dlp-plugin score`"
        )
    return [Plan.load(plan) for plan in found]


def _modifiers(content: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and fields of every modifier of a recipe that :func:`check_recipe` has passed."""
    for key, stage in content.items():
        for modifiers in stage.values() if key != "args" else ():
            yield from modifiers.items()


def _named(content: Any, ending: str, where: str) -> list[tuple[str, Any]]:
    """The entries of a mapping whose keys all have an ending; llm-compressor skips others."""
    if not isinstance(content, dict):
        remedy = "NAME: {FIELD: VALUE}, or NAME: {} for no fields"
        raise ValueError(f"{where} is {content!r}: write a mapping, {remedy}")
    if ending and not content:
        raise ValueError(f"{where} is empty: name a ...{ending}")
    for key in content:
        if not str(key).endswith(ending):
            raise ValueError(
                f"{where} holds {key!r}, which llm-compressor would skip: its name must end in "
                f"{ending}"
            )
    return list(content.items())
