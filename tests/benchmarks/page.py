"""Writes README.md and appendix.md beside this file, and the tables of two other pages.

    python tests/benchmarks/page.py

The text is that of page.md and appendix_page.md, with places ``{{...}}`` for what was measured.
Every figure stands in a file of ``results/``, and every part of those files on one of the pages;
``tests/test_benchmarks_page.py`` holds both to it. Standard library only.
"""

import re
from pathlib import Path

import figures
from experts import trained_mixture
from layout import Parts, wrapped
from yardsticks import gain_table

HERE = Path(__file__).parent
PAGES = {"README.md": "page.md", "appendix.md": "appendix_page.md"}
ROOT = HERE.parents[1]
TABLES = {
    ROOT / "README.md": gain_table,
    ROOT / "examples" / "README.md": figures.main_table,
}
PLACE = re.compile(r"\{\{([^}]+)\}\}")
MARKED = re.compile(r"(?<=<!-- written by tests/benchmarks/page.py -->\n).*?(?=<!-- end -->)", re.S)


def pages(parts: Parts) -> dict[Path, str]:
    """Both pages.

    :raises KeyError: if what they ask for was not measured
    :raises ValueError: if they leave something out that was
    """
    texts = {HERE / page: (HERE / text).read_text() for page, text in PAGES.items()}
    values = {
        name: value
        for write in (*figures.ALL, trained_mixture)
        for name, value in write(parts).items()
    }
    values |= {f"from {name}": parts.whence(name) for name in parts}
    for name, text in zip(("contents", "appendix contents"), texts.values(), strict=True):
        titles = re.findall(r"^## (.*)$", text, re.M)
        values[name] = "\n".join(f"- [{title}](#{anchor(title)})" for title in titles)
    asked = set(PLACE.findall("".join(texts.values())))
    needless = {"from search, blind"}  # of one commit with what it is compared with
    if left := {*values} - asked - needless | {*parts} - parts.shown:
        raise ValueError(f"measured, but on no page: {', '.join(sorted(left))}")
    return {
        page: "\n\n".join(filled(block, values) for block in text.split("\n\n"))
        for page, text in texts.items()
    }


def filled(block: str, values: dict[str, str]) -> str:
    """A block of a page with its places filled; a paragraph is wrapped anew."""
    found = PLACE.sub(lambda place: values[place[1]], block)
    return found if block.startswith("{{") or found == block else wrapped(found)


def anchor(title: str) -> str:
    """Where GitHub puts a title."""
    return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")


def with_tables(parts: Parts) -> dict[Path, str]:
    """The pages that have a table of what was measured, with it in its place."""
    return {
        page: MARKED.sub(lambda _, write=write: f"\n{write(parts).strip()}\n\n", page.read_text())
        for page, write in TABLES.items()
    }


def main() -> None:
    parts = Parts(HERE / "results")
    for page, text in (pages(parts) | with_tables(parts)).items():
        page.write_text(text)


if __name__ == "__main__":
    main()
