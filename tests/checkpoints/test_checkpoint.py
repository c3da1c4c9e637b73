"""Zeros of checkpoints on disk, dense and packed, against the models in memory."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from helpers import EVERY, MakeModel, linears_of, random_samples, run, zeros
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.pruning import WandaPruningModifier
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dlp_plugin import DLPModifier, MaskedGPTQModifier
from dlp_plugin.checkpoints.files import INDEX, check_weight_files, weight_files
from dlp_plugin.checkpoints.inspect import Zeros, inspect_checkpoint, zeros_lost, zstd_bytes


def stage() -> WandaPruningModifier:
    return WandaPruningModifier(sparsity=0.6, **EVERY)


def test_zeros_of_every_group(tmp_path: Path) -> None:
    weight = torch.tensor([[0.0, 1, 2, 0, 3, 4, 0, 0], [0.0, 0, 1, 2, 3, 0, 0, 4]])
    odd = torch.ones(2, 6)
    left = weight[:, :4].clone()
    tensors = {"layers.0.a.weight": weight, "layers.0.b.weight": odd, "layers.2.a.weight": left}
    save_file(tensors, tmp_path / "model.safetensors")
    found = inspect_checkpoint(tmp_path, group=4)
    assert found.linears["layers.0.a"] == Zeros(16, 8, (2, 2))
    assert found.linears["layers.0.b"].in_group is None  # 6 columns are not filled by groups of 4
    assert found.blocks["layers.0"] == Zeros(28, 8, None)
    assert found.blocks["layers.2"].in_group == (2, 2)
    assert inspect_checkpoint(tmp_path, group=2).linears["layers.0.a"].in_group == (0, 2)
    assert inspect_checkpoint(tmp_path).linears["layers.0.a"] == Zeros(16, 8)


def test_a_dense_checkpoint(make_model: MakeModel, tmp_path: Path) -> None:
    dlp = DLPModifier()
    model = make_model(torch.bfloat16)
    run(model, [dlp, stage()], random_samples(), output_dir=str(tmp_path))
    done: list[float] = []
    found = inspect_checkpoint(tmp_path, done.append)
    assert sum(done) == pytest.approx(1)
    assert found.quantization is None
    assert found.bytes_on_disk == (tmp_path / "model.safetensors").stat().st_size
    assert list(found.blocks) == [block.name for block in dlp.plan.blocks]
    for name, linear in linears_of(model).items():
        if name != "lm_head":
            assert found.linears[name] == Zeros(linear.weight.numel(), zeros(linear))
    for block in dlp.plan.blocks:
        assert found.blocks[block.name].weights == block.weights
        assert found.blocks[block.name].sparsity == pytest.approx(block.sparsity, abs=0.02)
    assert found.outside["lm_head"].zeros == 0
    inside = [zeros for name, zeros in found.linears.items() if name in linears_of(model)]
    inside.remove(found.linears["lm_head"])
    header = found.bytes_on_disk - sum(
        t.nbytes for t in load_file(tmp_path / "model.safetensors").values()
    )
    saved = sum(16 * z.zeros - z.weights for z in inside) // 8  # 2 bytes a zero, 1 bit a weight
    assert found.bytes_if_sparse == found.bytes_on_disk - header - saved
    assert saved > 0
    assert zstd_bytes(tmp_path) < 0.8 * found.bytes_on_disk


def test_lost_zeros_are_counted(make_model: MakeModel, tmp_path: Path) -> None:
    pruned, packed = tmp_path / "pruned", tmp_path / "packed"
    run(make_model(torch.bfloat16), [stage()], random_samples(), output_dir=str(pruned))
    weights = QuantizationArgs(num_bits=4, strategy="group", group_size=64)
    scheme = {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}
    for kind, keeps in ((GPTQModifier, False), (MaskedGPTQModifier, True)):
        quantizer = kind(ignore=["lm_head"], config_groups=scheme)
        folder = packed / kind.__name__
        run(
            make_model(torch.bfloat16),
            [stage(), quantizer],
            random_samples(),
            output_dir=str(folder),
        )
        lost = zeros_lost(pruned, folder)
        assert set(lost) == set(linears_of(make_model())) - {"lm_head"}
        assert (sum(lost.values()) == 0) == keeps
    assert set(zeros_lost(pruned, pruned).values()) == {0}
    other = tmp_path / "other"
    make_model(num_hidden_layers=2).save_pretrained(other)
    with pytest.raises(ValueError, match=r"layers.2.* is missing in .*not the same model"):
        zeros_lost(pruned, other)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "strategy", "group"), [(4, "group", 64), (8, "channel", None)])
def test_a_packed_checkpoint_counts_what_it_stands_for(
    make_model: MakeModel,
    tmp_path: Path,
    symmetric: bool,
    bits: int,
    strategy: str,
    group: int | None,
) -> None:
    weights = QuantizationArgs(
        num_bits=bits, symmetric=symmetric, strategy=strategy, group_size=group
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    gptq = GPTQModifier(ignore=["lm_head"], config_groups={"group_0": scheme})
    run(
        make_model(torch.bfloat16),
        [DLPModifier(), stage(), gptq],
        random_samples(),
        output_dir=str(tmp_path),
    )
    found = inspect_checkpoint(tmp_path)
    assert found.quantization == "pack-quantized"
    assert "model.layers.0.mlp.up_proj.weight_packed" in load_file(tmp_path / "model.safetensors")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    loaded(torch.zeros(1, 4, dtype=torch.int64))  # decompresses on the way
    for name, linear in linears_of(loaded).items():
        if name != "lm_head":
            assert found.linears[name] == Zeros(linear.weight.numel(), zeros(linear)), name
            assert found.linears[name].zeros > 0


def test_shards_and_ten_blocks_come_in_depth_order(tmp_path: Path) -> None:
    for shard in range(2):
        tensors = {f"model.layers.{i}.up.weight": torch.eye(2) for i in range(shard, 12, 2)} | {
            f"model.layers.{i}.norm.weight": torch.ones(2) for i in range(shard, 12, 2)
        }
        tensors["logit_scale" if shard else "bias"] = torch.ones(1)
        save_file(tensors, tmp_path / f"model-0000{shard + 1}-of-00002.safetensors")
    found = inspect_checkpoint(tmp_path)
    assert list(found.blocks) == [f"model.layers.{i}" for i in range(12)]
    assert "" not in found.linears  # a parameter of the model's own
    assert set(found.blocks.values()) == {Zeros(4, 2)}


def test_a_folder_without_safetensors_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no .safetensors file"):
        inspect_checkpoint(tmp_path)


def test_a_quantized_weight_without_a_scheme_is_refused(tmp_path: Path) -> None:
    packed = {"model.layers.0.up.weight_packed": torch.zeros(2, 2, dtype=torch.int32)}
    save_file(packed, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ValueError, match="model.layers.0.up is quantized, but config.json"):
        inspect_checkpoint(tmp_path)


def test_fused_experts(tmp_path: Path) -> None:
    """As GPT-OSS holds them: one tensor of all experts, counted as the matrices that it is."""
    experts = torch.ones(3, 4, 2)
    experts[0, :2] = 0
    tensors = {
        "layers.0.mlp.experts.gate_up_proj": experts,
        "layers.0.mlp.experts.gate_up_proj_bias": torch.zeros(3, 2),
        "layers.0.conv.weight": torch.zeros(3, 1, 4),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    name = "layers.0.mlp.experts.gate_up_proj"
    found = inspect_checkpoint(tmp_path)
    assert found.linears == {name: Zeros(24, 4)}
    assert found.bytes_if_sparse == (24 + 32 * 20) // 8 + 4 * (6 + 12)
    other = tmp_path / "other"
    other.mkdir()
    experts[0, 0, 0] = 1
    save_file(tensors, other / "model.safetensors")
    assert zeros_lost(tmp_path, other) == {name: 1}
    del tensors[name]
    save_file(tensors, other / "model.safetensors")
    with pytest.raises(ValueError, match=rf"{name} is \[3, 4, 2\] in .* and is missing in"):
        zeros_lost(tmp_path, other)


def random_bits(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Any number of a dtype, with many zeros of both signs, subnormals and NaNs among them."""
    size = dtype.itemsize
    bits = torch.randint(0, 256, (*shape, size), dtype=torch.uint8)
    bits[torch.rand(shape) < 0.4] = 0
    bits[torch.rand(shape) < 0.1] = torch.tensor([0] * (size - 1) + [0x80], dtype=torch.uint8)
    bits[torch.rand(shape) < 0.1] = torch.tensor([1] + [0] * (size - 1), dtype=torch.uint8)
    bits[torch.rand(shape) < 0.1] = 0xFF
    return bits.view(dtype).reshape(shape)


FLOATS = ["float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"]
INTEGERS = ["int64", "int32", "int16", "int8", "uint8", "uint16"]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", [*FLOATS, *INTEGERS])
def test_zeros_of_every_dtype_are_those_that_torch_counts(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    dtype = getattr(torch, name)
    folders = [tmp_path / "one", tmp_path / "two"]
    saved = []
    for folder in folders:
        folder.mkdir()
        tensors = {
            "layers.0.a.weight": random_bits(dtype, 24, 40),
            "layers.0.norm.weight": random_bits(dtype, 24),
            "layers.0.mlp.experts.down_proj": random_bits(dtype, 3, 8, 10),
            "head.weight": random_bits(dtype, 6, 40),
        }
        save_file(tensors, folder / "model.safetensors")
        saved.append({k.removesuffix(".weight"): x.double() == 0 for k, x in tensors.items()})
    one, two = saved
    matrices = {k: zero for k, zero in one.items() if k != "layers.0.norm"}
    found = inspect_checkpoint(folders[0])
    assert found.linears == {k: Zeros(z.numel(), int(z.sum())) for k, z in matrices.items()}
    assert found.linears["layers.0.a"].zeros > 200
    bits = 8 * dtype.itemsize
    inside = [zeros for key, zeros in found.linears.items() if key != "head"]
    sparse = sum(zeros.weights + bits * (zeros.weights - zeros.zeros) for zeros in inside)
    assert found.bytes_if_sparse == (sparse + bits * (24 + 6 * 40)) // 8
    counts = one["layers.0.a"].unflatten(1, (-1, 8)).sum(2)
    grouped = inspect_checkpoint(folders[0], group=8).linears["layers.0.a"]
    assert grouped.in_group == (int(counts.min()), int(counts.max()))
    assert zeros_lost(*folders) == {
        k: int((zero & ~two[k]).sum()) for k, zero in matrices.items() if k != "head"
    }


def test_a_dense_checkpoint_needs_no_torch(make_model: MakeModel, tmp_path: Path) -> None:
    """Importing torch takes longer than counting the zeros of a small model."""
    make_model(torch.bfloat16).save_pretrained(tmp_path)
    code = (
        "import sys; from dlp_plugin.cli import app; "
        "folder = sys.argv[1]; "
        "app(['inspect', folder, '--against', folder], standalone_mode=False); "
        "print({'torch', 'compressed_tensors', 'transformers'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "lost: 0" in done.stdout
    assert done.stdout.strip().endswith("set()")


class TestWhichFilesCount:
    """Of two shards, with and without what the index says."""

    @pytest.fixture
    def sharded(self, make_model: MakeModel, tmp_path: Path) -> Path:
        make_model().save_pretrained(tmp_path / "model", max_shard_size="150KB")
        assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
        return tmp_path / "model"

    def test_a_missing_shard(self, sharded: Path) -> None:
        gone = sorted(sharded.glob("*.safetensors"))[-1]
        gone.unlink()
        readers = (inspect_checkpoint, zstd_bytes, check_weight_files)
        for read in (*readers, lambda folder: zeros_lost(folder, folder)):
            with pytest.raises(FileNotFoundError, match=rf"{gone.name} is missing, which .*index"):
                read(sharded)
        for file in sharded.glob("*.safetensors"):
            file.unlink()
        with pytest.raises(FileNotFoundError, match=r"is missing, which .*index"):
            check_weight_files(sharded)  # not a folder of weights of another kind

    def test_a_shard_without_a_tensor_of_the_index(self, sharded: Path) -> None:
        file = sorted(sharded.glob("*.safetensors"))[-1]
        tensors = load_file(file)
        lost = sorted(tensors)[0]
        del tensors[lost]
        save_file(tensors, file)
        for read in (inspect_checkpoint, check_weight_files):
            with pytest.raises(ValueError, match=rf"{file.name} does not hold {re.escape(lost)}"):
                read(sharded)

    def test_a_tensor_in_two_shards_is_the_one_that_the_index_names(self, tmp_path: Path) -> None:
        names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
        save_file({"a.weight": torch.ones(2, 2)}, tmp_path / names[0])
        other = {"a.weight": torch.zeros(2, 2), "b.weight": torch.ones(2, 2)}
        save_file(other, tmp_path / names[1])
        weight_map = {"a.weight": names[0], "b.weight": names[1]}
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
        expected = {key: tmp_path / name for key, name in weight_map.items()}
        assert weight_files(tmp_path) == expected
        assert inspect_checkpoint(tmp_path).linears["a"].zeros == 0

    def test_files_of_something_else(self, sharded: Path) -> None:
        before, size = inspect_checkpoint(sharded), zstd_bytes(sharded)
        save_file({"layers.0.a.weight": torch.zeros(64, 64)}, sharded / "adapter.safetensors")
        assert inspect_checkpoint(sharded) == before
        assert zstd_bytes(sharded) == size

    def test_files_beside_a_single_one(self, tmp_path: Path) -> None:
        save_file({"layers.0.a.weight": torch.ones(4, 4)}, tmp_path / "model.safetensors")
        save_file({"layers.1.a.weight": torch.zeros(4, 4)}, tmp_path / "old.safetensors")
        found = inspect_checkpoint(tmp_path)
        assert found.linears == {"layers.0.a": Zeros(16, 0)}
        assert found.bytes_on_disk == (tmp_path / "model.safetensors").stat().st_size


class TestDamagedFiles:
    @pytest.mark.parametrize(
        "damage",
        [
            lambda data: data[:-1],
            lambda data: data[:20],
            lambda data: data + b"more",
            lambda data: b"",
            lambda data: bytes(len(data)),
            lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 144\n",
            bytes.upper,
        ],
        ids=["cut", "cut header", "longer", "empty", "zeros", "pointer of git-lfs", "garbage"],
    )
    def test_weights(self, tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
        whole, damaged = tmp_path / "whole", tmp_path / "damaged"
        for folder in (whole, damaged):
            folder.mkdir()
            save_file({"layers.0.a.weight": torch.ones(4, 4)}, folder / "model.safetensors")
        file = damaged / "model.safetensors"
        file.write_bytes(damage(file.read_bytes()))
        for read in (
            inspect_checkpoint,
            check_weight_files,
            lambda folder: zeros_lost(folder, whole),
            lambda folder: zeros_lost(whole, folder),
        ):
            message = rf"^{re.escape(str(file))} is damaged or incomplete .* again$"
            with pytest.raises(ValueError, match=message):
                read(damaged)
            read(whole)

    @pytest.mark.parametrize(
        ("text", "message"),
        [("{", "is not valid JSON"), ("[]", "holds a list instead of a mapping")],
    )
    @pytest.mark.parametrize("name", ["config.json", INDEX])
    def test_configuration_and_index(
        self, tmp_path: Path, name: str, text: str, message: str
    ) -> None:
        save_file({"layers.0.a.weight": torch.ones(4, 4)}, tmp_path / "model.safetensors")
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=rf"{re.escape(name)} {message}"):
            inspect_checkpoint(tmp_path)

    @pytest.mark.parametrize("weight_map", [None, {}, ["a.weight"], {"a.weight": 1}])
    def test_an_index_without_a_weight_map(self, tmp_path: Path, weight_map: object) -> None:
        (tmp_path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        for read in (inspect_checkpoint, check_weight_files):
            with pytest.raises(ValueError, match=r"index\.json has no weight_map from tensors"):
                read(tmp_path)


def test_weights_that_are_packed_in_a_way_that_is_not_read(
    make_model: MakeModel, tmp_path: Path
) -> None:
    make_model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="quantized by gptq, whose weights cannot be read"):
        inspect_checkpoint(tmp_path)


def test_a_folder_without_safetensors_may_hold_weights_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"weights")
    check_weight_files(tmp_path)


def test_an_adapter_is_checked_like_a_model(tmp_path: Path) -> None:
    file = tmp_path / "adapter_model.safetensors"
    save_file({"layers.0.a.lora_A.weight": torch.ones(2, 4)}, file)
    check_weight_files(tmp_path)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors is damaged or incomp"):
        check_weight_files(tmp_path)
