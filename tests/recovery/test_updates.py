"""Adapters that train under the masks."""

from __future__ import annotations

import copy
from pathlib import Path

import peft
import pytest
import torch
from adapted_models import (
    FLAVOURS,
    SOME,
    TARGETS,
    MakeModel,
    adapted,
    logits_of,
    lora,
    loss_of,
    prune,
    randomize,
    refilled,
)
from torch.nn import functional

from dlp_plugin.recovery import mask_updates, masks_of, sparse_merge

MASKABLE = ["plain", "rslora", "dora", "two", "two dora", "dora and plain", "bias", "patterns"]


@pytest.mark.parametrize("flavour", MASKABLE)
def test_what_is_trained_masked_is_what_is_merged(make_model: MakeModel, flavour: str) -> None:
    model = prune(make_model(attention_bias=True, mlp_bias=True))
    masks = masks_of(model)
    peft_model = adapted(model, *FLAVOURS[flavour])
    unmasked = logits_of(peft_model)
    keys = peft_model.state_dict().keys()
    mask_updates(peft_model)
    assert peft_model.state_dict().keys() == keys
    masked = logits_of(peft_model)
    assert (masked - unmasked).abs().max() > 0.05
    usual = copy.deepcopy(peft_model).merge_and_unload()
    usual_safe = copy.deepcopy(peft_model).merge_and_unload(safe_merge=True)
    merged = sparse_merge(peft_model)
    for one in (usual, usual_safe, merged):
        assert refilled(one, masks) == 0
        assert torch.allclose(logits_of(one), masked, atol=1e-4)


@pytest.mark.parametrize("flavour", ["plain", "dora"])
def test_masking_after_training_makes_another_model(make_model: MakeModel, flavour: str) -> None:
    """Without masked updates, the merged model is not the one whose loss was trained."""
    peft_model = adapted(prune(make_model()), *FLAVOURS[flavour])
    before = logits_of(peft_model)
    assert (logits_of(sparse_merge(peft_model)) - before).abs().max() > 0.05


@pytest.mark.parametrize("flavour", ["plain", "dora"])
def test_a_masked_adapter_that_is_loaded_again_merges_alike(
    make_model: MakeModel, flavour: str, tmp_path: Path
) -> None:
    peft_model = adapted(prune(make_model()), *FLAVOURS[flavour])
    plain = {n: v.clone() for n, v in peft.get_peft_model_state_dict(peft_model).items()}
    mask_updates(peft_model)
    peft_model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(prune(make_model()), tmp_path)
    state = peft.get_peft_model_state_dict(loaded)
    assert state.keys() == plain.keys()
    assert all(torch.equal(state[name], value) for name, value in plain.items())
    ours, theirs = sparse_merge(peft_model).state_dict(), sparse_merge(loaded).state_dict()
    assert all(torch.allclose(ours[name], value, atol=1e-6) for name, value in theirs.items())


@pytest.mark.parametrize("flavour", ["plain", "two dora"])
@pytest.mark.parametrize("safe", [True, False])
def test_merging_masked_updates_can_be_undone(
    make_model: MakeModel, flavour: str, safe: bool
) -> None:
    model = prune(make_model())
    before, dense = copy.deepcopy(model.state_dict()), logits_of(model)
    peft_model = adapted(model, *FLAVOURS[flavour])
    mask_updates(peft_model)
    masked = logits_of(peft_model)
    with peft_model.disable_adapter():
        assert torch.equal(logits_of(peft_model), dense)
    peft_model.merge_adapter(safe_merge=safe)
    assert torch.allclose(logits_of(peft_model), masked, atol=1e-4)
    with pytest.raises(ValueError, match="already merged into .*unmerge_adapter"):
        mask_updates(peft_model)
    peft_model.unmerge_adapter()
    assert torch.equal(logits_of(peft_model), masked)
    state = peft_model.unload().state_dict()
    assert all(torch.equal(state[name], value) for name, value in before.items())


def test_masking_twice_masks_once(make_model: MakeModel) -> None:
    peft_model = adapted(prune(make_model()), lora(use_dora=True))
    mask_updates(peft_model)
    masked = logits_of(peft_model)
    layer = peft_model.base_model.model.get_submodule(SOME)
    variant = layer.lora_variant["default"]
    mask_updates(peft_model)
    assert layer.lora_variant["default"] is variant
    assert torch.equal(logits_of(peft_model), masked)


def test_an_adapter_that_came_later_is_masked_by_calling_again(make_model: MakeModel) -> None:
    model = prune(make_model())
    masks = masks_of(model)
    peft_model = adapted(model, lora())
    mask_updates(peft_model)
    peft_model.add_adapter("second", lora())
    peft_model.base_model.set_adapter(["second", "default"])
    randomize(peft_model)
    with pytest.raises(ValueError, match="'second' is merged unmasked: unmerge it and call mask_u"):
        copy.deepcopy(peft_model).merge_and_unload()
    for order in (["second", "default"], ["default", "second"]):
        peft_model.base_model.set_adapter(order)
        with pytest.raises(ValueError, match=r"some adapters of \S+q_proj were masked by mask_upd"):
            sparse_merge(peft_model)
    mask_updates(peft_model)
    assert refilled(peft_model.merge_and_unload(), masks) == 0


def test_the_masked_update_against_a_naive_twin() -> None:
    """One Linear in float64: output, gradients, dropout and all."""
    torch.manual_seed(0)
    model = prune(torch.nn.Sequential(torch.nn.Linear(8, 6)).double(), sparsity=0.5)
    for dora in (False, True):
        settings = lora(r=2, target_modules=["0"], use_dora=dora, lora_dropout=0.5)
        peft_model = adapted(copy.deepcopy(model), settings).double().train()
        mask_updates(peft_model)
        layer = peft_model.base_model.model[0]
        weight, mask = model[0].weight.detach(), model[0].weight != 0
        leaves = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
        if dora:
            leaves.append(layer.lora_magnitude_vector["default"].weight)
        x = torch.randn(5, 8, dtype=torch.float64)
        torch.manual_seed(1)
        out = peft_model(x)
        found = torch.autograd.grad(out.square().sum(), leaves)

        twins = [leaf.detach().clone().requires_grad_() for leaf in leaves]
        update = 4 * twins[1] @ twins[0]  # lora_alpha / r
        if dora:
            norm = (weight + update.detach()).norm(dim=1, keepdim=True)
            update = twins[2][:, None] / norm * (weight + update) - weight
        torch.manual_seed(1)
        dropped = functional.dropout(x, 0.5)
        expected = x @ weight.T + model[0].bias + dropped @ (mask * update).T
        assert torch.allclose(out, expected)
        for gradient, wanted in zip(
            found, torch.autograd.grad(expected.square().sum(), twins), strict=True
        ):
            assert torch.allclose(gradient, wanted)


@pytest.mark.parametrize("flavour", ["plain", "dora"])
def test_masked_training(make_model: MakeModel, flavour: str) -> None:
    model = prune(make_model())
    masks = masks_of(model)
    peft_model = peft.get_peft_model(model, *copy.deepcopy(FLAVOURS[flavour]))
    peft_model.gradient_checkpointing_enable()  # the update checkpoints inside
    mask_updates(peft_model)
    parts = {n: p for n, p in peft_model.named_parameters() if p.requires_grad}
    assert len(parts) == 9 * (3 if flavour == "dora" else 2)
    optimizer = torch.optim.AdamW(parts.values(), lr=1e-2)
    losses = []
    for _ in range(6):
        loss = loss_of(peft_model.train())
        loss.backward()
        optimizer.step()
        if losses:  # at first B is zero, and so is A's gradient
            assert all(p.grad.abs().max() > 0 for p in parts.values())
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.2
    trained = loss_of(peft_model.eval()).item()
    merged = sparse_merge(peft_model)
    assert refilled(merged, masks) == 0
    assert loss_of(merged).item() == pytest.approx(trained, abs=1e-4)


@pytest.mark.parametrize("flavour", ["plain", "dora"])
def test_bfloat16_with_adapters_in_float32(make_model: MakeModel, flavour: str) -> None:
    model = prune(make_model(torch.bfloat16))
    masks = masks_of(model)
    peft_model = adapted(model, *FLAVOURS[flavour])
    mask_updates(peft_model)
    masked = logits_of(peft_model)
    with torch.autocast("cpu", torch.bfloat16):
        loss_of(peft_model).backward()
    merged = sparse_merge(peft_model)
    assert refilled(merged, masks) == 0
    assert merged.get_submodule(SOME).weight.dtype == torch.bfloat16
    assert torch.allclose(logits_of(merged), masked, atol=0.1)


def test_dora_of_rows_that_are_all_zero(make_model: MakeModel) -> None:
    """Their norm is 0, by which peft divides; masked they stay as they are."""
    model = prune(make_model())
    with torch.no_grad():
        model.get_submodule(SOME).weight[5] = 0
    masks = masks_of(model)
    peft_model = peft.get_peft_model(model, lora(use_dora=True))
    assert logits_of(peft_model).isnan().any()
    unmasked = sparse_merge(copy.deepcopy(peft_model))  # as after training masked and loading
    assert refilled(unmasked, masks) == 0
    assert logits_of(unmasked).isfinite().all()
    mask_updates(peft_model)
    loss_of(peft_model).backward()
    assert all(p.grad.isfinite().all() for p in peft_model.parameters() if p.grad is not None)
    assert refilled(sparse_merge(peft_model), masks) == 0


NOT_MASKABLE = [
    (peft.LoHaConfig(r=4, target_modules=TARGETS), "loha.layer.Linear, whose updates cannot be"),
    (
        lora(alora_invocation_tokens=[1], task_type="CAUSAL_LM"),
        "adapter 'default' of model.layers.0.self_attn.q_proj is a peft.*ALoraLinearVariant",
    ),
]


@pytest.mark.parametrize(("config", "match"), NOT_MASKABLE)
def test_updates_that_cannot_be_masked(
    make_model: MakeModel, config: peft.PeftConfig, match: str
) -> None:
    peft_model = peft.get_peft_model(prune(make_model()), config)
    with pytest.raises(ValueError, match=f"{match}.*: train unmasked and sparse_merge"):
        mask_updates(peft_model)


def test_updates_are_made_in_float32_under_autocast(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    peft_model = adapted(prune(make_model()), lora())
    mask_updates(peft_model)
    layer = peft_model.base_model.model.get_submodule(SOME)
    used = []
    usual = functional.linear
    monkeypatch.setattr(functional, "linear", lambda *args: used.append(args[1]) or usual(*args))
    for enabled in (False, True):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            layer(torch.randn(1, 3, 128))
    before, now = used[1], used[-1]
    assert now.dtype == torch.float32
    assert torch.equal(now, before)


def test_no_dense_update_is_kept_for_the_backward_pass(make_model: MakeModel) -> None:
    peft_model = adapted(prune(make_model()), lora(target_modules=["down_proj"], use_dora=True))
    mask_updates(peft_model)
    layer = peft_model.base_model.model.get_submodule(SOME)
    frozen = layer.base_layer.weight.data_ptr()
    kept = []

    def pack(value: torch.Tensor) -> torch.Tensor:
        if value.numel() == 64 * 128 and value.untyped_storage().data_ptr() != frozen:
            kept.append(value)
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        layer(torch.randn(1, 3, 128, requires_grad=True))
    assert not kept
