"""Weights and inputs that are no numbers: refused by every stage, by name, before it prunes."""

from __future__ import annotations

import pytest
import torch
from helpers import EVERY, PRUNERS, MakeModel, linears_of, prune, refuses

from dlp_plugin import ADMMPruningModifier, MaskedGPTQModifier, OneShotMagnitudeModifier

NAME = "model.layers.0.self_attn.q_proj"
BY_SAMPLES = [kind for kind in [*PRUNERS, ADMMPruningModifier] if kind != OneShotMagnitudeModifier]
FORMS = [{"sparsity": 0.5}, {"mask_structure": "2:4"}]


def broken(model: torch.nn.Module, place: str, value: float) -> torch.nn.Module:
    with torch.no_grad():
        model.get_submodule(place).weight.flatten()[3] = value
    return model


@pytest.mark.parametrize("kind", [*PRUNERS, ADMMPruningModifier])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_a_weight(make_model: MakeModel, kind: type, form: dict, value: float) -> None:
    """By its own name, though what it returns is no number either."""
    model = broken(make_model(), NAME, value)
    message = f"weight of {NAME} holds infinite or undefined values: the checkpoint is damaged"
    refuses(model, message, kind(**form, **EVERY))


@pytest.mark.parametrize("kind", BY_SAMPLES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_an_input(make_model: MakeModel, kind: type, form: dict, value: float) -> None:
    model = broken(make_model(), "model.layers.0.input_layernorm", value)
    message = (
        f"the inputs of {NAME} hold infinite or undefined values: check the calibration data, load "
        "the model in a wider dtype, or leave the module out by ignore"
    )
    refuses(model, message, kind(**form, **EVERY))


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (NAME, f"weight of {NAME} holds infinite or undefined values"),
        ("model.layers.0.input_layernorm", f"the inputs of {NAME} hold infinite or undefined"),
    ],
)
def test_at_4_bits(make_model: MakeModel, place: str, message: str) -> None:
    model = broken(make_model(), place, torch.nan)
    before = {name: linear.weight.clone() for name, linear in linears_of(model).items()}
    weights = {"num_bits": 4, "strategy": "group", "group_size": 32}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    with pytest.raises(ValueError, match=message):
        prune(model, MaskedGPTQModifier(config_groups=groups, ignore=["lm_head"]))
    for name, linear in linears_of(model).items():
        torch.testing.assert_close(linear.weight, before[name], rtol=0, atol=0, equal_nan=True)
