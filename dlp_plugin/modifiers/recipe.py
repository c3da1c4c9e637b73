"""Recipes in YAML, checked before a model is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

__all__ = ["check_recipe", "with_sparsity"]


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
    content = yaml.load(Path(path).read_text(encoding="utf-8"), _UniqueKeys)
    stated = [
        fields
        for stage in (stage for key, stage in content.items() if key != "args")
        for modifiers in stage.values()
        for fields in modifiers.values()
        if "sparsity" in fields
    ]
    if not stated:
        raise ValueError(
            f"sparsity: {sparsity} has no place in {path}, where no modifier states one: give its "
            "pruning stage sparsity: 0.5, which is then replaced; with N:M change mask_structure "
            "instead"
        )
    for fields in stated:
        fields["sparsity"] = sparsity
    return str(yaml.safe_dump(content, sort_keys=False, width=100))


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
