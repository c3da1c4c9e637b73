"""Plans as version 1 wrote them: one ``alpha`` for every method, settings in a sentence."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

__all__ = ["from_schema_1"]


def from_schema_1(plan: Mapping[str, Any]) -> dict[str, Any]:
    """A plan of version 1 with the fields of version 4; what is amiss stays for its checks.

    :param plan: the content of a plan file
    :raises ValueError: if ``statistic`` is no sentence that version 1 wrote
    """
    content = {key: value for key, value in plan.items() if key not in ("alpha", "statistic")}
    content["schema_version"] = 4
    if "alpha" in plan:
        content["strength"] = plan["alpha"]
    content["settings"] = _settings(plan.get("method", "dlp"), plan.get("statistic"))
    candidates = plan.get("candidates")
    if isinstance(candidates, list | tuple):
        content["candidates"] = [_renamed(each) for each in candidates]
    return content


def _renamed(candidate: Any) -> Any:
    if not isinstance(candidate, Mapping) or "alpha" not in candidate:
        return candidate
    rest = {key: value for key, value in candidate.items() if key != "alpha"}
    return {"strength": candidate["alpha"], **rest}


def _settings(method: Any, statistic: Any) -> dict[str, Any]:
    sentences = {
        "dlp": ("statistic", r"(median|mean)"),
        "owl": ("owl_m", r"% of scores above (\S+) x mean"),
        "alpha_pruning": ("tail", r"power-law exponent, tail from the (peak|median)"),
        "linear": (None, "depth"),
    }
    field, pattern = sentences.get(str(method), (None, "depth"))
    found = re.fullmatch(pattern, statistic) if isinstance(statistic, str) else None
    if found is None:
        raise ValueError(f"statistic is {statistic!r}, which no plan of method {method!r} has")
    if field is None:
        return {}
    return {field: float(found[1]) if field == "owl_m" else found[1]}
