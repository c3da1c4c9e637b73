"""Training a pruned model: adapters of peft and full fine-tuning keep its zeros."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from compressed_tensors.offload import offload_module
from conftest import linears_of
from llmcompressor.core import LifecycleCallbacks, create_session
from llmcompressor.modifiers.pruning.constant import ConstantPruningModifier
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from dlp_plugin.recovery import hold_masks, mask_updates, masks_of, sparse_merge

MakeModel = Callable[..., torch.nn.Module]
TARGETS = ["q_proj", "o_proj", "down_proj"]
TOKENS = torch.arange(24).reshape(2, 12)
SOME = "model.layers.0.mlp.down_proj"


@torch.no_grad()
def prune(model: torch.nn.Module, sparsity: float = 0.7, seed: int = 3) -> torch.nn.Module:
    """Set random weights of all Linears and convolutions but the output layer to zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, module in model.named_modules():
        kinds = (torch.nn.Linear, torch.nn.Conv2d, Conv1D)
        if isinstance(module, kinds) and name != "lm_head":
            drawn = torch.rand(module.weight.shape, generator=generator)
            module.weight.masked_fill_(drawn < sparsity, 0)
    return model


@torch.no_grad()
def randomize(peft_model: torch.nn.Module, seed: int = 4) -> torch.nn.Module:
    """As if trained: no part of an adapter is as it was initialised, above all no B zero."""
    torch.manual_seed(seed)
    layers = (peft.tuners.tuners_utils.BaseTunerLayer, peft.utils.ModulesToSaveWrapper)
    done = set()
    for module in peft_model.modules():
        if isinstance(module, layers):
            for name, value in module.named_parameters():
                mine = "base_layer" not in name and "original_module" not in name
                if mine and id(value) not in done:
                    value += 0.1 * torch.randn_like(value)
                    done.add(id(value))
    return peft_model


def lora(**settings: object) -> peft.LoraConfig:
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": TARGETS, **settings})


def adapted(model: torch.nn.Module, *configs: peft.PeftConfig) -> torch.nn.Module:
    """Two configurations make two active adapters, default and second."""
    configs = copy.deepcopy(configs)  # peft writes into them
    peft_model = peft.get_peft_model(model, configs[0])
    for config in configs[1:]:
        peft_model.add_adapter("second", config)
        peft_model.base_model.set_adapter(["default", "second"])
    return randomize(peft_model)


@torch.no_grad()
def logits_of(model: torch.nn.Module) -> torch.Tensor:
    model.eval()
    return model(input_ids=TOKENS).logits.float()


def loss_of(model: torch.nn.Module) -> torch.Tensor:
    logits = model(input_ids=TOKENS).logits.float()
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())


def refilled(model: torch.nn.Module, masks: dict[str, torch.Tensor]) -> int:
    """Pruned weights that are not exactly +0 any more."""
    count = 0
    for name, mask in masks.items():
        owner, _, parameter = name.rpartition(".")
        module = model.get_submodule(name if "experts" not in name else owner)
        values = (module.weight if "experts" not in name else getattr(module, parameter))[~mask]
        count += int(((values != 0) | values.signbit()).sum())
    return count


class Convolutions(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(4, 6, 3)
        self.linear = torch.nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.conv(x).mean((2, 3)))


class Experts(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = torch.nn.Parameter(torch.randn(3, 16, 8))
        self.down_proj = torch.nn.Parameter(torch.randn(3, 8, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("ni,eoi,eho->nh", x, self.gate_up_proj, self.down_proj)


class Mixture(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router = torch.nn.Linear(8, 8)
        self.experts = Experts()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.experts(self.router(x))


@pytest.fixture
def pruned(make_model: MakeModel) -> Callable[..., torch.nn.Module]:
    return lambda dtype=torch.float32, **changes: prune(make_model(dtype, **changes))


FLAVOURS = {
    "plain": [lora()],
    "rslora": [lora(use_rslora=True)],
    "dora": [lora(use_dora=True)],
    "two": [lora(), lora(r=2, target_modules=["q_proj", "up_proj"])],
    "two dora": [lora(use_dora=True), lora(use_dora=True)],
    "dora and plain": [lora(use_dora=True), lora()],
    "bias": [lora(lora_bias=True)],
    "patterns": [lora(rank_pattern={"q_proj": 2}, alpha_pattern={"down_proj": 32})],
    "embedding": [lora(target_modules=[*TARGETS, "embed_tokens"])],
    "tokens": [lora(trainable_token_indices=[1, 5])],
    "saved": [lora(modules_to_save=["embed_tokens", "lm_head", "norm"])],
    "loha": [peft.LoHaConfig(r=4, target_modules=TARGETS)],
    "lokr": [peft.LoKrConfig(r=4, target_modules=TARGETS)],
    "ia3": [peft.IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"])],
    "oft": [peft.OFTConfig(oft_block_size=8, target_modules=TARGETS, use_cayley_neumann=False)],
    "vera": [peft.VeraConfig(r=4, target_modules=["o_proj"])],
    "boft": [peft.BOFTConfig(boft_block_size=8, target_modules=TARGETS)],
    "osf": [peft.OSFConfig(target_modules=TARGETS)],
}


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_merging_under_masks_is_merging_with_the_zeros_left(
    pruned: MakeModel, flavour: str
) -> None:
    model = pruned(attention_bias=True, mlp_bias=True)
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


def test_the_named_adapters_are_merged(pruned: MakeModel) -> None:
    model = pruned()
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


def test_a_pruned_module_that_was_trained_as_a_whole_is_masked(pruned: MakeModel) -> None:
    model = pruned()
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


def test_masks_from_before_an_initialisation_that_changes_the_base(pruned: MakeModel) -> None:
    model = pruned()
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
def test_every_initialisation_that_changes_the_base_is_known(pruned: MakeModel, init: str) -> None:
    """An adapter that was loaded says by its configuration how it was made."""
    peft_model = adapted(pruned(), lora())
    peft_model.peft_config["default"].init_lora_weights = init
    for use in (sparse_merge, mask_updates):
        with pytest.raises(ValueError, match=rf"\({init}\) changed the base weights"):
            use(peft_model)


def test_a_tied_weight_is_warned_of_as_peft_does(pruned: MakeModel) -> None:
    model = pruned(tie_word_embeddings=True)
    peft_model = adapted(model, lora(target_modules=["q_proj", "lm_head"]))
    with pytest.warns(UserWarning, match="tie_word_embeddings=True"):
        sparse_merge(peft_model, allow_dense=True)


def test_embeddings_that_are_no_longer_tied(pruned: MakeModel) -> None:
    peft_model = adapted(pruned(tie_word_embeddings=True), lora(modules_to_save=["embed_tokens"]))
    merged = sparse_merge(peft_model)
    assert merged.lm_head.weight is not merged.model.embed_tokens.weight
    assert not merged.config.tie_word_embeddings


MASKABLE = ["plain", "rslora", "dora", "two", "two dora", "dora and plain", "bias", "patterns"]


@pytest.mark.parametrize("flavour", MASKABLE)
def test_what_is_trained_masked_is_what_is_merged(pruned: MakeModel, flavour: str) -> None:
    model = pruned(attention_bias=True, mlp_bias=True)
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
def test_masking_after_training_makes_another_model(pruned: MakeModel, flavour: str) -> None:
    """Without masked updates, the merged model is not the one whose loss was trained."""
    peft_model = adapted(pruned(), *FLAVOURS[flavour])
    before = logits_of(peft_model)
    assert (logits_of(sparse_merge(peft_model)) - before).abs().max() > 0.05


@pytest.mark.parametrize("flavour", ["plain", "dora"])
def test_a_masked_adapter_that_is_loaded_again_merges_alike(
    pruned: MakeModel, flavour: str, tmp_path: Path
) -> None:
    peft_model = adapted(pruned(), *FLAVOURS[flavour])
    plain = {n: v.clone() for n, v in peft.get_peft_model_state_dict(peft_model).items()}
    mask_updates(peft_model)
    peft_model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(pruned(), tmp_path)
    state = peft.get_peft_model_state_dict(loaded)
    assert state.keys() == plain.keys()
    assert all(torch.equal(state[name], value) for name, value in plain.items())
    ours, theirs = sparse_merge(peft_model).state_dict(), sparse_merge(loaded).state_dict()
    assert all(torch.allclose(ours[name], value, atol=1e-6) for name, value in theirs.items())


@pytest.mark.parametrize("flavour", ["plain", "two dora"])
@pytest.mark.parametrize("safe", [True, False])
def test_merging_masked_updates_can_be_undone(pruned: MakeModel, flavour: str, safe: bool) -> None:
    model = pruned()
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


def test_masking_twice_masks_once(pruned: MakeModel) -> None:
    peft_model = adapted(pruned(), lora(use_dora=True))
    mask_updates(peft_model)
    masked = logits_of(peft_model)
    layer = peft_model.base_model.model.get_submodule(SOME)
    variant = layer.lora_variant["default"]
    mask_updates(peft_model)
    assert layer.lora_variant["default"] is variant
    assert torch.equal(logits_of(peft_model), masked)


def test_an_adapter_that_came_later_is_masked_by_calling_again(pruned: MakeModel) -> None:
    model = pruned()
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
def test_masked_training(pruned: MakeModel, flavour: str) -> None:
    model = pruned()
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
def test_bfloat16_with_adapters_in_float32(pruned: MakeModel, flavour: str) -> None:
    model = pruned(torch.bfloat16)
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


def test_dora_of_rows_that_are_all_zero(pruned: MakeModel) -> None:
    """Their norm is 0, by which peft divides; masked they stay as they are."""
    model = pruned()
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


def test_dense_modules_are_adapted_as_usual(pruned: MakeModel) -> None:
    model = pruned()
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


def test_an_adapter_that_is_merged_unmasked(pruned: MakeModel) -> None:
    """The zeros are not the masks then; whether that adapter is to be merged or another."""
    peft_model = adapted(pruned(), lora(), lora(target_modules=["up_proj"]))
    peft_model.merge_adapter(["default"])
    for use in (mask_updates, lambda m: sparse_merge(m, adapter_names=["second"])):
        with pytest.raises(ValueError, match=r"default is already merged .*unmerge_adapter\(\)"):
            use(peft_model)


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
    pruned: MakeModel, change: Callable, arguments: dict, match: str
) -> None:
    peft_model = adapted(pruned(), lora())
    change(peft_model)
    before = {name: value.clone() for name, value in peft_model.state_dict().items()}
    with pytest.raises(ValueError, match=match):
        sparse_merge(peft_model, **arguments)
    for name, value in peft_model.state_dict().items():
        same = value.is_meta or value.float().nan_to_num(9).equal(
            before[name].float().nan_to_num(9)
        )
        assert same, name


UNFIT = [
    ({SOME: torch.ones(2, 3) > 0}, r"down_proj has shape \[2, 3\], its weight \[64, 128\]: read"),
    ({"model.layers.9": torch.ones(1) > 0}, "has 'model.layers.9', which is no weight of"),
    ({SOME: torch.ones(64, 128)}, "down_proj is torch.float32: make it torch.bool"),
]


@pytest.mark.parametrize(("changes", "match"), UNFIT)
def test_masks_that_do_not_fit(pruned: MakeModel, changes: dict, match: str) -> None:
    model = pruned()
    masks = {**masks_of(model), **changes}
    peft_model = adapted(model, lora())
    with pytest.raises(ValueError, match=match):
        sparse_merge(peft_model, masks=masks)


def test_masks_that_are_given_are_those_that_hold(pruned: MakeModel) -> None:
    model = pruned()
    masks = masks_of(model)
    given = {SOME: masks[SOME].clone()}
    given[SOME][0] = True
    merged = sparse_merge(adapted(model, lora()), masks=given)
    assert (merged.get_submodule(SOME).weight[0] != 0).all()
    assert refilled(merged, masks | given) == 0


def test_many_dense_modules_are_counted(make_model: MakeModel) -> None:
    peft_model = adapted(make_model(), lora())
    with pytest.raises(ValueError, match=r"0\.self_attn\.q_proj, .*, .* and 6 more are zero"):
        sparse_merge(peft_model)
    with pytest.raises(ValueError, match="none of the adapted modules is pruned"):
        mask_updates(peft_model)


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
    pruned: MakeModel, config: peft.PeftConfig, match: str
) -> None:
    peft_model = peft.get_peft_model(pruned(), config)
    with pytest.raises(ValueError, match=match):
        sparse_merge(peft_model)


NOT_MASKABLE = [
    (peft.LoHaConfig(r=4, target_modules=TARGETS), "loha.layer.Linear, whose updates cannot be"),
    (
        lora(alora_invocation_tokens=[1], task_type="CAUSAL_LM"),
        "adapter 'default' of model.layers.0.self_attn.q_proj is a peft.*ALoraLinearVariant",
    ),
]


@pytest.mark.parametrize(("config", "match"), NOT_MASKABLE)
def test_updates_that_cannot_be_masked(
    pruned: MakeModel, config: peft.PeftConfig, match: str
) -> None:
    peft_model = peft.get_peft_model(pruned(), config)
    with pytest.raises(ValueError, match=f"{match}.*: train unmasked and sparse_merge"):
        mask_updates(peft_model)


@pytest.mark.parametrize("use", [sparse_merge, mask_updates])
def test_a_model_without_adapters(pruned: MakeModel, use: Callable) -> None:
    with pytest.raises(ValueError, match="is a LlamaForCausalLM, not a PeftModel: give what"):
        use(pruned())
    twice = peft.get_peft_model(adapted(pruned(), lora()), lora())
    with pytest.raises(
        ValueError, match=r"a PeftModel is inside this .*: call get_peft_model\(\) o"
    ):
        use(twice)


def test_updates_are_made_in_float32_under_autocast(
    pruned: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    peft_model = adapted(pruned(), lora())
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


def test_without_peft(pruned: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    model = pruned()
    hold_masks(model, torch.optim.SGD(model.parameters()))
    for use in (sparse_merge, mask_updates):
        with pytest.raises(ImportError, match=r"need peft: pip install 'dlp_plugin\[lora\]'"):
            use(model)


def test_weights_that_are_offloaded(pruned: MakeModel) -> None:
    """Their masks can be read, but what peft writes into an onloaded copy is lost."""
    model = pruned()
    masks = masks_of(model)
    peft_model = adapted(model, lora())
    base = model.get_submodule(SOME).base_layer
    offload_module(base, onload_device="cpu", offload_device="cpu")
    assert torch.equal(masks_of(peft_model)[SOME], masks[SOME])
    for use in (sparse_merge, mask_updates):
        with pytest.raises(ValueError, match="down_proj is offloaded, .*: call remove_dispatch"):
            use(peft_model)


def test_attention_of_torch() -> None:
    """Its projections are one parameter, and peft merges the last one twice."""
    model = torch.nn.Sequential(torch.nn.MultiheadAttention(8, 2))
    peft_model = peft.get_peft_model(model, lora(target_modules=["0"]))
    with pytest.raises(ValueError, match="0 .MultiheadAttention. has no weight of its own"):
        sparse_merge(peft_model)


def test_no_dense_update_is_kept_for_the_backward_pass(pruned: MakeModel) -> None:
    peft_model = adapted(pruned(), lora(target_modules=["down_proj"], use_dora=True))
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


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_full_fine_tuning_keeps_the_zeros(
    pruned: MakeModel, make: Callable, dtype: torch.dtype
) -> None:
    model = pruned(dtype)
    masks = masks_of(model)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimizer = make(model.parameters())
    handle = hold_masks(model, optimizer)

    def step() -> float:
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    losses = []
    for _ in range(4):
        losses.append(step())
        assert refilled(model, masks) == 0
    assert losses[-1] < losses[0]
    for name, value in model.named_parameters():
        if dtype is torch.float32:
            assert not torch.equal(value, before[name]), f"{name} was not trained"
    assert masks_of(model).keys() == masks.keys()
    handle.remove()
    step()
    assert refilled(model, masks) > 0


def test_an_optimizer_of_matrices_and_accelerates_around_it(pruned: MakeModel) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = pruned()
    masks = masks_of(model)
    matrices = [m.weight for n, m in linears_of(model).items() if n != "lm_head"]
    before = matrices[0].detach().clone()
    try:
        optimizer = accelerate.Accelerator(cpu=True).prepare(torch.optim.Muon(matrices, lr=0.01))
        hold_masks(model, optimizer)
        loss_of(model).backward()
        optimizer.step()
    finally:
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    assert not torch.equal(matrices[0], before)
    assert refilled(model, masks) == 0


def test_optimizers_that_have_nothing_to_hold(make_model: MakeModel, pruned: MakeModel) -> None:
    dense = make_model()
    with pytest.raises(ValueError, match="no module of the model is pruned .*: prune it first"):
        hold_masks(dense, torch.optim.SGD(dense.parameters()))
    model = pruned()
    with pytest.raises(ValueError, match="trains none of the pruned .* and 18 more: make it from"):
        hold_masks(model, torch.optim.SGD(model.lm_head.parameters()))
    peft_model = adapted(model, lora())
    adapters = [p for p in peft_model.parameters() if p.requires_grad]
    with pytest.raises(ValueError, match=r"for adapters of peft use mask_updates\(\)"):
        hold_masks(peft_model, torch.optim.SGD(adapters))


@pytest.mark.parametrize(("start", "holds"), [(None, False), (0, True)])
def test_what_the_hosts_modifier_does_instead(start: int | None, holds: bool) -> None:
    """It waits for a start, and takes weights up to 1e-8 for pruned; its zeros may be -0."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(16, 16)
    with torch.no_grad():
        linear.weight[:, ::2] = 0
        linear.weight[0, 1] = 5e-9
    mask = linear.weight != 0
    optimizer = torch.optim.AdamW(linear.parameters(), lr=0.1)
    with create_session() as session:
        session.initialize(
            recipe=ConstantPruningModifier(targets="Linear", start=start), model=linear
        )
        for _ in range(3):  # what the training loop has to fire
            LifecycleCallbacks.batch_start()
            linear(torch.randn(4, 16)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            LifecycleCallbacks.optim_post_step()
            LifecycleCallbacks.batch_end()
        session.finalize()
    pruned = linear.weight[~mask]
    assert bool((pruned == 0).all()) == holds
    assert bool(linear.weight[0, 1] == 0) == holds
    assert bool(((pruned == 0) & pruned.signbit()).any()) == holds
