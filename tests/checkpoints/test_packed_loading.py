"""transformers loads a packed folder as what it was packed from, bit for bit, if asked to."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import MakeModel, linears_of
from packed_checkpoints import (
    assert_same_bits,
    mixture_of_experts,
    prune_rows,
    quantize,
    tensors_of,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, PreTrainedModel

from dlp_plugin import SparseConfig
from dlp_plugin.checkpoints.loading import load_model
from dlp_plugin.checkpoints.packing import pack, unpack

UP = "model.layers.0.mlp.up_proj"


def load(folder: Path, **arguments: object) -> PreTrainedModel:
    config = json.loads((folder / "config.json").read_text()).get("quantization_config") or {}
    if config.get("quant_method") == "dlp-sparse":
        arguments = {"quantization_config": SparseConfig(dequantize=True), **arguments}
    return AutoModelForCausalLM.from_pretrained(folder, **arguments)


@pytest.fixture
def source(make_model: MakeModel, tmp_path: Path) -> Path:
    prune_rows(make_model(torch.bfloat16)).save_pretrained(tmp_path / "source")
    return tmp_path / "source"


@pytest.fixture
def packed(source: Path) -> Path:
    pack(source, source.with_name("packed"))
    return source.with_name("packed")


class TestTheModel:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    @pytest.mark.parametrize("shard", ["150KB", "50GB"])
    def test_dense(
        self, make_model: MakeModel, tmp_path: Path, dtype: torch.dtype, shard: str
    ) -> None:
        source, packed = tmp_path / "source", tmp_path / "packed"
        model = prune_rows(make_model(dtype))
        model.get_submodule(UP).weight.data.view(-1)[:2] = torch.tensor([-0.0, float("nan")])
        model.save_pretrained(source, max_shard_size=shard)
        pack(source, packed)
        assert_same_bits(load(packed).state_dict(), load(source).state_dict())

    @pytest.mark.parametrize("symmetric", [True, False])
    @pytest.mark.parametrize(
        ("bits", "strategy", "group"), [(4, "group", 32), (8, "channel", None)]
    )
    def test_quantized(
        self,
        make_model: MakeModel,
        tmp_path: Path,
        symmetric: bool,
        bits: int,
        strategy: str,
        group: int | None,
    ) -> None:
        """What compressed-tensors decompresses the source to."""
        scheme = {
            "num_bits": bits,
            "strategy": strategy,
            "group_size": group,
            "symmetric": symmetric,
        }
        model = prune_rows(make_model(torch.bfloat16))
        source = quantize(model, tmp_path / "source", **scheme)
        pack(source, tmp_path / "packed")
        expected = load(source, quantization_config=CompressedTensorsConfig(dequantize=True))
        found = load(tmp_path / "packed")
        assert linears_of(found).keys() == linears_of(expected).keys()
        for name, linear in linears_of(expected).items():
            assert_same_bits({name: found.get_submodule(name).weight}, {name: linear.weight})

    def test_it_is_an_ordinary_one(self, source: Path, packed: Path, tmp_path: Path) -> None:
        """Not a trace of its quantizer, and saved again it is the dense checkpoint."""
        model = load(packed)
        assert not model.is_quantized
        assert not hasattr(model, "hf_quantizer")
        assert not hasattr(model.config, "quantization_config")
        assert {type(linear) for linear in linears_of(model).values()} == {torch.nn.Linear}
        model.save_pretrained(tmp_path / "again")
        assert_same_bits(tensors_of(tmp_path / "again"), tensors_of(source))
        model(torch.zeros(1, 4, dtype=torch.int64)).logits.sum().backward()
        assert model.get_submodule(UP).weight.grad is not None

    def test_a_mixture_of_experts(self, tmp_path: Path) -> None:
        """transformers makes one weight of all experts, which are not packed."""
        source, packed = tmp_path / "source", tmp_path / "packed"
        mixture_of_experts(tmp_path / "origin").save_pretrained(source)
        pack(source, packed)
        model = load(packed)
        assert_same_bits(model.state_dict(), load(source).state_dict())
        model.save_pretrained(tmp_path / "again")
        assert_same_bits(tensors_of(tmp_path / "again"), tensors_of(source))

    @pytest.mark.parametrize("base", [False, True], ids=["whole", "without prefix"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    def test_another_dtype(
        self, make_model: MakeModel, tmp_path: Path, base: bool, dtype: torch.dtype
    ) -> None:
        """Names without the prefix are those that a model without its head is saved with."""
        model = prune_rows(make_model(torch.bfloat16, tie_word_embeddings=True))
        (model.model if base else model).save_pretrained(tmp_path / "source")
        pack(tmp_path / "source", tmp_path / "packed")
        found, expected = (load(tmp_path / f, dtype=dtype) for f in ("packed", "source"))
        assert_same_bits(found.state_dict(), expected.state_dict())

    def test_on_a_device_and_on_the_disk(self, packed: Path, source: Path, tmp_path: Path) -> None:
        expected = load(source)
        assert_same_bits(load(packed, device_map="cpu").state_dict(), expected.state_dict())
        rest = ("embed_tokens", "layers.1", "layers.2", "norm", "rotary_emb")
        places = {"lm_head": "cpu", **{f"model.{name}": "cpu" for name in rest}}
        places["model.layers.0"] = "disk"
        model = load(packed, device_map=places, offload_folder=tmp_path / "offload")
        ids = torch.arange(8)[None]
        assert torch.equal(model(ids).logits, expected(ids).logits)


class TestDamage:
    """Nothing is loaded."""

    def edit(self, folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
        file = folder / "model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, metadata={"format": "pt"})

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (
                lambda x: x.pop(f"{UP}.weight_fractions"),
                rf"model\.safetensors lacks {UP}\.weight_fractions, which config\.json lists",
            ),
            (
                lambda x: x.update({f"{UP}.weight_table": x[f"{UP}.weight_table"][1:]}),
                rf"{UP}\.weight_table of .*model\.safetensors is U8 .*, but config\.json says",
            ),
            (
                lambda x: x[f"{UP}.weight_packed"][0].fill_(255),
                rf"model\.safetensors: {UP}\.weight_packed marks \d+ weights, but",
            ),
            (
                lambda x: x[f"{UP}.weight_exponents"].fill_(255),
                rf"model\.safetensors: {UP}\.weight_exponents points outside the",
            ),
        ],
    )
    @pytest.mark.parametrize("read", [load, load_model])
    def test_tensors(self, packed: Path, change: Callable, message: str, read: Callable) -> None:
        self.edit(packed, change)
        with pytest.raises(ValueError, match=message):
            read(packed)

    @pytest.mark.parametrize("read", [load, load_model])
    def test_a_newer_version(self, packed: Path, read: Callable) -> None:
        config = json.loads((packed / "config.json").read_text())
        config["quantization_config"]["version"] = 3
        (packed / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=r"config\.json has version 3 .*update dlp_plugin"):
            read(packed)

    def test_a_file_that_was_not_written_to_its_end(self, packed: Path) -> None:
        file = packed / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
        with pytest.raises(ValueError, match=r"safetensors is damaged or incomplete"):
            load_model(packed)


def test_tensor_parallel_in_transformers(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dlp_plugin.engines.experts.is_dtensor", lambda _parameter: True)
    with pytest.raises(ValueError, match=r"weight is packed, and transformers would divide it"):
        load(packed)


class TestRegistration:
    KNOWN = "; from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as known; "

    def python(self, code: str) -> str:
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        return done.stdout.strip() + done.stderr.strip()

    @pytest.mark.parametrize(
        "first",
        [
            "import dlp_plugin, transformers",
            "import transformers.modeling_utils, dlp_plugin",
            "import dlp_plugin.engines.transformers",
            "import transformers.modeling_utils, dlp_plugin, importlib; "
            "importlib.reload(dlp_plugin)",
        ],
    )
    def test_whatever_is_first(self, first: str) -> None:
        code = f"{first}{self.KNOWN}print(known['dlp-sparse'].__name__)"
        assert self.python(code) == "SparseQuantizer"

    def test_a_second_time(self) -> None:
        code = (
            "import sys, transformers.modeling_utils, dlp_plugin; "
            "del sys.modules['dlp_plugin.engines.transformers']; "
            f"import dlp_plugin.engines.transformers{self.KNOWN}print('dlp-sparse' in known)"
        )
        assert self.python(code) == "True"

    def test_a_transformers_that_is_too_old(self) -> None:
        """It goes on without: packed folders are unknown there."""
        absent = "import sys; sys.modules['dlp_plugin.engines.transformers'] = None; "
        code = f"{absent}import dlp_plugin{self.KNOWN}print('dlp-sparse' in known)"
        assert self.python(code).endswith("False")

    def test_without_the_import(self, packed: Path) -> None:
        """What the model card warns of: weights that are not the checkpoint's."""
        code = (
            "from transformers import AutoModelForCausalLM; "
            f"AutoModelForCausalLM.from_pretrained({str(packed)!r})"
        )
        said = self.python(code)
        assert "Unknown quantization type, got dlp-sparse" in said
        assert f"{UP}.weight".replace("layers.0", "layers.{0, 1, 2}") in said
        assert "import dlp_plugin" in (packed / "README.md").read_text()


def test_unpacked_it_loads_too(packed: Path, source: Path, tmp_path: Path) -> None:
    unpack(packed, tmp_path / "unpacked")
    assert_same_bits(load(tmp_path / "unpacked").state_dict(), load(source).state_dict())
