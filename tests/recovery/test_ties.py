"""A weight that the head and the embeddings share, with adapters at one end of it or at both."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from adapted_models import MakeModel, adapted, logits_of, lora, prune, refilled
from transformers import AutoModelForCausalLM

from dlp_plugin.recovery import mask_updates, masks_of, sparse_merge

HEAD = {"target_modules": ["q_proj", "lm_head"]}
EMBEDDING = {"target_modules": ["q_proj", "embed_tokens"]}
Q = {"target_modules": ["q_proj"]}
PARTED = {
    "head": HEAD,
    "embedding": EMBEDDING,
    "each its own": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "head, embedding saved": {**HEAD, "modules_to_save": ["embed_tokens"]},
    "embedding saved": {**Q, "modules_to_save": ["embed_tokens"]},
    "dora": {**HEAD, "use_dora": True},
}
TOGETHER = {
    "neither": Q,
    "embedding, tied": {**EMBEDDING, "ensure_weight_tying": True},
    "head, tied": {**HEAD, "ensure_weight_tying": True},
    "embedding saved, tied": {
        **Q,
        "modules_to_save": ["embed_tokens"],
        "ensure_weight_tying": True,
    },
    "tokens": {**Q, "trainable_token_indices": [1, 5]},
}

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings"),
    pytest.mark.filterwarnings("ignore:.*[Ww]eights?.tying"),
]


@pytest.mark.parametrize("settings", PARTED | TOGETHER)
def test_what_was_trained_is_what_is_merged_and_saved(
    make_model: MakeModel, settings: str, tmp_path: Path
) -> None:
    model = prune(make_model(tie_word_embeddings=True))
    masks = masks_of(model)
    peft_model = adapted(model, lora(**(PARTED | TOGETHER)[settings]))
    mask_updates(peft_model)
    trained = logits_of(peft_model)
    merged = sparse_merge(peft_model, allow_dense=settings in PARTED)
    torch.testing.assert_close(logits_of(merged), trained, rtol=1e-4, atol=1e-4)
    together = settings in TOGETHER
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) == together
    assert merged.config.tie_word_embeddings == together
    assert refilled(merged, masks) == 0
    merged.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert torch.equal(logits_of(loaded), logits_of(merged))


def test_a_head_was_never_pruned_though_the_embeddings_have_its_weight(
    make_model: MakeModel,
) -> None:
    model = prune(make_model(tie_word_embeddings=True))
    peft_model = adapted(model, lora(**HEAD))
    trained = logits_of(peft_model)
    with pytest.raises(ValueError, match="of lm_head are zero, so they were never pruned: allow_d"):
        sparse_merge(peft_model)
    assert torch.equal(logits_of(peft_model), trained)
    base = peft_model.get_base_model()
    assert base.lm_head.base_layer.weight is base.model.embed_tokens.weight  # tied as before
    assert base.config.tie_word_embeddings


def test_of_two_adapters_that_at_the_head_is_not_merged(make_model: MakeModel) -> None:
    peft_model = adapted(prune(make_model(tie_word_embeddings=True)), lora(), lora(**HEAD))
    before = peft_model.get_base_model().model.embed_tokens.weight.clone()
    merged = sparse_merge(peft_model, adapter_names=["default"])
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert torch.equal(merged.lm_head.weight, before)


def test_embeddings_that_are_not_there(make_model: MakeModel) -> None:
    peft_model = adapted(prune(make_model(tie_word_embeddings=True)), lora(**HEAD))
    peft_model.to("meta")
    with pytest.raises(ValueError, match="is on the meta device: load the model without offloadin"):
        sparse_merge(peft_model)
