"""Compiles the kernels when a wheel is built, or once at first use.

It imports nothing but the standard library, because it runs during the build too.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path

__all__ = ["FLAGS", "cached_name", "compile_to", "digest", "sources"]

FLAGS = ("-std=gnu11", "-O3", "-fPIC", "-fvisibility=hidden")
"""Compiler flags. They name no instruction set: the kernels for the CPU are chosen at run time."""
_PATIENCE = 120  # seconds for a compiler


def sources() -> list[Path]:
    """List the C files, without their headers."""
    return sorted(Path(__file__).parent.glob("*.c"))


def digest() -> str:
    """Hash the C sources and compiler flags, to recognize a library that was built from them."""
    files = sorted(Path(__file__).parent.glob("*.[ch]"))
    text = b"".join(path.name.encode() + path.read_bytes() for path in files)
    return sha256(text + " ".join(FLAGS).encode()).hexdigest()[:16]


def cached_name() -> str:
    """Return the library's file name in the cache, unique per version, system and architecture."""
    return f"kernels-{digest()}-{platform.system()}-{platform.machine()}.so"


def compile_to(target: Path) -> str | None:
    """Compile the library with the first compiler that succeeds.

    :param target: file to write
    :return: None on success, otherwise what went wrong in a few words
    """
    said = "there is no C compiler"
    for compiler in _compilers():
        define = f'-DDLP_DIGEST="{digest()}"'
        command = [*compiler, *FLAGS, define, "-shared", *map(str, sources()), "-o", str(target)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE)
        except (OSError, subprocess.TimeoutExpired) as error:
            said = f"{compiler[0]} fails ({error})"
            continue
        if done.returncode == 0:
            return None
        lines = [line for line in done.stderr.splitlines() if "error" in line] or ["no message"]
        said = f"{compiler[0]} fails ({lines[0].strip()})"
    return said


def _compilers() -> Iterator[list[str]]:
    """Yield the commands of the system's compilers, then that of the package ``ziglang``."""
    for name in ("cc", "gcc", "clang"):
        path = shutil.which(name)
        if path:
            yield [path]
    if find_spec("ziglang"):
        yield [sys.executable, "-m", "ziglang", "cc"]
