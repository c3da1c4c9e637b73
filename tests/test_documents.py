"""The documents against the code: links, fields, recipes, commands, versions."""

from __future__ import annotations

import ast
import re
import shlex
import sys
from pathlib import Path

import pytest
import typer
import yaml
from helpers import ROOT
from llmcompressor.modifiers import Modifier

import dlp_plugin
from dlp_plugin.cli import app
from dlp_plugin.search import gradient, linears, slopes

sys.path.append(str(ROOT / "tests" / "engines"))
import environments

FOLDERS = ("dlp_plugin", "examples", "recipes", "tests")
DOCUMENTS = [
    *ROOT.glob("*.md"),
    *(file for folder in FOLDERS for file in sorted((ROOT / folder).rglob("*.md"))),
]
README = (ROOT / "README.md").read_text()
CATALOGUE = (ROOT / "recipes" / "README.md").read_text()
MODIFIERS = (ROOT / "recipes" / "modifiers.md").read_text()
GLOSSARY = ROOT / "dlp_plugin" / "glossary.md"
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.M | re.S)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
PATH = re.compile(rf"\b(?:{'|'.join(FOLDERS)})/[\w./-]+\.(?:py|yaml|md|txt|json)\b")

documents = pytest.mark.parametrize(
    "document", DOCUMENTS, ids=[str(file.relative_to(ROOT)) for file in DOCUMENTS]
)


def blocks(document: Path, language: str) -> list[str]:
    return [code for _, kind, code in FENCE.findall(document.read_text()) if kind == language]


def anchors(document: Path) -> set[str]:
    """Where GitHub puts a document's titles."""
    titles = re.findall(r"^#+ +(.*)$", FENCE.sub("", document.read_text()), re.M)
    plain = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title).lower() for title in titles]
    return {re.sub(r"[^\w -]", "", title).replace(" ", "-") for title in plain}


@documents
def test_every_link_and_anchor_exists(document: Path) -> None:
    links = LINK.findall(FENCE.sub("", document.read_text()))
    for link in links:
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        target = document.parent / path if path else document
        assert target.exists(), f"{link}: there is no {path}"
        if anchor:
            assert anchor in anchors(target), f"{link}: no such title in {target.name}"


@documents
def test_every_path_from_the_root_exists(document: Path) -> None:
    text = LINK.sub("", document.read_text())
    for path in PATH.findall(text):
        assert (ROOT / path).exists(), path
    for name in re.findall(r"\btest_\w+\.py\b", text):
        assert list((ROOT / "tests").rglob(name)), name


@documents
def test_code_can_be_read(document: Path) -> None:
    for code in blocks(document, "python"):
        ast.parse(code)
    for code in blocks(document, "yaml"):
        yaml.safe_load(code)


@documents
def test_every_command_and_option_of_the_terminal_exists(document: Path) -> None:
    group = typer.main.get_command(app)
    for code in blocks(document, "bash"):
        for line in code.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if not words or words[0] != "dlp-plugin":
                continue
            command = group.commands.get(words[1])
            assert command, line
            known = {option for parameter in command.params for option in parameter.opts}
            assert {word for word in words if word.startswith("--")} <= known, line


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 130
    assert README.count("| perplexity |") == 1  # one table of a model's quality


@documents
def test_no_page_is_long(document: Path) -> None:
    if document.parent.name != "benchmarks":  # whose tables are as long as what was measured
        assert len(document.read_text().splitlines()) <= 300


# Words that mean something of their own here, in prose, to their entries in the glossary.
OWN = {
    "polish": "polish", "polished": "polish", "refit": "refit", "refitted": "refit",
    "strength": "strength", "unseen": "unseen", "easier": "easier", "judge": "judge",
    "host": "host", "packed": "packed", "pruning stage": "pruning-stage",
    "pruning stages": "pruning-stage", "held-out samples": "held-out-samples",
    "perplexity ratio": "perplexity-ratio", "unstructured": "unstructured",
    "Gram matrix": "gram-matrix", "divergence": "divergence",
}  # fmt: skip
SHORT = {"examples/text/README.md", "dlp_plugin/glossary.md", "dlp_plugin/command_line.md"}


def prose(text: str) -> str:
    """Without code, and what links lead to."""
    text = re.sub(r"`[^`]*`", "", FENCE.sub("", text))
    return re.sub(r"\]\([^)]*\)", "]", text)


@documents
def test_words_of_our_own_can_be_looked_up(document: Path) -> None:
    """A page links its words to their entries, or the glossary as a whole where it begins."""
    name = str(document.relative_to(ROOT))
    if name in SHORT or name.startswith("tests/"):
        return
    text = document.read_text()
    used = {entry for word, entry in OWN.items() if re.search(rf"\b{word}\b", prose(text))}
    assert used <= anchors(GLOSSARY)
    if "[glossary]" not in text.partition("\n## ")[0]:
        assert sorted(e for e in used if f"glossary.md#{e})" not in text) == []


def test_every_message_in_the_table_of_trouble_is_one_of_ours() -> None:
    text = (ROOT / "examples" / "troubleshooting.md").read_text()
    rows = re.findall(r"^\| `(.+?)` +\|", text.partition("## Messages of vLLM")[0], re.M)
    trees = [ast.parse(file.read_text()) for file in (ROOT / "dlp_plugin").rglob("*.py")]
    said = [
        "...".join(part.value if isinstance(part, ast.Constant) else "" for part in node.values)
        if isinstance(node, ast.JoinedStr)
        else node.value
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.JoinedStr)
        or (isinstance(node, ast.Constant) and isinstance(node.value, str))
    ]
    assert len(rows) > 10
    for row in rows:
        parts = [part for part in row.split("...") if part.strip()]
        assert any(all(part in text for part in parts) for text in said), row


def test_the_constants_of_refine_are_those_of_the_code() -> None:
    text = (ROOT / "dlp_plugin" / "refine.md").read_text()
    rows = re.findall(r"^\| [^|]+\| ([^|]+?) +\| (`[A-Z, `]+`) +\|$", text, re.M)
    assert len(rows) == 8
    for values, names in rows:
        wanted = [
            getattr(module, name)
            for name in re.findall(r"[A-Z]+", names)
            for module in (gradient, slopes, linears)
            if hasattr(module, name)
        ]
        found = [float(n.replace(",", "")) for n in re.findall(r"[\d.,]*\d", values)]
        assert found == [100 * w if "%" in values else w for w in wanted], names


def test_the_readme_has_the_two_commands() -> None:
    *_, job, tests = blocks(ROOT / "README.md", "bash")
    assert job == (
        "python3 -m venv .venv && .venv/bin/pip install -q -e '.[plot]' && "
        ".venv/bin/python examples/prune_and_compare.py\n"
    )
    assert tests == "bash tests/run\n"
    assert "`bash tests/run --engines`" in README


def test_every_example_has_its_walk_through() -> None:
    text = (ROOT / "examples" / "README.md").read_text()
    scripts = [file.name for file in (ROOT / "examples").glob("*.py")]
    assert [name for name in scripts if f"[{name}]({name})" not in text] == []


def test_every_recipe_is_in_the_catalogue() -> None:
    catalogue = CATALOGUE.partition("## Catalogue")[2].partition("\n## ")[0]
    listed = re.findall(r"^\| \[(.*?)\]\(\1\)", catalogue, re.M)
    assert sorted(listed) == sorted(file.name for file in (ROOT / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("name", [name for name in dlp_plugin.__all__ if "Modifier" in name])
def test_every_field_of_every_modifier_is_described(name: str) -> None:
    assert name in MODIFIERS
    rows = re.findall(r"^\| (`.*?) \|", MODIFIERS, re.M)
    described = {field for row in rows for field in re.findall(r"`(\w+)`", row)}
    fields = set(getattr(dlp_plugin, name).model_fields) - set(Modifier.model_fields)
    assert fields
    assert fields <= described


def test_every_room_is_in_the_picture() -> None:
    text = (ROOT / "dlp_plugin" / "README.md").read_text()
    picture = text.partition("## Rooms")[2].partition("\n## ")[0]
    rooms = [file for file in (ROOT / "dlp_plugin").iterdir() if not file.name.startswith("_")]
    rooms = [file.name for file in rooms if file.suffix == ".py" or (file / "__init__.py").exists()]
    assert [room for room in rooms if room not in picture] == []


def test_the_releases_are_those_that_are_asked_for() -> None:
    text = (ROOT / "dlp_plugin" / "README.md").read_text()
    table = text.partition("## Releases that work together")[2]
    asked = dict(re.findall(r"^\| ([\w-]+) +\| `(.*?)` ", table, re.M))
    project = (ROOT / "pyproject.toml").read_text()
    pins = {
        environments.VLLM,
        *environments.AUTO_GPTQ,
        *re.findall(r'"([\w-]+[<>=][^"]*)"', project),
    }
    assert len(asked) == 8
    assert {name + numbers for name, numbers in asked.items()} <= pins
