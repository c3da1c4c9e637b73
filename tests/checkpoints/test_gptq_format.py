"""Exported GPTQ checkpoints against what they were made from, weight by weight."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from helpers import MakeModel, assert_same, linears_of, random_samples, run
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dlp_plugin.checkpoints.gptq_format import export_gptq
from dlp_plugin.checkpoints.old_readers import readable_config

Pack = Callable[..., Path]


@pytest.fixture
def pack(make_model: MakeModel, tmp_path: Path) -> Pack:
    """A sparse and packed checkpoint, made by the real ``oneshot()`` without data."""

    def make(
        *,
        dtype: torch.dtype = torch.bfloat16,
        ignore: tuple[str, ...] = ("lm_head",),
        model: dict[str, object] | None = None,
        edit: Callable[[torch.nn.Module], None] = lambda _: None,
        **weights: object,
    ) -> Path:
        settings = {"num_bits": 4, "strategy": "group", "group_size": 32, **weights}
        scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**settings))
        made = make_model(dtype, **(model or {}))
        edit(made)
        for linear in linears_of(made).values():
            size = linear.weight.data.abs()
            linear.weight.data[size < size.float().quantile(0.6)] = 0
        quantization = QuantizationModifier(ignore=list(ignore), config_groups={"group_0": scheme})
        run(made, quantization, None, output_dir=str(tmp_path / "packed"))
        return tmp_path / "packed"

    return make


def exported(source: Path) -> Path:
    output = source.with_name("gptq")
    export_gptq(source, output)
    return output


def naive_column(words: torch.Tensor, bits: int) -> list[int]:
    """Unsigned numbers of one column of words, the lowest bits first."""
    mask = 2**bits - 1
    return [(int(word) >> shift) & mask for word in words for shift in range(0, 32, bits)]


def naive_numbers(words: torch.Tensor, bits: int) -> torch.Tensor:
    return torch.tensor([naive_column(column, bits) for column in words.T]).T


def naive_weight(tensors: dict[str, torch.Tensor], module: str, bits: int) -> torch.Tensor:
    """A Linear's weight ``[out, in]`` as AutoGPTQ's own pack() defines the format."""
    integers = naive_numbers(tensors[f"{module}.qweight"], bits)  # [in, out]
    zeros = naive_numbers(tensors[f"{module}.qzeros"].T, bits).T + 1  # [groups, out]
    scales, groups = tensors[f"{module}.scales"], tensors[f"{module}.g_idx"].long()
    return ((integers - zeros[groups]) * scales.float()[groups]).T


def edit_config(source: Path, edit: Callable[[dict[str, object]], object]) -> None:
    file = source / "config.json"
    config = json.loads(file.read_text())
    edit(config["quantization_config"])
    file.write_text(json.dumps(config))


def edit_tensors(source: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    file = source / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "strategy", "group"), [(4, "group", 32), (8, "channel", None)])
def test_every_weight_is_what_transformers_loads_from_the_source(
    pack: Pack, dtype: torch.dtype, symmetric: bool, bits: int, strategy: str, group: int | None
) -> None:
    source = pack(
        dtype=dtype, num_bits=bits, symmetric=symmetric, strategy=strategy, group_size=group
    )
    tensors = load_file(exported(source) / "model.safetensors")
    loaded = AutoModelForCausalLM.from_pretrained(source)
    loaded(torch.zeros(1, 4, dtype=torch.int64))  # decompresses on the way
    for name, linear in linears_of(loaded).items():
        if name == "lm_head":
            continue
        weight = naive_weight(tensors, name, bits)
        # The source's number times its scale is rounded to the model's dtype on loading.
        assert torch.equal(weight.to(dtype), linear.weight), name
        assert torch.equal(weight == 0, linear.weight == 0), name
        assert (weight == 0).float().mean() > 0.59, name


@pytest.mark.parametrize("bits", [4, 8])
def test_zero_points_of_nought_are_held_though_one_is_taken_off(pack: Pack, bits: int) -> None:
    name = "model.layers.0.mlp.up_proj"

    def rows_of_one_sign(model: torch.nn.Module) -> None:
        weight = model.get_submodule(name).weight.data
        weight[:20].abs_()
        weight[20:40].abs_().neg_()
        weight[40:50] = 0

    source = pack(num_bits=bits, symmetric=False, edit=rows_of_one_sign)
    tensors = load_file(exported(source) / "model.safetensors")
    loaded = AutoModelForCausalLM.from_pretrained(source)
    loaded(torch.zeros(1, 4, dtype=torch.int64))
    weight = naive_weight(tensors, name, bits)
    assert torch.equal(weight.bfloat16(), loaded.get_submodule(name).weight)
    assert (weight[:20] >= 0).all()
    assert weight[:20].max() > 0
    assert (weight[40:50] == 0).all()
    assert naive_numbers(tensors[f"{name}.qzeros"].T, bits).max() < 2**bits - 1


def test_shapes_and_types_are_those_of_auto_gptq(pack: Pack) -> None:
    tensors = load_file(exported(pack()) / "model.safetensors")
    down = "model.layers.0.mlp.down_proj"  # 64 x 128 (out x in), four groups of 32
    found = {k.removeprefix(f"{down}."): v for k, v in tensors.items() if k.startswith(down)}
    assert {local: (tensor.dtype, list(tensor.shape)) for local, tensor in found.items()} == {
        "qweight": (torch.int32, [16, 64]),
        "qzeros": (torch.int32, [4, 8]),
        "scales": (torch.float16, [4, 64]),
        "g_idx": (torch.int32, [128]),
    }
    assert found["g_idx"].tolist() == [0] * 32 + [1] * 32 + [2] * 32 + [3] * 32
    # Symmetric: the zero point is 8, stored as 7 in each of the eight places of a word.
    assert set(found["qzeros"].flatten().tolist()) == {0x77777777}


def test_the_rest_of_the_checkpoint_is_copied(pack: Pack) -> None:
    source = pack(model={"attention_bias": True})
    output = exported(source)
    before, after = (load_file(folder / "model.safetensors") for folder in (source, output))
    copied = {key for key in before if not key.split(".")[-1].startswith("weight_")}
    assert "model.layers.0.self_attn.q_proj.bias" in copied
    assert copied <= set(after)
    assert all(torch.equal(before[key], after[key]) for key in copied)
    assert not any("weight_" in key for key in after)
    other = {file.name for file in source.iterdir()} - {"model.safetensors", "config.json"}
    assert {"tokenizer.json", "generation_config.json", "recipe.yaml"} <= other
    for name in other - {"tokenizer_config.json"}:
        assert (output / name).read_bytes() == (source / name).read_bytes()


def test_a_tied_head_is_written_too(pack: Pack) -> None:
    source = pack(model={"tie_word_embeddings": True})
    assert "lm_head.weight" not in load_file(source / "model.safetensors")
    tensors = load_file(exported(source) / "model.safetensors")
    assert torch.equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"])


def test_both_configurations_say_gptq(pack: Pack) -> None:
    source = pack(strategy="channel", group_size=None)
    output = exported(source)
    settings = json.loads((output / "quantize_config.json").read_text())
    assert settings == {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "bits": 4,
        "group_size": -1,
        "sym": True,
        "desc_act": False,
        "lm_head": False,
    }
    before, after = (json.loads((f / "config.json").read_text()) for f in (source, output))
    assert after == readable_config({**before, "quantization_config": settings})


def test_a_quantized_head_is_announced(pack: Pack) -> None:
    output = exported(pack(ignore=()))
    assert json.loads((output / "quantize_config.json").read_text())["lm_head"] is True
    assert "lm_head.qweight" in load_file(output / "model.safetensors")


def test_activation_ordering_leaves_the_groups_in_order(
    make_model: MakeModel, tmp_path: Path
) -> None:
    source = tmp_path / "packed"
    args = QuantizationArgs(num_bits=4, strategy="group", group_size=32, actorder="static")
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    gptq = GPTQModifier(ignore=["lm_head"], config_groups={"group_0": scheme})
    run(make_model(torch.bfloat16), gptq, random_samples(), output_dir=str(source))
    output = exported(source)
    assert json.loads((output / "config.json").read_text())["quantization_config"]["desc_act"] is (
        False
    )
    tensors = load_file(output / "model.safetensors")
    loaded = AutoModelForCausalLM.from_pretrained(source)
    loaded(torch.zeros(1, 4, dtype=torch.int64))
    name = "model.layers.2.mlp.up_proj"
    weight = loaded.get_submodule(name).weight
    assert torch.equal(naive_weight(tensors, name, 4).bfloat16(), weight)


def test_scales_that_half_precision_would_round_stay_as_they_are(pack: Pack) -> None:
    source = pack()
    name = "model.layers.1.mlp.up_proj"

    def shrink(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{name}.weight_scale"] *= 2**-16

    edit_tensors(source, shrink)
    before = load_file(source / "model.safetensors")[f"{name}.weight_scale"]
    after = load_file(exported(source) / "model.safetensors")
    assert after[f"{name}.scales"].dtype == torch.bfloat16
    assert torch.equal(after[f"{name}.scales"], before.T)
    assert after["model.layers.0.mlp.up_proj.scales"].dtype == torch.float16


def test_shards_stay_shards(pack: Pack) -> None:
    source = pack()
    tensors = load_file(source / "model.safetensors")
    whole = load_file(exported(source) / "model.safetensors")
    # Cut where a module's tensors end up in different files.
    names = sorted(tensors)
    files = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for file, keys in files.items():
        save_file({key: tensors[key] for key in keys}, source / file, metadata={"format": "pt"})
    weight_map = {key: file for file, keys in files.items() for key in keys}
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    (source / "model.safetensors").unlink()
    output = source.with_name("sharded")
    export_gptq(source, output)
    index = json.loads((output / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    shards = {file: load_file(output / file) for file in files}
    assert set(index["weight_map"]) == set(whole)
    for key, file in index["weight_map"].items():
        assert torch.equal(shards[file][key], whole[key])
    gone = sorted(files)[-1]
    (source / gone).unlink()
    with pytest.raises(FileNotFoundError, match=rf"{gone} is missing, which .*index\.json names"):
        export_gptq(source, source.with_name("incomplete"))
    assert not source.with_name("incomplete").exists()


def test_files_of_something_else_are_left_out(pack: Pack) -> None:
    source = pack()
    save_file({"stray.weight_packed": torch.ones(1, dtype=torch.int32)}, source / "old.safetensors")
    (source / "notes.txt").write_text("kept")
    output = exported(source)
    assert [file.name for file in output.glob("*.safetensors")] == ["model.safetensors"]
    assert "stray.qweight" not in load_file(output / "model.safetensors")
    assert (output / "notes.txt").read_text() == "kept"


def test_an_empty_folder_is_filled_and_a_full_one_refused(pack: Pack, tmp_path: Path) -> None:
    source, output = pack(), tmp_path / "gptq"
    output.mkdir()
    export_gptq(source, output)
    before = sorted(output.iterdir())
    with pytest.raises(FileExistsError, match="gptq exists and is not an empty folder"):
        export_gptq(source, output)
    assert sorted(output.iterdir()) == before
    with pytest.raises(FileExistsError, match="packed exists and is not an empty folder"):
        export_gptq(source, source)
    with pytest.raises(FileNotFoundError, match="missing does not exist; create it first"):
        export_gptq(source, tmp_path / "missing" / "gptq")


@pytest.fixture
def refused(tmp_path: Path) -> Callable[[Path, str], None]:
    def check(source: Path, message: str) -> None:
        before = sorted(tmp_path.iterdir())
        with pytest.raises(ValueError, match=message):
            export_gptq(source, tmp_path / "gptq")
        assert sorted(tmp_path.iterdir()) == before  # nothing half-written

    return check


def test_a_source_that_is_not_packed_is_refused(
    make_model: MakeModel, tmp_path: Path, refused
) -> None:
    with pytest.raises(FileNotFoundError, match="holds no config.json"):
        export_gptq(tmp_path, tmp_path / "gptq")
    source = tmp_path / "dense"
    make_model().save_pretrained(source)
    refused(source, r"dense is not pack-quantized \(quant_method None, format None\)")
    config = {"quant_method": "compressed-tensors", "format": "int-quantized"}
    (source / "config.json").write_text(json.dumps({"quantization_config": config}))
    refused(source, r"\(quant_method compressed-tensors, format int-quantized\)")


def test_a_source_without_weights_is_refused(pack: Pack) -> None:
    source = pack()
    (source / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="packed holds no .safetensors file"):
        export_gptq(source, source.with_name("gptq"))


def group_of(config: dict[str, object]) -> dict[str, object]:
    return config["config_groups"]["group_0"]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda c: group_of(c).update(input_activations={"num_bits": 8, "dynamic": True}),
            "group_0 has input_activations, but GPTQ holds weights only",
        ),
        (
            lambda c: group_of(c).update(output_activations={"num_bits": 8}),
            "group_0 has output_activations, but GPTQ holds weights only",
        ),
        (lambda c: c.update(kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme is set"),
        (lambda c: group_of(c).update(weights=None), "group_0 has no weights"),
        (
            lambda c: group_of(c)["weights"].update(num_bits=3),
            "group_0 has num_bits 3 of type int, but the export supports type int with 4 or 8 bits",
        ),
        (
            lambda c: group_of(c)["weights"].update(strategy="tensor", group_size=None),
            "group_0 has strategy tensor, but the GPTQ format supports group and channel",
        ),
        (
            lambda c: c["config_groups"].update(
                other={"targets": ["re:.*up_proj"], "weights": {"num_bits": 8, "group_size": 32}}
            ),
            "group_0 and other differ in their weights' scheme",
        ),
    ],
)
def test_a_scheme_that_the_format_cannot_hold_is_refused(
    pack: Pack, refused, edit: Callable[[dict[str, object]], object], message: str
) -> None:
    source = pack()
    edit_config(source, edit)
    refused(source, message)


def test_a_module_that_the_format_cannot_hold_is_refused(pack: Pack, refused) -> None:
    # 36 is a whole number of 4-bit words for channels, but not of eight numbers each.
    source = pack(strategy="channel", group_size=None, model={"intermediate_size": 36})
    refused(source, "down_proj is 64 x 36 .*needs multiples of 8")


def test_reordered_groups_of_older_releases_are_refused(pack: Pack, refused) -> None:
    source = pack()
    name = "model.layers.1.mlp.up_proj"
    edit_tensors(source, lambda t: t.update({f"{name}.weight_g_idx": torch.arange(64)}))
    refused(source, f"{name} has a weight_g_idx")


@pytest.mark.parametrize("saved", [False, True])
def test_a_model_in_memory_gives_what_its_checkpoint_gives(
    make_model: MakeModel, tmp_path: Path, saved: bool
) -> None:
    def quantized(**save: str) -> torch.nn.Module:
        weights = QuantizationArgs(num_bits=4, strategy="group", group_size=32)
        scheme = QuantizationScheme(targets=["Linear"], weights=weights)
        gptq = GPTQModifier(ignore=["lm_head"], config_groups={"group_0": scheme})
        model = make_model(torch.bfloat16)
        run(model, gptq, random_samples(), **save)
        return model

    folder = tmp_path / "packed"
    model = quantized(output_dir=str(folder))
    export_gptq(folder, tmp_path / "from_folder")
    export_gptq(model if saved else quantized(), tmp_path / "from_memory")
    left = load_file(tmp_path / "from_folder" / "model.safetensors")
    right = load_file(tmp_path / "from_memory" / "model.safetensors")
    assert_same(right, left)


def test_a_damaged_source_is_named(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        export_gptq(source, tmp_path / "out")
    quantization = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    group = {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": 32}}
    quantization["config_groups"] = {"group_0": group}
    (source / "config.json").write_text(json.dumps({"quantization_config": quantization}))
    (source / "model.safetensors").write_bytes(b"garbage")
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged or incomplete"):
        export_gptq(source, tmp_path / "out")
    assert [entry.name for entry in tmp_path.iterdir()] == ["source"]
