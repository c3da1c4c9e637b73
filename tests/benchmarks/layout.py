"""What was measured, and Markdown for it: paragraphs, tables, where a figure comes from.

Standard library only.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

WIDTH = 118
WHOLE = {"break_long_words": False, "break_on_hyphens": False}


class Parts(dict[str, dict[str, Any]]):
    """All that was measured, by name; remembers what was asked for."""

    def __init__(self, folder: Path) -> None:
        """Read a folder.

        :raises ValueError: if a part stands in two files
        """
        super().__init__()
        self.shown: set[str] = set()
        for file in sorted(folder.glob("*.json")):
            for name, part in json.loads(file.read_text()).items():
                if name in self:
                    raise ValueError(f"{name} stands in {file.name} and in another file")
                self[name] = part

    def results(self, name: str) -> Any:
        self.shown.add(name)
        return self[name]["results"]

    def whence(self, name: str) -> str:
        return provenance(self[name])


def wrapped(paragraph: str) -> str:
    return fill(" ".join(paragraph.split()), WIDTH, **WHOLE)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, its columns aligned; the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]
    rule = [f"{'-' * max(widths[0], 3)}", *(f"{'-' * max(width - 1, 2)}:" for width in widths[1:])]
    lines = []
    for row in [columns, rule, *rows]:
        first, *others = row
        cells = [first.ljust(max(widths[0], 3))]
        cells += [cell.rjust(max(w, 3)) for cell, w in zip(others, widths[1:], strict=True)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def provenance(part: dict[str, Any]) -> str:
    """What a part holds for."""
    command = part["command"]
    facts = [part["processor"]]
    if sets := part.get("instruction_sets"):
        facts[0] += f" ({', '.join(sets)})"
    if "device" in part:
        facts.append(part["device"])
    for name in ("cores", "threads"):
        if count := part.get(name):
            facts.append(f"{count} {name if count > 1 else name[:-1]}")
    facts.append(f"commit {part['commit']} of {part['date']}")
    facts += [f"{name} {number}" for name, number in part.get("versions", {}).items()]
    facts += [part["note"]] if "note" in part else []
    if part.get("transcribed"):
        source = "the README" if part["transcribed"] is True else part["transcribed"]
        facts.append(f"transcribed from {source}" + ("" if command else "; command not kept"))
    line = wrapped(f"*{', '.join(facts)}*")
    if not command:
        return line
    held = re.sub(r"(--\S+) (?!-)", "\\1\0", command)  # an option and its value on one line
    lines = fill(held, WIDTH - 4, subsequent_indent="    ", **WHOLE).split("\n")
    return "\n".join(["```bash", " \\\n".join(lines).replace("\0", " "), "```", "", line])


def number(value: float) -> str:
    return f"{value:.2f}" if value < 1000 else f"{value:,.0f}"


def percent(target: str | float) -> str:
    return str(target) if ":" in str(target) else f"{float(target):.0%}".replace("%", " %")


def span(values: Sequence[float], digits: int = 2) -> str:
    least, most = f"{min(values):.{digits}f}", f"{max(values):.{digits}f}"
    return least if least == most else f"{least} to {most}"


def bullets(lines: Sequence[str]) -> str:
    return "\n".join(
        fill(line, WIDTH, initial_indent="- ", subsequent_indent="  ", **WHOLE) for line in lines
    )
