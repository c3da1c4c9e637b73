"""What this package relies on inside llm-compressor.

Each test says in words what has changed if a new release makes it fail.
"""

import pytest
import torch
from helpers import EVERY, MakeModel, linears_of, random_samples, run
from llmcompressor.args import DatasetArguments
from llmcompressor.core import active_session
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from pydantic import PrivateAttr

from dlp_plugin import DLPModifier, host


class Watcher(Modifier):
    """Notes which modifiers the session lists, and when."""

    requires_calibration_data: bool = True
    _seen: dict = PrivateAttr(default_factory=dict)

    @property
    def seen(self) -> dict[str, list[Modifier]]:
        return self._seen

    def note(self, when: str) -> None:
        self._seen[when] = list(active_session().lifecycle.recipe.modifiers)

    def on_initialize(self, state, **kwargs) -> bool:
        self.note("initialize")
        assert "sequential_targets" in kwargs, (
            "oneshot() no longer tells modifiers its sequential_targets: "
            "DLPModifier reads them in on_initialize"
        )
        return True

    def on_calibration_start(self, state, event, **kwargs) -> None:
        self.note("epoch")

    def on_finalize(self, state, **kwargs) -> bool:
        self.note("finalize")
        return True


def test_the_session_lists_all_modifiers_outside_and_one_inside_an_epoch(
    make_model: MakeModel,
) -> None:
    watcher = Watcher()
    stage = WandaPruningModifier(sparsity=0.5, targets=["re:.*mlp$"])
    run(make_model(), [watcher, stage], random_samples(2))
    assert watcher.seen["initialize"] == [watcher, stage], (
        "the recipe no longer lists all modifiers while they are initialized: "
        "stages_after() cannot find the stages to feed"
    )
    assert watcher.seen["epoch"] == [watcher], (
        "the independent pipeline no longer runs one modifier an epoch: "
        "DLPModifier's check that its stages come later is wrong"
    )
    assert watcher.seen["finalize"] == [watcher, stage]


@pytest.mark.parametrize("kind", [WandaPruningModifier, SparseGPTModifier])
@pytest.mark.parametrize(
    ("targets", "ignore"),
    [
        (["Linear"], []),
        (["Linear"], ["re:.*lm_head"]),
        (["LlamaDecoderLayer"], ["model.layers.1.mlp.up_proj"]),
        (["LlamaForCausalLM"], ["Embedding"]),
        (["re:.*_proj$", "LlamaMLP"], ["re:.*k_proj"]),
    ],
)
def test_a_stage_prunes_what_stage_targets_says(
    make_model: MakeModel, kind, targets, ignore
) -> None:
    model = make_model()
    stage = kind(sparsity=0.5, targets=targets, ignore=ignore)
    promised = host.stage_targets(model, stage)
    before = {name: linear.weight.clone() for name, linear in linears_of(model).items()}
    run(model, [stage], random_samples(2))
    pruned = {
        name
        for name, linear in linears_of(model).items()
        if not torch.equal(linear.weight, before[name])
    }
    assert pruned == {name for modules in promised.values() for name in modules}, (
        "a pruning stage matches targets and ignore in another way than stage_targets() "
        "does, so its sparsity list would be wrong"
    )


def test_a_list_has_one_entry_per_match_in_this_order(make_model: MakeModel) -> None:
    model = make_model()
    stage = WandaPruningModifier(sparsity=0.5, targets=["re:.*(up|down)_proj$"])
    targets = list(host.stage_targets(model, stage))
    stage.sparsity = [0.25 + 0.05 * place for place in range(len(targets))]
    given = dict(zip(targets, stage.sparsity, strict=True))
    run(model, [stage], random_samples(2))
    linears = linears_of(model)
    for name, sparsity in given.items():
        columns = linears[name].in_features
        assert ((linears[name].weight == 0).sum(1) == int(columns * sparsity)).all(), (
            "a pruning stage reads its sparsity list in another order than stage_targets() gives"
        )


def test_modifiers_of_one_type_in_a_group_still_lose_one_when_saved(make_model: MakeModel) -> None:
    """If this fails, ``keep_all_modifiers_when_saved`` can go."""
    from llmcompressor.recipe import Recipe

    twice = [DLPModifier(alpha=0.1), DLPModifier(alpha=0.2)]
    saved = Recipe.from_modifiers(twice).to_dict()
    assert len(saved["default_stage"]["default_modifiers"]) == 1


def test_a_modifier_finds_the_users_calibration_arguments(make_model: MakeModel) -> None:
    found = []

    class Looker(Watcher):
        def on_calibration_start(self, state, event, **kwargs) -> None:
            found.append(host.calibration_arguments())

    run(make_model(), [Looker()], random_samples(2), sequential_prefetch=True)
    assert found[0].sequential_prefetch, (
        "pipelines no longer hold the user's arguments as dataset_args: "
        "calibration_arguments() finds none, and scoring cannot run"
    )
    with pytest.raises(RuntimeError, match="no calibration pipeline"):
        host.calibration_arguments()


@pytest.mark.parametrize(("propagate_error", "runs"), [(True, 2), (False, 1)])
def test_the_sequential_pipeline_runs_blocks_once_without_propagation(
    make_model: MakeModel, propagate_error: bool, runs: int
) -> None:
    model, calls = make_model(), []
    model.model.layers[1].mlp.register_forward_hook(lambda *_: calls.append(1))
    run(model, [Watcher()], random_samples(3), propagate_error=propagate_error)
    assert len(calls) == 3 * runs, (
        "propagate_error no longer switches the second run of each block: "
        "run_once() is not what it says"
    )


@pytest.mark.parametrize(
    "name",
    ["propagate_error", "log_sequential_error", "layerwise_compression", "layerwise_decompression"],
)
def test_run_once_runs_blocks_once_and_leaves_their_weights(
    make_model: MakeModel, name: str
) -> None:
    """Whatever the user asks of the pruning that follows, as far as the release knows it."""
    if name not in DatasetArguments.__dataclass_fields__:
        pytest.skip(f"this llm-compressor has no {name}")
    model, calls, left = make_model(hidden_size=128), [], []
    block = model.model.layers[1].mlp

    class Scorer(Watcher):
        def on_calibration_start(self, state, event, **kwargs) -> None:
            if calls:
                return  # called by run_once()
            hook = block.register_forward_hook(lambda *_: calls.append(1))
            calls.append(0)
            host.run_once(state.model, state.data.calib)
            hook.remove()
            left.extend(name for name, _ in block.up_proj.named_parameters())

    quantizer = QuantizationModifier(scheme="W8A16", **EVERY)
    run(model, [Scorer(), quantizer], random_samples(3), pipeline="sequential", **{name: True})
    assert sum(calls) == 3
    assert "weight" in left, "what is yet to be pruned was stored in another form by then"
