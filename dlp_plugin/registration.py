"""Making modifiers known to llm-compressor's recipes, whichever is imported first.

llm-compressor has no entry points, and importing it takes seconds, which a command that only
shows a plan should not have to wait for. So where it is not loaded yet, its own import is
waited for.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

__all__ = ["register_with_host"]

_HOST = "llmcompressor"


def register_with_host(homes: Mapping[str, str]) -> None:
    """Register modifiers with llm-compressor's factory, now or once it is imported.

    Without llm-compressor nothing happens.

    :param homes: name of a modifier to the module that holds it, which is imported when a
        recipe first asks for it
    """
    if _HOST in sys.modules:
        _register(homes)
    else:
        sys.meta_path.insert(0, _HostWatcher(homes))


class _HostWatcher(MetaPathFinder):
    """Sees llm-compressor being imported; it finds nothing itself."""

    def __init__(self, homes: Mapping[str, str]) -> None:
        self._homes = homes
        self._asking = False

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if name != _HOST or self._asking:
            return None
        self._asking = True  # the other finders, by way of this one too
        try:
            spec = find_spec(name)
        finally:
            self._asking = False
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            _register(self._homes)

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def _register(homes: Mapping[str, str]) -> None:
    factory = import_module(f"{_HOST}.modifiers.factory").ModifierFactory
    for name, home in homes.items():
        factory.register(name, _stand_in(name, home))


def _stand_in(name: str, home: str) -> type:
    """A modifier class whose making gives the real one.

    llm-compressor may be loaded by the very module that holds a modifier, half done at that
    moment, so that the class itself cannot be had yet.
    """
    modifier = import_module(f"{_HOST}.modifiers").Modifier

    def make(_cls: type, **fields: Any) -> Any:
        return getattr(import_module(home), name)(**fields)

    return type(name, (modifier,), {"__new__": make, "__doc__": f"Stands in for ``{name}``."})
