"""Making modifiers known to recipes and packed folders to transformers, whatever is first.

llm-compressor has no entry points, nor has transformers, and importing either takes seconds,
which a command that only shows a plan should not have to wait for. So where one is not loaded
yet, its own import is waited for.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

__all__ = ["register_with_host", "register_with_transformers"]

_HOST = "llmcompressor"
_QUANTIZERS = "transformers.quantizers.auto"


def register_with_host(homes: Mapping[str, str]) -> None:
    """Register modifiers with llm-compressor's factory, now or once it is imported.

    Without llm-compressor nothing happens.

    :param homes: name of a modifier to the module that holds it, which is imported when a
        recipe first asks for it
    """
    _when_loaded(_HOST, lambda: _register(homes))


def register_with_transformers(home: str) -> None:
    """Register the quantizer of packed folders with transformers, now or once it is imported.

    Without transformers nothing happens, nor with one that is too old for it.

    :param home: the module that registers it when it is imported
    """

    def register() -> None:
        with suppress(ImportError):
            import_module(home)

    _when_loaded(_QUANTIZERS, register)


def _when_loaded(module: str, action: Callable[[], None]) -> None:
    if module in sys.modules:
        action()
    else:
        sys.meta_path.insert(0, _Watcher(module, action))


class _Watcher(MetaPathFinder):
    """Sees a module being imported; it finds nothing itself."""

    def __init__(self, module: str, action: Callable[[], None]) -> None:
        self._module = module
        self._action = action
        self._asking = False

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if name != self._module or self._asking:
            return None
        self._asking = True  # the other finders, by way of this one too
        try:
            spec = find_spec(name)
        finally:
            self._asking = False
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_act(module: ModuleType) -> None:
            execute(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            self._action()

        spec.loader.exec_module = execute_and_act  # type: ignore[method-assign]
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
