"""Dynamic Layerwise Pruning (DLP, arXiv 2505.23807) for llm-compressor.

``import dlp_plugin`` makes ``DLPModifier`` and ``MaskedGPTQModifier`` known to recipes.
"""

from llmcompressor.modifiers.factory import ModifierFactory

from dlp_plugin.masked_gptq import MaskedGPTQModifier
from dlp_plugin.modifier import DLPModifier, last_plans
from dlp_plugin.plan import BlockPlan, Plan

__all__ = ["BlockPlan", "DLPModifier", "MaskedGPTQModifier", "Plan", "last_plans"]

for _modifier in (DLPModifier, MaskedGPTQModifier):
    ModifierFactory.register(_modifier.__name__, _modifier)
