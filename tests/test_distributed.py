"""Two processes, each with its share of the calibration data, give what one gives."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from helpers import (
    CALIBRATION_TEXT,
    ROOT,
    SHIPPED,
    MakeModel,
    assert_same,
    command,
    prune,
    random_samples,
    recipe,
    run,
    word_tokenizer,
)
from llmcompressor.modifiers.pruning import WandaPruningModifier as StockWanda
from safetensors.torch import load_file

from dlp_plugin import DLPModifier, Plan, last_plans

pytestmark = pytest.mark.skipif(
    torch.cuda.device_count() == 1, reason="two processes need two GPUs, or none"
)


def text(pruner: str = "WandaPruningModifier", **dlp: object) -> str:
    return yaml.safe_dump(recipe(dlp, pruner, sparsity=0.6), sort_keys=False)


def torchrun(*words: object) -> str:
    """Run in two processes; what they print."""
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    done = subprocess.run(
        [*run, *(str(word) for word in words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout[-5000:]
    return done.stdout


Result = tuple[Plan, dict[str, torch.Tensor]]


def in_two_processes(
    folder: Path, *recipes: str, model: str, rows: list[dict], same_rows_on_all: bool = False
) -> tuple[list[list[Result]], str]:
    """For each recipe both ranks' plan and weights; and what the processes print."""
    out = folder / "out"
    out.mkdir()
    job = {
        "recipes": recipes,
        "model": model,
        "rows": rows,
        "same_rows_on_all": same_rows_on_all,
        "out": str(out),
    }
    (folder / "job.json").write_text(json.dumps(job))
    printed = torchrun(Path(__file__).with_name("distributed_probe.py"), folder / "job.json")

    def result(recipe: int, rank: int) -> Result:
        saved = out / f"recipe{recipe}-rank{rank}"
        return Plan.load(saved / "plan.json"), torch.load(saved / "weights.pt")

    return [[result(number, rank) for rank in range(2)] for number in range(len(recipes))], printed


@pytest.fixture
def saved(make_model: MakeModel, tmp_path: Path) -> str:
    make_model().save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def alone(make_model: MakeModel, recipe: str) -> tuple[Plan, dict[str, torch.Tensor]]:
    model = make_model()
    prune(model, recipe)
    return last_plans()[0], model.state_dict()


def assert_same_plan(one: Plan, other: Plan) -> None:
    assert [b.name for b in one.blocks] == [b.name for b in other.blocks]
    assert [b.sparsity for b in one.blocks] == pytest.approx(
        [b.sparsity for b in other.blocks], abs=1e-6
    )


def test_two_processes_prune_like_one(make_model: MakeModel, saved: str, tmp_path: Path) -> None:
    plan_path = tmp_path / "plan.json"
    pruners = ["WandaPruningModifier", "SparseGPTModifier"]
    recipes = [text(pruner, plan_path=str(plan_path)) for pruner in pruners]
    recipes.append(text(alpha="auto", refine=1))
    kinds = ["WandaPruningModifier", "OneShotMagnitudeModifier"]
    structured = [
        text(kind, alpha=0.3).replace("sparsity: 0.6", "mask_structure: '4:8'") for kind in kinds
    ]
    assert all("4:8" in each for each in structured)
    recipes += structured
    results, _ = in_two_processes(tmp_path, *recipes, model=saved, rows=random_samples(8).to_list())
    for pruner, ranks in zip(pruners, results[:2], strict=True):
        (first_plan, first), (second_plan, second) = ranks
        plan, weights = alone(make_model, text(pruner))
        assert first_plan == second_plan == Plan.load(plan_path)
        assert_same_plan(first_plan, plan)
        assert_same(first, second)
        if pruner == "WandaPruningModifier":
            assert_same(first, weights)
        else:
            for name, weight in weights.items():
                assert (first[name] == 0).sum() == (weight == 0).sum(), name
                torch.testing.assert_close(first[name], weight, atol=1e-4, rtol=1e-3)
    (first_plan, first), (second_plan, second) = results[2]
    assert first_plan == second_plan, "processes decide differently"
    assert [step.generation for step in first_plan.search] == [0, 1]
    assert len(first_plan.candidates) == 7
    assert_same(first, second)
    for each, ((first_plan, first), (_, second)) in zip(structured, results[3:], strict=True):
        plan, weights = alone(make_model, each)
        assert len({block.sparsity for block in plan.blocks}) > 1
        assert [b.sparsity for b in first_plan.blocks] == [b.sparsity for b in plan.blocks]
        assert_same(first, weights)
        assert_same(second, weights)


def test_two_processes_repair_like_one(make_model: MakeModel, saved: str, tmp_path: Path) -> None:
    """Gram matrices are summed; gradients are averaged, so that steps are of two samples."""
    kinds = ["WandaPruningModifier", "OneShotMagnitudeModifier"]
    recipes = [yaml.safe_dump(recipe({}, kind, sparsity=0.6, polish=True)) for kind in kinds]
    recipes.append(text("ADMMPruningModifier"))
    recipes.append(
        yaml.safe_dump(
            recipe({}, "ADMMPruningModifier", sparsity=0.6, reconstruct=2), sort_keys=False
        )
    )
    results, _ = in_two_processes(tmp_path, *recipes, model=saved, rows=random_samples(8).to_list())
    for each, ((_, first), (_, second)) in zip(recipes, results, strict=True):
        assert_same(first, second)
        _, weights = alone(make_model, each)
        for name, weight in weights.items():
            assert (first[name] == 0).sum() == (weight == 0).sum(), name
            if "reconstruct" not in each and "layers.0." in name:  # later ones amplify rounding
                assert (first[name] - weight).norm() < 0.01 * weight.norm(), name


def test_a_data_set_that_all_share_is_dealt_wrong_by_the_host_and_told(
    make_model: MakeModel, saved: str, tmp_path: Path
) -> None:
    """If this fails, the release deals each process its part: the warning can go."""
    rows = random_samples(8).to_list()
    (((plan, _), _),), printed = in_two_processes(
        tmp_path, text(), model=saved, rows=rows, same_rows_on_all=True
    )
    assert "All 2 processes calibrate on the same samples" in printed
    model = make_model()
    run(model, text(), random_samples(8).select(range(4)))
    assert_same_plan(plan, last_plans()[0])


def test_a_stock_stage_is_refused(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dlp_plugin.modifiers.feeding.is_distributed", lambda: True)
    stage = StockWanda(sparsity=0.6, targets=["Linear"])
    with pytest.raises(ValueError, match="llm-compressor's own class.*import it from dlp_plugin"):
        run(make_model(), [DLPModifier(), stage], random_samples(2))


def test_the_terminal_command(tmp_path: Path) -> None:
    """The shipped model by torchrun; the first process alone shows and writes."""
    arguments = ["--recipe", ROOT / "recipes" / "dlp_wanda.yaml", "--data", CALIBRATION_TEXT]
    arguments += ["--samples", "8", "--length", "64", "--output", tmp_path / "two"]
    output = torchrun("-m", "dlp_plugin.cli", "oneshot", SHIPPED, *arguments)
    assert output.count("Zeros in") == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["two"]
    arguments[-1] = tmp_path / "one"
    command("oneshot", SHIPPED, *arguments)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    all_zeros = sum(int((weight == 0).sum()) for weight in one.values())
    differ = sum(int(((one[name] == 0) != (two[name] == 0)).sum()) for name in one)
    assert differ <= 1e-5 * all_zeros  # scores equal but for rounding in the sum over samples
