"""The allocation methods as recipes name them."""

from __future__ import annotations

from dlp_plugin.modifiers.base import AllocationModifier
from dlp_plugin.planning.methods.alpha_pruning import AlphaPruning
from dlp_plugin.planning.methods.dlp import DLP
from dlp_plugin.planning.methods.linear import LinearSparsity
from dlp_plugin.planning.methods.owl import OWL

__all__ = ["AlphaPruningModifier", "DLPModifier", "LinearSparsityModifier", "OWLModifier"]


class DLPModifier(DLP, AllocationModifier):
    """Give every block a separate sparsity before SparseGPT, Wanda, ADMM or magnitude prunes it.

    Dynamic Layerwise Pruning (arXiv 2505.23807): blocks whose weights matter less on the
    calibration data are pruned more, with the same total. Put it before the pruning stages in a
    recipe:

    ```yaml
    pruning_stage:
      pruning_modifiers:
        DLPModifier:
          alpha: 0.15
        WandaPruningModifier:
          sparsity: 0.7
          targets: [Linear]
          ignore: ["re:.*lm_head"]
    ```

    With ``from_plan``, ``alpha`` is the plan's if it is left out. ``auto`` selects it by the loss
    of the pruned model on held-out samples: a quarter of all, at most 16,384 tokens. ``alpha`` and
    ``statistic`` are fields of :class:`~dlp_plugin.planning.methods.dlp.DLP`, the others of
    :class:`~dlp_plugin.modifiers.base.AllocationModifier`.
    """


class OWLModifier(OWL, AllocationModifier):
    """Outlier Weighed Layerwise sparsity (arXiv 2310.05175), used like :class:`DLPModifier`.

    It replaces ``sparsity_profile: owl`` of llm-compressor's stages, which raises an error in
    llm-compressor 0.14. ``owl_m`` and ``owl_lmbda`` have the same names.
    """


class AlphaPruningModifier(AlphaPruning, AllocationModifier):
    """AlphaPruning (arXiv 2410.10912), used like :class:`DLPModifier`.

    Scores weights only, so it needs no calibration data, unless ``epsilon`` is ``auto``.
    """


class LinearSparsityModifier(LinearSparsity, AllocationModifier):
    """Sparsities in arithmetic progression over depth (arXiv 2502.14770).

    Needs no calibration data, unless ``beta`` is ``auto``, its default.
    """
