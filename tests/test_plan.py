"""The plan: JSON there and back, another target, sound or refused."""

import json
import os
from pathlib import Path

import pytest

from dlp_plugin.plan import Plan


@pytest.fixture
def plan() -> Plan:
    return Plan.make(
        [("layers.0", 100, 1.0), ("layers.1", 300, 3.0), ("layers.2", 100, 2.0)],
        model="some/model",
        statistic="median",
        alpha=0.1,
        target=0.7,
    )


def test_blocks_hold_what_was_decided(plan: Plan) -> None:
    # k = 0.2, 0, 0.1; weighted mean of k = (20 + 0 + 10) / 500 = 0.06; c = 0.3 - 0.06
    assert [b.sparsity for b in plan.blocks] == pytest.approx([0.56, 0.76, 0.66])
    assert [b.importance for b in plan.blocks] == pytest.approx([1 - 1 / 6, 0.5, 1 - 2 / 6])
    assert plan.sparsity == pytest.approx(0.7, abs=1e-12)
    assert set(plan.versions) >= {"dlp_plugin", "llmcompressor", "torch"}


def test_json_there_and_back(plan: Plan, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert Plan.load(plan.model_dump(mode="json")) == plan
    again = tmp_path / "again.json"
    Plan.load(tmp_path / "plan.json").save(again)
    assert again.read_bytes() == (tmp_path / "plan.json").read_bytes()


def test_another_target_and_alpha_from_the_same_scores(plan: Plan) -> None:
    other = plan.at(target=0.5, alpha=0)
    assert [b.sparsity for b in other.blocks] == [0.5] * 3
    assert [b.score for b in other.blocks] == [b.score for b in plan.blocks]
    assert other.at(target=0.7, alpha=0.1).blocks == plan.blocks
    assert plan.at() is plan


def test_table_and_picture(plan: Plan, tmp_path: Path) -> None:
    text = str(plan)
    for part in ("some/model", "layers.1", "300", "0.7600", "target 0.7, alpha 0.1, median"):
        assert part in text
    plan.plot(tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    assert [file.name for file in tmp_path.iterdir()] == ["plan.png"]
    with pytest.raises(ValueError, match="has no suffix to tell the format; name it"):
        plan.plot(tmp_path / "plan")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.pop("target"), "target: Field required"),
        (lambda p: p.update(alpha=-1), "alpha must be finite and at least 0, got -1"),
        (lambda p: p.update(target=1.5), "target must be strictly between 0 and 1, got 1.5"),
        (lambda p: p.update(schema_version=2), "schema_version"),
        (lambda p: p.update(colour="red"), "colour"),
        (lambda p: p.update(blocks=[]), "blocks"),
        (lambda p: p["blocks"][1].update(name="layers.0"), "a name stands twice"),
        (lambda p: p["blocks"][1].update(sparsity=0.1), "come to 0.304000 of all weights"),
        (lambda p: p["blocks"][1].update(score=-3), r"blocks\.1\.score"),
        (lambda p: p["blocks"][1].update(sparsity=2), r"blocks\.1\.sparsity"),
    ],
)
def test_a_damaged_plan_is_refused(plan: Plan, tmp_path: Path, change, message: str) -> None:
    content = plan.model_dump(mode="json")
    change(content)
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"plan.json is not a sound plan \(.*{message}"):
        Plan.load(file)


@pytest.mark.parametrize("keep", [0, 1, 50, -3])
def test_a_truncated_file_is_refused(plan: Plan, tmp_path: Path, keep: int) -> None:
    file = tmp_path / "plan.json"
    plan.save(file)
    file.write_text(file.read_text()[:keep])
    with pytest.raises(ValueError, match=r"plan.json is not a sound plan .*dlp-plugin score"):
        Plan.load(file)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none.json does not exist; `dlp-plugin score`"):
        Plan.load(tmp_path / "none.json")


def test_an_interrupted_write_leaves_what_was_there(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "plan.json"
    plan.save(file)
    before = file.read_bytes()

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        plan.at(target=0.5).save(file)
    assert file.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["plan.json"]


def test_a_folder_that_is_not_there_is_named(plan: Plan, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent does not exist; create it first"):
        plan.save(tmp_path / "absent" / "plan.json")
