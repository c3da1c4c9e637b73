"""``import dlp_plugin`` is light, and recipes know the modifiers whatever is imported first."""

import subprocess
import sys
from ast import literal_eval
from importlib.metadata import version

import pytest

import dlp_plugin

FIRST = [
    "import dlp_plugin, llmcompressor",
    "import llmcompressor, dlp_plugin",
    "from dlp_plugin.modifiers.methods import OWLModifier",
    "from dlp_plugin.pruning import calibrated",
    "import dlp_plugin; from llmcompressor.modifiers.pruning import WandaPruningModifier",
]
KNOWN = """
from llmcompressor.recipe import Recipe
text = "s_stage: {p_modifiers: {OWLModifier: {}, WandaPruningModifier: {sparsity: 0.5}}}"
modules = [type(modifier).__module__ for modifier in Recipe.create_instance(text).modifiers]
print((first, modules), flush=True)
"""
# Each in a process of its own, forked from one that has imported what takes seconds
EACH = f"""
import os, torch, compressed_tensors, transformers.modeling_utils
for first in {FIRST}:
    if os.fork() == 0:
        exec(first + {KNOWN!r})
        os._exit(0)
    os.wait()
"""


def python(code: str) -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_the_import_loads_neither_torch_nor_the_host() -> None:
    code = "import sys, dlp_plugin; print({'torch', 'llmcompressor'} & set(sys.modules))"
    assert python(code).strip() == "set()"


@pytest.fixture(scope="module")
def known() -> dict[str, list[str]]:
    found = (line for line in python(EACH).splitlines() if line.startswith("("))  # not a log's
    return dict(map(literal_eval, found))


@pytest.mark.parametrize("first", FIRST)
def test_recipes_know_the_modifiers(known: dict[str, list[str]], first: str) -> None:
    assert known[first] == ["dlp_plugin.modifiers.methods", "dlp_plugin.pruning.calibrated"]


def test_it_can_be_imported_without_the_host() -> None:
    code = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "llmcompressor":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
import dlp_plugin
print(dlp_plugin.Plan.__name__)
"""
    assert python(code).strip() == "Plan"


def test_every_name_is_there() -> None:
    for name in dlp_plugin.__all__:
        assert name in dir(dlp_plugin)
        if name != "__version__":
            assert getattr(dlp_plugin, name).__name__ == name
    assert dlp_plugin.__version__ == version("dlp_plugin")
    with pytest.raises(AttributeError, match="'dlp_plugin' has no attribute 'NoModifier'"):
        _ = dlp_plugin.NoModifier
