"""Packed mixtures of experts: small, and the model that was pruned, in every family's own names."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from families import FAMILIES, make
from helpers import VOCABULARY, command, random_samples, run
from packed_checkpoints import assert_same_bits, tensors_of
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sparse_models import needs_kernels, sparse_of
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, PreTrainedModel

from dlp_plugin import MaskedGPTQModifier, SparseConfig, WandaPruningModifier, pack, unpack
from dlp_plugin.checkpoints.inspect import inspect_checkpoint, zeros_lost
from dlp_plugin.checkpoints.loading import load_model
from dlp_plugin.checkpoints.packing import Packed
from dlp_plugin.kernels.products import available

# Family to names in its files: of an expert's Linear, or of a layer's experts
EXPERT = {
    "mixtral": "model.layers.0.block_sparse_moe.experts.3.w1",
    "qwen3_moe": "model.layers.0.mlp.experts.3.gate_proj",
    "deepseek_v3": "model.layers.1.mlp.experts.3.gate_proj",
    "gpt_oss": "model.layers.0.mlp.experts.gate_up_proj",
}
ONE_BY_ONE = [name for name in EXPERT if name != "gpt_oss"]
W4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Checkpoints of families as the real ``oneshot()`` saves them in bfloat16, once each."""
    made: dict[tuple[str, bool], Path] = {}

    def of(name: str, quantized: bool = False) -> Path:
        if (name, quantized) not in made:
            folder = tmp_path_factory.mktemp(name)
            family = FAMILIES[name]
            make(family.config(), folder / "origin", family.kind).save_pretrained(folder / "source")
            model = family.kind.from_pretrained(folder / "source", dtype=torch.bfloat16)
            ignore = ["re:.*lm_head", *family.ignore]
            stages: list[object] = [
                WandaPruningModifier(sparsity=0.7, targets=["Linear"], ignore=ignore)
            ]
            if quantized:
                groups = {"group_0": {"targets": ["Linear"], "weights": W4}}
                stages.append(MaskedGPTQModifier(config_groups=groups, ignore=ignore))
            made[name, quantized] = folder / "pruned"
            run(model, stages, random_samples(4), output_dir=str(folder / "pruned"))
        return made[name, quantized]

    return of


def load(folder: Path, **arguments: object) -> PreTrainedModel:
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", output_loading_info=True, **arguments
    )
    assert not any(info.values()), info
    return model


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(torch.arange(48).reshape(3, 16)).logits


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def packed_of(source: Path, folder: Path) -> tuple[Path, Packed]:
    return folder / "packed", pack(source, folder / "packed")


@pytest.mark.parametrize("name", EXPERT)
def test_a_family_comes_back(name: str, pruned: Callable[..., Path], tmp_path: Path) -> None:
    source = pruned(name)
    packed, found = packed_of(source, tmp_path)
    # Named as in the source, a fused tensor's expert by its number
    fused = {f"{EXPERT[name]}.{i}" for i in range(4)} if name == "gpt_oss" else {EXPERT[name]}
    assert fused <= found.linears.keys()
    assert not any(re.search(r"\.(gate|router)$", linear) for linear in found.linears)
    assert found.dense == (3 if name == "deepseek_v3" else 0)  # kv_b_proj, which is ignored
    # A bit a weight, and a byte and a half for three in ten: 4.6 of 16 bits.
    assert found.bytes_after / found.bytes_before < 0.32
    assert config_of(packed)["version"] == 2  # which releases without packed experts refuse

    unpack(packed, tmp_path / "unpacked")
    assert_same_bits(tensors_of(tmp_path / "unpacked"), tensors_of(source))
    before, after = inspect_checkpoint(source, group=4), inspect_checkpoint(packed, group=4)
    assert after.linears == before.linears
    assert after.bytes_if_sparse == before.bytes_if_sparse
    for pair in ((source, packed), (packed, source)):
        assert set(zeros_lost(*pair).values()) == {0}

    expected = load(source)
    dense = load(packed, quantization_config=SparseConfig(dequantize=True))
    assert_same_bits(dense.state_dict(), expected.state_dict())
    assert torch.equal(logits(dense), logits(expected))
    dense.save_pretrained(tmp_path / "again")
    assert_same_bits(tensors_of(tmp_path / "again"), tensors_of(source))


@needs_kernels
@pytest.mark.parametrize("name", EXPERT)
def test_it_runs_as_it_is_packed(name: str, pruned: Callable[..., Path], tmp_path: Path) -> None:
    """Experts that files hold one by one too; fused ones are decoded. Saved, it is as it was."""
    packed, found = packed_of(pruned(name), tmp_path)
    model = load(packed, dtype=torch.float32)
    left = {each for each in found.linears if ".experts." in each and name == "gpt_oss"}
    assert len(sparse_of(model)) == len(found.linears) - len(left)
    held = [key for key, each in model.named_parameters() if each.ndim == 3]
    assert bool(held) == (name == "gpt_oss")
    expected = logits(load(pruned(name), dtype=torch.float32))
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    load(packed).save_pretrained(tmp_path / "again")
    again = logits(load(tmp_path / "again", dtype=torch.float32))
    torch.testing.assert_close(again, expected, rtol=1e-5, atol=1e-5)
    if not left:
        assert_same_bits(tensors_of(tmp_path / "again"), tensors_of(packed))
        assert config_of(tmp_path / "again") == config_of(packed)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes_and_a_copy(
    pruned: Callable[..., Path], tmp_path: Path, dtype: torch.dtype
) -> None:
    packed, _ = packed_of(pruned("mixtral"), tmp_path)
    model = load(packed, dtype=dtype)
    expected = logits(load(pruned("mixtral"), dtype=dtype))
    torch.testing.assert_close(logits(model), expected, rtol=0.05, atol=0.05)
    assert torch.equal(logits(deepcopy(model)), logits(model))


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_an_expert_that_is_not_pruned(
    name: str, pruned: Callable[..., Path], tmp_path: Path
) -> None:
    """One by one it stays dense beside packed ones; in a fused tensor it is stored as it is."""
    source = changed(pruned(name), tmp_path / "source", lambda tensors: fill(tensors, name))
    packed, found = packed_of(source, tmp_path)
    assert (EXPERT[name] in found.linears, found.dense) == (False, int(name == "mixtral"))
    unpack(packed, tmp_path / "unpacked")
    assert_same_bits(tensors_of(tmp_path / "unpacked"), tensors_of(source))
    dense = load(packed, quantization_config=SparseConfig(dequantize=True))
    assert_same_bits(dense.state_dict(), load(source).state_dict())
    assert set(zeros_lost(source, packed).values()) == {0}


def test_fused_experts_that_are_not_pruned_stay_dense(
    pruned: Callable[..., Path], tmp_path: Path
) -> None:
    whole = EXPERT["gpt_oss"]
    source = changed(pruned("gpt_oss"), tmp_path / "source", lambda x: x[whole].fill_(0.5))
    packed, found = packed_of(source, tmp_path)
    assert found.dense == 4
    assert whole in tensors_of(packed)
    assert inspect_checkpoint(packed).linears == inspect_checkpoint(source).linears


@pytest.mark.parametrize("name", ONE_BY_ONE)
def test_experts_at_4_bits(name: str, pruned: Callable[..., Path], tmp_path: Path) -> None:
    """Saved and unpacked it is the checkpoint of compressed-tensors; loaded they are decoded."""
    source = pruned(name, quantized=True)
    packed, found = packed_of(source, tmp_path)
    assert found.linears[EXPERT[name]].kind == "integers"
    assert found.bytes_after < 0.8 * found.bytes_before
    unpack(packed, tmp_path / "unpacked")
    assert_same_bits(tensors_of(tmp_path / "unpacked"), tensors_of(source))
    plain = load(source, quantization_config=CompressedTensorsConfig(dequantize=True))
    dense = load(packed, quantization_config=SparseConfig(dequantize=True))
    expected = dict(plain.named_parameters())
    for key, value in dense.named_parameters():
        assert torch.equal(value, expected[key]), key
    if available() is None:
        load(packed).save_pretrained(tmp_path / "again")
        assert_same_bits(tensors_of(tmp_path / "again"), tensors_of(packed))


def test_what_the_commands_do(pruned: Callable[..., Path], tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(pruned("gpt_oss"), source)
    assert "36 Linears of blocks packed, 0 left dense" in said("pack", source, tmp_path / "packed")
    assert "lost: 0" in said("inspect", tmp_path / "packed", "--against", source)
    text = tmp_path / "text.txt"
    text.write_text(" ".join(str(number) for number in range(VOCABULARY)))
    data = ["--data", text, "--length", "32"]
    figures = [
        float(re.search(r"perplexity\D*([\d.]+)", said("ppl", folder, *data))[1])
        for folder in (source, tmp_path / "packed")
    ]
    assert figures[0] == pytest.approx(figures[1], rel=1e-2)
    told = said("export-gptq", tmp_path / "packed", tmp_path / "gptq", code=1)
    assert "packed is not pack-quantized (quant_method dlp-sparse" in told
    assert not (tmp_path / "gptq").exists()


def test_files_are_opened_once_and_not_for_every_expert(
    pruned: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opening reads the names of all tensors: of 128 experts a layer it took most of the time."""
    opened: list[str] = []

    def counting(file: object, *arguments: object, **named: object) -> object:
        opened.append(str(file))
        return safe_open(file, *arguments, **named)

    for name, module in list(sys.modules.items()):
        if name.startswith("dlp_plugin.") and hasattr(module, "safe_open"):
            monkeypatch.setattr(module, "safe_open", counting)

    def times(work: Callable[[], object]) -> int:
        opened.clear()
        work()
        return len(opened)

    source, packed = pruned("qwen3_moe"), tmp_path / "packed"
    assert len(tensors_of(source)) > 50
    assert times(lambda: pack(source, packed)) < 10
    assert times(lambda: unpack(packed, tmp_path / "unpacked")) < 10
    assert times(lambda: load(packed)) < 10
    assert times(lambda: load(packed, quantization_config=SparseConfig(dequantize=True))) < 10
    for folder in (source, packed):
        assert times(lambda folder=folder: inspect_checkpoint(folder)) < 10
    assert times(lambda: zeros_lost(source, packed)) < 10


class TestBadInput:
    """One line, and nothing is written."""

    @pytest.mark.parametrize(
        ("name", "edit", "message"),
        [
            (
                "mixtral",
                lambda x: x.pop(f"{EXPERT['mixtral']}.weight"),
                r"no file of .*source holds model\.layers\.0\.block_sparse_moe\.experts\.3\.w1\."
                "weight, and the layer has 4 experts: fetch or save",
            ),
            (
                "deepseek_v3",
                lambda x: [
                    x.pop(key) for key in list(x) if re.search(r"experts\.\d\.up_proj", key)
                ],
                r"hold 8,192 weights of model\.layers\.1\.mlp\.experts\.gate_up_proj, and in "
                r"the model it is \[4, 64, 64\]: config\.json is that of another model",
            ),
            (
                "qwen3_moe",
                lambda x: shorten(x, f"{EXPERT['qwen3_moe']}.weight"),
                r"experts\.3\.gate_proj\.weight of .*source is \[31, 64\], and model\.layers\.0\."
                r"mlp\.experts\.0\.gate_proj\.weight \[32, 64\]: experts of a layer have one",
            ),
            (
                "gpt_oss",
                lambda x: shorten(x, EXPERT["gpt_oss"]),
                r"hold 36,864 weights of model\.layers\.0\.mlp\.experts\.gate_up_proj, and in the",
            ),
        ],
    )
    def test_experts_of_a_source(
        self,
        pruned: Callable[..., Path],
        tmp_path: Path,
        name: str,
        edit: Callable,
        message: str,
    ) -> None:
        source = changed(pruned(name), tmp_path / "source", edit)
        with pytest.raises(ValueError, match=message):
            pack(source, tmp_path / "packed")
        assert not (tmp_path / "packed").exists()

    @pytest.mark.parametrize("name", ONE_BY_ONE)
    @pytest.mark.parametrize(
        ("edit", "message"),
        [
            (
                lambda x, key: x.pop(key),
                r"no file of .*source holds {}, and the layer has 4 experts: fetch or save",
            ),
            (
                lambda x, key: shorten(x, key),
                r"{} of .*source is \[\d+, 64\], and .*\.0\..* \[\d+, 64\]: experts of a layer",
            ),
        ],
    )
    def test_every_reader_of_a_source_refuses_them(
        self, pruned: Callable[..., Path], tmp_path: Path, name: str, edit: Callable, message: str
    ) -> None:
        key = f"{EXPERT[name]}.weight"
        source = changed(pruned(name), tmp_path / "source", lambda x: edit(x, key))
        for read in (inspect_checkpoint, load_model, lambda f: pack(f, tmp_path / "packed")):
            with pytest.raises(ValueError, match=message.format(re.escape(key))) as told:
                read(source)
            assert "\n" not in str(told.value)
        assert [each.name for each in tmp_path.iterdir()] == ["source"]

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("mixtral", r"experts\.3\.w1\.weight, and the layer has 4 experts"),
            (
                "gpt_oss",
                r"gate_up_proj of .* damaged entry in .* \(some of its 4 experts are missing",
            ),
        ],
    )
    def test_experts_of_a_packed_folder(
        self, pruned: Callable[..., Path], tmp_path: Path, name: str, message: str
    ) -> None:
        """Which config.json does not list either: transformers would take what there is."""
        expert = EXPERT[name] if name == "mixtral" else f"{EXPERT[name]}.3"
        packed, _ = packed_of(pruned(name), tmp_path)
        broken = changed(packed, tmp_path / "broken", lambda x: drop(x, expert))
        config = json.loads((broken / "config.json").read_text())
        del config["quantization_config"]["linears"][expert]
        (broken / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=message):
            load(broken)


Tensors = dict[str, torch.Tensor]


def changed(source: Path, folder: Path, edit: Callable[[Tensors], object]) -> Path:
    """A copy of a checkpoint of which ``edit(tensors)`` was called."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def fill(tensors: Tensors, name: str) -> None:
    """Give an expert weights of more exponents than there is room for in a table."""
    weight = tensors[EXPERT[name]][0] if name == "gpt_oss" else tensors[f"{EXPERT[name]}.weight"]
    exponents = torch.arange(weight.numel()).remainder(40).sub(20).view(weight.shape)
    weight.copy_(exponents.float().exp2())


def shorten(tensors: Tensors, key: str) -> None:
    """Take off the last row, of fused experts the last expert."""
    tensors[key] = tensors[key][:-1].clone()


def drop(tensors: Tensors, name: str) -> None:
    for key in [key for key in tensors if key.startswith(f"{name}.")]:
        del tensors[key]


def said(*arguments: object, code: int = 0) -> str:
    return " ".join(command(*arguments, code=code).output.split())
