"""Training a pruned model without losing its zeros.

In a pruned model the zeros are the mask. What is trained afterwards fills them: merging a
LoRA adapter adds a dense matrix to the weight, and an optimizer's step moves every weight.
``sparse_merge`` merges the adapters of peft under the masks, ``mask_updates`` has them train
under the masks, so that what is trained is what is merged, and ``hold_masks`` keeps the zeros
while the weights themselves are trained. Embeddings, norms and biases train freely.

``layers`` declares all that is relied on of the inside of peft. None of the files imports peft
before adapters are used.
"""

from dlp_plugin.recovery.adapters import load_adapter
from dlp_plugin.recovery.masks import masks_of
from dlp_plugin.recovery.merge import sparse_merge
from dlp_plugin.recovery.training import hold_masks
from dlp_plugin.recovery.updates import mask_updates

__all__ = ["hold_masks", "load_adapter", "mask_updates", "masks_of", "sparse_merge"]
