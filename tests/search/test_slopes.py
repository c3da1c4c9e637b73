"""The cost of one more pruned weight: read off one backward pass, against a naive twin."""

import math

import pytest
import torch
from helpers import MakeModel, random_samples

from dlp_plugin.planning.structure import UNSTRUCTURED, MaskStructure
from dlp_plugin.scoring import predictions
from dlp_plugin.scoring.blocks import Block
from dlp_plugin.search import slopes as module
from dlp_plugin.search.masks import Masks
from dlp_plugin.search.slopes import Slopes


def batches(samples: int = 3, length: int = 16) -> list[dict[str, torch.Tensor]]:
    return [
        {"input_ids": torch.tensor([ids])} for ids in random_samples(samples, length)["input_ids"]
    ]


def blocks_of(model: torch.nn.Module) -> list[Block]:
    return [
        Block(
            f"model.layers.{i}",
            {
                f"model.layers.{i}.{name}": linear
                for name, linear in layer.named_modules()
                if isinstance(linear, torch.nn.Linear)
            },
        )
        for i, layer in enumerate(model.model.layers)
    ]


def masks_of(blocks: list[Block], by_magnitude: tuple[str, ...] = ()) -> Masks:
    linears = {name: linear for block in blocks for name, linear in block.linears.items()}
    generator = torch.Generator().manual_seed(1)
    norms = {n: torch.rand(m.in_features, generator=generator) + 0.1 for n, m in linears.items()}
    return Masks(linears, norms, by_magnitude)


def naive_costs(
    model: torch.nn.Module,
    masks: Masks,
    sparsities: dict[str, float],
    structure: MaskStructure = UNSTRUCTURED,
    by_magnitude: tuple[str, ...] = (),
) -> dict[str, float]:
    """As the formula stands: ranks of all weights, all gradients at once, the whole vocabulary."""
    dense = [model(**batch).logits[0].log_softmax(-1).detach() for batch in batches()]
    seen, before = {}, {}
    for name, sparsity in sparsities.items():
        linear = masks.linears[name]
        weight = before[name] = linear.weight.detach().clone()
        whole = name in by_magnitude and not structure
        norms = torch.ones(weight.shape[1]) if name in by_magnitude else masks.norms[name]

        def rank_of(rows: torch.Tensor, whole: bool = whole, norms: object = norms) -> torch.Tensor:
            """Places among what is ranked together: a matrix, groups, or rows."""
            scores = rows.abs() * norms
            if whole:
                scores = scores.view(1, -1)
            elif structure:
                scores = scores.unflatten(1, (-1, structure.m))
            return scores.argsort(-1).argsort(-1)

        rank = rank_of(weight)
        count = int(rank.shape[-1] * sparsity)
        linear.weight.data *= (rank >= count).view(weight.shape)
        rows = slice(None, None, max(1, len(weight) // module.ROWS))
        rank = rank_of(weight[rows])
        if whole:
            count = count * rank.numel() // weight.numel()
        width = 1 if structure else max(1, int(module.BAND * rank.shape[-1]))
        near = (rank >= count - width) & (rank < count + width)
        seen[name] = rows, near.view(weight[rows].shape)
    tokens = 0
    model.zero_grad()
    for batch, logs in zip(batches(), dense, strict=True):
        pruned = model(**batch).logits[0].log_softmax(-1)
        (logs.exp() * (logs - pruned)).sum().backward()
        tokens += len(logs)
    costs = {}
    for name, (rows, near) in seen.items():
        linear = masks.linears[name]
        cost = -(before[name] * linear.weight.grad)[rows][near].mean()
        costs[name] = cost.item() / tokens
        linear.weight.data = before[name]
    model.zero_grad()
    return costs


@pytest.mark.parametrize("structure", [UNSTRUCTURED, MaskStructure(4, 8)])
@pytest.mark.parametrize("magnitude", [(), ("model.layers.1.mlp.up_proj",)])
@pytest.mark.parametrize("rows", [256, 16])
def test_costs_are_those_of_the_formula(
    make_model: MakeModel,
    monkeypatch: pytest.MonkeyPatch,
    structure: MaskStructure,
    magnitude: tuple[str, ...],
    rows: int,
) -> None:
    """Read off all rows, or off sixteen of them."""
    monkeypatch.setattr(module, "ROWS", rows)
    model = make_model().eval()
    blocks = blocks_of(model)
    masks = masks_of(blocks, magnitude)
    sparsities = {name: (2 + i % 4) / 8 for i, name in enumerate(masks.linears)}
    expected = naive_costs(model, masks, sparsities, structure, magnitude)
    found, tokens = Slopes(model, blocks, masks, batches()).at(sparsities, [0], structure)
    assert tokens == 48
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-9)
    assert len(set(found.values())) == len(found)


def is_its_own(model: torch.nn.Module) -> bool:
    """Whether every module's forward is that of its class."""
    return all(m.forward.__func__ is type(m).forward for m in model.modules())


def test_nothing_is_left_behind(make_model: MakeModel) -> None:
    """No gradient of a weight, no changed weight, no forward of ours, and the mode as it was."""
    model = make_model().train()
    blocks = blocks_of(model)
    masks = masks_of(blocks)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    Slopes(model, blocks, masks, batches()).at(dict.fromkeys(masks.linears, 0.5), [0])
    assert all(parameter.grad is None for parameter in model.parameters())
    assert is_its_own(model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model.training


def test_frozen_weights_are_enough(make_model: MakeModel) -> None:
    model = make_model()
    blocks = blocks_of(model)
    masks = masks_of(blocks)
    sparsities = dict.fromkeys(masks.linears, 0.5)
    free = Slopes(model, blocks, masks, batches()).at(sparsities, [0])
    model.requires_grad_(False)
    assert Slopes(model, blocks, masks, batches()).at(sparsities, [0]) == free


def test_weights_at_either_end(make_model: MakeModel) -> None:
    """A Linear that is dense, or empty, has a threshold too."""
    model = make_model()
    blocks = blocks_of(model)
    masks = masks_of(blocks)
    for structure in (UNSTRUCTURED, MaskStructure(2, 4)):
        for sparsity in (0.0, 1.0):
            costs, _ = Slopes(model, blocks, masks, batches()).at(
                dict.fromkeys(masks.linears, sparsity), [0], structure
            )
            assert all(cost == cost for cost in costs.values())


@pytest.mark.parametrize("by_magnitude", [False, True])
def test_what_is_pruned_already_costs_nothing_more(
    make_model: MakeModel, by_magnitude: bool
) -> None:
    """Whose zeros reach beyond the threshold and the band about it."""
    model = make_model()
    blocks = blocks_of(model)
    masks = masks_of(blocks)
    with torch.no_grad():
        for linear in masks.linears.values():
            linear.weight[:, : linear.in_features * 3 // 4] = 0
    first, *others = masks.linears
    masks = masks_of(blocks, tuple(masks.linears) if by_magnitude else ())
    sparsities = {first: 0.8, **dict.fromkeys(others, 0.5)}
    costs, _ = Slopes(model, blocks, masks, batches()).at(sparsities, [0])
    assert math.isfinite(costs[first])
    assert costs[first] != 0
    assert [costs[name] for name in others] == [0] * len(others)


def test_steps_go_through_the_samples_one_portion_after_the_other(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TOGETHER", 16)
    model = make_model()
    blocks = blocks_of(model)
    slopes = Slopes(model, blocks, masks_of(blocks), batches(5, 16))
    assert [slopes.portion(step, 32) for step in range(4)] == [[0, 1], [2, 3], [4, 0], [1, 2]]
    assert slopes.portion(0, 1) == [0]
    assert slopes.portion(3, 1000) == [0, 1, 2, 3, 4]  # all there is, each once


def test_a_step_runs_no_more_tokens_where_samples_are_longer(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are cut, and steps see the beginnings of all before what follows these."""
    monkeypatch.setattr(module, "TOGETHER", 16)
    model = make_model()
    blocks = blocks_of(model)
    slopes = Slopes(model, blocks, masks_of(blocks), batches(2, 40))
    sparsities = dict.fromkeys(slopes._masks.linears, 0.5)
    ran = [slopes.at(sparsities, slopes.portion(step, 16))[1] for step in range(6)]
    assert ran == [16, 16, 16, 16, 16, 16]  # the last of two ends of eight tokens


def peak_bytes(model: torch.nn.Module, tokens: int) -> int:
    """Most memory that one backward pass takes beyond what was there."""
    blocks = blocks_of(model)
    masks = masks_of(blocks)
    slopes = Slopes(model, blocks, masks, batches(1, tokens))
    sparsities = dict.fromkeys(masks.linears, 0.5)
    slopes.at(sparsities, [0])  # thresholds are there from now on
    with torch.profiler.profile(profile_memory=True) as profile:
        slopes.at(sparsities, [0])
    held = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def test_memory_grows_by_one_tensor_a_block(make_model: MakeModel) -> None:
    """Of every block its input is kept; its activations are made again, block by block."""
    tokens, hidden = 128, 64
    few, many = (peak_bytes(make_model(num_hidden_layers=blocks), tokens) for blocks in (2, 10))
    inputs = 4 * tokens * hidden
    assert many - few < 8 * 2 * inputs
    # what a block's backward would hold besides: inputs and outputs of seven Linears
    assert 8 * 4 * tokens * (7 * hidden + 4 * 128) > 4 * (many - few)


def test_of_a_large_vocabulary_logits_and_their_gradient_are_in_memory(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing as large besides."""
    monkeypatch.setattr(predictions, "WIDE", 64)
    tokens, vocabulary = 1024, 8192
    small, large = (
        peak_bytes(make_model(vocab_size=size, attn_implementation="sdpa"), tokens)
        for size in (vocabulary // 2, vocabulary)
    )
    assert large - small < 2.5 * 4 * tokens * vocabulary / 2


def test_no_room_is_told_with_the_remedy(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    model = make_model()
    blocks = blocks_of(model)
    masks = masks_of(blocks)
    monkeypatch.setattr(torch.autograd, "grad", full)
    with pytest.raises(MemoryError, match=r"take shorter samples \(max_seq_length\), or search: e"):
        Slopes(model, blocks, masks, batches()).at(dict.fromkeys(masks.linears, 0.5), [0])
    assert is_its_own(model)


def test_a_model_without_gradients_is_told(make_model: MakeModel) -> None:
    model = make_model()
    blocks = blocks_of(model)
    masks = masks_of(blocks)
    model.model.forward = torch.no_grad()(model.model.forward)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="LlamaForCausalLM has no gradient.*take search: evol"):
        Slopes(model, blocks, masks, batches()).at(dict.fromkeys(masks.linears, 0.5), [0])
