"""The ADMM stage through ``oneshot()``: fed like the others, better at the same sparsity."""

from __future__ import annotations

import pytest
import torch
from helpers import (
    EVERY,
    MakeModel,
    assert_same,
    linears_of,
    prune,
    random_samples,
    recorded_inputs,
    refuses,
    run,
    weights_of,
    zeros,
    zeros_per_group,
)

from dlp_plugin import (
    ADMMPruningModifier,
    DLPModifier,
    Plan,
    SparseGPTModifier,
    WandaPruningModifier,
    last_plans,
)
from dlp_plugin.planning.structure import UNSTRUCTURED
from dlp_plugin.pruning.least_squares import LeastSquares


def test_a_plan_gives_every_block_its_sparsity(make_model: MakeModel) -> None:
    stage = ADMMPruningModifier(sparsity=0.6, **EVERY)
    model = prune(make_model(), DLPModifier(alpha=0.2), stage)
    (plan,) = last_plans()
    assert len({block.sparsity for block in plan.blocks}) == 3
    for block in plan.blocks:
        for linear in linears_of(model.get_submodule(block.name)).values():
            assert zeros(linear) == int(linear.weight.numel() * block.sparsity)
    assert torch.equal(model.lm_head.weight, make_model().lm_head.weight)
    assert stage.sparsity == 0.6


def test_a_linear_of_the_first_block_is_the_arithmetics(make_model: MakeModel) -> None:
    model = make_model()
    dense = weights_of(model)
    with recorded_inputs(model) as inputs:
        for row in random_samples():
            model(**{key: torch.tensor([value]) for key, value in row.items()})
    prune(model, ADMMPruningModifier(sparsity=0.7, dampening_frac=0.05, **EVERY))
    name = "model.layers.0.self_attn.q_proj"
    seen = torch.cat(inputs[name]).float()
    problem = LeastSquares(seen.T @ seen, 0.05)
    weight = dense[f"{name}.weight"]
    expected = problem.polished(weight, problem.pruned(weight, 0.7, UNSTRUCTURED))
    torch.testing.assert_close(
        model.get_submodule(name).weight.detach(), expected, rtol=1e-3, atol=1e-5
    )


@pytest.mark.parametrize("structure", ["2:4", "3:8"])
def test_an_n_for_every_block(make_model: MakeModel, structure: str) -> None:
    n, m = map(int, structure.split(":"))
    stage = ADMMPruningModifier(mask_structure=structure, **EVERY)
    model = prune(make_model(), DLPModifier(alpha=0.3), stage)
    (plan,) = last_plans()
    for block in plan.blocks:
        for linear in linears_of(model.get_submodule(block.name)).values():
            assert zeros_per_group(linear.weight, m) == {round(block.sparsity * m)}
    assert sum(block.sparsity * m for block in plan.blocks) == 3 * n


def test_a_block_that_is_to_stay_dense_does(make_model: MakeModel) -> None:
    stage = ADMMPruningModifier(
        sparsity=[0.0, 0.6, 0.6], targets=["LlamaDecoderLayer"], ignore=["re:.*lm_head"]
    )
    model = prune(make_model(), stage)
    for name, linear in linears_of(make_model().model.layers[0]).items():
        assert torch.equal(model.model.layers[0].get_submodule(name).weight, linear.weight)
    assert zeros(model.model.layers[1].mlp.up_proj) == int(64 * 128 * 0.6)


def test_less_is_lost_than_by_the_other_stages(make_model: MakeModel) -> None:
    """Of the model's outputs, on the samples that they all calibrate on."""
    samples = torch.tensor(random_samples()["input_ids"])
    with torch.no_grad():
        wanted = make_model()(samples).logits

    def error(kind: type) -> float:
        model = prune(make_model(), kind(sparsity=0.6, **EVERY))
        with torch.no_grad():
            return float((model(samples).logits - wanted).square().mean())

    admm, *others = map(error, (ADMMPruningModifier, SparseGPTModifier, WandaPruningModifier))
    assert admm < 0.9 * min(others)


@pytest.mark.parametrize("kind", [ADMMPruningModifier, SparseGPTModifier])
@pytest.mark.parametrize("structure", ["0:0", "4:8"])
def test_matrices_kept_on_the_cpu_and_the_same_run_again(
    make_model: MakeModel, kind: type, structure: str
) -> None:
    fields = {"sparsity": 0.5, "mask_structure": structure, **EVERY}
    first, second = (
        prune(make_model(), kind(offload_hessians=offload, **fields)) for offload in (False, True)
    )
    assert_same(weights_of(first), weights_of(second))


def test_the_recipe_reads_as_it_was_written_and_gives_the_same_again(
    make_model: MakeModel,
) -> None:
    text = """
    pruning_stage:
      pruning_modifiers:
        DLPModifier: {alpha: 0.2}
        ADMMPruningModifier:
          sparsity: 0.6
          dampening_frac: 0.02
          targets: [Linear]
          ignore: ["re:.*lm_head"]
    """
    from llmcompressor.core import active_session

    first = prune(make_model(), text)
    saved = active_session().get_serialized_recipe()
    assert "dampening_frac: 0.02" in saved
    assert "0.6" in saved
    second = prune(make_model(), saved)
    assert_same(weights_of(first), weights_of(second))
    assert isinstance(last_plans()[0], Plan)


def test_it_is_refused(make_model: MakeModel) -> None:
    def stage(**fields: object) -> ADMMPruningModifier:
        return ADMMPruningModifier(**{"sparsity": 0.5, **EVERY, **fields})

    refuses(make_model(), "ADMMPruningModifier.sparsity must be between 0 and 1", stage(sparsity=2))
    refuses(
        make_model(),
        "has 64 columns, which is not a multiple of 7",
        stage(sparsity=None, mask_structure="3:7"),
    )
    with pytest.raises(ValueError, match="dampening_frac"):
        stage(dampening_frac=0)
    with pytest.raises(ValueError, match="block_size"):
        stage(block_size=128)


def test_inputs_that_are_not_finite(make_model: MakeModel) -> None:
    model = make_model()
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[3] = torch.inf
    with pytest.raises(ValueError, match=r"inputs of model\.layers\.1\.self_attn.* hold infinite"):
        run(model, [ADMMPruningModifier(sparsity=0.5, **EVERY)], random_samples())
