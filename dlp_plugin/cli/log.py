"""Sets up what the terminal shows during work: the package's own steps, and each warning once."""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

from loguru import logger

if TYPE_CHECKING:
    from loguru import Message

__all__ = ["show_log"]

_WARNING = 30
# Modules that log a line per block, Linear or folder, which only --verbose shows.
_QUIET = (
    "checkpoints.packing",
    "modifiers.scoring_pass",
    "pruning.admm",
    "pruning.magnitude",
    "pruning.reconstruction",
)
# Which messages llm-compressor logs, until this package's log takes its place
_LEVEL = "LLM_COMPRESSOR_LOG_LEVEL"
# tqdm's settings: on a terminal bars vanish when they are full; in a file there are none.
_BARS = {True: ("TQDM_LEAVE", ""), False: ("TQDM_DISABLE", "1")}


def show_log(verbose: bool = False, host: bool = True) -> None:
    """Log the package's own steps and the warnings of all packages, each once, to stderr.

    Warnings that other packages give in every run are left out.
    Progress bars of other packages vanish when they are full; if stderr is a file there are none.
    Call this before tqdm is imported, and torch imports tqdm.

    :param verbose: show all lines and bars of llm-compressor and other packages
    :param host: whether llm-compressor will be needed; it is imported first, because the import
        sets up a log of its own
    """
    if not verbose:
        os.environ.setdefault(*_BARS[sys.stderr.isatty()])
        # Warnings of every run, that ask for nothing
        warnings.filterwarnings("ignore", "Attempting to save a model with offloaded modules")
        logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)
        logging.captureWarnings(True)
        logging.getLogger("py.warnings").handlers = [_Warnings()]
    if host:
        with _quiet_import() if not verbose else nullcontext():
            import llmcompressor  # noqa: F401

        for module in ("metric_logging", "dev"):
            (logger.enable if verbose else logger.disable)(f"llmcompressor.utils.{module}")
    first = os.environ.get("RANK", "0") == "0"  # of several processes
    levels: dict[str | None, str | int | bool] = {
        "": "INFO" if verbose else "WARNING",
        "dlp_plugin": "INFO" if first else "WARNING",
    }
    if not verbose:
        levels |= {f"dlp_plugin.{module}": "WARNING" for module in _QUIET}
        levels["llmcompressor.entrypoints.oneshot"] = "ERROR"  # warns of what it sets in every run
    logger.remove()
    logger.add(_Printer(repeats=verbose), level=0, format="{level}: {message}", filter=levels)


@contextmanager
def _quiet_import() -> Iterator[None]:
    """Have llm-compressor's import log errors only: it warns where there is no accelerator."""
    before = os.environ.get(_LEVEL)
    os.environ.setdefault(_LEVEL, "ERROR")
    yield
    if before is None:
        del os.environ[_LEVEL]  # processes that this one starts log as they would alone


class _Printer:
    """Prints log messages, and each warning only once.

    :param repeats: whether to print repeated warnings too
    """

    def __init__(self, repeats: bool) -> None:
        self._repeats = repeats
        self._said: set[str] = set()

    def __call__(self, message: Message) -> None:
        again = str(message) in self._said and message.record["level"].no == _WARNING
        if self._repeats or not again:
            self._said.add(str(message))
            sys.stderr.write(message)


class _Warnings(logging.Handler):
    """Logs Python's warnings, without the line of code that they quote."""

    def emit(self, record: logging.LogRecord) -> None:
        """Log the text of the warning."""
        text = re.sub(r"\A.*:\d+: (?=\w+: )", "", record.getMessage())
        logger.warning(text.rpartition("\n  ")[0] or text.strip())
