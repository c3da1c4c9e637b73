"""Distillation of quantized models: scales, norms and biases are trained, integers stay."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
from families import FAMILIES, make
from helpers import (
    EVERY,
    MakeModel,
    as_if_loaded,
    assert_same,
    divergence,
    kept_on_disk,
    linears_of,
    prune,
    random_samples,
    refuses,
    run,
    sharpened,
    weights_of,
)
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from dlp_plugin import MaskedGPTQModifier, WandaPruningModifier
from dlp_plugin.pruning.scales import Scales

MANY = random_samples(32, 64)
SAMPLES = torch.tensor(MANY["input_ids"])

GROUPS = {"num_bits": 4, "strategy": "group", "group_size": 32}
WEIGHTS = [
    GROUPS,
    {**GROUPS, "symmetric": False},
    {"num_bits": 4, "strategy": "channel"},
    {"num_bits": 8, "strategy": "tensor"},
    {**GROUPS, "num_bits": 2, "actorder": None},
]
IDS = ["groups", "zero points", "rows", "matrices", "2 bits in order"]

Model = torch.nn.Module
distance = partial(divergence, samples=SAMPLES)


def quantizer(weights: dict[str, object] = GROUPS, **fields: object) -> MaskedGPTQModifier:
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return MaskedGPTQModifier(config_groups=groups, ignore=EVERY["ignore"], **fields)


def quantized(model: Model, *before: object, **arguments: object) -> Model:
    return run(model, [*before, quantizer(**arguments)], MANY)


def sharp(make_model: MakeModel, dtype: torch.dtype = torch.float32) -> Model:
    return sharpened(make_model(dtype))


def integers(model: Model) -> dict[str, torch.Tensor]:
    return {
        name: quantize(
            linear.weight,
            linear.weight_scale,
            linear.weight_zero_point,
            linear.quantization_scheme.weights,
        )
        for name, linear in linears_of(model).items()
        if hasattr(linear, "weight_scale")
    }


@pytest.mark.parametrize("weights", WEIGHTS, ids=IDS)
def test_predictions_come_nearer_and_integers_stay(
    make_model: MakeModel, weights: dict[str, object]
) -> None:
    plain = quantized(sharp(make_model), weights=weights)
    distilled = quantized(sharp(make_model), weights=weights, distill=2)
    assert_same(integers(distilled), integers(plain))
    assert distance(distilled, sharp(make_model)) < distance(plain, sharp(make_model))
    for name, linear in linears_of(distilled).items():
        if name in integers(plain):
            assert not torch.equal(linear.weight_scale, linears_of(plain)[name].weight_scale)
            stored = dequantize(
                integers(plain)[name],
                linear.weight_scale,
                linear.weight_zero_point,
                linear.quantization_scheme.weights,
            )
            torch.testing.assert_close(linear.weight, stored)


def test_what_is_trained(make_model: MakeModel) -> None:
    """Nothing but the quantized weights' scales, and norms."""
    found = weights_of(quantized(sharp(make_model), distill=1))
    plain = weights_of(quantized(sharp(make_model)))
    changed = {name for name, value in found.items() if not torch.equal(value, plain[name])}
    kinds = [f"self_attn.{kind}_proj" for kind in "qkvo"]
    kinds += [f"mlp.{kind}_proj" for kind in ("gate", "up", "down")]
    scales = {f"{kind}.{part}" for kind in kinds for part in ("weight", "weight_scale")}
    norms = {"input_layernorm.weight", "post_attention_layernorm.weight"}
    assert changed == {f"model.layers.{n}.{kind}" for n in range(3) for kind in scales | norms}


def test_experts_that_saw_no_token(tmp_path: Path) -> None:
    """They are rounded to nearest, and their scales stay."""
    family = FAMILIES["mixtral"]

    def quantized_on_little(**fields: object) -> Model:
        config = family.config()
        config.num_local_experts, config.num_experts_per_tok = 16, 1
        model = sharpened(make(config, tmp_path, family.kind))
        stage = quantizer({**GROUPS, "group_size": 16}, **fields)
        stage.ignore = [*EVERY["ignore"], "re:.*gate$"]
        return run(model, [stage], random_samples(4, 4), moe_calibrate_all_experts=False)

    model, plain = quantized_on_little(distill=1), quantized_on_little()
    assert_same(integers(model), integers(plain))
    scales = {n: v for n, v in weights_of(model).items() if n.endswith("weight_scale")}
    changed = {n for n, v in scales.items() if not torch.equal(v, weights_of(plain)[n])}
    assert all(torch.isfinite(scale).all() for scale in scales.values())
    experts = [name for name in scales if "experts" in name]
    assert 0 < len([name for name in experts if name in changed]) < len(experts)


def test_a_model_on_disk(make_model: MakeModel, tmp_path: Path) -> None:
    """The same scales as of one in memory."""
    on_disk = quantized(kept_on_disk(sharp(make_model), tmp_path), distill=1)
    in_memory = quantized(LlamaForCausalLM.from_pretrained(tmp_path / "source"), distill=1)
    for name, value in weights_of(in_memory).items():
        torch.testing.assert_close(weights_of(on_disk)[name], value, atol=1e-5, rtol=1e-4)


def test_zeros_stay_and_the_pruned_model_is_the_teacher(make_model: MakeModel) -> None:
    def stage() -> WandaPruningModifier:
        return WandaPruningModifier(sparsity=0.6, **EVERY)

    pruned = run(sharp(make_model), [stage()], MANY)
    plain = quantized(sharp(make_model), stage())
    distilled = quantized(sharp(make_model), stage(), distill=2)
    assert distance(distilled, pruned) < distance(plain, pruned)
    for name, linear in linears_of(distilled).items():
        zeros = linears_of(pruned)[name].weight == 0
        assert not linear.weight[zeros].any(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_saved_is_what_was_trained(
    make_model: MakeModel, tmp_path: Path, dtype: torch.dtype
) -> None:
    model = quantized(sharp(make_model, dtype), distill=1)
    model.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=dtype)
    lost = distance(model, sharp(make_model, dtype))
    assert distance(loaded, model) < (1e-6 if dtype == torch.float32 else 0.01 * lost)


@pytest.mark.parametrize("shape", [(3, 4), (3, 1), (1,)], ids=["groups", "rows", "matrix"])
def test_the_slope_is_that_of_the_scales(shape: tuple[int, ...]) -> None:
    """By hand: the weight is integers times scales times factors."""
    torch.manual_seed(0)
    scale, integer = torch.rand(shape) + 0.5, torch.randint(-8, 8, (3, 8)).float()

    def weight(factors: torch.Tensor) -> torch.Tensor:
        each = scale * factors
        return integer * (each.repeat_interleave(8 // shape[-1], 1) if len(shape) > 1 else each)

    linear = torch.nn.Linear(8, 3, bias=False)
    linear.register_parameter("weight_scale", torch.nn.Parameter(scale.clone()))
    factors = torch.ones(shape, requires_grad=True)
    scales = Scales(linear, weight(factors).detach())
    direction = torch.randn(3, 8)
    (expected,) = torch.autograd.grad((weight(factors) * direction).sum(), factors)
    torch.testing.assert_close(scales.slope(direction), expected)

    with torch.no_grad():
        scales.values.copy_(moved := torch.rand(shape) + 0.5)
        scales.spread()
    torch.testing.assert_close(scales.leaf.detach(), weight(moved))
    scales.write(moved)
    torch.testing.assert_close(linear.weight.detach(), weight(moved))
    torch.testing.assert_close(linear.weight_scale.detach(), scale * moved)


class TestBadInput:
    @pytest.mark.parametrize(
        ("scheme", "problem"),
        [
            ("W8A8", "quantizes activations"),
            ("MXFP4A16", "has no integers"),
            ("W4A16", None),
        ],
    )
    def test_schemes(self, tmp_path: Path, scheme: str, problem: str | None) -> None:
        sizes = {"hidden_size": 128, "intermediate_size": 128, "vocab_size": 256}
        config = LlamaConfig(num_hidden_layers=1, num_attention_heads=2, **sizes)
        model = as_if_loaded(LlamaForCausalLM(config), tmp_path)
        stage = MaskedGPTQModifier(scheme=scheme, distill=1, **EVERY)
        if problem is None:
            prune(model, stage)
        else:
            refuses(model, f"MaskedGPTQModifier.distill trains .* {problem}: take one", stage)

    def test_one_batch(self, make_model: MakeModel) -> None:
        with pytest.raises(ValueError, match="MaskedGPTQModifier.distill holds out one of eight"):
            run(make_model(), [quantizer(distill=1)], random_samples(1))

    def test_all_modifiers_at_once(self, make_model: MakeModel) -> None:
        stages = [WandaPruningModifier(sparsity=0.5, **EVERY), quantizer(distill=1)]
        with pytest.raises(ValueError, match="MaskedGPTQModifier.distill trains before the next"):
            run(make_model(), stages, MANY, pipeline="sequential")
