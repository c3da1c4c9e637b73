"""Losses of a model as if it were pruned, against really pruning it."""

import pytest
import torch
from helpers import MakeModel, random_samples
from torch.nn import functional

from dlp_plugin.planning.structure import MaskStructure
from dlp_plugin.search.judge import Judge
from dlp_plugin.search.masks import Masks


def batches(samples: int = 6, length: int = 16) -> list[dict[str, torch.Tensor]]:
    rows = random_samples(samples, length)
    return [
        {"input_ids": torch.tensor([ids]), "attention_mask": torch.tensor([mask])}
        for ids, mask in zip(rows["input_ids"], rows["attention_mask"], strict=True)
    ]


def parts(model: torch.nn.Module) -> tuple[dict, dict]:
    linears = {
        name: module
        for name, module in model.model.layers.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    generator = torch.Generator().manual_seed(1)
    norms = {
        name: torch.rand(linear.in_features, generator=generator) + 0.1
        for name, linear in linears.items()
    }
    return linears, norms


def really_prune(linears: dict, norms: dict, sparsities: dict[str, float]) -> None:
    """Wanda as written: in each row the ``int(columns * sparsity)`` smallest scores go."""
    for name, sparsity in sparsities.items():
        weight = linears[name].weight.data
        order = (weight.abs().float() * norms[name]).sort(dim=1, stable=True).indices
        weight.scatter_(1, order[:, : int(weight.shape[1] * sparsity)], 0)


@torch.no_grad()
def logits_of(model: torch.nn.Module) -> torch.Tensor:
    """All samples' logits in float64, ``[samples, tokens, vocabulary]``."""
    rows = [model(input_ids=batch["input_ids"], use_cache=False).logits for batch in batches()]
    return torch.cat(rows).double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_and_divergence_are_those_of_the_really_pruned_model(
    make_model: MakeModel, dtype: torch.dtype
) -> None:
    model = make_model(dtype)
    linears, norms = parts(model)
    before = {name: linear.weight.clone() for name, linear in linears.items()}
    names = list(linears)
    sparsities = {name: 0.2 + 0.03 * i for i, name in enumerate(names[:-1])} | {names[-1]: 0.001}
    judge = Judge(model, Masks(linears, norms), batches())
    dense = logits_of(model).log_softmax(-1)
    loss, divergence = judge.loss(sparsities), judge.divergence(sparsities)
    for name, linear in linears.items():
        assert torch.equal(linear.weight, before[name])
    assert torch.equal(logits_of(model).log_softmax(-1), dense), "a forward was left masked"

    really_prune(linears, norms, sparsities)
    pruned = logits_of(model).log_softmax(-1)
    wanted = torch.cat([batch["input_ids"] for batch in batches()])[:, 1:]
    expected = functional.nll_loss(pruned[:, :-1].flatten(0, 1), wanted.flatten()).item()
    assert loss == pytest.approx(expected, rel=1e-5 if dtype is torch.float32 else 1e-2)
    expected = (dense.exp() * (dense - pruned)).sum(-1).mean().item()
    assert divergence == pytest.approx(expected, rel=1e-3 if dtype is torch.float32 else 5e-2)


def test_the_dense_model_diverges_from_itself_by_nothing(make_model: MakeModel) -> None:
    model = make_model()
    judge = Judge(model, Masks(*parts(model)), batches())
    assert judge.divergence({}) == pytest.approx(0, abs=1e-6)


def test_tokens_that_are_not_likely_count_as_one(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lower bound of the whole divergence, that gets closer with more tokens."""
    model = make_model()
    linears, norms = parts(model)
    sparsities = dict.fromkeys(linears, 0.7)
    found = []
    for likeliest in (8, 64, 256):
        monkeypatch.setattr("dlp_plugin.scoring.predictions.LIKELIEST", likeliest)
        found.append(Judge(model, Masks(linears, norms), batches()).divergence(sparsities))
    assert 0 < found[0] < found[1] < found[2]


def test_divergence_on_portions(make_model: MakeModel) -> None:
    model = make_model()
    linears, norms = parts(model)
    # samples of unequal length are not run together
    unequal = [*batches(1, 16), *batches(1, 9), *batches(1, 5)]
    judge = Judge(model, Masks(linears, norms), unequal)
    assert judge.tokens == 30
    sparsities = dict.fromkeys(linears, 0.5)
    whole = judge.divergence(sparsities)
    assert judge.portions(10) == [[0], [1, 2]]
    assert judge.portions(17) == [[0, 1, 2]]  # the last 5 are no portion of their own
    assert judge.portions(1) == [[0], [1], [2]]
    total = 0.0
    for portion, part in zip(judge.portions(10), (unequal[:1], unequal[1:]), strict=True):
        alone = Judge(model, Masks(linears, norms), part).divergence(sparsities)
        assert judge.divergence(sparsities, portion) == pytest.approx(alone)
        total += alone * judge.tokens_in(portion)
    assert whole == pytest.approx(total / 30)


def test_the_mode_of_the_model_comes_back(make_model: MakeModel) -> None:
    model = make_model().train()
    Judge(model, Masks(*parts(model)), batches()).loss({})
    assert model.training


def test_columns_that_the_model_does_not_take_are_left_out(make_model: MakeModel) -> None:
    model = make_model()
    linears, norms = parts(model)
    more = [{**batch, "length": torch.tensor([16]), "labels": "?"} for batch in batches()]
    sparsities = dict.fromkeys(linears, 0.5)
    found = Judge(model, Masks(linears, norms), more).loss(sparsities)
    assert found == pytest.approx(Judge(model, Masks(linears, norms), batches()).loss(sparsities))


def test_few_thresholds_are_remembered(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dlp_plugin.search.masks.REMEMBERED", 2)
    model = make_model()
    linears, norms = parts(model)
    masks = Masks(linears, norms)
    judge = Judge(model, masks, batches())
    first = judge.loss(dict.fromkeys(linears, 0.5))
    once = masks.bytes_kept
    for sparsity in (0.2, 0.3, 0.4):
        judge.loss(dict.fromkeys(linears, sparsity))
    assert masks.bytes_kept == 2 * once
    assert judge.loss(dict.fromkeys(linears, 0.5)) == first


def test_groups_of_n_m(make_model: MakeModel) -> None:
    model = make_model()
    linears, norms = parts(model)
    numbers = {name: i % 9 for i, name in enumerate(linears)}  # none and all of 8 among them
    sparsities = {name: n / 8 for name, n in numbers.items()}
    judge = Judge(model, Masks(linears, norms), batches())
    of_eight = MaskStructure(4, 8)
    loss, by_rows = judge.loss(sparsities, of_eight), judge.loss(sparsities)
    assert judge.divergence(sparsities, structure=of_eight) != judge.divergence(sparsities)
    for name, n in numbers.items():
        weight = linears[name].weight.data
        groups = (weight.abs() * norms[name]).unflatten(1, (-1, 8))
        mask = torch.zeros_like(groups).scatter_(2, groups.argsort(2)[..., :n], 1).flatten(1)
        weight[mask.bool()] = 0
    assert loss == pytest.approx(judge.loss({}), abs=1e-6)
    assert by_rows != pytest.approx(loss, abs=1e-4)


def test_places_are_kept_for_one_structure_at_a_time(make_model: MakeModel) -> None:
    """A byte a weight, whatever number of structures is measured."""
    model = make_model()
    linears, norms = parts(model)
    masks = Masks(linears, norms)
    judge = Judge(model, masks, batches())
    sparsities = dict.fromkeys(linears, 0.5)
    first = judge.loss(sparsities, structure=MaskStructure(2, 4))
    judge.loss(sparsities, structure=MaskStructure(4, 8))
    assert masks.bytes_kept == sum(linear.weight.numel() for linear in linears.values())
    assert judge.loss(sparsities, structure=MaskStructure(2, 4)) == first
