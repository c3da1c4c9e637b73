"""``tests/run``: which environment it takes, what it installs there, and what it has pytest do.

The script is the real one; the interpreters of its environments write down what they are asked.
"""

import shutil
import subprocess
from pathlib import Path

import pytest
from helpers import ROOT

PROJECT = "-m pip install -q -e .[test]"
PYTEST = "-m pytest -n 2 --dist loadfile"
NEWEST = "--upgrade --pre llmcompressor compressed-tensors"


@pytest.mark.parametrize(
    ("arguments", "environment", "asked"),
    [
        ([], ".venv", [PROJECT, PYTEST]),
        (["-k", "a or b"], ".venv", [PROJECT, f"{PYTEST} -k a or b"]),
        (["--engines", "-x"], ".venv", [PROJECT, f"{PYTEST} -m  -x"]),
        (
            ["-x", "--next-host"],
            ".venv-next-host",
            [PROJECT, f"-m pip install -q --no-warn-conflicts {NEWEST}", f"{PYTEST} -x"],
        ),
    ],
    ids=["default", "less of it", "engines", "next host"],
)
def test_arguments(
    tmp_path: Path, arguments: list[str], environment: str, asked: list[str]
) -> None:
    (tmp_path / "tests").mkdir()
    shutil.copy(ROOT / "tests" / "run", tmp_path / "tests")
    for name in (".venv", ".venv-next-host"):
        python = tmp_path / name / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text(f'#!/bin/sh\necho "{name} $*" >> {tmp_path}/asked\n')
        python.chmod(0o755)
    subprocess.run(["bash", tmp_path / "tests" / "run", *arguments], check=True)
    found = (tmp_path / "asked").read_text().splitlines()
    assert found == [f"{environment} {line}" for line in asked]
