"""Whole files or nothing, and told before the work if it will be nothing."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dlp_plugin.files import check_vacant, check_writable, replacing

WRITER = """
import sys, time
from dlp_plugin.files import replacing
with replacing(sys.argv[1]) as outer, replacing(sys.argv[1] + "-too") as beside:
    outer.write_text("half")
    beside.mkdir()
    (beside / "part").write_text("half")
    print("writing", flush=True)
    time.sleep(60)
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


def test_a_full_disk(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("as it was")

    def write() -> None:
        with replacing(tmp_path / "file") as beside:
            beside.write_text("half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match=r"cannot write .*file: No space left on device"):
        write()
    assert [file.read_text() for file in tmp_path.iterdir()] == ["as it was"]


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

    def test_a_folder_without_permission(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
        with pytest.raises(PermissionError, match=r"no permission in .*; choose another folder"):
            check_writable(tmp_path / "file")

    def test_what_can_be_written_may_be_there_already(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        check_writable(tmp_path / "file")
        check_writable(tmp_path / "new")
        check_vacant(tmp_path / "new")
