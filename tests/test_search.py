"""Choosing a strength and evolving a plan, on losses that are known."""

import json
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import Logged

from dlp_plugin import Plan
from dlp_plugin.planning.methods import DLP, METHODS, LinearSparsity
from dlp_plugin.planning.structure import UNSTRUCTURED, MaskStructure
from dlp_plugin.scoring.blocks import Block
from dlp_plugin.search.evolution import evolve
from dlp_plugin.search.linears import sparsities_of
from dlp_plugin.search.progress import forget
from dlp_plugin.search.strength import HALF_RANGES, choose_strength

SCORES = [1.0, 2.0, 3.0, 4.0]


class KnownJudge:
    """Stands in for a model whose divergence is known: a square distance from an optimum."""

    tokens = 4096
    fingerprint = "by hand"
    parts = 2

    def __init__(self, best: Callable[[str], float]) -> None:
        self.best = best
        self.calls = 0
        self.measured: list[tuple[int | None, tuple[float, ...]]] = []

    def portions(self, tokens: int) -> list[list[int]]:
        return [[part] for part in range(self.parts)]

    def tokens_in(self, portion: list[int]) -> int:
        return self.tokens // self.parts

    def divergence(
        self,
        sparsities: Mapping[str, float],
        portion: list[int] | None = None,
        structure: MaskStructure = UNSTRUCTURED,
    ) -> float:
        self.calls += 1
        self.measured.append((None if portion is None else portion[0], tuple(sparsities.values())))
        return sum((s - self.best(name)) ** 2 for name, s in sparsities.items())

    def loss(
        self, sparsities: Mapping[str, float], structure: MaskStructure = UNSTRUCTURED
    ) -> float:
        return self.divergence(sparsities, structure=structure)


def blocks() -> list[Block]:
    """Four blocks of a large and a small Linear."""
    return [
        Block(f"b{i}", {f"b{i}.up": torch.nn.Linear(8, 40), f"b{i}.q": torch.nn.Linear(8, 10)})
        for i in range(4)
    ]


def start(method: str = "dlp", alpha: float = 0.0) -> Plan:
    rows = [(block.name, block.weights, s) for block, s in zip(blocks(), SCORES, strict=True)]
    kind = METHODS[method]
    return Plan.make(rows, method=kind(**{kind.strength_field: alpha}), model="m", target=0.6)


def total(sparsities: Mapping[str, float]) -> float:
    weights = {n: lin.weight.numel() for b in blocks() for n, lin in b.linears.items()}
    return sum(weights[n] * s for n, s in sparsities.items()) / sum(weights.values())


class TestChooseStrength:
    @pytest.mark.parametrize(("alpha", "chosen"), [(0.0, 0.0), (0.1, 0.1), (0.29, 0.3)])
    def test_the_least_loss_wins(self, alpha: float, chosen: float) -> None:
        wanted = sparsities_of(start(alpha=alpha), blocks())
        judge = KnownJudge(wanted.__getitem__)
        make = partial(
            Plan.make,
            [(b.name, b.weights, s) for b, s in zip(blocks(), SCORES, strict=True)],
            model="m",
            method=DLP(),
            target=0.6,
        )
        plan = choose_strength(judge, make, DLP(), blocks())
        assert plan.strength == chosen
        assert judge.calls == len(plan.candidates) <= 8
        assert plan.candidates[0].strength == 0
        assert min(c.loss for c in plan.candidates) == next(
            c.loss for c in plan.candidates if c.strength == chosen
        )

    def test_the_linear_one_chooses_a_step(self) -> None:
        wanted = {f"b{i}.{n}": 0.45 + 0.1 * i for i in range(4) for n in ("up", "q")}
        make = partial(
            Plan.make,
            [(b.name, b.weights, float(i)) for i, b in enumerate(blocks())],
            method=LinearSparsity(),
            model="m",
            target=0.6,
        )
        plan = choose_strength(KnownJudge(wanted.__getitem__), make, LinearSparsity(), blocks())
        assert plan.strength == pytest.approx(0.1)
        assert [b.sparsity for b in plan.blocks] == pytest.approx([0.45, 0.55, 0.65, 0.75])

    def test_of_equal_losses_the_uniform_one_wins(self, logged: Logged) -> None:
        make = partial(Plan.make, [("b0", 480, 1.0)], model="m", method=DLP(), target=0.6)
        judge = KnownJudge(lambda _: 0.6)
        assert choose_strength(judge, make, DLP(), blocks()[:1]).strength == 0
        lines = logged("INFO")
        assert "Trying 7 strengths, each on 4096 held-out tokens" in lines[0]
        assert [line.split("alpha ")[1].split(":")[0] for line in lines[1:]] == [
            f"{half:g}" for half in HALF_RANGES
        ]


class TestEvolve:
    def test_it_finds_the_optimum_at_the_same_total(self) -> None:
        best = {f"b{i}.up": 0.4 + 0.1 * i for i in range(4)}
        best |= {f"b{i}.q": 0.8 for i in range(4)}
        judge = KnownJudge(lambda name: best[name])
        plan = evolve(judge, start(), blocks(), generations=150)
        found = sparsities_of(plan, blocks())
        assert total(found) == pytest.approx(0.6, abs=1e-9)
        assert plan.sparsity == pytest.approx(0.6, abs=1e-9)
        assert plan.search[-1].divergence < 0.05 * plan.search[0].divergence
        assert judge.divergence(found) == plan.search[-1].divergence

    def test_it_never_gets_worse_and_says_what_it_took(self) -> None:
        judge = KnownJudge(lambda name: 0.9 if name.endswith("q") else 0.55)
        plan = evolve(judge, start(), blocks(), generations=9)
        path = [step.divergence for step in plan.search]
        assert path == sorted(path, reverse=True)
        assert [step.step for step in plan.search] == list(range(10))
        assert plan.search[-1].evaluations == judge.calls
        portions = [portion for portion, _ in judge.measured]
        whole = portions.count(None)
        assert whole == 1 + 9 * 2  # the start, and two survivors of every generation
        assert plan.search[-1].tokens == whole * 4096 + (judge.calls - whole) * 2048

    @pytest.mark.parametrize("structure", ["0:0", "2:4"])
    def test_nothing_is_measured_twice(self, structure: str) -> None:
        """Neither the best plan on a portion, nor a change that was drawn before."""
        rows = [(block.name, block.weights, 1.0) for block in blocks()]
        plan = Plan.make(
            rows,
            model="m",
            method=DLP(alpha=0.0),
            target=0.5,
            mask_structure=MaskStructure.parse(structure),
        )
        judge = KnownJudge(lambda name: 0.5)  # the start is the optimum
        refined = evolve(judge, plan, blocks(), generations=30)
        assert refined.search[-1].evaluations == judge.calls
        assert len(set(judge.measured)) == judge.calls < 1 + 2 + 30 * 10  # some were drawn again

    def test_one_portion_is_all_there_is(self) -> None:
        """Then what was sifted is measured already."""
        judge = KnownJudge(lambda name: 0.9 if name.endswith("q") else 0.55)
        judge.parts = 1
        plan = evolve(judge, start(), blocks(), generations=9)
        assert plan.search[-1].evaluations == judge.calls <= 1 + 9 * 8
        assert {portion for portion, _ in judge.measured} == {None}
        assert plan.search[-1].divergence < plan.search[0].divergence

    def test_sifting_looks_at_one_portion_after_the_other(self) -> None:
        judge = KnownJudge(lambda name: 0.6)
        judge.parts = 3
        evolve(judge, start(), blocks(), generations=6)
        looked = [portion for portion, _ in judge.measured if portion is not None]
        assert list(dict.fromkeys(looked[:-20])) == [1, 2, 0]
        assert {looked.count(part) // 8 for part in range(3)} == {2}

    def test_changes_and_what_they_start_from_are_sifted_on_the_same_portion(self) -> None:
        judge = KnownJudge(lambda name: 0.9 if name.endswith("q") else 0.55)
        judge.parts = 3
        evolve(judge, start(), blocks(), generations=3)
        generation = 1
        for portion, _ in judge.measured[1:]:
            generation += portion not in (None, generation % 3)
            assert portion in (None, generation % 3)
        assert generation == 3

    def test_it_tells_what_it_will_do_and_every_step(self, logged: Logged) -> None:
        plan = evolve(KnownJudge(lambda name: 0.6), start(), blocks(), generations=2)
        lines = logged("INFO")
        assert "2 generations of 8 changes, each on 2048 tokens, the best 2 on 4096" in lines[0]
        last = plan.search[-1]
        expected = f"divergence {last.divergence:.4f} after {last.evaluations} evaluations"
        assert f"generation 2 of 2: {expected}" in lines[-1]
        assert len(lines) == 3

    def test_of_n_m_it_moves_whole_numbers(self) -> None:
        """A step of b.up (320 weights) is one N in it and four in b.q (80 weights)."""

        class OfFours(KnownJudge):
            def divergence(self, sparsities: Mapping, *rest: int, **named: int) -> float:
                assert all((8 * s).is_integer() for s in sparsities.values())
                return super().divergence(sparsities, *rest, **named)

        rows = [(block.name, block.weights, s) for block, s in zip(blocks(), SCORES, strict=True)]
        plan = Plan.make(
            rows,
            model="m",
            method=DLP(alpha=0.0),
            target=0.5,
            mask_structure=MaskStructure(4, 8),
        )
        best = {f"b{i}.{n}": (2 + i) / 8 for i in range(4) for n in ("up", "q")}
        judge = OfFours(lambda name: best[name] + (0.0625 if name < "b2" else -0.0625))
        refined = evolve(judge, plan, blocks(), generations=60)
        assert refined.sparsity == pytest.approx(0.5, abs=1e-12)
        assert refined.search[-1].divergence < 0.5 * refined.search[0].divergence
        assert Plan.load(refined.model_dump(mode="json")) == refined

    def test_the_first_third_moves_whole_blocks(self) -> None:
        class Recorder(KnownJudge):
            def divergence(self, sparsities: Mapping, *rest: int, **named: int) -> float:
                whole.append(all(sparsities[f"b{i}.up"] == sparsities[f"b{i}.q"] for i in range(4)))
                return super().divergence(sparsities, *rest, **named)

        whole: list[bool] = []
        evolve(Recorder(lambda name: 0.2 * int(name[1])), start(), blocks(), generations=6)
        first_two = 1 + 2 * 10  # the start is not measured on every portion at once
        assert all(whole[:first_two])
        assert not all(whole[first_two : first_two + 8])

    def test_the_seed_decides(self) -> None:
        def refined(seed: int) -> Plan:
            judge = KnownJudge(lambda name: 0.9 if name.endswith("q") else 0.55)
            return evolve(judge, start(), blocks(), generations=4, seed=seed)

        assert refined(0) == refined(0)
        assert refined(0) != refined(1)

    def test_an_interrupted_search_goes_on(self, tmp_path: Path) -> None:
        class Cliff(KnownJudge):
            def divergence(self, sparsities: Mapping, *rest: int, **named: int) -> float:
                found = super().divergence(sparsities, *rest, **named)
                return math.inf if max(sparsities.values()) > 0.66 else found

        class Tired(Cliff):
            def divergence(self, sparsities: Mapping, *rest: int, **named: int) -> float:
                if self.calls == 60:
                    raise KeyboardInterrupt("tired")
                return super().divergence(sparsities, *rest, **named)

        def optimum(name: str) -> float:
            return 0.9 if name.endswith("q") else 0.55

        path = tmp_path / "search"
        search = partial(evolve, plan=start(), blocks=blocks(), generations=12, progress_path=path)
        with pytest.raises(KeyboardInterrupt, match="tired"):
            search(Tired(optimum))
        done = len(json.loads(path.read_text())["steps"]) - 1
        assert 0 < done < 12
        assert "Infinity" in path.read_text()
        judge = Cliff(optimum)
        whole = evolve(Cliff(optimum), start(), blocks(), generations=12)
        assert search(judge) == whole
        assert judge.calls <= (12 - done) * 11
        # A finished one costs nothing when the plan could not be written and is made again.
        again = Cliff(optimum)
        assert search(again) == whole
        assert again.calls == 0
        forget(path)
        forget(path)
        assert not path.exists()

    @pytest.mark.parametrize(
        "damage",
        [
            lambda text: text[: len(text) // 2],
            lambda text: "garbage",
            lambda text: "[]",
            lambda text: text.replace('"steps"', '"stages"'),
            lambda text: text.replace("b0.up", "b9.up"),
            lambda text: text.replace('"costs"', '"costs":1,"other"'),
            lambda text: text.replace('"b0":', '"b0":"NaN","b1":', 1),
            lambda text: "\udcff" + text,
            lambda text: "[" * 100_000,
        ],
    )
    def test_a_damaged_file_does_not_block(
        self, tmp_path: Path, logged: Logged, damage: Callable
    ) -> None:
        path = tmp_path / "search"
        search = partial(evolve, plan=start(), blocks=blocks(), generations=3, progress_path=path)
        whole = search(KnownJudge(lambda name: 0.6 if name < "b2" else 0.5))
        path.write_text(damage(path.read_text()), errors="surrogateescape")
        judge = KnownJudge(lambda name: 0.6 if name < "b2" else 0.5)
        assert search(judge) == whole
        assert judge.calls == whole.search[-1].evaluations
        assert [f"{path} is damaged" in line for line in logged("WARNING")] == [True]

    def test_progress_of_another_search_is_not_gone_on_with(self, tmp_path: Path) -> None:
        path = tmp_path / "search"
        path.write_text(json.dumps({"fingerprint": "another"}))
        judge = KnownJudge(lambda name: 0.6)
        plan = evolve(judge, start(), blocks(), generations=1, progress_path=path)
        assert plan == evolve(judge, start(), blocks(), generations=1)

    def test_a_refined_plan_holds_for_its_target_only(self, tmp_path: Path) -> None:
        plan = evolve(KnownJudge(lambda name: 0.5), start(), blocks(), generations=1)
        plan.save(tmp_path / "plan.json")
        loaded = Plan.load(tmp_path / "plan.json")
        assert loaded == plan
        assert loaded.at(target=0.6) is loaded
        with pytest.raises(ValueError, match="refined by a search at target 0.6"):
            loaded.at(target=0.5)
