"""Writing whole files and folders or nothing."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["check_vacant", "replacing"]


def check_vacant(folder: str | Path) -> None:
    """Make sure before long work that :func:`replacing` may put a folder here.

    :raises FileExistsError: if there is a file, or a folder that is not empty
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not an empty folder; give a new one")


@contextmanager
def replacing(target: str | Path) -> Iterator[Path]:
    """Give a path beside ``target`` to write to; rename it on success.

    If the body fails or the process dies, ``target`` stays as it was; what a killed
    process left beside it is cleared away by the next. A folder takes the place of an
    empty or missing one only.

    :param target: file or folder to be written; its parent must exist
    :raises FileNotFoundError: if the parent folder does not exist
    """
    target = Path(target).resolve()
    if not target.parent.is_dir():
        raise FileNotFoundError(
            f"cannot write {target}: the folder {target.parent} does not exist; create it first"
        )
    _remove_what_killed_runs_left(target)
    beside = _beside(target, os.getpid())
    try:
        yield beside
        os.replace(beside, target)
    finally:
        _remove(beside)


def _beside(target: Path, process: int | str) -> Path:
    # The suffix stays last: plotting libraries choose the format by it.
    name = f".{target.stem}.{platform.node()}-{process}.part{target.suffix}"
    return target.with_name(name)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _remove_what_killed_runs_left(target: Path) -> None:
    """Clear away parts for ``target`` whose process, on this machine, is no more."""
    before, after = _beside(target, "*").name.split("*")
    for path in target.parent.iterdir():
        process = path.name.removeprefix(before).removesuffix(after)
        if path.name == before + process + after and process.isdigit():
            try:
                os.kill(int(process), 0)
            except ProcessLookupError:
                _remove(path)
            except PermissionError:
                pass  # it lives, as another user's
