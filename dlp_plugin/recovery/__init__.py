"""Training a pruned model without losing its zeros.

In a pruned model the zeros are the mask. Training fills them: merging a LoRA adapter adds a dense
matrix to the weight, and an optimizer's step changes every weight. ``sparse_merge`` merges
adapters of peft and keeps the zeros. ``mask_updates`` applies the mask to the adapters while they
are trained, so that merging changes nothing. ``hold_masks`` keeps the zeros while the weights
themselves are trained. Embeddings, norms and biases are not masked.

``layers`` declares which internals of peft are used. No file imports peft before adapters are
used.
"""

from dlp_plugin.recovery.adapters import load_adapter
from dlp_plugin.recovery.masks import masks_of
from dlp_plugin.recovery.merge import sparse_merge
from dlp_plugin.recovery.training import hold_masks
from dlp_plugin.recovery.updates import mask_updates

__all__ = ["hold_masks", "load_adapter", "mask_updates", "masks_of", "sparse_merge"]
