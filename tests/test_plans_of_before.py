"""Plans and recipes that version 1 of the schema wrote: read, and pruned to the same bytes.

``plans/`` holds plans of every method, made on the shipped model before schema 2, and
``pruned.json`` the digests of the weights that magnitude then pruned by them: which are the same
on any processor, as no product of numbers is taken.
"""

import hashlib
import json
from pathlib import Path

import pytest
import yaml
from helpers import SHIPPED, run
from transformers import AutoModelForCausalLM

from dlp_plugin import Plan

FOLDER = Path(__file__).parent / "plans"
PRUNED = json.loads((FOLDER / "pruned.json").read_text())
MODIFIERS = {
    "dlp": "DLPModifier",
    "owl": "OWLModifier",
    "alpha": "AlphaPruningModifier",
    "linear": "LinearSparsityModifier",
}


def content(name: str) -> dict:
    return json.loads((FOLDER / f"{name}.json").read_text())


@pytest.mark.parametrize("name", PRUNED)
def test_it_prunes_to_the_same_bytes(name: str) -> None:
    plan = content(name)
    structure = plan["mask_structure"]
    stage = {"targets": ["Linear"], "ignore": ["re:.*lm_head"]}
    stage |= {"sparsity": 0.7} if structure == "0:0" else {"mask_structure": structure}
    modifiers = {MODIFIERS[name.split("_")[0]]: {"from_plan": plan}}
    modifiers["OneShotMagnitudeModifier"] = stage
    model = AutoModelForCausalLM.from_pretrained(SHIPPED, dtype="float32")
    run(model, yaml.safe_dump({"pruning_stage": {"pruning_modifiers": modifiers}}), None)
    digest = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        digest.update(key.encode())
        digest.update(value.detach().numpy().tobytes())
    assert digest.hexdigest() == PRUNED[name]


@pytest.mark.parametrize("name", PRUNED)
def test_what_it_says_is_all_there(name: str, tmp_path: Path) -> None:
    old, plan = content(name), Plan.load(FOLDER / f"{name}.json")
    assert plan.schema_version == 4
    assert (plan.method, plan.strength) == (old["method"], old["alpha"])
    assert plan.scored_by.score_name == old["statistic"]
    assert [(c.strength, c.loss) for c in plan.candidates] == [
        (c["alpha"], c["loss"]) for c in old["candidates"]
    ]
    assert [step.step for step in plan.search] == [step["generation"] for step in old["search"]]
    same = {"model", "target", "mask_structure", "blocks", "unseen", "versions"}
    assert plan.model_dump(mode="json", include=same) == {key: old[key] for key in same}
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("dlp_mean_0of0", {"statistic": "mean"}),
        ("owl_0of0", {"owl_m": 3.0}),
        ("alpha_pruning_0of0", {"tail": "median"}),
        ("linear_0of0", {}),
    ],
)
def test_its_sentence_is_read_as_settings(name: str, settings: dict) -> None:
    assert Plan.load(content(name)).settings == settings


@pytest.mark.parametrize(
    ("name", "statistic"),
    [
        ("dlp_0of0", "mode"),
        ("owl_0of0", "% of scores above many x mean"),
        ("owl_0of0", "median"),
        ("alpha_pruning_0of0", "power-law exponent, tail from the nose"),
        ("linear_0of0", None),
    ],
)
def test_a_sentence_that_none_wrote_is_refused(name: str, statistic: object) -> None:
    with pytest.raises(ValueError, match=r"is not a sound plan \(plan: Value error"):
        Plan.load({**content(name), "statistic": statistic})
