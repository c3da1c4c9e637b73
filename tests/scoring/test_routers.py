"""What routes tokens to experts stays dense unless a target names it."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from families import FAMILIES, make
from helpers import PRUNERS, Logged, linears_of, random_samples, refuses, run, zeros
from llmcompressor.modeling.moe.linearize import linearize_moe
from llmcompressor.modifiers import pruning
from torch.nn import Linear, ModuleList

from dlp_plugin import ADMMPruningModifier, DLPModifier, MaskedGPTQModifier, Plan, pack
from dlp_plugin.scoring.routers import unnamed_routers

JAMBA = "model.layers.1.feed_forward.router"
GATES = [f"model.layers.{depth}.mlp.shared_expert_gate" for depth in range(3)]
NAMED = ["Linear", r"re:.*\.shared_expert_gate$"]


def model_of(name: str, folder: Path) -> torch.nn.Module:
    return make(FAMILIES[name].config(), folder)


class Stacked(torch.nn.Module):
    """Experts as one parameter, as transformers holds most."""

    def __init__(self) -> None:
        super().__init__()
        self.down_proj = torch.nn.Parameter(torch.zeros(4, 8, 8))


def experts() -> ModuleList:
    return ModuleList(Linear(8, 8) for _ in range(4))


def module(**children: torch.nn.Module) -> torch.nn.Module:
    found = torch.nn.Module()
    for name, child in children.items():
        found.add_module(name, child)
    return found


@pytest.mark.parametrize(
    ("mixture", "routers"),
    [
        ({"experts": Stacked(), "gate": Linear(8, 4)}, ["mlp.gate"]),
        ({"experts": experts(), "router": Linear(8, 4)}, ["mlp.router"]),
        ({"experts": Stacked(), "gate": module(wg=Linear(8, 4))}, ["mlp.gate.wg"]),
        ({"experts": Stacked(), "shared_expert_gate": Linear(8, 1)}, ["mlp.shared_expert_gate"]),
        # No routers: another size, another name, in an expert, in the part of attention
        ({"experts": Stacked(), "per_layer_input_gate": Linear(8, 16)}, []),
        ({"experts": Stacked(), "gate_proj": Linear(8, 4), "up": Linear(8, 1)}, []),
        ({"experts": Stacked(), "shared_expert": module(gate=Linear(8, 4))}, []),
        ({"gate": Linear(8, 4), "up_proj": Linear(8, 4)}, []),
        ({"layers": experts(), "gate": Linear(8, 4)}, []),
    ],
)
def test_they_are_known_by_where_they_are_their_names_and_outputs(
    mixture: dict, routers: list[str]
) -> None:
    model = module(mlp=module(**mixture))
    assert list(unnamed_routers(model, ["Linear"])) == routers
    assert not unnamed_routers(model, ["Linear", *routers])
    assert not unnamed_routers(model, ["re:mlp"])


@pytest.mark.parametrize("kind", [*PRUNERS, ADMMPruningModifier])
@pytest.mark.parametrize("fed", [True, False])
def test_a_stage_leaves_them_dense_unless_they_are_named(
    kind: type, fed: bool, tmp_path: Path, logged: Logged
) -> None:
    ignore = ["re:.*lm_head"]
    for targets in (["Linear"], NAMED):
        model = model_of("qwen3_next", tmp_path)
        stage = kind(sparsity=0.6, targets=targets, ignore=ignore)
        run(model, [*([DLPModifier()] if fed else []), stage], random_samples(2))
        for name, linear in linears_of(model).items():
            dense = name == "lm_head" or (name in GATES and targets != NAMED)
            assert (zeros(linear) == 0) == dense, name
        assert stage.ignore == ignore
    told = [message for message in logged() if "leaves routers dense" in message]
    assert told == [
        f"{kind.__name__} leaves routers dense: {GATES[0]} and 2 more; to prune them too, add "
        r"'re:.*\.shared_expert_gate$' to its targets"
    ]


BROAD = ["Linear", "re:.*mlp.*"]


def quantizer(targets: list[str]) -> MaskedGPTQModifier:
    weights = {"num_bits": 4, "strategy": "group", "group_size": 32}
    groups = {"group_0": {"targets": targets, "weights": weights}}
    return MaskedGPTQModifier(config_groups=groups, ignore=["re:.*lm_head"])


def stage(kind: type, targets: list[str], **fields: object) -> object:
    return kind(sparsity=0.6, targets=targets, ignore=["re:.*lm_head"], **fields)


STAGES = [partial(stage, kind) for kind in (*PRUNERS, ADMMPruningModifier)]
ALONE = partial(stage, DLPModifier, plan_path="plan.json")  # no stage follows, whose targets count


@pytest.mark.parametrize(
    ("make_modifier", "targets"),
    [*((each, BROAD) for each in (*STAGES, quantizer)), (ALONE, NAMED)],
)
def test_targets_that_reach_them_are_warned_of(
    make_modifier: Callable,
    targets: list[str],
    tmp_path: Path,
    logged: Logged,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    modifier = make_modifier(targets)
    run(model_of("qwen3_next", tmp_path), [modifier], random_samples(2))
    (told,) = [message for message in logged("WARNING") if "prunes routers" in message]
    assert told == (
        f"{type(modifier).__name__} prunes routers, which choose the experts for each "
        f"token: {GATES[0]} and 2 more; to leave them dense, add "
        r"'re:.*\.shared_expert_gate$' to its ignore"
    )


@pytest.mark.parametrize("make_modifier", [*STAGES, ALONE, quantizer])
def test_targets_that_name_one_that_is_no_linear_are_refused(
    make_modifier: Callable, tmp_path: Path
) -> None:
    """Which most families have; nothing would become of such an entry."""
    message = (
        r"targets holds 're:\.\*mlp\\\\\.gate\$', which matches model\.layers\.0\.mlp\.gate, a "
        r"router of the class MixtralTopKRouter; only Linears are pruned: remove it"
    )
    model = linearize_moe(model_of("mixtral", tmp_path))  # as the host does
    refuses(model, message, make_modifier(["Linear", r"re:.*mlp\.gate$"]))


def test_pack_leaves_them_dense(tmp_path: Path) -> None:
    """Engines build them where they ask no quantization method."""
    model = model_of("jamba", tmp_path / "origin")
    for weight in model.parameters():
        weight.data[..., ::2] = 0
    model.save_pretrained(tmp_path / "source")
    linears = pack(tmp_path / "source", tmp_path / "packed").linears
    assert JAMBA not in linears
    assert "model.layers.1.feed_forward.experts.0.gate_proj" in linears


def test_a_stock_stage_that_is_fed_leaves_them_dense(tmp_path: Path) -> None:
    model = model_of("jamba", tmp_path)
    stage = pruning.WandaPruningModifier(sparsity=0.6, ignore=["re:.*lm_head"])
    run(model, [DLPModifier(), stage], random_samples(2))
    assert not zeros(linears_of(model)[JAMBA])
    assert zeros(linears_of(model)["model.layers.1.self_attn.q_proj"])
    assert stage.ignore == ["re:.*lm_head"]


@pytest.mark.parametrize("targets", [["Linear"], NAMED])
def test_4_bits_are_for_those_that_are_named(targets: list[str], tmp_path: Path) -> None:
    model = model_of("qwen3_next", tmp_path)
    modifier = quantizer(targets)
    run(model, [modifier], random_samples(2), output_dir=str(tmp_path / "packed"))
    assert modifier.ignore == ["re:.*lm_head"]
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    left = set(config["quantization_config"]["ignore"])
    assert left >= {"lm_head"}
    assert left.isdisjoint(GATES) == (targets == NAMED)


def test_a_plan_that_no_stage_follows_counts_none(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    run(
        model_of("jamba", tmp_path),
        [DLPModifier(sparsity=0.6, plan_path=str(path))],
        random_samples(2),
    )
    stage = pruning.WandaPruningModifier(sparsity=0.6, ignore=["re:.*lm_head"])
    run(model_of("jamba", tmp_path), [DLPModifier(from_plan=str(path)), stage], random_samples(2))


@pytest.mark.parametrize("refine", [0, 1])
def test_a_plan_that_counts_them_says_how_to_prune_by_it(refine: int, tmp_path: Path) -> None:
    """Such plans were made when a class in ``targets`` took them in."""

    def stage(*more: str) -> object:
        kind, targets = PRUNERS[0], ["Linear", *more]
        return kind(sparsity=0.6, targets=targets, ignore=["re:.*lm_head", "re:.*dt_proj"])

    entry = r"re:.*\.router$"
    counting = DLPModifier(refine=refine)
    run(model_of("jamba", tmp_path), [counting, stage(entry)], random_samples())
    given = Plan.model_dump(counting.plan, mode="json")
    message = (
        rf"counts routers \({JAMBA}\), which stay dense unless the stage's targets name them: add "
        r"'re:.*' to targets to prune them by it, or score again"
    )
    model = model_of("jamba", tmp_path)
    with pytest.raises(ValueError, match=message):
        run(model, [DLPModifier(from_plan=given), stage()], random_samples())
    assert not any(map(zeros, linears_of(model).values()))
    run(model, [DLPModifier(from_plan=given), stage(entry)], random_samples())
    assert zeros(linears_of(model)[JAMBA])
