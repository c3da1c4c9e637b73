"""The plan: JSON there and back, another target, sound or refused."""

import json
import os
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

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
        (lambda p: p.update(alpha=True), "alpha: Value error, True is no number"),
        (lambda p: p.update(alpha=1e308), r"alpha must be at most 1e\+06, got 1e\+308"),
        (lambda p: p["blocks"][1].update(weights=10**400), r"blocks\.1\.weights"),
        (lambda p: p["blocks"][1].update(score=10**400), r"blocks\.1\.score"),
        (
            lambda p: p["blocks"][1].update(linears={"up": 0.1, "down": 0.2}),
            "sparsity of layers.1 is 0.76.*, but its linears' lie between 0.1 and 0.2",
        ),
    ],
)
def test_a_damaged_plan_is_refused(plan: Plan, tmp_path: Path, change, message: str) -> None:
    content = plan.model_dump(mode="json")
    change(content)
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"plan.json is not a sound plan \(.*{message}"):
        Plan.load(file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe", "it is no UTF-8 text"),
        (b"[" * 200_000, "it is nested too deeply"),
        (b'{"alpha": ' + b"9" * 5000 + b"}", "digits"),
        (b"[1]", "valid dictionary"),
    ],
)
def test_a_file_that_is_something_else(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "plan.json").write_bytes(content)
    with pytest.raises(ValueError, match=rf"plan.json is not a sound plan \(.*{message}") as told:
        Plan.load(tmp_path / "plan.json")
    assert len(str(told.value)) < 700


def test_a_folder_is_no_plan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a sound plan .*directory"):
        Plan.load(tmp_path)


ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**40), 10**40),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=5), st.floats(), max_size=2),
)


@given(data=st.data())
def test_whatever_stands_in_a_field_it_is_a_plan_or_an_error(data: st.DataObject) -> None:
    content = Plan.make(
        [("a", 8, 1.0), ("b", 8, 2.0)], model="m", statistic="median", alpha=0.1, target=0.5
    ).model_dump(mode="json")
    place = data.draw(st.sampled_from([content, content["blocks"][0]]))
    place[data.draw(st.sampled_from(sorted(place)))] = data.draw(ODD)
    with suppress(ValueError):
        assert Plan.load(content).sparsity == pytest.approx(Plan.load(content).target, abs=1e-5)


def test_linears_must_come_to_their_block() -> None:
    block = {"name": "b", "weights": 40, "score": 1.0, "importance": 0.0, "sparsity": 0.5}
    block["linears"] = {"b.up": 0.2, "b.down": 0.6}
    content = {"model": "m", "statistic": "median", "alpha": 0, "target": 0.5, "blocks": [block]}
    plan = Plan.load(content)
    plan.check_linears({"b.up": 10, "b.down": 30})  # (10 * 0.2 + 30 * 0.6) / 40
    message = r"block b has sparsity 0\.5, and its linears come to 0\.4 by their weights: search"
    with pytest.raises(ValueError, match=message):
        plan.check_linears({"b.up": 20, "b.down": 20})


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
