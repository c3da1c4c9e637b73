"""One run at a time: a second one for the same output is told before it works."""

from __future__ import annotations

import errno
import fcntl
import os
import platform
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from helpers import (
    CALIBRATE,
    EVERY,
    ROOT,
    Logged,
    MakeModel,
    assert_same,
    command,
    prune,
    weights_of,
)

from dlp_plugin import DLPModifier, WandaPruningModifier
from dlp_plugin.files import replacing, reserved

HOLDER = """
import sys, time
from dlp_plugin.files import reserved
with reserved(sys.argv[1]):
    print("has it", flush=True)
    time.sleep(60)
"""
Holds = Callable[[Path], subprocess.Popen]


@pytest.fixture
def held() -> Iterator[Holds]:
    """Have another process reserve something."""
    processes = []

    def hold(target: Path) -> subprocess.Popen:
        words = [sys.executable, "-c", HOLDER, str(target)]
        processes.append(subprocess.Popen(words, stdout=subprocess.PIPE, text=True))
        assert processes[-1].stdout.readline() == "has it\n"
        return processes[-1]

    yield hold
    for process in processes:
        process.kill()
        process.communicate()


def is_free(target: Path) -> bool:
    """As another thread finds it, which is another run as far as locks go."""

    def reserve() -> bool:
        try:
            with reserved(target):
                return True
        except BlockingIOError:
            return False

    with ThreadPoolExecutor() as pool:
        return pool.submit(reserve).result()


class TestAReservation:
    def test_another_run_is_told_whose_it_is(self, tmp_path: Path, held: Holds) -> None:
        process = held(tmp_path / "out")
        whose = rf"process {process.pid} on {platform.node()} since 20\d\d-\d\d-\d\d \d\d:\d\d:"
        message = rf"another run is writing {tmp_path}/out \({whose}.*\): wait for its end, or"
        with pytest.raises(BlockingIOError, match=message), reserved(tmp_path / "out"):
            pytest.fail("it is another's")
        with reserved(tmp_path / "other"):
            pass

    @pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
    def test_it_ends_with_the_process(
        self, tmp_path: Path, held: Holds, number: signal.Signals
    ) -> None:
        process = held(tmp_path / "out")
        process.send_signal(number)
        process.wait(timeout=30)
        assert len(list(tmp_path.iterdir())) == (number == signal.SIGKILL)
        with reserved(tmp_path / "out"):
            pass
        assert list(tmp_path.iterdir()) == []

    def test_it_ends_with_the_work(self, tmp_path: Path) -> None:
        def fail() -> None:
            with reserved(tmp_path / "out"):
                raise KeyError("a reason")

        with pytest.raises(KeyError, match="a reason"):
            fail()
        assert list(tmp_path.iterdir()) == []

    def test_what_has_it_may_ask_again(self, tmp_path: Path) -> None:
        with reserved(tmp_path / "out"):
            with reserved(tmp_path / "out"), replacing(tmp_path / "out") as beside:
                beside.write_text("whole")
            assert not is_free(tmp_path / "out")
        assert is_free(tmp_path / "out")
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    def test_of_several_processes_the_first_has_it(self, tmp_path: Path) -> None:
        with reserved(tmp_path / "out"), reserved(tmp_path / "out", first=False):
            assert not is_free(tmp_path / "out")
        with reserved(tmp_path / "out", first=False):
            assert is_free(tmp_path / "out")

    @pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
    def test_a_file_system_without_locks_stops_nobody(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logged: Logged, number: int
    ) -> None:
        def refuse(*_: object) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(fcntl, "flock", refuse)
        with reserved(tmp_path / "out"):
            assert list(tmp_path.iterdir()) == []
        (warning,) = logged("WARNING")
        assert re.search(rf"/out is not locked \(.*{os.strerror(number)}", warning)


PRUNING = ["--recipe", ROOT / "recipes" / "w4a16.yaml", *CALIBRATE, "--output"]


@pytest.mark.parametrize(
    "words",
    [
        ["oneshot", "./no-model", *PRUNING],
        ["oneshot", "./no-model", "--pack", *PRUNING],
        ["merge", "./no-model"],
        ["pack", "./no-model"],
        ["unpack", "./no-model"],
        ["export-gptq", "./no-model"],
    ],
    ids=lambda words: words[0],
)
def test_two_runs_with_one_output(tmp_path: Path, words: list[object]) -> None:
    """The second is told before its model is looked at, of which there is none."""
    with ThreadPoolExecutor() as pool, reserved(tmp_path / "out"):
        told = pool.submit(command, *words, tmp_path / "out", code=1).result().stderr
    (line,) = [line for line in told.splitlines() if line.startswith("error:")]
    assert line.startswith(f"error: another run is writing {tmp_path}/out (process {os.getpid()} ")
    assert list(tmp_path.iterdir()) == []
    assert "another run" not in command(*words, tmp_path / "out", code=1).stderr


def test_a_search_that_another_run_is_at(
    make_model: MakeModel, tmp_path: Path, held: Holds
) -> None:
    search, plan = tmp_path / "plan.json.search", tmp_path / "plan.json"
    stage = WandaPruningModifier(sparsity=0.5, **EVERY)
    model = make_model()
    before = weights_of(model)
    held(search)
    with pytest.raises(BlockingIOError, match=rf"another run is writing {search} \(process"):
        prune(model, DLPModifier(refine=1, plan_path=str(plan)), stage)
    assert_same(weights_of(model), before)
    assert not plan.exists()
