"""Finds and loads the kernels' C library: from the wheel, or built at first use.

It is loaded by ctypes and does not link against Python or torch, so that one library works with
all versions of both. It starts no threads of its own, but uses those of torch: it is passed the
address of ``GOMP_parallel`` in the OpenMP library that torch uses. The environment variable
``DLP_KERNELS`` selects older instruction sets than the processor has, or turns the kernels off.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
import tempfile
from functools import cache
from pathlib import Path

import torch
from filelock import FileLock

from dlp_plugin.kernels.building import cached_name, compile_to, digest

__all__ = ["VARIABLE", "Weight", "chosen", "library", "missing", "parallel"]

VARIABLE = "DLP_KERNELS"
_OFF = "off"
_PORTABLE = "portable"
_LEVELS = (_PORTABLE, "avx2", "avx512", "avx512bf16")  # indices as in kernels_of() of products.c
_PACKAGED = "_products.so"


class Weight(ctypes.Structure):
    """The C struct ``Weight`` of ``kernels.h``."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "columns", "words")),
        *((name, ctypes.c_void_p) for name in ("mask", "starts", "packed", "scale", "zero")),
        ("groups", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("bits", "dtype")),
    )


def missing() -> str | None:
    """Say why the kernels cannot be used.

    :return: None if they can; otherwise the reason and what to do, in one sentence
    :raises ValueError: if ``DLP_KERNELS`` has an invalid value
    """
    if os.environ.get(VARIABLE) == _OFF:
        return f"the kernels are turned off by {VARIABLE}={_OFF}: unset it"
    level = chosen()
    found = _found()
    if isinstance(found, str):
        return found
    if _LEVELS[level or 0] == _PORTABLE and not os.environ.get(VARIABLE):
        return (
            f"the kernels for this processor ({platform.machine()}) are portable C, which may be "
            f"slower than a dense product: set {VARIABLE}={_PORTABLE} to run them"
        )
    return None


def library() -> ctypes.CDLL:
    """Return the library; call it only if :func:`missing` returns None."""
    found = _found()
    assert not isinstance(found, str)
    return found


def chosen() -> int | None:
    """Return the number of the kernels to use: those of ``DLP_KERNELS``, or the processor's best.

    :return: index as in ``kernels_of()`` of products.c; None if there is no library or it is
        turned off
    :raises ValueError: if ``DLP_KERNELS`` is unknown, or the processor cannot run these kernels
    """
    return _level(os.environ.get(VARIABLE, ""))


@cache
def _level(name: str) -> int | None:
    if name == _OFF or isinstance(_found(), str):
        return None
    best: int = library().dlp_best()
    if not name:
        return best
    if name not in _LEVELS[: best + 1]:
        allowed = ", ".join((*_LEVELS[: best + 1], _OFF))
        raise ValueError(f"{VARIABLE} is {name}, but on this processor it may be one of {allowed}")
    return _LEVELS.index(name)


@cache
def _found() -> ctypes.CDLL | str:
    wanted = digest()
    packaged = _load(Path(__file__).with_name(_PACKAGED), wanted)
    return packaged or _built(wanted)


def _built(wanted: str) -> ctypes.CDLL | str:
    """Load the library from the cache; the first process that needs it builds it there."""
    hint = "set XDG_CACHE_HOME to a folder that can be written, or reinstall with a C compiler"
    try:
        cache_home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(cache_home) / "dlp_plugin"
        folder.mkdir(parents=True, exist_ok=True)
        target = folder / cached_name()
        if not target.exists():
            with FileLock(target.with_suffix(".lock")):
                said = None if target.exists() else _build(target)
            if said:
                return f"the kernels cannot be built: {said}; install a C compiler or ziglang"
    except (OSError, RuntimeError) as error:
        return f"the kernels' folder cannot be written ({error}): {hint}"
    return _load(target, wanted) or f"{target} cannot be loaded: delete it to have it built again"


def _build(target: Path) -> str | None:
    with tempfile.TemporaryDirectory(dir=target.parent) as beside:
        library = Path(beside) / target.name
        said = compile_to(library)
        if said is None:
            os.replace(library, target)
    return said


def _load(path: Path, wanted: str) -> ctypes.CDLL | None:
    """Load a library; None if it is missing, does not run here, or has other sources."""
    if not path.exists():
        return None
    try:
        found = ctypes.CDLL(str(path))
        made_of = found.dlp_digest
    except (OSError, AttributeError):
        return None
    made_of.restype = ctypes.c_char_p
    if made_of().decode() != wanted:
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    found.dlp_multiply.argtypes = [
        *(ctypes.POINTER(Weight), ctypes.c_int, pointer, number, ctypes.c_int),
        *(pointer, pointer, ctypes.c_int, pointer),
    ]
    found.dlp_expand.argtypes = [
        *(ctypes.POINTER(Weight), ctypes.c_int, number, number, ctypes.c_int),
        *(pointer, ctypes.c_int, pointer),
    ]
    return found


@cache
def parallel() -> int | None:
    """Return the address of the ``GOMP_parallel`` that torch calls.

    :return: None if there is none; then the kernels use one thread
    """
    suffix = "dylib" if sys.platform == "darwin" else "so"
    # Search as the dynamic linker does: global symbols first, then torch's own libraries. So the
    # result is the one that torch calls, even if a second OpenMP is loaded or preloaded.
    for path in (None, Path(torch.__file__).parent / "lib" / f"libtorch_cpu.{suffix}"):
        try:
            found = ctypes.CDLL(None if path is None else str(path)).GOMP_parallel
        except (OSError, AttributeError):
            continue
        return ctypes.cast(found, ctypes.c_void_p).value
    return None
