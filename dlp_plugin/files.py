"""Writing whole files and folders or nothing."""

from __future__ import annotations

import os
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

    If the body fails or the process dies, ``target`` stays as it was. A folder takes
    the place of an empty or missing one only.

    :param target: file or folder to be written; its parent must exist
    :raises FileNotFoundError: if the parent folder does not exist
    """
    target = Path(target).resolve()
    if not target.parent.is_dir():
        raise FileNotFoundError(
            f"cannot write {target}: the folder {target.parent} does not exist; create it first"
        )
    # The suffix stays last: plotting libraries choose the format by it.
    beside = target.with_name(f".{target.stem}.{os.getpid()}.part{target.suffix}")
    try:
        yield beside
        os.replace(beside, target)
    finally:
        if beside.is_dir():
            shutil.rmtree(beside)
        else:
            beside.unlink(missing_ok=True)
