"""Dynamic Layerwise Pruning (DLP, arXiv 2505.23807) for llm-compressor.

``import dlp_plugin`` makes ``DLPModifier``, ``OWLModifier``,
``AlphaPruningModifier``, ``LinearSparsityModifier`` and ``MaskedGPTQModifier`` known to
recipes, and adds ``ADMMPruningModifier`` and ``OneShotMagnitudeModifier``. In YAML recipes it
replaces llm-compressor's SparseGPT and Wanda stages by its own, which accept a separate N of N:M
for every block, agree over several processes, and can repair what they prune.

It also makes transformers load packed folders (:func:`pack`) without decoding them;
:class:`SparseConfig` asks for the dense model.

The import loads neither torch nor llm-compressor; they are loaded when a name is first used. The
modifiers are registered once llm-compressor is loaded, before or after this package, and packed
folders once transformers is.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from dlp_plugin.registration import register_with_host, register_with_transformers

if TYPE_CHECKING:
    from dlp_plugin.checkpoints.packing import pack, unpack
    from dlp_plugin.engines.transformers import SparseConfig
    from dlp_plugin.modifiers.base import last_plans
    from dlp_plugin.modifiers.methods import (
        AlphaPruningModifier,
        DLPModifier,
        LinearSparsityModifier,
        OWLModifier,
    )
    from dlp_plugin.planning.plan import BlockPlan, Plan
    from dlp_plugin.pruning.admm import ADMMPruningModifier
    from dlp_plugin.pruning.calibrated import SparseGPTModifier, WandaPruningModifier
    from dlp_plugin.pruning.magnitude import OneShotMagnitudeModifier
    from dlp_plugin.pruning.masked_gptq import MaskedGPTQModifier

    __version__: str

__all__ = [
    "ADMMPruningModifier",
    "AlphaPruningModifier",
    "BlockPlan",
    "DLPModifier",
    "LinearSparsityModifier",
    "MaskedGPTQModifier",
    "OWLModifier",
    "OneShotMagnitudeModifier",
    "Plan",
    "SparseConfig",
    "SparseGPTModifier",
    "WandaPruningModifier",
    "__version__",
    "last_plans",
    "pack",
    "unpack",
]

_MODIFIERS = {
    "ADMMPruningModifier": "pruning.admm",
    "AlphaPruningModifier": "modifiers.methods",
    "DLPModifier": "modifiers.methods",
    "LinearSparsityModifier": "modifiers.methods",
    "MaskedGPTQModifier": "pruning.masked_gptq",
    "OneShotMagnitudeModifier": "pruning.magnitude",
    "OWLModifier": "modifiers.methods",
    "SparseGPTModifier": "pruning.calibrated",
    "WandaPruningModifier": "pruning.calibrated",
}
_HOMES = {
    **_MODIFIERS,
    "BlockPlan": "planning.plan",
    "Plan": "planning.plan",
    "SparseConfig": "engines.transformers",
    "last_plans": "modifiers.base",
    "pack": "checkpoints.packing",
    "unpack": "checkpoints.packing",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version(__name__)
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_with_host({name: f"{__name__}.{home}" for name, home in _MODIFIERS.items()})
register_with_transformers(f"{__name__}.engines.transformers")
