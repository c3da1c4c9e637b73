"""Dynamic Layerwise Pruning (DLP, arXiv 2505.23807) for llm-compressor.

``import dlp_plugin`` makes ``DLPModifier``, its peers ``OWLModifier``,
``AlphaPruningModifier`` and ``LinearSparsityModifier``, and ``MaskedGPTQModifier`` known to
recipes, and has SparseGPT and Wanda stages agree over several processes.
"""

from llmcompressor.modifiers.factory import ModifierFactory

from dlp_plugin.masked_gptq import MaskedGPTQModifier
from dlp_plugin.modifier import DLPModifier, last_plans
from dlp_plugin.peers import AlphaPruningModifier, LinearSparsityModifier, OWLModifier
from dlp_plugin.plan import BlockPlan, Plan
from dlp_plugin.stages import SparseGPTModifier, WandaPruningModifier

__all__ = [
    "AlphaPruningModifier",
    "BlockPlan",
    "DLPModifier",
    "LinearSparsityModifier",
    "MaskedGPTQModifier",
    "OWLModifier",
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
    OWLModifier,
    SparseGPTModifier,
    WandaPruningModifier,
):
    ModifierFactory.register(_modifier.__name__, _modifier)
