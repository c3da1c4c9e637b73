"""Writing whole files and folders or nothing, and one run at a time."""

from __future__ import annotations

import errno
import os
import platform
import re
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from types import FrameType

from filelock import FileLock, Timeout
from loguru import logger

__all__ = ["check_vacant", "check_writable", "exit_on_sigterm", "replacing", "reserved"]

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_IN_THE_WAY = (errno.EEXIST, errno.ENOTEMPTY, errno.EISDIR, errno.ENOTDIR)
# Seconds to wait for a run that is just ending.
_PATIENCE = 0.5


def check_vacant(folder: str | Path) -> None:
    """Make sure before long work that :func:`replacing` may put a folder here.

    :param folder: to be written later
    :raises FileExistsError: if there is a file, or a folder that is not empty or that none can
        take the place of
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not an empty folder; give a new one")
    if folder.is_dir() and (folder.is_mount() or folder.samefile(os.curdir)):
        raise FileExistsError(
            f"{folder} is the current folder or a mount point, which cannot be replaced; name a "
            "folder in it"
        )
    _check_parent(folder)


def check_writable(file: str | Path) -> None:
    """Make sure before long work that :func:`replacing` may put a file here.

    :param file: to be written later
    :raises IsADirectoryError: if it is a folder
    :raises OSError: if its folder does not exist or cannot be written to
    """
    if Path(file).is_dir():
        raise IsADirectoryError(f"{file} is a folder; name a file in it")
    _check_parent(Path(file))


def _check_parent(path: Path) -> None:
    parent = path.resolve().parent
    if not parent.is_dir():
        what = "is a file" if parent.exists() else "does not exist; create it first"
        raise FileNotFoundError(f"cannot write {path}: the folder {parent} {what}")
    trial = _beside(path.resolve(), os.getpid())
    try:
        trial.mkdir()
    except FileExistsError:  # it is being written
        return
    except OSError as error:
        denied = error.errno in (errno.EACCES, errno.EPERM)
        reason = "no permission" if denied else os.strerror(error.errno or 0).lower()
        raise type(error)(
            f"cannot write {path}: {reason} in {parent}; choose another folder or name"
        ) from None
    trial.rmdir()


@contextmanager
def reserved(target: str | Path, first: bool = True) -> Iterator[None]:
    """Keep other runs from writing a file or folder, from before the work until it is done.

    The system lets go of it when the process ends, however that ends; meanwhile a file beside
    ``target`` says whose it is. Where a file system has no locks, a warning says so and the
    work goes on.

    :param target: file or folder; its parent must exist
    :param first: whether this is the first of several processes, which holds it for all
    :raises OSError: if the parent does not exist or cannot be written to
    :raises BlockingIOError: if another run has it, naming that run
    """
    target = Path(target).resolve()
    _check_parent(target)
    path = target.with_name(f".{target.name}.lock")
    # Soft locks outlive a process that is killed.
    lock = FileLock(path, timeout=_PATIENCE, is_singleton=True, fallback_to_soft=False)
    if lock.is_locked or not first:  # what calls this has it already
        yield
        return
    with exit_on_sigterm():
        try:
            _acquire(lock, target)
            yield
        finally:
            if lock.is_locked:
                with suppress(OSError):
                    path.unlink()  # while nobody else can have it
                lock.release()


def _acquire(lock: FileLock, target: Path) -> None:
    path = Path(lock.lock_file)
    try:
        lock.acquire()
    except Timeout:
        holder = ""
        with suppress(OSError):
            holder = path.read_text()
        raise BlockingIOError(
            f"another run is writing {target} ({holder or 'it does not say which'}): wait for its "
            "end, or give another name"
        ) from None
    except OSError as error:
        logger.warning("{} is not locked ({}): let no other run write it", target, error)
        with suppress(OSError):
            if not path.read_text():  # made just now
                path.unlink()
    else:
        now = datetime.now().astimezone().isoformat(" ", "seconds")
        with suppress(OSError):
            path.write_text(f"process {os.getpid()} on {platform.node()} since {now}")


@contextmanager
def replacing(target: str | Path) -> Iterator[Path]:
    """Give a path beside ``target`` to write to; rename it on success.

    If the body fails or the process is told to end (SIGTERM), ``target`` stays as it was and
    nothing lies beside it; what a killed process left there is cleared away by the next. A
    folder takes the place of an empty or missing one only.

    :param target: file or folder to be written; its parent must exist
    :raises FileNotFoundError: if the parent folder does not exist
    :raises FileExistsError: before the body if ``target`` is a folder that is not empty, and
        after it if another run has put something there meanwhile that cannot be replaced
    :raises OSError: naming ``target``, if the disk or a quota is full
    """
    target = Path(target).resolve()
    _check_parent(target)
    if target.is_dir():
        check_vacant(target)
    _remove_what_killed_runs_left(target)
    beside = _beside(target, os.getpid())
    with exit_on_sigterm():
        try:
            yield beside
            _move(beside, target)
        except Exception as error:
            number = _errno(error)
            if number not in _NO_ROOM:
                raise
            reason = os.strerror(number)
            raise OSError(
                number, f"cannot write {target}: {reason}; make room, or write elsewhere"
            ) from error
        finally:
            _remove(beside)


def _errno(error: Exception) -> int:
    """Number of a system's error; 0 for others. Writers in Rust tell it in words only."""
    if isinstance(error, OSError):
        return error.errno or 0
    told = re.search(r"\(os error (\d+)\)", str(error))
    return int(told[1]) if told else 0


def _move(beside: Path, target: Path) -> None:
    try:
        os.replace(beside, target)
    except OSError as error:
        if error.errno not in _IN_THE_WAY:
            raise
        raise FileExistsError(
            f"cannot write {target}: something else is there by now, perhaps of another run; "
            "give a new one"
        ) from error


@contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """Have SIGTERM unwind the stack, as SIGINT does, where nobody else has taken it."""
    mine = threading.current_thread() is threading.main_thread()
    if not mine or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    leaving = False

    def leave(number: int, _frame: FrameType | None) -> None:
        nonlocal leaving
        if not leaving:  # a second one must not stop the clearing away
            leaving = True
            sys.exit(128 + number)

    signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGTERM) is leave:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


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
