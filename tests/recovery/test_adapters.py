"""What is checked of adapters before anything is done with them."""

from __future__ import annotations

import sys
from collections.abc import Callable

import peft
import pytest
import torch
from adapted_models import SOME, MakeModel, adapted, lora, prune, refilled
from compressed_tensors.offload import offload_module

from dlp_plugin.recovery import hold_masks, mask_updates, masks_of, sparse_merge


def test_masks_from_before_an_initialisation_that_changes_the_base(make_model: MakeModel) -> None:
    model = prune(make_model())
    masks = masks_of(model)
    peft_model = peft.get_peft_model(model, lora(init_lora_weights="pissa"))
    assert SOME not in masks_of(peft_model)
    with pytest.raises(ValueError, match=r"'default' \(pissa\) changed the base .*merge\(masks="):
        sparse_merge(peft_model)
    with pytest.raises(ValueError, match=r"\(pissa\) changed.*: train unmasked and sparse_merge"):
        mask_updates(peft_model)
    merged = sparse_merge(peft_model, masks=masks)
    assert refilled(merged, masks) == 0


@pytest.mark.parametrize("init", ["pissa_niter_4", "olora", "corda", "loftq", "lora_ga"])
def test_every_initialisation_that_changes_the_base_is_known(
    make_model: MakeModel, init: str
) -> None:
    """An adapter that was loaded says by its configuration how it was made."""
    peft_model = adapted(prune(make_model()), lora())
    peft_model.peft_config["default"].init_lora_weights = init
    for use in (sparse_merge, mask_updates):
        with pytest.raises(ValueError, match=rf"\({init}\) changed the base weights"):
            use(peft_model)


def test_kasa_changes_the_base_and_says_so_by_its_own_configuration(make_model: MakeModel) -> None:
    model = prune(make_model())
    masks = masks_of(model)
    peft_model = adapted(model, lora(kasa_config=peft.KasaConfig()))
    assert SOME not in masks_of(peft_model)
    for use in (sparse_merge, mask_updates):
        with pytest.raises(ValueError, match=r"\(KaSA\) changed the base weights"):
            use(peft_model)
    assert refilled(sparse_merge(peft_model, masks=masks), masks) == 0


def test_an_adapter_that_is_merged_unmasked(make_model: MakeModel) -> None:
    """The zeros are not the masks then; whether that adapter is to be merged or another."""
    peft_model = adapted(prune(make_model()), lora(), lora(target_modules=["up_proj"]))
    peft_model.merge_adapter(["default"])
    for use in (mask_updates, lambda m: sparse_merge(m, adapter_names=["second"])):
        with pytest.raises(ValueError, match=r"default is already merged .*unmerge_adapter\(\)"):
            use(peft_model)


@pytest.mark.parametrize("use", [sparse_merge, mask_updates])
def test_a_model_without_adapters(make_model: MakeModel, use: Callable) -> None:
    with pytest.raises(ValueError, match="is a LlamaForCausalLM, not a PeftModel: give what"):
        use(prune(make_model()))
    twice = peft.get_peft_model(adapted(prune(make_model()), lora()), lora())
    with pytest.raises(
        ValueError, match=r"a PeftModel is inside this .*: call get_peft_model\(\) o"
    ):
        use(twice)


def test_without_peft(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    model = prune(make_model())
    hold_masks(model, torch.optim.SGD(model.parameters()))
    for use in (sparse_merge, mask_updates):
        with pytest.raises(ImportError, match=r"need peft: pip install 'dlp_plugin\[lora\]'"):
            use(model)


def test_weights_that_are_offloaded(make_model: MakeModel) -> None:
    """Their masks can be read, but what peft writes into an onloaded copy is lost."""
    model = prune(make_model())
    masks = masks_of(model)
    peft_model = adapted(model, lora())
    base = model.get_submodule(SOME).base_layer
    offload_module(base, onload_device="cpu", offload_device="cpu")
    assert torch.equal(masks_of(peft_model)[SOME], masks[SOME])
    for use in (sparse_merge, mask_updates):
        with pytest.raises(ValueError, match="down_proj is offloaded, .*: call remove_dispatch"):
            use(peft_model)
