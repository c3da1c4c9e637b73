"""Writes README.md beside this file, and the main table of the README, from results/*.json.

    python tests/benchmarks/page.py

The text is page.md's, with places ``{{...}}`` for what was measured. Every figure stands in a
file of ``results/``, and every part of those files stands on the page;
``tests/test_benchmarks_page.py`` holds both to it. Standard library only.
"""

import re
from pathlib import Path

import figures
from layout import Parts, wrapped

HERE = Path(__file__).parent
PAGE = HERE / "README.md"
README = HERE.parents[1] / "README.md"
PLACE = re.compile(r"\{\{([^}]+)\}\}")
MAIN = re.compile(r"(?<=<!-- written by tests/benchmarks/page.py -->\n).*?(?=<!-- end -->)", re.S)


def page(parts: Parts) -> str:
    """The page.

    :raises KeyError: if what page.md asks for was not measured
    :raises ValueError: if page.md leaves something out that was
    """
    text = (HERE / "page.md").read_text()
    values = {name: value for write in figures.ALL for name, value in write(parts).items()}
    values |= {f"from {name}": parts.whence(name) for name in parts}
    titles = re.findall(r"^## (.*)$", text, re.M)
    values["contents"] = "\n".join(f"- [{title}](#{anchor(title)})" for title in titles)
    asked = set(PLACE.findall(text))
    needless = {"from search, blind"}  # of one commit with what it is compared with
    if left := {*values} - asked - needless | {*parts} - parts.shown:
        raise ValueError(f"measured, but not on the page: {', '.join(sorted(left))}")
    blocks = (filled(block, values) for block in text.split("\n\n"))
    return "\n\n".join(blocks)


def filled(block: str, values: dict[str, str]) -> str:
    """A block of page.md with its places filled; a paragraph is wrapped anew."""
    found = PLACE.sub(lambda place: values[place[1]], block)
    return found if block.startswith("{{") or found == block else wrapped(found)


def anchor(title: str) -> str:
    """Where GitHub puts a title."""
    return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")


def with_main_table(readme: str, parts: Parts) -> str:
    """The README with the main command's table in its place."""
    return MAIN.sub(lambda _: f"\n{figures.main_table(parts)}\n", readme)


def main() -> None:
    parts = Parts(HERE / "results")
    PAGE.write_text(page(parts))
    README.write_text(with_main_table(README.read_text(), parts))


if __name__ == "__main__":
    main()
