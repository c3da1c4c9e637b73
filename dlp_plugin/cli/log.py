"""What the terminal shows while it works: our own steps, and each warning once."""

from __future__ import annotations

import logging
import os
import re
import sys
from typing import TYPE_CHECKING

from loguru import logger

if TYPE_CHECKING:
    from loguru import Message

__all__ = ["show_log"]

_WARNING = 30
# What these say of every block, Linear or folder is for --verbose.
_QUIET = (
    "checkpoints.packing",
    "modifiers.scoring_pass",
    "pruning.admm",
    "pruning.magnitude",
    "pruning.reconstruction",
)
# On a terminal tqdm's bars vanish when they are full; in a file there are none.
_BARS = {True: ("TQDM_LEAVE", ""), False: ("TQDM_DISABLE", "1")}


def show_log(verbose: bool = False, host: bool = True) -> None:
    """Log to stderr: our own steps, and the warnings of all packages, each once.

    Progress bars of other packages vanish when they are full. Where stderr is a file there are
    none. Both need tqdm not to be imported yet, and importing torch imports it.

    :param verbose: show all lines and bars of llm-compressor and other packages
    :param host: whether llm-compressor will be needed; importing it sets up a log of its own
    """
    if not verbose:
        os.environ.setdefault(*_BARS[sys.stderr.isatty()])
        logging.captureWarnings(True)
        logging.getLogger("py.warnings").handlers = [_Warnings()]
    if host:
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
    logger.remove()
    logger.add(_Printer(repeats=verbose), level=0, format="{level}: {message}", filter=levels)


class _Printer:
    """Prints what is logged, and a warning only once.

    :param repeats: print a warning every time that it comes
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
    """Logs Python's warnings, without the line of code that they name."""

    def emit(self, record: logging.LogRecord) -> None:
        """Log the text of the warning."""
        text = re.sub(r"\A.*:\d+: (?=\w+: )", "", record.getMessage())
        logger.warning(text.rpartition("\n  ")[0] or text.strip())
