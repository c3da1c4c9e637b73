"""Training the weights themselves: an optimizer keeps the zeros."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from adapted_models import MakeModel, adapted, lora, loss_of, prune, refilled
from helpers import linears_of
from llmcompressor.core import LifecycleCallbacks, create_session
from llmcompressor.modifiers.pruning.constant import ConstantPruningModifier

from dlp_plugin.recovery import hold_masks, masks_of

OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_full_fine_tuning_keeps_the_zeros(
    make_model: MakeModel, make: Callable, dtype: torch.dtype
) -> None:
    model = prune(make_model(dtype))
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


def test_an_optimizer_of_matrices_and_accelerates_around_it(make_model: MakeModel) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = prune(make_model())
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


def test_optimizers_that_have_nothing_to_hold(make_model: MakeModel) -> None:
    dense = make_model()
    with pytest.raises(ValueError, match="no module of the model is pruned .*: prune it first"):
        hold_masks(dense, torch.optim.SGD(dense.parameters()))
    model = prune(make_model())
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
