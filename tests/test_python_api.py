"""The page of the Python API: its names exist, and its script runs."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

import pytest
from helpers import ROOT, SHIPPED, TEST_TEXT

import dlp_plugin

PAGE = (ROOT / "dlp_plugin" / "python_api.md").read_text()


def test_every_public_name_is_on_the_page() -> None:
    assert [name for name in dlp_plugin.__all__ if not re.search(rf"`{name}\b", PAGE)] == []


@pytest.mark.parametrize("name", re.findall(r"^\| `(dlp_plugin\.[\w.]+)`", PAGE, re.M))
def test_every_function_is_public_in_its_module(name: str) -> None:
    module, _, function = name.rpartition(".")
    found = import_module(module)
    assert function in found.__all__
    assert getattr(found, function).__doc__


def test_the_script_prunes_and_measures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text(TEST_TEXT.read_text()[:3_000])
    monkeypatch.chdir(tmp_path)
    (script,) = (code for code in re.findall(r"```python\n(.*?)```", PAGE, re.S) if "MODEL" in code)
    script = script.replace(
        '"my/model", "train.txt", "test.txt", 2048', f'"{SHIPPED}", "text.txt", "text.txt", 32'
    )
    script = script.replace("recipes/", f"{ROOT}/recipes/")
    exec(compile(script, "python_api.md", "exec", dont_inherit=True), {})
    assert 1 < float(capsys.readouterr().out.splitlines()[-1]) < 1000
    assert (tmp_path / "my_pruned" / "recipe.yaml").exists()
