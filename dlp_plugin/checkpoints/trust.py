"""Whether code that comes with a checkpoint may run: only where the user says so."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

__all__ = ["trusting_remote_code", "trusts_remote_code"]

_trusted = ContextVar("trust_remote_code", default=False)


@contextmanager
def trusting_remote_code(trusted: bool = True) -> Iterator[None]:
    """Let models and tokenizers be loaded by the code that lies beside them, or not.

    :param trusted: as ``trust_remote_code`` of transformers; nobody is asked in either case
    """
    token = _trusted.set(trusted)
    try:
        yield
    finally:
        _trusted.reset(token)


def trusts_remote_code() -> bool:
    """Whether such code may run here; by default it may not."""
    return _trusted.get()
