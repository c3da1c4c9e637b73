"""The allocation methods as recipes name them."""

from __future__ import annotations

from dlp_plugin.modifiers.base import AllocationModifier
from dlp_plugin.planning.methods.alpha_pruning import AlphaPruning
from dlp_plugin.planning.methods.dlp import DLP
from dlp_plugin.planning.methods.linear import LinearSparsity
from dlp_plugin.planning.methods.owl import OWL

__all__ = ["AlphaPruningModifier", "DLPModifier", "LinearSparsityModifier", "OWLModifier"]


class DLPModifier(DLP, AllocationModifier):
    """Give every block its own sparsity before SparseGPT, Wanda, ADMM or magnitude prunes it.

    Dynamic Layerwise Pruning (arXiv 2505.23807): the blocks whose weights matter less
    on the calibration data are pruned harder, with the same total. Put it in front of
    the stock stages in a recipe:

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

    ``alpha``, left out with ``from_plan``, is the plan's; ``auto`` chooses it by the loss of
    the pruned model on a quarter of the samples, of at most 16,384 tokens, which are then not
    scored on. That and
    ``statistic`` are :class:`~dlp_plugin.planning.methods.dlp.DLP`'s fields, the others
    :class:`~dlp_plugin.modifiers.base.AllocationModifier`'s.
    """


class OWLModifier(OWL, AllocationModifier):
    """Outlier Weighed Layerwise sparsity (arXiv 2310.05175), in the same life cycle.

    What ``sparsity_profile: owl`` of the stock stages is meant to be, which raises an error in
    llm-compressor 0.14; ``owl_m`` and ``owl_lmbda`` have the same names.
    """


class AlphaPruningModifier(AlphaPruning, AllocationModifier):
    """AlphaPruning (arXiv 2410.10912), in the same life cycle.

    Needs no calibration data of its own, unless ``epsilon`` is chosen.
    """


class LinearSparsityModifier(LinearSparsity, AllocationModifier):
    """Sparsities in arithmetic progression over depth (arXiv 2502.14770).

    Needs no calibration data of its own, unless ``beta`` is chosen, as it is by default.
    """
