"""Merging adapters under the masks, and what cannot be merged."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import peft
import pytest
import torch
from adapted_models import (
    FLAVOURS,
    SOME,
    MakeModel,
    Mixture,
    adapted,
    logits_of,
    lora,
    prune,
    refilled,
)
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from dlp_plugin.recovery import mask_updates, masks_of, sparse_merge


class Convolutions(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(4, 6, 3)
        self.linear = torch.nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.conv(x).mean((2, 3)))


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_merging_under_masks_is_merging_with_the_zeros_left(
    make_model: MakeModel, flavour: str
) -> None:
    model = prune(make_model(attention_bias=True, mlp_bias=True))
    given = masks = masks_of(model)
    assert len(masks) == 7 * 3
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft_model = adapted(model, *FLAVOURS[flavour])
        twin = copy.deepcopy(peft_model)
        usual = twin.merge_and_unload()
    merged = sparse_merge(peft_model, masks=given if flavour == "osf" else None)
    assert merged is model
    # IA3 scales weights, which leaves zeros, if not their sign
    assert flavour == "ia3" or refilled(usual, masks) > 0
    assert refilled(merged, masks) == 0
    state = merged.state_dict()
    assert state.keys() == usual.state_dict().keys()
    for name, value in usual.state_dict().items():
        mask = masks.get(name.removesuffix(".weight"))
        same = torch.equal if mask is None else lambda a, b, m=mask: torch.equal(a[m], b[m])
        assert same(state[name], value), name
        assert state[name].dtype == value.dtype


def test_the_named_adapters_are_merged(make_model: MakeModel) -> None:
    model = prune(make_model())
    masks = masks_of(model)
    before = copy.deepcopy(model.state_dict())
    peft_model = adapted(model, lora(target_modules=["q_proj"]), lora(target_modules=["up_proj"]))
    merged = sparse_merge(peft_model, adapter_names=["second"])
    changed = {n for n, value in merged.state_dict().items() if not torch.equal(value, before[n])}
    assert changed == {f"model.layers.{i}.mlp.up_proj.weight" for i in range(3)}
    assert refilled(merged, masks) == 0


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}], ids=["plain", "dora"])
def test_conv1d(settings: dict[str, bool]) -> None:
    """GPT-2's weights are ``[in, out]``."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=2)
    model = prune(GPT2LMHeadModel(config)).eval()
    masks = masks_of(model)
    assert set(masks) == {n for n, m in model.named_modules() if isinstance(m, Conv1D)}
    assert masks["transformer.h.0.mlp.c_fc"].shape == (32, 128)
    peft_model = adapted(
        model, lora(target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, **settings)
    )
    usual = copy.deepcopy(peft_model).merge_and_unload()
    merged = sparse_merge(copy.deepcopy(peft_model))
    assert refilled(usual, masks) > refilled(merged, masks) == 0
    for name, mask in masks.items():
        ours, theirs = (m.get_submodule(name).weight[mask] for m in (merged, usual))
        assert torch.equal(ours, theirs)
    mask_updates(peft_model)
    masked = logits_of(peft_model)
    usual = copy.deepcopy(peft_model).merge_and_unload()
    for one in (usual, sparse_merge(peft_model)):
        assert refilled(one, masks) == 0
        assert torch.allclose(logits_of(one), masked, atol=1e-4)


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}], ids=["plain", "dora"])
def test_convolutions(settings: dict[str, bool]) -> None:
    torch.manual_seed(0)
    model = prune(Convolutions())
    masks = masks_of(model)
    assert set(masks) == {"conv", "linear"}
    peft_model = adapted(model, lora(target_modules=["conv", "linear"], **settings))
    usual = copy.deepcopy(peft_model).merge_and_unload()
    merged = sparse_merge(peft_model)
    assert refilled(usual, masks) > refilled(merged, masks) == 0
    assert torch.equal(merged.conv.weight[masks["conv"]], usual.conv.weight[masks["conv"]])


def test_fused_experts() -> None:
    torch.manual_seed(0)
    model = Mixture()
    with torch.no_grad():
        for value in (model.experts.gate_up_proj, model.experts.down_proj):
            value.masked_fill_(torch.rand(value.shape) < 0.7, 0)
    masks = masks_of(model)
    assert set(masks) == {"experts.gate_up_proj", "experts.down_proj"}
    targets = ["experts.gate_up_proj", "experts.down_proj"]
    peft_model = adapted(model, lora(target_modules=[], target_parameters=targets))
    assert masks_of(peft_model).keys() == masks.keys()
    with pytest.raises(ValueError, match="ParamWrapper, whose updates cannot be masked: train unm"):
        mask_updates(peft_model)
    usual = copy.deepcopy(peft_model).merge_and_unload()
    merged = sparse_merge(peft_model)
    assert refilled(usual, masks) > refilled(merged, masks) == 0
    for name, mask in masks.items():
        ours, theirs = (m.get_parameter(name)[mask] for m in (merged, usual))
        assert torch.equal(ours, theirs)


def test_a_pruned_module_that_was_trained_as_a_whole_is_masked(make_model: MakeModel) -> None:
    model = prune(make_model())
    masks = masks_of(model)
    peft_model = adapted(model, lora(target_modules=["q_proj"], modules_to_save=["mlp"]))
    assert masks_of(peft_model).keys() == masks.keys()
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.gate_proj is pruned and in modules_to"):
        mask_updates(peft_model)
    trained = copy.deepcopy(peft_model).merge_and_unload()
    merged = sparse_merge(peft_model)
    assert refilled(trained, masks) > refilled(merged, masks) == 0
    kept = masks[SOME]
    ours, theirs = (m.get_submodule(SOME).weight[kept] for m in (merged, trained))
    assert torch.equal(ours, theirs)


def test_a_tied_weight_is_warned_of_as_peft_does(make_model: MakeModel) -> None:
    model = prune(make_model(tie_word_embeddings=True))
    peft_model = adapted(model, lora(target_modules=["q_proj", "lm_head"]))
    with pytest.warns(UserWarning, match="tie_word_embeddings=True"):
        sparse_merge(peft_model, allow_dense=True)


def test_embeddings_that_are_no_longer_tied(make_model: MakeModel) -> None:
    peft_model = adapted(
        prune(make_model(tie_word_embeddings=True)), lora(modules_to_save=["embed_tokens"])
    )
    merged = sparse_merge(peft_model)
    assert merged.lm_head.weight is not merged.model.embed_tokens.weight
    assert not merged.config.tie_word_embeddings


def test_dense_modules_are_adapted_as_usual(make_model: MakeModel) -> None:
    model = prune(make_model())
    masks = masks_of(model)
    with torch.no_grad():
        model.lm_head.weight[0, 0] = 0  # by accident
    peft_model = adapted(model, lora(target_modules=["q_proj", "lm_head"]))
    mask_updates(peft_model)
    masked = logits_of(peft_model)
    with pytest.raises(ValueError, match="of lm_head are zero, .*never pruned: allow_dense=True"):
        sparse_merge(peft_model)
    with pytest.raises(ValueError, match="never pruned"):
        sparse_merge(peft_model, masks=masks)
    merged = sparse_merge(peft_model, allow_dense=True)
    assert merged.lm_head.weight[0, 0] != 0
    assert refilled(merged, masks) == 0
    assert torch.allclose(logits_of(merged), masked, atol=1e-4)


def test_many_dense_modules_are_counted(make_model: MakeModel) -> None:
    peft_model = adapted(make_model(), lora())
    with pytest.raises(ValueError, match=r"0\.self_attn\.q_proj, .*, .* and 6 more are zero"):
        sparse_merge(peft_model)
    with pytest.raises(ValueError, match="none of the adapted modules is pruned"):
        mask_updates(peft_model)


def test_masks_that_are_given_are_those_that_hold(make_model: MakeModel) -> None:
    model = prune(make_model())
    masks = masks_of(model)
    given = {SOME: masks[SOME].clone()}
    given[SOME][0] = True
    merged = sparse_merge(adapted(model, lora()), masks=given)
    assert (merged.get_submodule(SOME).weight[0] != 0).all()
    assert refilled(merged, masks | given) == 0


UNFIT = [
    ({SOME: torch.ones(2, 3) > 0}, r"down_proj has shape \[2, 3\], its weight \[64, 128\]: read"),
    ({"model.layers.9": torch.ones(1) > 0}, "has 'model.layers.9', which is no weight of"),
    ({SOME: torch.ones(64, 128)}, "down_proj is torch.float32: make it torch.bool"),
]


@pytest.mark.parametrize(("changes", "match"), UNFIT)
def test_masks_that_do_not_fit(make_model: MakeModel, changes: dict, match: str) -> None:
    model = prune(make_model())
    masks = {**masks_of(model), **changes}
    peft_model = adapted(model, lora())
    with pytest.raises(ValueError, match=match):
        sparse_merge(peft_model, masks=masks)


def broken(peft_model: torch.nn.Module) -> None:
    layer = peft_model.base_model.model.get_submodule("model.layers.2.mlp.down_proj")
    layer.lora_B["default"].weight.data[0, 0] = float("nan")


def quantized(peft_model: torch.nn.Module) -> None:
    layer = peft_model.base_model.model.get_submodule(SOME)
    weight = layer.base_layer.weight.to(torch.float8_e4m3fn)
    layer.base_layer.weight = torch.nn.Parameter(weight, requires_grad=False)


CANNOT_MERGE = [
    (lambda m: None, {"adapter_names": ["third"]}, r"\['third'\]: give a list of .*\['default'\]"),
    (lambda m: None, {"adapter_names": "default"}, "is 'default': give a list"),
    (lambda m: m.merge_adapter(), {}, "default is already merged into .*: call peft_model.unmerge"),
    (
        broken,
        {},
        r"model\.layers\.2\.mlp\.down_proj is not finite with the adapter merged: train it",
    ),
    (quantized, {}, r"down_proj has weights of torch.float8_e4m3fn: load the model unquantized"),
    (lambda m: m.to("meta"), {}, "is on the meta device: load the model without offloading"),
]


@pytest.mark.parametrize(("change", "arguments", "match"), CANNOT_MERGE)
def test_nothing_changes_if_it_cannot_be_merged(
    make_model: MakeModel, change: Callable, arguments: dict, match: str
) -> None:
    peft_model = adapted(prune(make_model()), lora())
    change(peft_model)
    before = {name: value.clone() for name, value in peft_model.state_dict().items()}
    with pytest.raises(ValueError, match=match):
        sparse_merge(peft_model, **arguments)
    for name, value in peft_model.state_dict().items():
        same = value.is_meta or value.float().nan_to_num(9).equal(
            before[name].float().nan_to_num(9)
        )
        assert same, name


NOT_MERGEABLE = [
    (
        lora(lora_bias=True),
        r"adapter of model\.layers\.0\.\S+ \(Impossible to merge LoRA with `lora",
    ),
    (
        lora(alora_invocation_tokens=[1], task_type="CAUSAL_LM"),
        r"q_proj \(aLoRA does not support merging.\): keep the adapter beside the model",
    ),
    (peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"), "do not change weights"),
]


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
@pytest.mark.parametrize(("config", "match"), NOT_MERGEABLE)
def test_adapters_that_cannot_be_merged(
    make_model: MakeModel, config: peft.PeftConfig, match: str
) -> None:
    peft_model = peft.get_peft_model(prune(make_model()), config)
    with pytest.raises(ValueError, match=match):
        sparse_merge(peft_model)


def test_attention_of_torch() -> None:
    """Its projections are one parameter, and peft merges the last one twice."""
    model = torch.nn.Sequential(torch.nn.MultiheadAttention(8, 2))
    peft_model = peft.get_peft_model(model, lora(target_modules=["0"]))
    with pytest.raises(ValueError, match="0 .MultiheadAttention. has no weight of its own"):
        sparse_merge(peft_model)
