"""Descent by slopes: its arithmetic by hand, and on models what it promises."""

import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from families import FAMILIES, make
from helpers import EVERY, MakeModel, assert_same, kept_on_disk, prune, weights_of
from hypothesis import given
from hypothesis import strategies as st
from llmcompressor.modifiers.pruning import SparseGPTModifier as StockSparseGPT

from dlp_plugin import (
    ADMMPruningModifier,
    DLPModifier,
    OneShotMagnitudeModifier,
    OWLModifier,
    Plan,
    SparseGPTModifier,
    WandaPruningModifier,
)
from dlp_plugin.planning.methods import DLP
from dlp_plugin.planning.structure import UNSTRUCTURED, MaskStructure
from dlp_plugin.scoring.blocks import Block
from dlp_plugin.search.gradient import descend, stepped
from dlp_plugin.search.judge import Judge
from dlp_plugin.search.linears import project, sparsities_of
from dlp_plugin.search.slopes import Slopes

STAGE = {"sparsity": 0.6, **EVERY}


def test_moves_worked_by_hand() -> None:
    # mean 5, apart -4, -2 and 6, the median of their sizes 4
    moves = stepped({"a": 1.0, "b": 3.0, "c": 11.0}, dict.fromkeys("abc", 10))
    assert moves == pytest.approx({"a": -1, "b": -math.sqrt(0.5), "c": math.sqrt(1.5)})
    # the mean by sizes is 4, and 17 of the median 1 counts as 4
    moves = stepped({"a": 3.0, "b": 5.0, "c": 21.0}, {"a": 90, "b": 73, "c": 1})
    assert moves["c"] == 2


def test_equal_costs_move_nothing() -> None:
    assert stepped({"a": 2.0, "b": 2.0}, {"a": 10, "b": 30}) == {"a": 0, "b": 0}


@given(
    st.lists(st.tuples(st.floats(-0.5, 1.5), st.integers(1, 99)), min_size=1, max_size=9),
    st.floats(0.01, 0.99),
)
def test_one_shift_puts_the_total_on_target(drawn: list, target: float) -> None:
    weights = {str(i): size for i, (_, size) in enumerate(drawn)}
    given_ = {str(i): sparsity for i, (sparsity, _) in enumerate(drawn)}
    found = project(given_, weights, target)
    total = sum(weights[n] * s for n, s in found.items()) / sum(weights.values())
    assert total == pytest.approx(target, abs=1e-9)
    least, most = min(0.05, target), max(0.98, target)
    assert all(least <= s <= most for s in found.values())
    inside = [given_[n] - s for n, s in found.items() if least < s < most]
    assert inside == pytest.approx([inside[0]] * len(inside) if inside else [], abs=1e-9)


def blocks() -> list[Block]:
    return [
        Block(f"b{i}", {f"b{i}.up": torch.nn.Linear(8, 40), f"b{i}.q": torch.nn.Linear(8, 10)})
        for i in range(4)
    ]


def start(structure: MaskStructure = UNSTRUCTURED) -> Plan:
    rows = [(block.name, block.weights, 1.0) for block in blocks()]
    target = structure.sparsity if structure else 0.6
    return Plan.make(
        rows, method=DLP(alpha=0.0), model="m", target=target, mask_structure=structure
    )


class Known:
    """A divergence that is known: a square distance from an optimum, per weight."""

    tokens = 4096
    fingerprint = "by hand"

    def __init__(self, best: Mapping[str, float]) -> None:
        self.best = best
        self.calls = 0

    def divergence(self, sparsities: Mapping[str, float], *_: object, **__: object) -> float:
        self.calls += 1
        return sum((s - self.best[name]) ** 2 for name, s in sparsities.items())

    def portion(self, number: int, tokens: int) -> list[int]:
        return [number]

    def at(
        self, sparsities: Mapping[str, float], portion: list[int], structure: MaskStructure
    ) -> tuple[dict[str, float], int]:
        return {n: 2 * (s - self.best[n]) / size_of(n) for n, s in sparsities.items()}, 1024


def size_of(name: str) -> int:
    return 80 if name.endswith("q") else 320


# mean by sizes 0.6: the large ones 0.5 to 0.6, the small ones 0.8
BEST = {f"b{i}.up": 0.4 + 0.1 * i for i in range(4)} | {f"b{i}.q": 0.8 for i in range(4)}


class TestDescend:
    def test_it_comes_near_the_optimum_at_the_same_total(self) -> None:
        known = Known(BEST)
        plan = descend(known, known, start(), blocks(), steps=32)
        assert plan.sparsity == pytest.approx(0.6, abs=1e-9)
        assert plan.search[-1].divergence < 0.1 * plan.search[0].divergence
        found = sparsities_of(plan, blocks())
        assert known.divergence(found) == plan.search[-1].divergence

    def test_it_is_measured_a_few_times_and_says_what_it_took(self) -> None:
        known = Known(BEST)
        plan = descend(known, known, start(), blocks(), steps=16)
        assert [step.step for step in plan.search] == [0, 4, 8, 12, 16]
        assert plan.search[-1].evaluations == known.calls == 5
        assert plan.search[-1].tokens == 5 * 4096 + 16 * 4 * 1024
        path = [step.divergence for step in plan.search]
        assert path == sorted(path, reverse=True)

    @pytest.mark.parametrize("steps", [1, 2, 3, 5, 7])
    def test_the_last_step_is_always_measured(self, steps: int) -> None:
        known = Known(BEST)
        plan = descend(known, known, start(), blocks(), steps=steps)
        assert plan.search[-1].step == steps
        assert len(plan.search) == 1 + min(4, steps)

    def test_steps_that_lead_away_are_not_kept(self) -> None:
        class Misled(Known):
            def at(self, *arguments: object) -> tuple[dict[str, float], int]:
                costs, tokens = super().at(*arguments)
                return {name: -cost for name, cost in costs.items()}, tokens

        best = dict.fromkeys(BEST, 0.6)
        misled = Misled(best)
        misled.best = {name: s + 1e-3 * i for i, (name, s) in enumerate(best.items())}
        plan = descend(misled, misled, start(), blocks(), steps=4)
        assert sparsities_of(plan, blocks()) == pytest.approx(best)
        assert plan.search[-1].divergence == plan.search[0].divergence

    def test_of_n_m_it_moves_whole_numbers(self) -> None:
        known = Known({name: s - 0.1 for name, s in BEST.items()})
        plan = descend(known, known, start(MaskStructure(4, 8)), blocks(), steps=32)
        found = sparsities_of(plan, blocks())
        assert all((8 * s).is_integer() for s in found.values())
        assert plan.sparsity == pytest.approx(0.5, abs=1 / 8 * 320 / 1600)
        assert plan.search[-1].divergence < 0.5 * plan.search[0].divergence
        assert Plan.load(plan.model_dump(mode="json")) == plan

    def test_a_start_that_is_not_finite_is_told(self) -> None:
        known = Known(dict.fromkeys(BEST, math.inf))
        with pytest.raises(ValueError, match="divergence of the plan to refine is not finite"):
            descend(known, known, start(), blocks(), steps=4)

    def test_an_interrupted_descent_goes_on(self, tmp_path: Path) -> None:
        path = tmp_path / "plan.json.search"
        whole = Known(BEST)
        expected = descend(whole, whole, start(), blocks(), steps=8)

        class Killed(Known):
            def at(self, sparsities: Mapping, portion: list[int], *rest: object) -> tuple:
                if portion == [5]:
                    raise KeyboardInterrupt
                return super().at(sparsities, portion, *rest)

        killed = Killed(BEST)
        with pytest.raises(KeyboardInterrupt):
            descend(killed, killed, start(), blocks(), steps=8, progress_path=path)
        again = Known(BEST)
        plan = descend(again, again, start(), blocks(), steps=8, progress_path=path)
        assert plan == expected
        assert again.calls == 2  # after steps 6 and 8


class TestInRecipes:
    def test_it_is_what_refine_does_and_its_plan_prunes_the_same(
        self, make_model: MakeModel, tmp_path: Path
    ) -> None:
        path = tmp_path / "plan.json"
        modifier = DLPModifier(alpha=0.1, refine=6, plan_path=str(path))
        model = prune(make_model(), modifier, WandaPruningModifier(**STAGE))
        plan = Plan.load(path)
        assert plan.search[-1].divergence < plan.search[0].divergence
        assert plan.sparsity == pytest.approx(0.6)
        assert [file.name for file in tmp_path.iterdir()] == ["plan.json"]
        stage = WandaPruningModifier(**STAGE)
        again = prune(make_model(), DLPModifier(from_plan=str(path)), stage)
        assert_same(weights_of(again), weights_of(model))

    def test_the_same_inputs_give_the_same_plan(self, make_model: MakeModel) -> None:
        plans = []
        for _ in range(2):
            modifier = OWLModifier(refine=3)
            prune(make_model(), modifier, WandaPruningModifier(**STAGE))
            plans.append(modifier.plan)
        assert plans[0] == plans[1]

    def test_magnitude_is_refined_by_its_own_masks(
        self, make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What is judged is what comes out: the divergence of the really pruned model."""
        judges: list[Judge] = []

        class Seen(Judge):
            def __init__(self, *arguments: object) -> None:
                super().__init__(*arguments)
                judges.append(self)

        monkeypatch.setattr("dlp_plugin.modifiers.base.Judge", Seen)
        modifier = DLPModifier(refine=2)
        prune(make_model(), modifier, OneShotMagnitudeModifier(**STAGE))
        (judge,) = judges  # whose model is pruned by now
        assert judge.divergence({}) == pytest.approx(modifier.plan.search[-1].divergence, rel=1e-4)

    @pytest.mark.parametrize("search", ["gradient", "evolution"])
    def test_less_is_pruned_while_it_searches_where_what_stays_is_repaired(
        self, make_model: MakeModel, tmp_path: Path, search: str
    ) -> None:
        path = tmp_path / "plan.json"
        asked = {"alpha": 0.0, "refine": 3, "search": search}
        repaired = DLPModifier(**asked, plan_path=str(path))
        prune(make_model(), repaired, ADMMPruningModifier(sparsity=0.8, **EVERY))
        easier = DLPModifier(**asked)
        prune(make_model(), easier, WandaPruningModifier(sparsity=0.6, **EVERY))
        plan = Plan.load(path)
        assert plan.searched_at == 0.6
        assert plan.sparsity == pytest.approx(0.8)
        assert plan.search == easier.plan.search
        assert easier.plan.searched_at is None
        for row, other in zip(plan.blocks, easier.plan.blocks, strict=True):
            moved = {name: sparsity + 0.2 for name, sparsity in other.linears.items()}
            assert row.linears == pytest.approx(moved)

    @pytest.mark.parametrize(
        ("stages", "searched_at"),
        [
            ([WandaPruningModifier(sparsity=0.8, **EVERY)], None),
            ([WandaPruningModifier(sparsity=0.65432109, **EVERY)], None),
            ([WandaPruningModifier(sparsity=0.8, polish=True, **EVERY)], 0.6),
            ([SparseGPTModifier(sparsity=0.8, **EVERY)], 0.7),
            ([StockSparseGPT(sparsity=0.8, **EVERY)], 0.7),
            ([SparseGPTModifier(sparsity=0.8, reconstruct=1, **EVERY)], 0.6),
            ([ADMMPruningModifier(sparsity=0.8, polish=False, **EVERY)], 0.7),
            ([ADMMPruningModifier(sparsity=0.6, **EVERY)], 0.5),
            ([ADMMPruningModifier(sparsity=0.5, **EVERY)], None),
            ([ADMMPruningModifier(sparsity=0.99, **EVERY)], None),
            ([ADMMPruningModifier(mask_structure="4:8", **EVERY)], None),
        ],
    )
    def test_by_what_the_stages_do_for_the_weights_that_stay(
        self, make_model: MakeModel, stages: list, searched_at: float | None
    ) -> None:
        modifier = DLPModifier(alpha=0.0, refine=1)
        prune(make_model(), modifier, *stages)
        assert modifier.plan.searched_at == searched_at

    def test_evolution_is_there_still(self, make_model: MakeModel) -> None:
        modifier = DLPModifier(refine=2, search="evolution")
        prune(make_model(), modifier, WandaPruningModifier(**STAGE))
        assert [step.step for step in modifier.plan.search] == [0, 1, 2]

    def test_an_unknown_search_is_refused(self) -> None:
        with pytest.raises(ValueError, match="'gradient' or 'evolution'"):
            DLPModifier(refine=2, search="annealing")

    def test_samples_of_the_steps_are_not_those_it_is_measured_on(
        self, make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen: dict[type, list[list[int]]] = {}
        for kind, place in ((Judge, 2), (Slopes, 3)):

            def init(self, *arguments, kind=kind, place=place, original=kind.__init__) -> None:
                seen[kind] = [b["input_ids"].flatten().tolist() for b in arguments[place]]
                original(self, *arguments)

            monkeypatch.setattr(kind, "__init__", init)
        prune(make_model(), DLPModifier(refine=1), WandaPruningModifier(**STAGE))
        assert len(seen[Judge]) == 2
        assert len(seen[Slopes]) == 6
        assert not any(sample in seen[Slopes] for sample in seen[Judge])

    def test_a_model_on_disk_gives_the_plan_of_one_in_memory(
        self, make_model: MakeModel, tmp_path: Path
    ) -> None:
        """Blocks come and go, forward and backward, and nothing of them is kept."""
        on_disk = kept_on_disk(make_model(), tmp_path, attn_implementation="eager")
        plans = []
        for model in (on_disk, make_model()):
            modifier = DLPModifier(refine=2, sparsity=0.6, plan_path=str(tmp_path / "plan.json"))
            prune(model, modifier)
            plans.append(modifier.plan)
        assert plans[0].blocks == plans[1].blocks

    def test_every_expert_gets_a_sparsity_of_its_own(self, tmp_path: Path) -> None:
        family = FAMILIES["qwen3_moe"]
        modifier = DLPModifier(refine=3)
        prune(make(family.config(), tmp_path, family.kind), modifier, WandaPruningModifier(**STAGE))
        plan = modifier.plan
        assert plan.sparsity == pytest.approx(0.6)
        experts = {
            name: sparsity
            for block in plan.blocks
            for name, sparsity in block.linears.items()
            if ".experts." in name
        }
        assert len(experts) > 4
        assert len(set(experts.values())) > len(experts) / 2
