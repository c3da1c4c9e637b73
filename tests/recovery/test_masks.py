"""Reading the masks of a pruned model from its zeros."""

from __future__ import annotations

import torch
from adapted_models import MakeModel, adapted, lora

from dlp_plugin.recovery import masks_of


def test_masks_are_those_of_pruned_modules(make_model: MakeModel) -> None:
    model = make_model(tie_word_embeddings=True)
    with torch.no_grad():
        model.model.embed_tokens.weight[:64] = 0  # as of tokens that never occur
        weights = [layer.mlp.down_proj.weight for layer in model.model.layers]
        assert weights[0].numel() == 8192
        weights[0].view(-1)[:81] = 0  # 0.99 %
        weights[1].view(-1)[:82] = 0  # 1.001 %
    masks = masks_of(model)
    assert list(masks) == ["model.layers.1.mlp.down_proj"]
    assert torch.equal(masks["model.layers.1.mlp.down_proj"], weights[1] != 0)
    peft_model = adapted(model, lora())
    assert {n: m.tolist() for n, m in masks_of(peft_model).items()} == {
        n: m.tolist() for n, m in masks.items()
    }
