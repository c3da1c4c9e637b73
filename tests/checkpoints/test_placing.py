"""Models that no device has room for, and models that are let go.

Without a GPU the CPU stands for one: what it has no room for lies on disk. ``tests/test_gpu.py``
has the same where the CPU's memory takes the rest.
"""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import SHIPPED, MakeModel, assert_same, prune, recipe, weights_of
from lm_tasks import write_task
from transformers import AutoTokenizer, LlamaForCausalLM

from dlp_plugin.checkpoints.placing import let_go, placed, spread
from dlp_plugin.evaluation.causal import check_causal
from dlp_plugin.evaluation.finite import check_finite
from dlp_plugin.evaluation.perplexity import perplexity
from dlp_plugin.evaluation.zeroshot import zero_shot

Spread = Callable[[LlamaForCausalLM], LlamaForCausalLM]
WINDOWS = list(torch.arange(96).view(3, 32))


@pytest.fixture
def on_two(tmp_path: Path) -> Spread:
    """Leaves no room in memory for a model's last parts, which go to disk."""

    def halved(model: LlamaForCausalLM) -> LlamaForCausalLM:
        room = sum(weight.nbytes for weight in model.parameters()) - 1
        found = spread(model, {"cpu": room}, main_device="cpu", offload_dir=tmp_path / "rest")
        assert {str(weight.device) for weight in found.parameters()} == {"cpu", "meta"}
        return found

    return halved


def test_a_model_that_is_spread_computes_what_it_does_whole(
    make_model: MakeModel, on_two: Spread
) -> None:
    model = on_two(make_model())
    check_causal(model, "this")
    assert perplexity(model, WINDOWS) == perplexity(make_model(), WINDOWS)


def test_blocks_are_not_taken_apart(make_model: MakeModel, on_two: Spread) -> None:
    for block in on_two(make_model()).model.layers:
        assert len({weight.device for weight in block.parameters()}) == 1


def test_zero_shot_takes_it(make_model: MakeModel, on_two: Spread, tmp_path: Path) -> None:
    write_task(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED)
    whole, halved = (make_model(vocab_size=len(tokenizer)) for _ in range(2))
    found, expected = (
        zero_shot(model, tokenizer, "continuation", limit=4, task_folder=tmp_path)
        for model in (on_two(halved), whole)
    )
    assert found == expected


def test_a_weight_that_is_not_finite_is_named_wherever_it_lies(
    on_two: Spread, make_model: MakeModel
) -> None:
    model, name = make_model(), "model.layers.2.mlp.up_proj.weight"
    with pytest.raises(ValueError, match="its weights are finite"):
        check_finite(math.nan, "this", on_two(model))
    let_go(model)
    model = make_model()
    model.get_parameter(name).data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=f"this is nan; {name} holds NaN"):
        check_finite(perplexity(on_two(model), WINDOWS), "this", model)


def test_there_is_room(make_model: MakeModel) -> None:
    """Then the model is on one device, and nothing hooks into it."""
    model = placed(make_model())
    assert len({weight.device for weight in model.parameters()}) == 1
    assert not hasattr(model, "_hf_hook")


@pytest.mark.parametrize("made", ["spread", "pruned", "plain"])
def test_of_a_model_that_is_let_go_nothing_stays_in_memory(
    made: str, make_model: MakeModel, on_two: Spread
) -> None:
    model = make_model()
    if made != "plain":
        model = on_two(model) if made == "spread" else prune(model, recipe())
    let_go(model)
    assert {weight.device.type for weight in model.parameters()} == {"meta"}


def test_another_model_is_left_alone(make_model: MakeModel) -> None:
    kept, gone = make_model(), make_model()
    before = weights_of(kept)
    let_go(gone)
    assert_same(weights_of(kept), before)
