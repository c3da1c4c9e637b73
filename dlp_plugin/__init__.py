"""Dynamic Layerwise Pruning (DLP, arXiv 2505.23807) for llm-compressor.

``import dlp_plugin`` makes ``DLPModifier``, its peers ``OWLModifier``,
``AlphaPruningModifier`` and ``LinearSparsityModifier``, and ``MaskedGPTQModifier`` known to
recipes, adds ``OneShotMagnitudeModifier``, and has SparseGPT and Wanda stages take an N of N:M
for every block and agree over several processes.
"""

from llmcompressor.modifiers.factory import ModifierFactory

from dlp_plugin.masked_gptq import MaskedGPTQModifier
from dlp_plugin.modifier import DLPModifier, last_plans
from dlp_plugin.peers import AlphaPruningModifier, LinearSparsityModifier, OWLModifier
from dlp_plugin.plan import BlockPlan, Plan
from dlp_plugin.stages import (
    OneShotMagnitudeModifier,
    SparseGPTModifier,
    WandaPruningModifier,
)

__all__ = [
    "AlphaPruningModifier",
    "BlockPlan",
    "DLPModifier",
    "LinearSparsityModifier",
    "MaskedGPTQModifier",
    "OWLModifier",
    "OneShotMagnitudeModifier",
    "Plan",
    "SparseGPTModifier",
    "WandaPruningModifier",
    "last_plans",
]

for _modifier in (
    AlphaPruningModifier,
    DLPModifier,
    LinearSparsityModifier,
    MaskedGPTQModifier,
    OneShotMagnitudeModifier,
    OWLModifier,
    SparseGPTModifier,
    WandaPruningModifier,
):
    ModifierFactory.register(_modifier.__name__, _modifier)
