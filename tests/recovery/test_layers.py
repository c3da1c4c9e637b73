"""What is relied on of the inside of peft: a release that changes one of these fails here."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import peft
import pytest
import torch
from adapted_models import (
    FLAVOURS,
    SOME,
    TARGETS,
    MakeModel,
    Mixture,
    adapted,
    lora,
)
from peft.tuners.lora.layer import LoraVariant
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from transformers.pytorch_utils import Conv1D

from dlp_plugin import recovery
from dlp_plugin.recovery.layers import (
    AdapterLayer,
    LoraLinear,
    Variant,
    adapted_parameter,
    adapter_layers,
    adapters_in,
    as_lora_linear,
    base_of,
    is_dora,
    is_tied_to,
    unwrapped,
    variant_of,
)


def lora_layer(
    *configs: peft.PeftConfig, inner: torch.nn.Module | None = None
) -> tuple[torch.nn.Module, LoraLinear]:
    """A model of one Linear ``[out 6, in 8]``, and the layer of peft around it."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(inner or torch.nn.Linear(8, 6))
    peft_model = adapted(model, *configs or [lora(target_modules=["0"])])
    return peft_model, peft_model.base_model.model[0]


def test_peft_is_imported_only_when_adapters_are_used() -> None:
    """What the host imports is its own affair, so that the files themselves are looked at."""
    files = list(Path(recovery.__file__).parent.glob("*.py"))
    assert len(files) == 8
    for file in files:
        for statement in ast.parse(file.read_text()).body:
            names = [getattr(statement, "module", None) or ""]
            names += [alias.name for alias in getattr(statement, "names", [])]
            assert not any(name.split(".")[0] == "peft" for name in names), file


def test_wrappers_and_no_others_have_merged_adapters(make_model: MakeModel) -> None:
    for kind in (BaseTunerLayer, AuxiliaryTrainingWrapper):
        assert kind.merged_adapters == []
    assert not any(hasattr(module, "merged_adapters") for module in make_model().modules())


def test_a_model_is_as_it_is_or_what_the_peft_model_is_around(make_model: MakeModel) -> None:
    model = make_model()
    assert base_of(model) is model
    assert base_of(adapted(model, lora())) is model


def test_what_trains_beside_a_module_keeps_it_as_original_module(make_model: MakeModel) -> None:
    model = make_model()
    mlp, embedding = model.model.layers[0].mlp, model.model.embed_tokens
    adapted(
        model,
        lora(target_modules=["q_proj"], modules_to_save=["mlp"], trainable_token_indices=[1]),
    )
    copied, tokens = model.model.layers[0].mlp, model.model.embed_tokens
    assert copied.original_module is mlp
    assert copied.modules_to_save["default"] is not mlp
    assert unwrapped(copied) == (mlp, [], True)
    assert tokens.original_module is tokens.token_adapter.base_layer is embedding
    assert unwrapped(tokens) == (embedding, [], False)


def test_an_adapter_layer_is_around_its_base_layer() -> None:
    linear = torch.nn.Linear(8, 6)
    _, layer = lora_layer(inner=linear)
    assert layer.base_layer is layer.get_base_layer() is linear
    assert unwrapped(layer) == (linear, [layer], False)
    assert unwrapped(linear) == (linear, [], False)
    assert adapted_parameter(layer) == "weight"


def test_layers_of_several_parameters_are_around_one_another_and_name_theirs() -> None:
    model = Mixture()
    experts, names = model.experts, ["gate_up_proj", "down_proj"]
    targets = [f"experts.{name}" for name in names]
    adapted(model, lora(target_modules=[], target_parameters=targets))
    inner, layers, copied = unwrapped(model.experts)
    assert inner is experts
    assert not copied
    assert layers == [model.experts, model.experts.base_layer]
    assert {adapted_parameter(layer) for layer in layers} == set(names)
    assert all(layer.get_base_layer() is experts for layer in layers)
    assert [name for name, _ in adapter_layers(model)] == ["experts", "experts"]


def test_layers_have_the_names_of_the_modules_that_they_are_around(make_model: MakeModel) -> None:
    model = make_model()
    names = {name for name, _ in model.named_modules()}
    adapted(model, lora(modules_to_save=["norm"], trainable_token_indices=[1]))
    found = [name for name, _ in adapter_layers(model)]
    assert len(found) == len(set(found)) == 3 * len(TARGETS) + 1
    assert names.issuperset(found)
    assert {SOME, "model.embed_tokens"} <= set(found)


@pytest.mark.parametrize("flavour", ["plain", "dora", "loha", "lokr", "ia3", "oft", "vera"])
def test_the_attributes_that_hold_an_adapters_parts_are_named(
    make_model: MakeModel, flavour: str
) -> None:
    model = make_model()
    adapted(model, *FLAVOURS[flavour])
    for _, layer in adapter_layers(model):
        assert adapters_in(layer, None) == ["default"]
        assert adapters_in(layer, ["other", "default"]) == ["default"]


def test_the_active_adapters_are_those_that_a_layer_has() -> None:
    other = lora(target_modules=["1"])
    model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.Linear(6, 4))
    peft_model = adapted(model, lora(target_modules=["0", "1"]), other)
    layers = dict(adapter_layers(model))
    assert {name: adapters_in(layer, None) for name, layer in layers.items()} == {
        "0": ["default"],
        "1": ["default", "second"],
    }
    peft_model.base_model.set_adapter("second")
    assert adapters_in(layers["0"], None) == []
    assert adapters_in(layers["0"], ["default"]) == ["default"]


@pytest.mark.parametrize("inner", [torch.nn.Linear(8, 6), Conv1D(6, 8)], ids=["Linear", "Conv1D"])
def test_lora_of_a_linear_has_the_parts_that_are_declared(inner: torch.nn.Module) -> None:
    transposed = isinstance(inner, Conv1D)
    settings = {"target_modules": ["0"], "fan_in_fan_out": transposed}
    _, layer = lora_layer(
        lora(**settings, lora_bias=True), lora(**settings, use_dora=True), inner=inner
    )
    declared = {**AdapterLayer.__annotations__, **LoraLinear.__annotations__}
    assert all(hasattr(layer, name) for name in declared)
    assert as_lora_linear(layer) is layer
    assert layer.lora_A["default"].weight.shape == (4, 8)
    assert layer.lora_B["default"].weight.shape == (6, 4)
    assert layer.lora_B["default"].bias.shape == (6,)
    assert layer.lora_B["second"].bias is None
    assert layer.lora_magnitude_vector["second"].weight.shape == (6,)
    assert layer.scaling["default"] == 8 / 4  # lora_alpha / r
    assert layer.fan_in_fan_out == transposed
    x = torch.randn(3, 8)
    assert layer.lora_dropout["default"](x) is x


def test_what_is_no_lora_of_a_linear_is_not_taken_for_it() -> None:
    _, layer = lora_layer(peft.IA3Config(target_modules=["0"], feedforward_modules=[]))
    assert as_lora_linear(layer) is None
    assert variant_of(layer, "default") is None
    model = torch.nn.Sequential(torch.nn.Embedding(8, 6))
    adapted(model, lora(target_modules=["0"]))
    assert as_lora_linear(model[0]) is None


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings")
@pytest.mark.parametrize("tied", [True, False])
def test_adapters_of_a_head_are_tied_to_the_embedding_s_by_their_storage(
    make_model: MakeModel, tied: bool
) -> None:
    model = make_model(tie_word_embeddings=True)
    settings = {"target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": tied}
    peft.get_peft_model(model, lora(**settings))
    head, embedding = model.lm_head, model.model.embed_tokens
    assert is_tied_to(head, embedding, "default") == tied
    assert not is_tied_to(embedding, head, "default")
    assert not is_tied_to(head, embedding, "other")


def test_plain_lora_has_no_variant_and_dora_has_its_own() -> None:
    _, layer = lora_layer(
        lora(target_modules=["0"]),
        lora(target_modules=["0"], use_dora=True),
    )
    assert set(layer.lora_variant) == {"second"}
    assert variant_of(layer, "default") is None
    assert is_dora(variant_of(layer, "second"))


def test_a_variant_has_the_methods_that_are_declared_and_init() -> None:
    """``init`` makes an adapter's parts; ours comes after it, and has none to make."""

    def parameters(kind: type) -> dict[str, list[str]]:
        methods = {n: f for n, f in vars(kind).items() if not n.startswith("_")}
        return {
            name: [
                parameter
                for parameter in inspect.signature(getattr(kind, name)).parameters
                if parameter != "self"
            ]
            for name in methods
        }

    theirs = parameters(LoraVariant)
    assert theirs.pop("init") == ["module", "adapter_name"]
    assert parameters(Variant) == theirs


class Recorder(Variant):
    """Adds one to what there is, and writes down how it was called."""

    def __init__(self) -> None:
        self.calls: list[tuple] = []

    def supports_lora_conversion(self) -> bool:
        self.calls.append(("supports_lora_conversion",))
        return False

    def forward(self, module, active_adapter, x, result, **kwargs):
        self.calls.append(("forward", active_adapter, tuple(x.shape), tuple(result.shape)))
        return result + 1

    def merge_safe(self, module, active_adapter, orig_weight):
        self.calls.append(("merge_safe", active_adapter, list(module.merged_adapters)))
        return orig_weight + 1

    def merge_unsafe(self, module, active_adapter, orig_weight):
        self.calls.append(("merge_unsafe", active_adapter, list(module.merged_adapters)))
        orig_weight.data += 1

    def unmerge(self, module, active_adapter, orig_weight):
        self.calls.append(("unmerge", active_adapter, list(module.merged_adapters)))
        return orig_weight - 1


def both_recorded() -> tuple[torch.nn.Module, LoraLinear, Recorder]:
    peft_model, layer = lora_layer(lora(target_modules=["0"]), lora(target_modules=["0"]))
    recorder = Recorder()
    layer.lora_variant.update(default=recorder, second=recorder)
    return peft_model, layer, recorder


def test_a_layer_computes_with_its_variants_one_after_the_other() -> None:
    peft_model, layer, recorder = both_recorded()
    x = torch.randn(3, 8)
    assert torch.allclose(peft_model(x), layer.base_layer(x) + 2)
    assert recorder.calls == [
        ("forward", "default", (3, 8), (3, 6)),
        ("forward", "second", (3, 8), (3, 6)),
    ]
    assert not layer.supports_lora_conversion("default")
    assert recorder.calls.pop() == ("supports_lora_conversion",)


@pytest.mark.parametrize("safe", [True, False])
def test_variants_merge_in_order_and_unmerge_from_the_last(safe: bool) -> None:
    """What is in the weight already is in ``merged_adapters``."""
    peft_model, layer, recorder = both_recorded()
    before = layer.base_layer.weight.detach().clone()
    peft_model.merge_adapter(safe_merge=safe)
    assert layer.merged
    assert torch.allclose(layer.base_layer.weight, before + 2)
    peft_model.unmerge_adapter()
    assert not layer.merged
    assert torch.allclose(layer.base_layer.weight, before, atol=1e-6)
    how = "merge_safe" if safe else "merge_unsafe"
    assert recorder.calls == [
        (how, "default", []),
        (how, "second", ["default"]),
        ("unmerge", "second", ["default"]),
        ("unmerge", "default", []),
    ]


def test_merging_takes_the_named_adapters() -> None:
    _, layer, recorder = both_recorded()
    layer.merge(adapter_names=["second"])
    assert layer.merged_adapters == ["second"]
    assert recorder.calls == [("merge_unsafe", "second", [])]
