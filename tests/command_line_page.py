"""Writes dlp_plugin/command_line.md from what the commands declare.

    python tests/command_line_page.py

``tests/cli/test_command_line_page.py`` fails where the page is not what this writes.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from textwrap import fill
from typing import Any

import typer

from dlp_plugin.cli import app

PAGE = Path(__file__).parents[1] / "dlp_plugin" / "command_line.md"
WIDTH = 118
HEAD = """\
# The command line

<!-- written by tests/command_line_page.py: change the help texts, not this page -->

Every command with its arguments and options, as `dlp-plugin COMMAND --help` shows them.
`python -m dlp_plugin` is the same program. Words: [glossary](glossary.md). Tasks, step by step:
[examples](../examples/README.md).
"""


def page() -> str:
    """The whole page."""
    group: Any = typer.main.get_command(app)
    general = [_row(option) for option in group.params if not _is_completion(option)]
    parts = [HEAD.strip(), _table(("before the command", "meaning"), general)]
    parts += [_section(name, command) for name, command in group.commands.items()]
    return "\n\n".join(parts) + "\n"


def _section(name: str, command: Any) -> str:
    text = [_paragraph(one) for one in inspect.cleandoc(command.help or "").split("\n\n")]
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option"]
    needed = [p for p in options if p.required]
    usage = ["dlp-plugin", name, *(a.name.upper() for a in arguments)]
    usage += [f"{option.opts[0]} {_kind(option)}" for option in needed]
    more = len(options) > len(needed)
    parts = [f"## {name}", *text, f"```text\n{' '.join(usage)}{' [OPTIONS]' * more}\n```"]
    rows = [[f"`{a.name.upper()}`", _cell(getattr(a, "help", "")), "required"] for a in arguments]
    rows += [[*_row(option), _default(option)] for option in options]
    parts.append(_table(("argument or option", "meaning", "default"), rows))
    return "\n\n".join(parts)


def _is_completion(option: Any) -> bool:
    return "completion" in (option.name or "")


def _row(option: Any) -> list[str]:
    names = ", ".join(f"`{name}`" for name in [*option.opts, *option.secondary_opts])
    return [names, _cell(option.help or "")]


def _kind(option: Any) -> str:
    return str(option.name).upper().replace("_", "-")


def _default(option: Any) -> str:
    if option.required:
        return "required"
    if isinstance(option.show_default, str):
        return _cell(option.show_default)
    value = option.default
    if value is None or value == [] or callable(value):
        return ""
    return ("on" if value else "off") if isinstance(value, bool) else f"`{value}`"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _paragraph(text: str) -> str:
    return fill(" ".join(text.split()), WIDTH, break_long_words=False, break_on_hyphens=False)


def _table(head: tuple[str, ...], rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in [list(head), *rows]) for i in range(len(head) - 1)]
    rule = ["-" * width for width in widths] + ["-" * len(head[-1])]
    return "\n".join(
        "| " + " | ".join([*(c.ljust(w) for c, w in zip(row, widths)), row[-1]]) + " |"
        for row in [list(head), rule, *rows]
    )


if __name__ == "__main__":
    PAGE.write_text(page())
