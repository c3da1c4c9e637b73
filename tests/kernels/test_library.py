"""The library in C: packaged, built at first use, or missing with a word on what to do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT
from packed_weights import packed

from dlp_plugin.kernels.building import cached_name, digest
from dlp_plugin.kernels.layout import dense, layout_of
from dlp_plugin.kernels.library import chosen, missing, parallel
from dlp_plugin.kernels.products import available, linear

SAY = "from dlp_plugin.kernels.products import available; print(available())"

# As engines do it, beside which neither the host nor its packages are.
PRODUCT = """
import sys
import torch
from dlp_plugin.checkpoints.sparse_format import encode
from dlp_plugin.kernels.layout import layout_of
from dlp_plugin.kernels.products import available, linear

x = torch.randn(3, 64)
assert torch.equal(linear(x, layout_of(*encode(torch.eye(64)))), x)
others = {"llmcompressor", "compressed_tensors", "transformers", "safetensors", "loguru"}
assert not others & set(sys.modules)
print(available())
"""


# An engine may bring an OpenMP of its own, as vLLM does.
TWO = """
import ctypes, shutil
from pathlib import Path
import torch
from dlp_plugin.kernels.library import parallel

(own,) = (Path(torch.__file__).parent / "lib").glob("libgomp*")
shutil.copy(own, "other.so")
ctypes.CDLL("./other.so", mode=ctypes.RTLD_GLOBAL)
found = ctypes.cast(ctypes.CDLL(str(own)).GOMP_parallel, ctypes.c_void_p).value
print(parallel() == found)
"""


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """The package without a library, in a folder of its own."""
    folder = tmp_path / "package"
    (folder / "dlp_plugin").parent.mkdir()
    subprocess.run(["cp", "-R", ROOT / "dlp_plugin", folder], check=True)
    (folder / "dlp_plugin" / "kernels" / "_products.so").unlink(missing_ok=True)
    return folder


def say(package: Path, code: str = SAY, **variables: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(package), **variables}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=package, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_it_is_built_once_at_first_use_or_done_without(package: Path) -> None:
    if missing():
        pytest.skip("there is no C compiler")
    cache = package / "cache"
    several = [
        subprocess.Popen(
            [sys.executable, "-c", SAY],
            env={**os.environ, "PYTHONPATH": str(package), "XDG_CACHE_HOME": str(cache)},
            cwd=package,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    assert [one.communicate()[0].strip() for one in several] == ["None", "None"]
    built = cache / "dlp_plugin" / cached_name()
    assert {path.name for path in built.parent.iterdir()} >= {built.name}
    before = built.stat().st_mtime_ns
    # Then without a compiler, too
    assert say(package, XDG_CACHE_HOME=str(cache), PATH="/nowhere") == "None"
    assert built.stat().st_mtime_ns == before
    # A library of other sources is not taken, wherever it is; and products are right without one
    source = package / "dlp_plugin" / "kernels" / "portable.c"
    built.rename(source.with_name("_products.so"))
    source.write_text(source.read_text() + "/* another */\n")
    said = say(package, PRODUCT, XDG_CACHE_HOME=str(package / "empty"), PATH="/nowhere")
    assert said.startswith("the kernels cannot be built: there is no C compiler; install")


def test_a_compiler_that_fails(package: Path) -> None:
    compiler = package / "bin" / "cc"
    compiler.parent.mkdir()
    compiler.write_text("#!/bin/sh\necho 'x.c:1: error: unknown target' >&2; exit 1\n")
    compiler.chmod(0o755)
    cache = package / "cache"
    said = say(package, XDG_CACHE_HOME=str(cache), PATH=str(compiler.parent))
    assert said == (
        f"the kernels cannot be built: {compiler} fails (x.c:1: error: unknown target); install a "
        "C compiler or ziglang"
    )
    assert not list(cache.rglob("*.so"))
    assert not [path for path in (cache / "dlp_plugin").iterdir() if path.is_dir()]


def test_a_cache_that_cannot_be_written(package: Path) -> None:
    (package / "file").write_text("")
    said = say(package, XDG_CACHE_HOME=str(package / "file"))
    assert said.startswith("the kernels' folder cannot be written (")
    assert said.endswith(
        "set XDG_CACHE_HOME to a folder that can be written, or reinstall with a C compiler"
    )


def test_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DLP_KERNELS", "off")
    assert available() == "the kernels are turned off by DLP_KERNELS=off: unset it"
    layout = layout_of(*packed(torch.float32, (4, 9)))
    assert torch.equal(linear(torch.eye(9), layout), dense(layout).T)


@pytest.mark.skipif(missing() is not None, reason="there is no library")
def test_it_is_held_to_less_than_the_processor_has(monkeypatch: pytest.MonkeyPatch) -> None:
    best = chosen()
    monkeypatch.setenv("DLP_KERNELS", "portable")
    assert available() is None
    assert chosen() == 0
    assert best >= 0
    monkeypatch.setenv("DLP_KERNELS", "sse")
    with pytest.raises(ValueError, match=r"^DLP_KERNELS is sse, but on this processor it may be"):
        available()


def test_what_is_slower_than_a_dense_product_runs_where_it_is_asked_for(package: Path) -> None:
    """As on a processor that has portable C only: a model is then loaded dense."""
    for source in (package / "dlp_plugin" / "kernels").glob("*.[ch]"):
        source.write_text(source.read_text().replace("__x86_64__", "__another__"))
    cache = {"XDG_CACHE_HOME": str(package / "cache")}
    said = say(package, **cache)
    if said.startswith("the kernels cannot be built"):
        pytest.skip("there is no C compiler")
    assert said.startswith("the kernels for this processor (")
    assert said.endswith("slower than a dense product: set DLP_KERNELS=portable to run them")
    assert say(package, **cache, DLP_KERNELS="portable") == "None"


@pytest.mark.skipif(sys.platform != "linux" or missing() is not None, reason="as torch is there")
def test_the_threads_are_those_of_torch() -> None:
    """No second OpenMP is loaded: what torch links with is what the library is given."""
    address = parallel()
    assert address
    with open("/proc/self/maps") as maps:
        lines = [line.split() for line in maps]
    for first, last, path in (
        (*(int(end, 16) for end in line[0].split("-")), line[-1]) for line in lines
    ):
        if first <= address < last:
            assert Path(path).parent == Path(torch.__file__).parent / "lib"
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        layout = layout_of(*packed(torch.float32, (600, 64)))
        number = len(os.listdir("/proc/self/task"))
        torch.ones(1000, 1000).sum()
        linear(torch.ones(1, 64), layout)
        assert len(os.listdir("/proc/self/task")) <= number + 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(sys.platform != "linux" or missing() is not None, reason="as torch is there")
def test_the_threads_are_those_of_torch_where_there_is_another_openmp(package: Path) -> None:
    assert say(package, TWO) == "True"


def test_the_digest_is_of_every_source(package: Path) -> None:
    code = "from dlp_plugin.kernels.building import digest; print(digest())"
    assert say(package, code) == digest()
    header = package / "dlp_plugin" / "kernels" / "kernels.h"
    header.write_text(header.read_text() + "\n")
    assert say(package, code) != digest()
