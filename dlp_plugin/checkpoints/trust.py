"""Whether code that comes with a checkpoint may run: only if the user allows it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

__all__ = ["trusting_remote_code", "trusts_remote_code"]

_trusted = ContextVar("trust_remote_code", default=False)


@contextmanager
def trusting_remote_code(trusted: bool = True) -> Iterator[None]:
    """Allow or forbid, inside the context, that a checkpoint's own code loads it.

    :param trusted: passed to transformers as ``trust_remote_code``; the user is never prompted
    """
    token = _trusted.set(trusted)
    try:
        yield
    finally:
        _trusted.reset(token)


def trusts_remote_code() -> bool:
    """Return whether a checkpoint's own code may run; by default it may not."""
    return _trusted.get()
