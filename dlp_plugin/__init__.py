"""Dynamic Layerwise Pruning (DLP, arXiv 2505.23807) for llm-compressor.

``import dlp_plugin`` makes ``DLPModifier`` known to recipes.
"""

from llmcompressor.modifiers.factory import ModifierFactory

from dlp_plugin.modifier import DLPModifier, last_plans
from dlp_plugin.plan import BlockPlan, Plan

__all__ = ["BlockPlan", "DLPModifier", "Plan", "last_plans"]

ModifierFactory.register("DLPModifier", DLPModifier)
