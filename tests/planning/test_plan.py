"""The plan: JSON there and back, another target, sound or refused."""

import json
import os
from contextlib import suppress
from pathlib import Path
from statistics import fmean

import pytest
from helpers import command
from hypothesis import given, settings
from hypothesis import strategies as st

from dlp_plugin.planning import view
from dlp_plugin.planning.methods import DLP
from dlp_plugin.planning.plan import Plan, SearchStep


@pytest.fixture
def plan() -> Plan:
    return Plan.make(
        [("layers.0", 100, 1.0), ("layers.1", 300, 3.0), ("layers.2", 100, 2.0)],
        model="some/model",
        method=DLP(alpha=0.1),
        target=0.7,
    )


def test_blocks_hold_what_was_decided(plan: Plan) -> None:
    # k = 0.2, 0, 0.1; weighted mean of k = (20 + 0 + 10) / 500 = 0.06; c = 0.3 - 0.06
    assert [b.sparsity for b in plan.blocks] == pytest.approx([0.56, 0.76, 0.66])
    assert [b.importance for b in plan.blocks] == pytest.approx([1 - 1 / 6, 0.5, 1 - 2 / 6])
    assert plan.sparsity == pytest.approx(0.7, abs=1e-12)
    assert set(plan.versions) >= {"dlp_plugin", "llmcompressor", "torch"}


def test_the_table_of_a_refined_plan_shows_no_scores(plan: Plan) -> None:
    """Which its sparsities no longer follow."""
    assert "importance" in view.text(plan)
    first, *rest = plan.blocks
    spread = {"up": first.sparsity - 0.1, "down": first.sparsity + 0.1}
    blocks = (first.model_copy(update={"linears": spread}), *rest)
    step = SearchStep(step=4, evaluations=2, tokens=8, divergence=0.5)
    text = view.text(plan.model_copy(update={"search": (step,), "blocks": blocks}))
    assert "importance" not in text
    assert "sparsity of Linears" in text
    assert f"{first.sparsity - 0.1:.2f} to {first.sparsity + 0.1:.2f}" in text


class TestWholeExperts:
    """A refined plan of experts says which of them it prunes nearly whole."""

    @staticmethod
    def refined(*blocks: dict[str, float]) -> Plan:
        """A plan of these sparsities of Linears, all of one size."""
        rows = [
            {
                "name": f"layers.{depth}",
                "weights": 100 * len(linears),
                "score": 1,
                "importance": 0.5,
                "sparsity": fmean(linears.values()),
                "linears": {f"layers.{depth}.{name}": s for name, s in linears.items()},
            }
            for depth, linears in enumerate(blocks)
        ]
        total = sum(sum(linears.values()) for linears in blocks) / sum(map(len, blocks))
        step = {"step": 4, "evaluations": 2, "tokens": 8, "divergence": 0.5}
        content = {"model": "m", "strength": 0.1, "target": total, "blocks": rows, "search": [step]}
        return Plan.load(content)

    @staticmethod
    def experts(*sparsities: tuple[float, float]) -> dict[str, float]:
        return {
            f"mlp.experts.{number}.{name}": sparsity
            for number, both in enumerate(sparsities)
            for name, sparsity in zip(("up_proj", "down_proj"), both, strict=True)
        }

    def test_they_are_named_by_layer_and_counted(self) -> None:
        # Of both Linears together 0.95, 0.945 and 0.98; one Linear alone does not count
        first = {"attn.q_proj": 0.98, **self.experts((0.5, 0.5), (0.95, 0.95), (0.91, 0.98))}
        second = self.experts((0.98, 0.98), (0.92, 0.98), (0.05, 0.98))
        third = {"mlp.shared_experts.up_proj": 0.98, **self.experts((0.3, 0.3), (0.4, 0.4))}
        assert (
            "whole experts at 95% sparsity or more: 3 of 8, 37.5% of the experts' weights; "
            "layers.0.mlp.experts: 1; layers.1.mlp.experts: 0, 1"
        ) in words(view.text(self.refined(first, second, third)))

    def test_there_may_be_none(self) -> None:
        text = words(view.text(self.refined(self.experts((0.5, 0.6), (0.9, 0.98)))))
        assert text.endswith(
            "whole experts at 95% sparsity or more: 0 of 2, 0.0% of the experts' weights"
        )

    def test_nothing_is_said_without_experts_or_their_sparsities(self, plan: Plan) -> None:
        shared = {"mlp.shared_experts.up_proj": 0.98, "mlp.up_proj": 0.5}
        for each in (plan, self.refined(shared)):
            assert "experts at" not in words(view.text(each))

    def test_the_command_shows_it(self, tmp_path: Path) -> None:
        self.refined(self.experts((0.5, 0.6), (0.97, 0.98))).save(tmp_path / "plan.json")
        assert "1 of 2, 50.0% of" in words(command("show", tmp_path / "plan.json").output)


def words(text: str) -> str:
    return " ".join(text.split())


def test_json_there_and_back(plan: Plan, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert Plan.load(plan.model_dump(mode="json")) == plan
    again = tmp_path / "again.json"
    Plan.load(tmp_path / "plan.json").save(again)
    assert again.read_bytes() == (tmp_path / "plan.json").read_bytes()


def test_version_2_had_no_searched_at(plan: Plan) -> None:
    content = plan.model_dump(mode="json") | {"schema_version": 2}
    with pytest.raises(ValueError, match="schema_version"):
        Plan.load(content)
    del content["searched_at"]
    assert Plan.load(content) == plan


def test_version_3_had_generations(plan: Plan) -> None:
    rest = {"evaluations": 1, "tokens": 8, "divergence": 0.5}
    content = plan.model_dump(mode="json") | {"search": [{"step": 4, **rest}]}
    older = content | {"schema_version": 3, "search": [{"generation": 4, **rest}]}
    assert Plan.load(older) == Plan.load(content)
    assert Plan.load(older).search[0].step == 4


def test_another_target_and_alpha_from_the_same_scores(plan: Plan) -> None:
    other = plan.at(target=0.5, strength=0)
    assert [b.sparsity for b in other.blocks] == [0.5] * 3
    assert [b.score for b in other.blocks] == [b.score for b in plan.blocks]
    assert other.at(target=0.7, strength=0.1).blocks == plan.blocks
    assert plan.at() is plan


def test_table_and_picture(plan: Plan, tmp_path: Path) -> None:
    text = view.text(plan)
    for part in ("some/model", "layers.1", "300", "0.7600", "target 0.7, alpha 0.1, median"):
        assert part in text
    view.plot(plan, tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    assert [file.name for file in tmp_path.iterdir()] == ["plan.png"]
    with pytest.raises(ValueError, match="has no suffix to tell the format; name it"):
        view.plot(plan, tmp_path / "plan")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.pop("target"), "target: Field required"),
        (lambda p: p.update(strength=-1), "strength must be finite and at least 0, got -1"),
        (lambda p: p.update(target=1.5), "target must be strictly between 0 and 1, got 1.5"),
        (lambda p: p.update(schema_version=5), "schema_version"),
        (lambda p: p.update(colour="red"), "colour"),
        (lambda p: p.update(blocks=[]), "blocks"),
        (lambda p: p["blocks"][1].update(name="layers.0"), "blocks: two have the same name"),
        (lambda p: p["blocks"][1].update(sparsity=0.1), "come to 0.304000 of all weights"),
        (lambda p: p["blocks"][1].update(score=-3), r"blocks\.1\.score"),
        (lambda p: p["blocks"][1].update(sparsity=2), r"blocks\.1\.sparsity"),
        (lambda p: p.update(strength=True), "strength: Value error, True is not a number"),
        (lambda p: p.update(strength=1e308), r"strength must be at most 1e\+06, got 1e\+308"),
        (lambda p: p["blocks"][1].update(weights=10**400), r"blocks\.1\.weights"),
        (lambda p: p["blocks"][1].update(score=10**400), r"blocks\.1\.score"),
        (lambda p: p["blocks"][1].update(score=1e308), r"blocks\.1\.score"),
        (
            lambda p: p["blocks"][1].update(weights=True),
            r"blocks\.1\.weights: .*True is not a number",
        ),
        (lambda p: p["blocks"][1].update(linears={"a": True}), r"blocks\.1\.linears\.a: .*True is"),
        (lambda p: p.update(target=True), "target: .*True is not a number"),
        (lambda p: p.update(schema_version=True), "schema_version: .*True is not a number"),
        (lambda p: p.update(mask_structure="1:" + "9" * 400), "mask_structure must be N:M"),
        (lambda p: p.update({"a\nb": 1}), "a b: Extra inputs are not permitted"),
        (
            lambda p: p.update(search=[{"step": 10**400}]),
            r"search\.0\.step: Input should be less than",
        ),
        (
            lambda p: p.update(candidates=[{"strength": 0.1, "loss": 1e999}]),
            r"candidates\.0\.loss: Input should be a finite number",
        ),
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
        (b"\xff\xfe", "it is not UTF-8 text"),
        (b"[" * 200_000, "recursion limit exceeded"),
        (b'{"a":' * 200_000, "recursion limit exceeded"),
        (b'{"alpha": ' + b"9" * 5000 + b"}", "number out of range"),
        (b'{"model": "\\ud800"}', "Invalid JSON"),
        (b"[1]", "should be an object"),
        (b"", "Invalid JSON"),
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
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"file/plan.json is not a sound plan .*directory"):
        Plan.load(tmp_path / "file" / "plan.json")


ODD = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**400), 10**400)
    | st.floats()
    | st.sampled_from([1e308, -1e308, 5e-324, 1 << 53, "1:4", "4:8", "1e400"])
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


def places_in(value: object) -> list[tuple[dict | list, object]]:
    """Every container and key inside a JSON value."""
    keys = {dict: lambda: sorted(value), list: lambda: range(len(value))}.get(type(value), tuple)()
    inside = [place for key in keys for place in places_in(value[key])]
    return [(value, key) for key in keys] + inside


@settings(deadline=None)
@given(data=st.data())
def test_whatever_stands_in_a_file_it_is_a_plan_or_an_error_in_one_line(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A good plan with fields changed, removed and added, and its text cut and garbled."""
    row = {"score": 1.0, "importance": 0.5, "sparsity": 0.5}
    content = {
        "model": "m",
        **data.draw(
            st.sampled_from(
                [
                    {"statistic": "median", "alpha": 0.0},
                    {"schema_version": 2, "settings": {"statistic": "mean"}, "strength": 0.0},
                    {"schema_version": 3, "strength": 0.0, "searched_at": 0.3},
                    {"schema_version": 4, "strength": 0.0, "searched_at": 0.3},
                ]
            )
        ),
        "target": 0.5,
        "mask_structure": data.draw(st.sampled_from(["0:0", "2:4"])),
        "blocks": [
            {"name": "a", "weights": 8, **row, "linears": {"a.up": 0.25, "a.down": 0.75}},
            {"name": "b", "weights": 8, **row},
        ],
        "candidates": [],
        "search": [{"generation": 0, "evaluations": 1, "tokens": 8, "divergence": 1.0}],
        "versions": {"torch": "2"},
    }
    assert Plan.load(content).sparsity == 0.5
    for _ in range(data.draw(st.integers(0, 3))):
        holder, key = data.draw(st.sampled_from(places_in(content)))
        match data.draw(st.sampled_from(["change", "remove", "add"])):
            case "change":
                holder[key] = data.draw(ODD)
            case "remove":
                del holder[key]
            case "add" if isinstance(holder, dict):
                holder[data.draw(st.text(max_size=5))] = data.draw(ODD)
    raw = json.dumps(content).encode()
    if data.draw(st.booleans()):
        at = data.draw(st.integers(0, len(raw)))
        raw = raw[:at] + data.draw(st.binary(max_size=3)) + raw[at + data.draw(st.integers(0, 9)) :]
    file = tmp_path_factory.getbasetemp() / "plan.json"
    file.write_bytes(raw)
    refused = f"{file} is not a sound plan ("
    try:
        plan = Plan.load(file)
    except ValueError as error:
        told = str(error)
    else:
        told = refused
        assert "block" in view.text(plan)
        plan.save(file)
        assert Plan.load(file) == plan
        with suppress(ValueError):  # AlphaPruning's epsilon above 1
            other = plan.model_copy(update={"search": ()}).at(target=0.25, mask_structure="0:0")
            assert other.sparsity == pytest.approx(0.25)
    assert told.startswith(refused)
    assert "\n" not in told


def test_linears_must_come_to_their_block() -> None:
    block = {"name": "b", "weights": 40, "score": 1.0, "importance": 0.0, "sparsity": 0.5}
    block["linears"] = {"b.up": 0.2, "b.down": 0.6}
    content = {"model": "m", "statistic": "median", "alpha": 0, "target": 0.5, "blocks": [block]}
    plan = Plan.load(content)
    plan.check_linears({"b.up": 10, "b.down": 30})  # (10 * 0.2 + 30 * 0.6) / 40
    message = r"block b has sparsity 0\.5, and its linears come to 0\.4 by their weights: search"
    with pytest.raises(ValueError, match=message):
        plan.check_linears({"b.up": 20, "b.down": 20})


def test_of_n_m_linears_are_whole_numbers() -> None:
    block = {"name": "b", "weights": 40, "score": 1.0, "importance": 0.0, "sparsity": 0.5}
    block["linears"] = {"b.up": 0.4, "b.down": 0.6}
    content = {"model": "m", "statistic": "median", "alpha": 0, "target": 0.5, "blocks": [block]}
    Plan.load(content)
    with pytest.raises(ValueError, match=r"sparsity of b\.up is 0\.4, which is no whole number of"):
        Plan.load({**content, "mask_structure": "2:4"})


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
        raise KeyboardInterrupt("while it writes")

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt, match="while it writes"):
        plan.at(target=0.5).save(file)
    assert file.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["plan.json"]


def test_a_folder_that_is_not_there_is_named(plan: Plan, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent does not exist; create it first"):
        plan.save(tmp_path / "absent" / "plan.json")
