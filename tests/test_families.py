"""Architectures: tiny random models of many families through the real ``oneshot()``.

Each plan is compared with the naive definition in float64, each Linear's zeros with its
block's sparsity, and what the host cannot prune fails with a message that says so.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import (
    VOCABULARY,
    as_if_loaded,
    linears_of,
    naive_scores_of,
    naive_sparsities,
    random_samples,
    recorded_inputs,
    run,
    zeros,
)
from llmcompressor.modeling.moe.linearize import get_non_linearized_moes, linearize_moe
from llmcompressor.modifiers.pruning import WandaPruningModifier
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BertConfig,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from dlp_plugin import DLPModifier
from dlp_plugin.blocks import outer_block

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
ENCODER = {k: v for k, v in SIZES.items() if k not in ("num_key_value_heads", "head_dim")}
OPT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "ffn_dim": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "word_embed_proj_dim": 32,
    "pad_token_id": 0,
}

FAMILIES: dict[str, tuple[Callable[[], PreTrainedConfig], str, int]] = {
    # configuration, where the blocks are, prunable Linears in each
    "llama": (lambda: LlamaConfig(**SIZES), "model.layers", 7),
    "mistral": (lambda: MistralConfig(**SIZES, sliding_window=16), "model.layers", 7),
    "qwen3": (lambda: Qwen3Config(**SIZES), "model.layers", 7),
    "gemma3": (lambda: Gemma3TextConfig(**SIZES, sliding_window=16), "model.layers", 7),
    "phi3": (lambda: Phi3Config(**SIZES), "model.layers", 4),
    "opt": (lambda: OPTConfig(**OPT), "model.decoder.layers", 6),
    "mixtral": (lambda: MixtralConfig(**SIZES, **EXPERTS), "model.layers", 4 + 3 * 4),
    "qwen3_moe": (
        lambda: Qwen3MoeConfig(
            **SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32
        ),
        "model.layers",
        4 + 3 * 4,
    ),
    "bert": (lambda: BertConfig(**ENCODER), "bert.encoder.layer", 6),
}


def make(config: PreTrainedConfig, folder: object) -> torch.nn.Module:
    torch.manual_seed(0)
    config._attn_implementation = "eager"
    kind = AutoModelForMaskedLM if isinstance(config, BertConfig) else AutoModelForCausalLM
    model = kind.from_config(config).float().eval()
    for parameter in model.parameters():  # unlike blocks, and no weight at exactly zero
        parameter.data += 0.02 * (1 + torch.rand(())) * torch.randn(parameter.shape)
    return as_if_loaded(model, folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_family(family: str, tmp_path: Path) -> None:
    config, prefix, count = FAMILIES[family]
    dataset = random_samples()

    # What the host shows each Linear, seen from outside while a plan is made. Every block
    # runs twice in an epoch: a common factor of all norms, which drops out.
    scored = make(config(), tmp_path)
    if get_non_linearized_moes(scored):
        linearize_moe(scored)
    blocks = [f"{prefix}.{i}" for i in range(3)]
    names: dict[str, list[str]] = {block: [] for block in blocks}
    for name in linears_of(scored):
        if (block := outer_block(name, blocks)) is not None:
            names[block].append(name)
    assert [len(group) for group in names.values()] == [count] * 3
    with recorded_inputs(scored) as inputs:
        only_plan = DLPModifier(sparsity=0.6, alpha=0.1, plan_path=str(tmp_path / "plan.json"))
        run(scored, [only_plan], dataset)
    naive = naive_scores_of(scored, inputs, names)
    expected = naive_sparsities([s["median"] for s in naive.values()], 0.6, 0.1)

    dlp = DLPModifier(alpha=0.1)
    stage = WandaPruningModifier(sparsity=0.6, targets=["Linear"])
    model = make(config(), tmp_path)
    run(model, [dlp, stage], dataset)

    assert dlp.plan.blocks == only_plan.plan.blocks
    assert dlp.plan.unseen == ()
    assert [block.name for block in dlp.plan.blocks] == blocks
    assert [b.sparsity for b in dlp.plan.blocks] == pytest.approx(expected, abs=1e-6)
    linears = linears_of(model)
    for block in dlp.plan.blocks:
        for name in names[block.name]:
            linear = linears[name]
            pruned = int(linear.in_features * block.sparsity) * linear.out_features
            assert zeros(linear) == pruned, name
    for name in linears.keys() - {name for group in names.values() for name in group}:
        assert zeros(linears[name]) == 0, name


def test_experts_that_saw_no_token_are_named_and_stay_dense(tmp_path: Path) -> None:
    config = Qwen3MoeConfig(
        **SIZES, num_experts=16, num_experts_per_tok=1, moe_intermediate_size=32
    )
    dlp = DLPModifier(alpha=0.1)
    stage = WandaPruningModifier(sparsity=0.6, targets=["Linear"], ignore=["re:.*lm_head"])
    model = make(config, tmp_path)
    run(model, [dlp, stage], random_samples(1, 8), moe_calibrate_all_experts=False)
    linears = linears_of(model)
    assert 0 < len(dlp.plan.unseen) < 3 * 3 * 16
    for name in dlp.plan.unseen:
        assert ".experts." in name
        assert zeros(linears[name]) == 0, name
    for block in dlp.plan.blocks:
        inside = [n for n in linears if outer_block(n, [block.name])]
        seen = [n for n in inside if n not in dlp.plan.unseen]
        assert block.weights == sum(linears[n].weight.numel() for n in seen)
        assert all(zeros(linears[n]) for n in seen)
    assert dlp.plan.sparsity == pytest.approx(0.6, abs=1e-9)


def test_what_the_host_cannot_prune_is_told(tmp_path: Path) -> None:
    """GPT-2's projections are Conv1D modules, which the stock stages pass over."""
    sizes = {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4}
    stage = WandaPruningModifier(sparsity=0.6, targets=["Linear"], ignore=["re:.*lm_head"])
    with pytest.raises(ValueError, match="prunes no Linear in any block"):
        run(make(GPT2Config(**sizes), tmp_path), [DLPModifier(), stage], random_samples())
    only_plan = DLPModifier(sparsity=0.6, plan_path=str(tmp_path / "plan.json"))
    with pytest.raises(ValueError, match="no Linear in any block of GPT2LMHeadModel"):
        run(make(GPT2Config(**sizes), tmp_path), [only_plan], random_samples())
