"""Packed folders: small, whole, and back to what they were packed from, bit for bit."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import MakeModel, word_tokenizer
from packed_checkpoints import (
    assert_same_bits,
    prune_rows,
    quantize,
    tensors_of,
)
from safetensors.torch import load_file, save_file

import dlp_plugin
from dlp_plugin.checkpoints.files import INDEX
from dlp_plugin.checkpoints.inspect import inspect_checkpoint, zeros_lost
from dlp_plugin.checkpoints.packing import pack, unpack
from dlp_plugin.checkpoints.sparse_format import PARTS, VERSION

UP = "model.layers.0.mlp.up_proj"
SCHEMES = [
    pytest.param({"num_bits": 4}, id="W4A16"),
    pytest.param({"num_bits": 4, "symmetric": False}, id="W4A16 asymmetric"),
    pytest.param({"num_bits": 8, "strategy": "channel", "group_size": None}, id="W8A16 channel"),
    pytest.param(
        {"num_bits": 8, "strategy": "channel", "group_size": None, "symmetric": False},
        id="W8A16 channel asymmetric",
    ),
]


@pytest.fixture
def source(make_model: MakeModel, tmp_path: Path) -> Path:
    """A pruned bfloat16 checkpoint with a tokenizer and a model card."""
    folder = tmp_path / "source"
    prune_rows(make_model(torch.bfloat16)).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n\n# A model\n")
    return folder


@pytest.fixture
def packed(source: Path) -> Path:
    pack(source, source.with_name("packed"))
    return source.with_name("packed")


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def edit_config(folder: Path, edit: Callable[[dict], object]) -> None:
    config = config_of(folder)
    edit(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


def edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def assert_it_comes_back(source: Path, packed: Path) -> None:
    unpacked = source.with_name("unpacked")
    unpack(packed, unpacked)
    assert_same_bits(tensors_of(unpacked), tensors_of(source))
    assert {file.name for file in unpacked.iterdir()} == {file.name for file in source.iterdir()}
    for file in source.iterdir():
        if file.suffix == ".json":
            one, other = (json.loads((f / file.name).read_text()) for f in (unpacked, source))
            assert one == other, file.name
        elif file.suffix != ".safetensors":
            assert (unpacked / file.name).read_bytes() == file.read_bytes()


class TestDense:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    @pytest.mark.parametrize("shard", ["150KB", "50GB"])
    def test_it_comes_back(
        self, make_model: MakeModel, tmp_path: Path, dtype: torch.dtype, shard: str
    ) -> None:
        source, packed = tmp_path / "source", tmp_path / "packed"
        prune_rows(make_model(dtype)).save_pretrained(source, max_shard_size=shard)
        assert (source / INDEX).exists() == (shard == "150KB")
        done: list[float] = []
        found = pack(source, packed, done.append)
        assert sum(done) == pytest.approx(1)
        assert {file.name for file in packed.iterdir()} == {
            "README.md",
            *(file.name for file in source.iterdir()),
        }
        if (source / INDEX).exists():
            index = json.loads((packed / INDEX).read_text())
            tensors = tensors_of(packed)
            assert index["weight_map"].keys() == tensors.keys()
            assert index["metadata"]["total_size"] == sum(x.nbytes for x in tensors.values())
        assert_it_comes_back(source, packed)
        kinds = {stored.kind for stored in found.linears.values()}
        assert kinds == {"planes" if dtype == torch.bfloat16 else "values"}

    def test_what_is_packed_and_what_is_said_of_it(self, source: Path) -> None:
        found = dlp_plugin.pack(source, source.with_name("packed"))
        before, after = tensors_of(source), tensors_of(source.with_name("packed"))
        assert set(found.linears) == {
            key.removesuffix(".weight")
            for key, tensor in before.items()
            if "layers" in key and tensor.ndim == 2
        }
        assert found.dense == 0
        parts = {k for k in after if k.rpartition(".")[2] in PARTS}
        assert {k for k in after if k not in parts} == {
            "lm_head.weight",
            *(k for k in before if "norm" in k or "embed" in k),
        }
        assert found.bytes_after == sum(after[key].nbytes for key in parts)
        assert found.bytes_before == sum(before[f"{n}.weight"].nbytes for n in found.linears)
        assert found.bytes_before == 2 * found.weights
        # A bit a weight, and a byte and a half for three in ten: 4.6 of 16 bits.
        assert found.bytes_after / found.bytes_before == pytest.approx(0.29, abs=0.01)
        settings = config_of(source.with_name("packed"))["quantization_config"]
        assert settings["linears"] == {n: s.to_config() for n, s in found.linears.items()}
        assert settings["source"] is None

    @pytest.mark.parametrize("word", ["which", "that of another release"])
    def test_the_model_card_tells(self, source: Path, packed: Path, word: str) -> None:
        text = (packed / "README.md").read_text()
        assert re.match(r"---\nlicense: mit\n---\n\n> Packed by dlp_plugin: `import dlp_pl", text)
        assert text.endswith("\n# A model\n")
        (packed / "README.md").write_text(text.replace("which", word))
        assert_it_comes_back(source, packed)

    def test_further_chat_templates_go_along(self, source: Path) -> None:
        template = Path("additional_chat_templates", "tool_use.jinja")
        (source / template.parent).mkdir()
        (source / template).write_text("{{ messages }}")
        pack(source, source.with_name("packed"))
        unpack(source.with_name("packed"), source.with_name("unpacked"))
        for folder in ("packed", "unpacked"):
            assert (source.with_name(folder) / template).read_text() == "{{ messages }}"

    def test_a_linear_that_would_not_shrink(self, make_model: MakeModel, tmp_path: Path) -> None:
        model = prune_rows(make_model(torch.float16))
        model.get_submodule(UP).weight.data.fill_(0.5)
        model.save_pretrained(tmp_path / "source")
        found = pack(tmp_path / "source", tmp_path / "packed")
        assert (found.dense, UP in found.linears) == (1, False)
        assert f"{UP}.weight" in tensors_of(tmp_path / "packed")
        assert_it_comes_back(tmp_path / "source", tmp_path / "packed")

    def test_names_without_the_prefix_of_the_whole_model(
        self, make_model: MakeModel, tmp_path: Path
    ) -> None:
        """As a model without its head saves them."""
        prune_rows(make_model(torch.bfloat16)).model.save_pretrained(tmp_path / "source")
        found = pack(tmp_path / "source", tmp_path / "packed")
        assert "layers.0.mlp.up_proj" in found.linears
        assert_it_comes_back(tmp_path / "source", tmp_path / "packed")

    def test_a_model_in_memory(self, make_model: MakeModel, tmp_path: Path) -> None:
        model = prune_rows(make_model(torch.bfloat16))
        pack(model, tmp_path / "packed")
        unpack(tmp_path / "packed", tmp_path / "unpacked")
        expected = {k: v for k, v in model.state_dict().items() if "rotary" not in k}
        assert_same_bits(tensors_of(tmp_path / "unpacked"), expected)
        assert not (tmp_path / "unpacked" / "README.md").exists()


class TestQuantized:
    @pytest.mark.parametrize("scheme", SCHEMES)
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_it_comes_back(
        self, make_model: MakeModel, tmp_path: Path, dtype: torch.dtype, scheme: dict
    ) -> None:
        source = quantize(prune_rows(make_model(dtype)), tmp_path / "source", **scheme)
        packed = tmp_path / "packed"
        found = pack(source, packed)
        assert {stored.kind for stored in found.linears.values()} == {"integers"}
        assert {stored.bits for stored in found.linears.values()} == {scheme["num_bits"]}
        assert {s.symmetric for s in found.linears.values()} == {scheme.get("symmetric", True)}
        assert found.bytes_after < 0.8 * found.bytes_before
        assert_it_comes_back(source, packed)

    def test_linears_that_are_not_quantized_are_packed_too(
        self, make_model: MakeModel, tmp_path: Path
    ) -> None:
        model = prune_rows(make_model(torch.bfloat16))
        source = quantize(model, tmp_path / "source", ignore=["lm_head", UP])
        found = pack(source, tmp_path / "packed")
        assert found.linears[UP].kind == "planes"
        assert_it_comes_back(source, tmp_path / "packed")

    def test_one_that_was_never_pruned(self, make_model: MakeModel, tmp_path: Path) -> None:
        """Its integers are stored without a mask, as there is no other place for them."""
        source = quantize(make_model(torch.bfloat16), tmp_path / "source")
        found = pack(source, tmp_path / "packed")
        assert {stored.masked for stored in found.linears.values()} == {False}
        assert_it_comes_back(source, tmp_path / "packed")
        assert inspect_checkpoint(tmp_path / "packed").linears == inspect_checkpoint(source).linears


@pytest.mark.parametrize("scheme", [None, *SCHEMES])
def test_zeros_are_counted_as_in_the_source(
    make_model: MakeModel, tmp_path: Path, scheme: dict | None
) -> None:
    source, packed = tmp_path / "source", tmp_path / "packed"
    model = prune_rows(make_model(torch.bfloat16))
    model.get_submodule(UP).weight.data.view(-1)[:2] = torch.tensor([-0.0, float("nan")])
    if scheme is None:
        model.save_pretrained(source)
    else:
        model.get_submodule(UP).weight.data.view(-1)[1] = 0
        quantize(model, source, **scheme)
    pack(source, packed)
    before, after = (inspect_checkpoint(folder, group=4) for folder in (source, packed))
    assert after.linears == before.linears
    assert after.quantization == ("dlp-sparse, pack-quantized" if scheme else "dlp-sparse")
    assert after.bytes_on_disk == (packed / "model.safetensors").stat().st_size
    shapes = 0 if scheme is None else 16 * len(before.linears) - 32  # weight_shape is in no part
    assert after.bytes_if_sparse == before.bytes_if_sparse - shapes
    assert set(zeros_lost(source, packed).values()) == {0}
    assert set(zeros_lost(packed, source).values()) == {0}


class TestRefusals:
    def test_a_packed_one_packed_again(self, packed: Path, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"packed is packed already; `dlp-plugin unpack`"):
            pack(packed, tmp_path / "again")

    def test_an_unpacked_one_unpacked_again(self, source: Path, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"source is not packed; give a folder that `dlp-plug"):
            unpack(source, tmp_path / "again")

    def test_one_that_would_not_shrink(self, make_model: MakeModel, tmp_path: Path) -> None:
        make_model(torch.float16).save_pretrained(tmp_path / "source")
        with pytest.raises(ValueError, match=r"no Linear of .* would shrink by packing: prune it"):
            pack(tmp_path / "source", tmp_path / "packed")
        assert [entry.name for entry in tmp_path.iterdir()] == ["source"]

    @pytest.mark.parametrize("write", [pack, unpack])
    def test_folders(self, write: Callable, source: Path, packed: Path, tmp_path: Path) -> None:
        folder = source if write is pack else packed
        with pytest.raises(FileExistsError, match="exists and is not an empty folder"):
            write(folder, packed)
        with pytest.raises(FileNotFoundError, match=r"nowhere does not exist; create it first"):
            write(folder, tmp_path / "nowhere" / "output")
        (folder / "config.json").unlink()
        with pytest.raises(FileNotFoundError, match="holds no config.json; give the folder of a"):
            write(folder, tmp_path / "output")

    @pytest.mark.parametrize(
        ("edit", "message"),
        [
            (lambda q: q.update(quant_method="gptq"), "quant_method gptq, format pack-quantized"),
            (lambda q: q.update(format="int-quantized"), "format int-quantized"),
            (lambda q: q.update(kv_cache_scheme={"num_bits": 8}), r"\(kv_cache_scheme\)"),
            (lambda q: q.update(transform_config={"config_groups": 1}), r"\(transform_config\)"),
            (
                lambda q: q["config_groups"]["group_0"].update(input_activations={"num_bits": 8}),
                r"\(input_activations\)",
            ),
            (
                lambda q: q["config_groups"]["group_0"]["weights"].update(num_bits=3),
                r"\(weights of type int, 3 bits, strategy group\)",
            ),
            (
                lambda q: q["config_groups"]["group_0"]["weights"].update(strategy="block"),
                "strategy block",
            ),
        ],
    )
    def test_other_ways_of_quantizing(
        self, make_model: MakeModel, tmp_path: Path, edit: Callable, message: str
    ) -> None:
        source = quantize(make_model(torch.bfloat16), tmp_path / "source")
        edit_config(source, edit)
        with pytest.raises(
            ValueError, match=rf"is quantized in a way that cannot be packed .*{message}"
        ):
            pack(source, tmp_path / "packed")
        assert not (tmp_path / "packed").exists()

    def test_a_head_that_is_quantized(self, make_model: MakeModel, tmp_path: Path) -> None:
        source = quantize(make_model(torch.bfloat16), tmp_path / "source", ignore=[])
        with pytest.raises(ValueError, match=r"^lm_head of .* is quantized, but the sparse format"):
            pack(source, tmp_path / "packed")

    @pytest.mark.parametrize(
        ("edit", "message"),
        [
            (
                lambda x: x.update({f"{UP}.weight_g_idx": torch.arange(64)}),
                r"a way that cannot be packed \(weight_g_idx\)",
            ),
            (lambda x: x.pop(f"{UP}.weight_scale"), rf"{UP} lacks weight_scale: save the"),
            (
                lambda x: x.update({f"{UP}.weight_scale": x[f"{UP}.weight_scale"][:3]}),
                rf"model\.safetensors: {UP} of 128 x 64 is not as compressed-tensors packs it",
            ),
            (
                lambda x: x.update({f"{UP}.weight_packed": x[f"{UP}.weight_packed"][:, 1:]}),
                rf"{UP} of 128 x 64 is not as compressed-tensors packs it",
            ),
        ],
    )
    def test_quantized_linears_that_are_damaged(
        self, make_model: MakeModel, tmp_path: Path, edit: Callable, message: str
    ) -> None:
        source = quantize(make_model(torch.bfloat16), tmp_path / "source")
        edit_tensors(source, lambda x: (edit(x), x.update({k: v.clone() for k, v in x.items()})))
        with pytest.raises(ValueError, match=message):
            pack(source, tmp_path / "packed")


class TestDamage:
    """Of a packed folder: nothing is written."""

    @pytest.mark.parametrize(
        ("edit", "message"),
        [
            (
                lambda x: x.pop(f"{UP}.weight_table"),
                rf"model\.safetensors lacks {UP}\.weight_table, which config\.json lists",
            ),
            (
                lambda x: [x.pop(key) for key in list(x) if key.startswith(UP)],
                rf"no file holds {UP}\.weight_packed, which config\.json lists",
            ),
            (
                lambda x: x.update({f"{UP}2.weight_values": torch.ones(2)}),
                rf"model\.safetensors holds {UP}2\.weight_values, which config\.json does not",
            ),
            (
                lambda x: x.update({f"{UP}.weight_table": torch.ones(2)}),
                rf"{UP}\.weight_table of .*model\.safetensors is F32 \[2\], but config\.json says",
            ),
            (
                lambda x: x[f"{UP}.weight_packed"][0].fill_(0),
                rf"model\.safetensors: {UP}\.weight_packed marks \d+ weights, but",
            ),
            (
                lambda x: x[f"{UP}.weight_exponents"].fill_(255),
                rf"model\.safetensors: {UP}\.weight_exponents points outside the",
            ),
        ],
    )
    def test_tensors(self, packed: Path, tmp_path: Path, edit: Callable, message: str) -> None:
        edit_tensors(packed, edit)
        with pytest.raises(ValueError, match=message):
            unpack(packed, tmp_path / "unpacked")
        assert not (tmp_path / "unpacked").exists()

    def test_the_configuration(self, packed: Path, tmp_path: Path) -> None:
        edit_config(packed, lambda settings: settings["linears"][UP].update(kept=-1))
        with pytest.raises(ValueError, match=rf"^{UP} of .*packed has an invalid entry"):
            unpack(packed, tmp_path / "unpacked")
        edit_config(packed, lambda settings: settings.update(version=VERSION + 1))
        for read in (lambda f: unpack(f, tmp_path / "unpacked"), inspect_checkpoint):
            with pytest.raises(ValueError, match=r"packed has version 3 of dlp-sparse, but this"):
                read(packed)

    def test_a_file_that_was_not_written_to_its_end(self, packed: Path, tmp_path: Path) -> None:
        file = packed / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
        with pytest.raises(ValueError, match=r"model\.safetensors is damaged or incomplete"):
            unpack(packed, tmp_path / "unpacked")

    def test_the_folder_beside_is_cleared_away(
        self, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*_arguments: object, **_more: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("dlp_plugin.checkpoints.packing.save_file", full)
        with pytest.raises(OSError, match=r"cannot write .*packed: No space left .*make room"):
            pack(source, tmp_path / "packed")
        assert [entry.name for entry in tmp_path.iterdir()] == ["source"]
