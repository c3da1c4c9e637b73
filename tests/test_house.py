"""The house: which room may import which, how long things are, and whose names are used."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import TypeGuard

import pytest
from helpers import ROOT

from dlp_plugin.cli import app

PACKAGE = ROOT / "dlp_plugin"
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}

# Floor by floor from the ground; a room imports from floors below its own.
FLOORS = [
    {"files", "generation", "precision", "registration", "stacking"},
    {"scoring", "evaluation"},
    {"planning", "host"},
    {"experts", "search"},
    {"pruning", "checkpoints"},
    {"kernels"},
    {"modifiers", "recovery", "engines"},
    {"comparison"},
    {"cli"},
]
# What torch keeps under such names and tells nobody otherwise.
TORCH = {"_apply", "_parameters", "_version"}

# A field of all modifiers that the host declares.
HOST_FIELD = "requires_calibration_data"
# Functions whose arguments have help texts instead of :param:.
COMMANDS = {command.callback.__name__ for command in app.registered_commands if command.callback}

FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def imported(path: Path) -> Iterator[str]:
    """Modules of the package that a file imports anywhere, but for type checkers alone."""

    def visit(node: ast.AST) -> Iterator[str]:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            return
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dlp_plugin"):
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in MODULES else str(node.module)
        for child in ast.iter_child_nodes(node):
            yield from visit(child)

    yield from visit(ast.parse(path.read_text()))


@pytest.mark.parametrize("module", [name for name in MODULES if room_of(name) in FLOOR])
def test_imports_go_down(module: str) -> None:
    room = room_of(module)
    for other in imported(MODULES[module]):
        below = room_of(other)
        assert below == room or below == "" or FLOOR[below] < FLOOR[room], other


def test_every_room_has_its_floor() -> None:
    rooms = {room_of(module) for module in MODULES} - {"", "__main__"}
    assert rooms == set(FLOOR)


def test_no_module_imports_itself_by_way_of_others() -> None:
    arrows = {module: set(imported(path)) for module, path in MODULES.items()}
    done: set[str] = set()

    def walk(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " > ".join((*way, module))
        if module not in done:
            for other in arrows[module]:
                walk(other, (*way, module))
            done.add(module)

    for module in MODULES:
        walk(module, ())


@pytest.mark.parametrize("folder", ["dlp_plugin", "tests", "examples"])
def test_no_file_is_long(folder: str) -> None:
    lengths = {p: len(p.read_text().splitlines()) for p in (ROOT / folder).rglob("*.py")}
    assert {path.name: n for path, n in lengths.items() if n > 400} == {}


@pytest.mark.parametrize("module", MODULES)
def test_no_function_is_long(module: str) -> None:
    """Lines of code: those of the signature, the docstring, and empty ones do not count."""
    text = MODULES[module].read_text()
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            first = body[0].lineno if body else node.end_lineno or 0
            code = [line for line in lines[first - 1 : node.end_lineno] if line.strip()]
            assert len(code) <= 60, f"{node.name} has {len(code)}"


@pytest.mark.parametrize("module", MODULES)
def test_docstrings_name_the_parameters(module: str) -> None:
    """Those of public functions and classes; a class' fields may have docstrings of their own."""
    for node in ast.parse(MODULES[module].read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            said = ast.get_docstring(node) or ""
            missing = [name for name in parameters(node) if f":param {name}:" not in said]
            assert missing == [] or node.name in COMMANDS, f"{node.name}: {missing}"


@pytest.mark.parametrize("module", MODULES)
def test_private_names_stay_in_their_module(module: str) -> None:
    tree = ast.parse(MODULES[module].read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dlp_plugin"):
            for alias in node.names:
                public = not alias.name.startswith("_") or alias.name == "__version__"
                assert public, f"{node.module}.{alias.name}"
    mine = {f"{node.value.id}.{node.attr}" for node in attributes(tree)}
    mine |= {f"self.{node.target.id}" for node in ast.walk(tree) if is_field(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_"):
            known = node.attr.startswith("__") or node.attr in TORCH
            assert known or {f"self.{node.attr}", f"cls.{node.attr}"} & mine, ast.unparse(node)


def parameters(node: ast.FunctionDef | ast.ClassDef) -> Iterator[str]:
    """Names of a function's arguments; of a class those of ``__init__``, or else of its fields."""
    if isinstance(node, ast.FunctionDef):
        args = node.args
        every = [*args.posonlyargs, *args.args, args.vararg, *args.kwonlyargs, args.kwarg]
        yield from (arg.arg for arg in every if arg is not None and arg.arg != "self")
        return
    made = [each for each in node.body if getattr(each, "name", "") == "__init__"]
    if made and isinstance(made[0], ast.FunctionDef):
        yield from parameters(made[0])
        return
    for field, after in zip(node.body, [*node.body[1:], None], strict=True):
        described = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
        if is_field(field) and not described:
            name, kind = ast.unparse(field.target), ast.unparse(field.annotation)
            if not name.startswith("_") and not kind.startswith("ClassVar") and name != HOST_FIELD:
                yield name


def attributes(tree: ast.AST) -> Iterator[ast.Attribute]:
    """Attributes of names, such as ``self._plan``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            yield node


def is_field(node: ast.AST) -> TypeGuard[ast.AnnAssign]:
    return isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
