"""transformers loads packed folders to run as they are packed, and saves them so."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, make
from helpers import Logged
from packed_checkpoints import assert_same_bits, quantize, tensors_of
from sparse_models import (
    UP,
    dense,
    llama,
    load,
    logits,
    needs_kernels,
    packed_llama,
    sparse_of,
    without_gpu,
)
from transformers import CompressedTensorsConfig, PreTrainedModel

from dlp_plugin import SparseConfig, pack, unpack
from dlp_plugin.checkpoints.names import linears_of_blocks
from dlp_plugin.comparison.memory import peak, reset_peak

pytestmark = needs_kernels
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed_llama(tmp_path_factory.mktemp("models"))


def as_dense(folder: Path) -> PreTrainedModel:
    """The model loaded, once it has computed in float32 what the dense one does."""
    model = load(folder, dtype=torch.float32)
    expected = logits(dense(folder, dtype=torch.float32))
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    return model


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


class TestTheModel:
    def test_no_weight_is_dense(self, packed: Path) -> None:
        model = as_dense(packed)
        assert sparse_of(model).keys() == config_of(packed)["quantization_config"]["linears"].keys()
        assert not any(name.endswith("proj.weight") for name, _ in model.named_parameters())
        assert model.is_quantized

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("shard", ["20KB", "50GB"])
    def test_floats(self, tmp_path: Path, dtype: torch.dtype, shard: str) -> None:
        """In one file, or in many and with tied embeddings; saved, it is the same folder."""
        model = llama(tmp_path / "origin", dtype, tie_word_embeddings=shard == "20KB")
        model.save_pretrained(tmp_path / "source", max_shard_size=shard)
        pack(tmp_path / "source", tmp_path / "packed")
        assert len(sparse_of(as_dense(tmp_path / "packed"))) == 21
        load(tmp_path / "packed").save_pretrained(tmp_path / "again", max_shard_size=shard)
        assert_same_bits(tensors_of(tmp_path / "again"), tensors_of(tmp_path / "packed"))
        assert config_of(tmp_path / "again") == config_of(tmp_path / "packed")
        as_dense(tmp_path / "again")

    @pytest.mark.parametrize("symmetric", [True, False])
    @pytest.mark.parametrize(
        ("bits", "strategy", "group"), [(4, "group", 32), (8, "channel", None)]
    )
    def test_integers(
        self, tmp_path: Path, symmetric: bool, bits: int, strategy: str, group: int | None
    ) -> None:
        """Saved and unpacked it is the checkpoint of compressed-tensors again."""
        scheme = {"num_bits": bits, "strategy": strategy, "group_size": group}
        model = llama(tmp_path / "origin", intermediate_size=96)
        source = quantize(model, tmp_path / "source", symmetric=symmetric, **scheme)
        pack(source, tmp_path / "packed")
        model = load(tmp_path / "packed", dtype=torch.float32)
        assert len(sparse_of(model)) == 21
        plain = load(source, quantization_config=CompressedTensorsConfig(dequantize=True)).float()
        # which has rounded every weight to bfloat16
        torch.testing.assert_close(logits(model), logits(plain), rtol=2**-6, atol=2**-6)
        load(tmp_path / "packed").save_pretrained(tmp_path / "again")
        unpack(tmp_path / "again", tmp_path / "unpacked")
        assert_same_bits(tensors_of(tmp_path / "unpacked"), tensors_of(source))
        found, expected = config_of(tmp_path / "unpacked"), config_of(source)
        assert found["quantization_config"] == expected["quantization_config"]

    def test_without_prefix(self, tmp_path: Path) -> None:
        """As a model without its head is saved; saved again it has the head's names."""
        model = llama(tmp_path / "origin", tie_word_embeddings=True)
        model.model.save_pretrained(tmp_path / "source")
        pack(tmp_path / "source", tmp_path / "packed")
        as_dense(tmp_path / "packed").save_pretrained(tmp_path / "again")
        as_dense(tmp_path / "again")

    @pytest.mark.parametrize(
        ("family", "left"),
        [
            ("llava", set()),  # has other names in the file
            ("qwen3_moe", set()),  # has experts, which are dense
            ("modernbert", set()),  # draws weights by way of the modules above them
            ("jamba", {"dt_proj"}),  # multiplies by the weight itself
            ("falcon", {"dense", "dense_4h_to_h", "dense_h_to_4h", "query_key_value"}),
        ],
    )
    def test_families(self, tmp_path: Path, family: str, left: set[str]) -> None:
        """A Linear that is more than torch's, or of whose weight the code speaks, is dense."""
        kind = FAMILIES[family]
        model = make(kind.config(), tmp_path / "origin", kind.kind)
        for name in linears_of_blocks(model, model.state_dict()):
            model.get_parameter(f"{name}.weight").data[:, ::2] = 0
        model.save_pretrained(tmp_path / "source")
        linears = pack(tmp_path / "source", tmp_path / "packed").linears
        found, info = kind.kind.from_pretrained(tmp_path / "packed", output_loading_info=True)
        assert not any(info.values())
        names, run = (
            {name.rpartition(".")[2] for name in of} for of in (linears, sparse_of(found))
        )
        assert names - run == left
        sample = kind.samples().with_format("torch")[0]
        inputs = {key: torch.as_tensor(value)[None] for key, value in sample.items()}
        found.save_pretrained(tmp_path / "again")
        for folder in ("packed", "again"):
            expected = kind.kind.from_pretrained(
                tmp_path / folder, quantization_config=SparseConfig(dequantize=True)
            )
            with torch.no_grad():
                pair = found(**inputs).logits, expected(**inputs).logits
            torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-4)

    def test_quantized_ones_that_are_not_all_sparse_are_not_saved(self, tmp_path: Path) -> None:
        kind = FAMILIES["bloom"]
        model = make(kind.config(), tmp_path / "origin").bfloat16()
        quantize(model, tmp_path / "source")
        pack(tmp_path / "source", tmp_path / "packed")
        with pytest.raises(ValueError, match=r"6 quantized Linears of .* copy the folder instead"):
            load(tmp_path / "packed").save_pretrained(tmp_path / "again")

    @without_gpu
    def test_memory(self, tmp_path: Path) -> None:
        """Held at once are the model and, of what it is made from, less than one block."""
        sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 4}
        llama(tmp_path / "origin", **sizes).save_pretrained(tmp_path / "source")
        pack(tmp_path / "source", tmp_path / "packed")
        load(tmp_path / "packed")  # what is loaded on the way
        reset_peak()
        before = peak()
        model = load(tmp_path / "packed")
        after = peak()
        if before is None or after is None:
            pytest.skip("the system does not tell")
        block = 2 * sum(
            linear.weight.numel() for linear in sparse_of(model.model.layers[0]).values()
        )
        assert after - before < model.get_memory_footprint() + block


class TestDtypes:
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_they_are_those_of_activations(self, packed: Path, dtype: torch.dtype) -> None:
        model = load(packed, dtype=dtype)
        assert model.dtype == logits(model).dtype == dtype
        if dtype == torch.float32:
            converted = load(packed).to(dtype)
            assert torch.equal(logits(converted), logits(model))
            assert_same_bits(*(sparse_of(each)[UP].state_dict() for each in (converted, model)))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_a_product_is_rounded_once(self, packed: Path, dtype: torch.dtype) -> None:
        """By half a unit in the last place, after sums whose terms err by theirs in float32."""
        layer = sparse_of(load(packed))[UP]
        x = torch.randn(70, layer.in_features, generator=torch.Generator().manual_seed(0)).to(dtype)
        weight = layer.decoded().double()
        exact = x.double() @ weight.T
        sums = layer.in_features * 2**-24 * (x.double().abs() @ weight.abs().T)
        rounding = torch.finfo(dtype).eps / 2 * exact.abs()
        for rows in (1, 7, 70):
            found = layer(x[:rows]).double()
            assert ((found - exact[:rows]).abs() <= (rounding + 2 * sums + 1e-7)[:rows]).all()

    def test_one_without_kernels(self, packed: Path, logged: Logged) -> None:
        model = load(packed, dtype=torch.float64)
        assert not sparse_of(model)
        (said,) = logged(by="dlp_plugin")
        assert "packed is loaded dense: packed weights run in bfloat16, float16" in said


class TestPlaces:
    @pytest.mark.parametrize(
        "place",
        [
            "cpu",
            {"": "cpu"},
            pytest.param("auto", marks=without_gpu),
            pytest.param("sequential", marks=without_gpu),
        ],
    )
    def test_the_cpu(self, packed: Path, place: object) -> None:
        model = load(packed, device_map=place, max_memory={"cpu": 1 << 10})
        assert len(sparse_of(model)) == 21
        assert torch.equal(logits(model), logits(load(packed)))

    def test_the_disk(self, packed: Path, tmp_path: Path, logged: Logged) -> None:
        rest = ("lm_head", "model.embed_tokens", "model.norm", "model.rotary_emb")
        places = dict.fromkeys([*rest, "model.layers.1", "model.layers.2"], "cpu")
        places["model.layers.0"] = "disk"
        model = load(packed, device_map=places, offload_folder=tmp_path)
        assert not sparse_of(model)
        assert torch.equal(logits(model), logits(dense(packed)))
        assert "packed weights run on the CPU only, and device_map names disk" in logged()[-1]

    def test_without_kernels(
        self, packed: Path, logged: Logged, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("DLP_KERNELS", "off")
        model = load(packed)
        assert not model.is_quantized
        assert_same_bits(model.state_dict(), load(packed.with_name("source")).state_dict())
        (said,) = logged(by="dlp_plugin")
        assert "packed is loaded dense: the kernels are turned off by DLP_KERNELS=off" in said

    def test_asked_for(self, packed: Path, logged: Logged) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model = dense(packed)
        assert not model.is_quantized
        assert_same_bits(model.state_dict(), load(packed.with_name("source")).state_dict())
        assert not logged(by="dlp_plugin")

    def test_of_a_model_that_is_not_packed(self, packed: Path) -> None:
        with pytest.raises(ValueError, match=r"is a SparseConfig, but the model is not packed"):
            dense(packed.with_name("source"))
