"""Every family of the README, pruned by the real ``oneshot()``, saved, and loaded again by the
plain class: under the names of the checkpoint that it came from, with the very same weights.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.offload import load_offloaded_model
from families import FAMILIES, Family, make
from helpers import (
    Logged,
    assert_same,
    linears_of,
    random_samples,
    run,
    weights_of,
    word_tokenizer,
    zeros,
)
from llmcompressor.modeling.moe.conversion_mappings import (
    get_linearize_load_mappings,
    set_save_conversion_mapping,
)
from llmcompressor.modeling.moe.linearize import get_linearized_moes, linearize_moe
from llmcompressor.modifiers.pruning import REAPPruningModifier, WandaPruningModifier
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import conversion_mapping
from transformers.core_model_loading import Interleave, WeightConverter

import dlp_plugin
from dlp_plugin import DLPModifier, MaskedGPTQModifier, OneShotMagnitudeModifier
from dlp_plugin.checkpoints.loading import apply_recipe
from dlp_plugin.evaluation.text import calibrate_on
from dlp_plugin.experts import save_under_source_names

SPLIT = ["mixtral", "qwen3_moe", "deepseek_v3", "qwen3_next", "jamba", "nemotron_h_experts"]
EXPERTS = [*SPLIT, "gpt_oss"]  # of which a layer has one tensor
W4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}


def source_of(family: Family, folder: Path) -> Path:
    """A checkpoint as the family's are published."""
    make(family.config(), folder, family.kind).save_pretrained(folder)
    return folder


def load(family: Family, folder: Path, **arguments: object) -> torch.nn.Module:
    return family.kind.from_pretrained(folder, attn_implementation="eager", **arguments)


def reload(family: Family, folder: Path, **arguments: object) -> torch.nn.Module:
    model, info = load(family, folder, output_loading_info=True, **arguments)
    assert not any(info.values()), info
    return model


def pruners(family: Family) -> list[object]:
    ignore = ["re:.*lm_head", *family.ignore]
    return [DLPModifier(), WandaPruningModifier(sparsity=0.6, targets=["Linear"], ignore=ignore)]


def quantizer(*ignore: str) -> MaskedGPTQModifier:
    groups = {"group_0": {"targets": ["Linear"], "weights": W4}}
    return MaskedGPTQModifier(config_groups=groups, ignore=["re:.*lm_head", *ignore])


def prune_as(model: torch.nn.Module, family: Family, output: Path | None, *more: object) -> None:
    run(
        model,
        [*pruners(family), *more],
        family.calibration(),
        sequential_targets=family.sequential_targets,
        output_dir=None if output is None else str(output),
    )


def shapes(folder: Path) -> dict[str, list[int]]:
    """Every tensor's shape in a checkpoint's files, each in one file."""
    found: dict[str, list[int]] = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            here = {key: opened.get_slice(key).get_shape() for key in opened.keys()}  # noqa: SIM118
        assert not here.keys() & found.keys()
        found |= here
    return found


def logits(model: torch.nn.Module, family: Family) -> torch.Tensor:
    row = {key: torch.tensor([value]) for key, value in family.samples()[0].items()}
    row = {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in row.items()}
    with torch.no_grad():
        return model(**row).logits


def assert_computes_same(reloaded: torch.nn.Module, model: torch.nn.Module, family: Family) -> None:
    """Compare with a model whose experts are Linears, where it has any."""
    if model.dtype == torch.float32:  # bfloat16 rounds fused products another way
        torch.testing.assert_close(logits(reloaded, family), logits(model, family))
    reloaded = linearize_moe(reloaded)
    assert torch.equal(logits(reloaded, family), logits(model, family))
    assert_same(weights_of(reloaded), weights_of(model))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_pruned_model_loads_as_it_was_saved(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    source, pruned = source_of(family, tmp_path / "source"), tmp_path / "pruned"
    model = load(family, source)
    prune_as(model, family, pruned)
    assert shapes(pruned) == shapes(source)
    assert_computes_same(reload(family, pruned), model, family)
    inside = [each for names in family.linears(model).values() for each in names]
    counts = [(zeros(linears_of(model)[each]), linears_of(model)[each]) for each in inside]
    weights = sum(linear.weight.numel() for _, linear in counts)
    assert sum(count for count, _ in counts) / weights == pytest.approx(0.6, abs=0.02)


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_in_bfloat16(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    source, pruned = source_of(family, tmp_path / "source"), tmp_path / "pruned"
    model = load(family, source, dtype=torch.bfloat16)
    prune_as(model, family, pruned)
    assert shapes(pruned) == shapes(source)
    assert_computes_same(reload(family, pruned, dtype=torch.bfloat16), model, family)


@pytest.mark.parametrize("sparsity", [0, 0.5], ids=["alone", "then pruned"])
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_a_stock_stage_removes_experts(name: str, sparsity: float, tmp_path: Path) -> None:
    """Alone no modifier of this package takes part; before others it leaves them fewer experts."""
    family, smaller = FAMILIES[name], tmp_path / "smaller"
    source = source_of(family, tmp_path / "source")
    word_tokenizer().save_pretrained(source)
    recipe = [REAPPruningModifier(sparsity=0.25)]
    if sparsity:
        wanda = dlp_plugin.WandaPruningModifier(targets=["Linear"], ignore=["lm_head"])
        recipe += [DLPModifier(sparsity=sparsity), wanda]
    model = apply_recipe(
        source,
        recipe,
        smaller,
        **calibrate_on(random_samples(), word_tokenizer()),
    )
    kept = shapes(smaller)
    held = [each for each in shapes(source) if ".experts." in each]
    assert 3 * len(held) == 4 * sum(".experts." in each for each in kept)
    torch.testing.assert_close(logits(reload(family, smaller), family), logits(model, family))
    counts = [
        (zeros(linear), linear.weight.numel())
        for name, linear in linears_of(model).items()
        if "layers" in name and not name.endswith("gate")
    ]
    dead, weights = map(sum, zip(*counts, strict=True))
    assert dead / weights == pytest.approx(sparsity, abs=0.02)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_experts_of_a_model_that_was_not_loaded(name: str, tmp_path: Path) -> None:
    family, pruned = FAMILIES[name], tmp_path / "pruned"
    model = make(family.config(), tmp_path, family.kind)
    prune_as(model, family, pruned)
    assert shapes(pruned) == shapes(source_of(family, tmp_path / "source"))
    assert_computes_same(reload(family, pruned), model, family)


@pytest.mark.parametrize("name", SPLIT)
def test_experts_at_4_bits(name: str, tmp_path: Path) -> None:
    """Names as vLLM expects them; transformers reads the experts dequantized."""
    family = FAMILIES[name]
    source, packed = source_of(family, tmp_path / "source"), tmp_path / "packed"
    model = load(family, source)
    prune_as(model, family, packed, quantizer(*family.ignore, "re:.*dt_proj"))
    written = shapes(packed).keys()
    experts = [key for key in shapes(source) if ".experts." in key and key.endswith(".weight")]
    assert len(experts) == sum(len(linears_of(module)) for _, module in get_linearized_moes(model))
    for key in experts:
        assert {f"{key}_packed", f"{key}_scale", f"{key}_shape"} <= written
        assert key not in written

    reloaded = linearize_moe(reload(family, packed))
    assert torch.isfinite(logits(reloaded, family)).all()
    ModelCompressor.from_pretrained_model(model).decompress_model(model)
    for place, module in get_linearized_moes(model):
        for each, linear in linears_of(module).items():
            again = reloaded.get_submodule(f"{place}.{each}")
            assert torch.equal(linear.weight, again.weight), f"{place}.{each}"
            assert zeros(again) > 0.4 * again.weight.numel()


RECIPES = {
    "allocation": lambda: pruners(FAMILIES["mixtral"]),
    "stage": lambda: [dlp_plugin.WandaPruningModifier(sparsity=0.6, ignore=["re:.*lm_head"])],
    "magnitude": lambda: [OneShotMagnitudeModifier(sparsity=0.6, ignore=["re:.*lm_head"])],
    "quantizer": lambda: [quantizer()],
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_each_of_our_modifiers_is_enough(recipe: str, tmp_path: Path) -> None:
    family = FAMILIES["mixtral"]
    model = load(family, source_of(family, tmp_path / "source"))
    saved = tmp_path / "saved"
    run(model, RECIPES[recipe](), random_samples(), output_dir=str(saved))
    assert not [key for key in shapes(saved) if ".mlp." in key]
    reload(family, saved)


@pytest.mark.parametrize("recipe", ["pruned", "quantized only"])
def test_fused_experts_cannot_be_quantized(recipe: str, tmp_path: Path) -> None:
    family = FAMILIES["gpt_oss"]
    model = load(family, source_of(family, tmp_path / "source"))
    before = weights_of(linearize_moe(model))
    modifiers = [*(pruners(family) if recipe == "pruned" else []), quantizer()]
    message = (
        r"MaskedGPTQModifier would quantize model\.layers\.0\.mlp\.experts\.0\.up_proj, but "
        r"checkpoints of gpt_oss hold experts fused.*: add 're:\.\*experts\.\*' to its ignore"
    )
    with pytest.raises(ValueError, match=message):
        run(model, modifiers, random_samples(), output_dir=str(tmp_path / "packed"))
    assert not (tmp_path / "packed").exists()
    assert_same(weights_of(model), before)


def test_a_bad_pattern_of_a_quantizer_is_named(tmp_path: Path) -> None:
    """Its matches are looked for before it has been initialized itself."""
    family = FAMILIES["mixtral"]
    model = load(family, source_of(family, tmp_path / "source"))
    message = r"MaskedGPTQModifier\.ignore holds 're:\[', which is no regular expression"
    with pytest.raises(ValueError, match=message):
        run(model, [*pruners(family), quantizer("re:[")], random_samples())


def test_what_is_beside_fused_experts_can_be_quantized(tmp_path: Path) -> None:
    family = FAMILIES["gpt_oss"]
    source, packed = source_of(family, tmp_path / "source"), tmp_path / "packed"
    model = load(family, source)
    prune_as(model, family, packed, quantizer("re:.*experts.*"))
    written = shapes(packed)
    assert "model.layers.0.self_attn.q_proj.weight_packed" in written
    for key, shape in shapes(source).items():
        assert ".experts." not in key or written[key] == shape, key
    reloaded = linearize_moe(reload(family, packed))
    for place, module in get_linearized_moes(model):
        for each, linear in linears_of(module).items():
            again = reloaded.get_submodule(f"{place}.{each}")
            assert torch.equal(linear.weight, again.weight), f"{place}.{each}"


def test_dense_experts_beside_quantized_linears_are_warned_of(
    tmp_path: Path, logged: Logged
) -> None:
    """vLLM reads them. If transformers does now, the warning can go."""
    family, packed = FAMILIES["mixtral"], tmp_path / "packed"
    model = load(family, source_of(family, tmp_path / "source"))
    prune_as(model, family, packed, quantizer("re:.*experts.*"))
    (warning,) = [each for each in logged("WARNING") if "Experts stay unquantized" in each]
    assert "model.layers.0.mlp.experts and others" in warning
    ignored = json.loads((packed / "config.json").read_text())["quantization_config"]["ignore"]
    assert "model.layers.0.block_sparse_moe.experts.0.w1" in ignored
    _, info = load(family, packed, output_loading_info=True)
    missing = {
        f"{depth}.mlp.experts.{name}"
        for depth in range(3)
        for name in ("gate_up_proj", "down_proj")
    }
    assert {key.removeprefix("model.layers.") for key in info["missing_keys"]} == missing


def test_files_that_part_the_experts_of_a_layer(tmp_path: Path) -> None:
    """transformers fills files in the order of the Linears, and converts each by itself."""
    family, pruned = FAMILIES["gpt_oss"], tmp_path / "pruned"
    source = source_of(family, tmp_path / "source")
    model = load(family, source)
    prune_as(model, family, None)
    model.save_pretrained(pruned, max_shard_size="50KB")  # two Linears
    assert len(list(pruned.glob("*.safetensors"))) > 3 * 2
    assert shapes(pruned) == shapes(source)
    assert_computes_same(reload(family, pruned), model, family)


def test_fused_experts_that_stay_on_disk(tmp_path: Path) -> None:
    family, pruned = FAMILIES["gpt_oss"], tmp_path / "pruned"
    source = source_of(family, tmp_path / "source")
    with load_offloaded_model():
        model = load(
            family,
            source,
            device_map="auto_offload",
            max_memory={"cpu": 100_000},
            offload_folder=str(tmp_path / "offload"),
        )
    prune_as(model, family, pruned)
    in_memory = load(family, source)
    prune_as(in_memory, family, None)
    assert_computes_same(reload(family, pruned), in_memory, family)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_being_asked_again_changes_nothing(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    source = source_of(family, tmp_path / "source")
    model = linearize_moe(load(family, source))
    for folder in (tmp_path / "once", tmp_path / "again"):
        save_under_source_names(model)
        model.save_pretrained(folder)
        assert shapes(folder) == shapes(source)


def test_experts_that_were_loaded_as_linears_are_left_to_the_host(tmp_path: Path) -> None:
    family = FAMILIES["qwen3_moe"]
    model = linearize_moe(load(family, source_of(family, tmp_path / "source")))
    _, _, save_mapping = get_linearize_load_mappings("qwen3_moe")
    set_save_conversion_mapping(model, save_mapping)  # as load_quantizable_moe() does
    model.save_pretrained(tmp_path / "host")
    save_under_source_names(model)
    model.save_pretrained(tmp_path / "ours")
    host, ours = (load_file(tmp_path / name / "model.safetensors") for name in ("host", "ours"))
    assert_same(ours, host)


@pytest.fixture
def strange_mixtral() -> Iterator[None]:
    """An architecture whose experts are fused in a way of its own when they are loaded."""
    key, name = "MixtralForCausalLM", ".experts.down_proj"
    converter = WeightConverter(name, name, [Interleave(1)])
    conversion_mapping.register_checkpoint_conversion_mapping(key, [converter])
    yield
    conversion_mapping.register_checkpoint_conversion_mapping(key, None, overwrite=True)


@pytest.mark.usefixtures("strange_mixtral")
def test_experts_in_an_unknown_form_are_refused(tmp_path: Path) -> None:
    family = FAMILIES["mixtral"]
    model = make(family.config(), tmp_path, family.kind)
    message = r"model\.layers\.0\.mlp\.experts\.down_proj of mixtral is made by \[Interleave"
    with pytest.raises(ValueError, match=message):
        prune_as(model, family, None)
