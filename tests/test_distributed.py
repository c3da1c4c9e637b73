"""Two processes, each with its share of the calibration data, give what one gives."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from conftest import random_samples, run, word_tokenizer

from dlp_plugin import Plan

RECIPE = {
    "pruning_stage": {
        "pruning_modifiers": {
            "DLPModifier": {},
            "WandaPruningModifier": {
                "sparsity": 0.6,
                "targets": ["Linear"],
                "ignore": ["re:.*lm_head"],
            },
        }
    }
}


def recipe(pruner: str = "WandaPruningModifier", **dlp: object) -> str:
    modifiers = dict(RECIPE["pruning_stage"]["pruning_modifiers"])
    stage = modifiers.pop("WandaPruningModifier")
    return yaml.safe_dump(
        {"pruning_stage": {"pruning_modifiers": {"DLPModifier": dlp, pruner: stage}}}
    )


def in_two_processes(folder: Path, **job: object) -> list[tuple[Plan, dict[str, torch.Tensor]]]:
    """Each rank's plan and weights."""
    out = folder / "out"
    out.mkdir()
    job = {"same_rows_on_all": False, "arguments": {}, "out": str(out), **job}
    (folder / "job.json").write_text(json.dumps(job))
    probe = Path(__file__).with_name("distributed_probe.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    subprocess.run(
        [*command, "--standalone", str(probe), str(folder / "job.json")],
        check=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    ranks = [out / f"rank{rank}" for rank in range(2)]
    return [(Plan.load(rank / "plan.json"), torch.load(rank / "weights.pt")) for rank in ranks]


@pytest.fixture
def saved(make_model: Callable[..., torch.nn.Module], tmp_path: Path) -> str:
    make_model().save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def alone(make_model: Callable, text: str) -> tuple[Plan, dict[str, torch.Tensor]]:
    model = make_model()
    run(model, text, random_samples(8))
    from dlp_plugin import last_plans

    return last_plans()[0], model.state_dict()


def assert_same_plan(one: Plan, other: Plan) -> None:
    assert [b.name for b in one.blocks] == [b.name for b in other.blocks]
    assert [b.sparsity for b in one.blocks] == pytest.approx(
        [b.sparsity for b in other.blocks], abs=1e-6
    )


@pytest.mark.parametrize("pruner", ["WandaPruningModifier", "SparseGPTModifier"])
def test_two_processes_prune_like_one(
    make_model: Callable, saved: str, tmp_path: Path, pruner: str
) -> None:
    plan_path = tmp_path / "plan.json"
    rows = random_samples(8).to_list()
    text = recipe(pruner, plan_path=str(plan_path))
    (first_plan, first), (second_plan, second) = in_two_processes(
        tmp_path, model=saved, rows=rows, recipe=text
    )
    plan, weights = alone(make_model, recipe(pruner))
    assert first_plan == second_plan == Plan.load(plan_path)
    assert_same_plan(first_plan, plan)
    for name, weight in weights.items():
        assert torch.equal(first[name], second[name]), name
        if pruner == "WandaPruningModifier":
            assert torch.equal(first[name], weight), name
        else:
            assert (first[name] == 0).sum() == (weight == 0).sum(), name
            torch.testing.assert_close(first[name], weight, atol=1e-4, rtol=1e-3)
