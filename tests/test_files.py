"""Whole files or nothing, and told before the work if it will be nothing."""

import errno
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from helpers import deny_writing, word_tokenizer
from safetensors.torch import save_file

from dlp_plugin.files import check_vacant, check_writable, replacing

WRITER = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's job may ignore it
from dlp_plugin.files import replacing
with replacing(sys.argv[1]) as outer, replacing(sys.argv[1] + "-too") as beside:
    outer.write_text("half")
    beside.mkdir()
    (beside / "part").write_text("half")
    print("writing", flush=True)
    time.sleep(60)
"""

# A second SIGTERM comes while the first is being obeyed.
TOLD_TWICE = """
import shutil, signal, sys
from dlp_plugin.files import replacing
remove = shutil.rmtree
def told_again(path):
    signal.raise_signal(signal.SIGTERM)
    remove(path)
shutil.rmtree = told_again
with replacing(sys.argv[1]) as beside:
    beside.mkdir()
    signal.raise_signal(signal.SIGTERM)
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, None)])
def test_a_process_that_is_told_to_end_leaves_nothing(
    tmp_path: Path, number: signal.Signals, code: int | None
) -> None:
    command = [sys.executable, "-c", WRITER, str(tmp_path / "file")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "writing\n"
    process.send_signal(number)
    process.communicate(timeout=30)
    assert list(tmp_path.iterdir()) == []
    assert process.returncode == code or code is None


def test_a_process_that_is_told_twice_leaves_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-c", TOLD_TWICE, str(tmp_path / "folder")]
    assert subprocess.run(command, timeout=30).returncode == 143
    assert list(tmp_path.iterdir()) == []


def test_a_handler_of_somebody_else_stays(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with replacing(tmp_path / "file") as beside:
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
            beside.write_text("whole")
    finally:
        signal.signal(signal.SIGTERM, before)
    with replacing(tmp_path / "file") as beside:
        beside.write_text("whole again")
    assert signal.getsignal(signal.SIGTERM) is before
    assert (tmp_path / "file").read_text() == "whole again"


def test_a_handler_that_somebody_installs_meanwhile_stays(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    try:
        with replacing(tmp_path / "file") as beside:
            assert signal.getsignal(signal.SIGTERM) is not before
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            beside.write_text("whole")
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


def test_other_threads_write_without_a_handler(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)

    def write() -> None:
        with replacing(tmp_path / "file") as beside:
            assert signal.getsignal(signal.SIGTERM) is before
            beside.write_text("whole")

    with ThreadPoolExecutor() as pool:
        pool.submit(write).result()
    assert (tmp_path / "file").read_text() == "whole"


def test_a_full_disk(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("as it was")

    def write() -> None:
        with replacing(tmp_path / "file") as beside:
            beside.write_text("half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match=r"cannot write .*file: No space left on device"):
        write()
    assert [file.read_text() for file in tmp_path.iterdir()] == ["as it was"]


@pytest.mark.parametrize(
    "writer",
    [
        lambda path: path.write_text("x" * 5000),
        lambda path: save_file({"a": torch.ones(40, 40)}, path),
        lambda path: word_tokenizer().backend_tokenizer.save(str(path)),
    ],
    ids=["Python", "safetensors", "tokenizers"],
)
def test_no_room_for_what_a_library_writes(
    tmp_path: Path, writer: Callable[[Path], object]
) -> None:
    """Not every writer raises an OSError; a limit to a file's size stands for a full disk."""

    def write() -> None:
        with replacing(tmp_path / "file") as beside:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
            writer(beside)

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(OSError, match=r"cannot write .*/file: File too large; make room, or"):
            write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [PermissionError(errno.EACCES, "a reason"), KeyError("a reason")])
def test_a_failure_of_another_kind_is_told_as_it_is(tmp_path: Path, error: Exception) -> None:
    def write() -> None:
        with replacing(tmp_path / "file") as beside:
            beside.write_text("half")
            raise error

    with pytest.raises(type(error), match="a reason") as caught:
        write()
    assert caught.value is error
    assert list(tmp_path.iterdir()) == []


class TestWhatIsInTheWay:
    def test_a_folder_that_is_not_empty(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("as it was")
        message = r"is not an empty folder; give a new one"
        with pytest.raises(FileExistsError, match=message), replacing(tmp_path):
            pytest.fail("it is told before anything is written")
        assert (tmp_path / "file").read_text() == "as it was"

    def test_a_folder_that_another_run_has_filled_meanwhile(self, tmp_path: Path) -> None:
        def write() -> None:
            with replacing(tmp_path / "folder") as beside:
                beside.mkdir()
                (tmp_path / "folder").mkdir()
                (tmp_path / "folder" / "theirs").write_text("whole")

        with pytest.raises(FileExistsError, match=r"cannot write .*/folder: something else is"):
            write()
        assert [path.name for path in tmp_path.iterdir()] == ["folder"]
        assert (tmp_path / "folder" / "theirs").read_text() == "whole"

    @pytest.mark.parametrize("folder", [True, False])
    def test_what_is_of_another_kind(self, tmp_path: Path, folder: bool) -> None:
        target = tmp_path / "target"
        target.write_text("theirs") if folder else target.mkdir()

        def write() -> None:
            with replacing(target) as beside:
                beside.mkdir() if folder else beside.write_text("ours")

        with pytest.raises(FileExistsError, match=r"something else is there .*give a new one"):
            write()
        assert list(tmp_path.iterdir()) == [target]


class TestBeforeTheWork:
    def test_a_folder_that_does_not_exist(self, tmp_path: Path) -> None:
        for check in (check_writable, check_vacant):
            with pytest.raises(FileNotFoundError, match=r"gone does not exist; create it first"):
                check(tmp_path / "gone" / "file")

    def test_a_file_in_place_of_the_folder(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(FileNotFoundError, match=r"the folder .*file is a file"):
            check_writable(tmp_path / "file" / "plan.json")

    def test_a_folder_in_place_of_the_file(self, tmp_path: Path) -> None:
        with pytest.raises(IsADirectoryError, match=r"is a folder; name a file in it"):
            check_writable(tmp_path)

    def test_a_name_that_cannot_be_made(self, tmp_path: Path) -> None:
        for check in (check_vacant, check_writable):
            with pytest.raises(OSError, match=r"cannot write .*: file name too long in"):
                check(tmp_path / ("long" * 63))
        assert list(tmp_path.iterdir()) == []

    def test_a_folder_without_permission(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        deny_writing(monkeypatch)
        with pytest.raises(PermissionError, match=r"no permission in .*; choose another folder"):
            check_writable(tmp_path / "file")

    def test_a_folder_that_none_can_take_the_place_of(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A model would be written, and lost as it is renamed."""
        message = "is the current folder or a mount point.*; name a folder in it"
        with monkeypatch.context() as inside:
            inside.chdir(tmp_path)
            for folder in (".", tmp_path):
                with pytest.raises(FileExistsError, match=message):
                    check_vacant(folder)
        check_vacant(tmp_path)
        monkeypatch.setattr(Path, "is_mount", lambda _: True)
        with pytest.raises(FileExistsError, match=message):
            check_vacant(tmp_path)

    def test_what_can_be_written_may_be_there_already(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        check_writable(tmp_path / "file")
        check_writable(tmp_path / "new")
        check_vacant(tmp_path / "new")
