"""Run with vLLM's interpreter: its layers multiply the same slices of packed weights as of dense.

    python vllm_probe_layers.py

Every kind of Linear, for every rank of 1, 2 and 4 processes, of which there is only this one:
what vLLM asks about them is answered here.
"""

import gc
import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from unittest import TestCase
from unittest.mock import patch
from weakref import ref

import torch
from vllm.config.quantization import QuantizationConfigArgs
from vllm.model_executor import parameter
from vllm.model_executor.layers import linear as layers
from vllm.model_executor.layers.quantization.online.base import OnlineQuantizationConfig
from vllm.model_executor.model_loader.reload import record_metadata_for_reloading
from vllm.model_executor.models.utils import WeightsMapper

from dlp_plugin.checkpoints.sparse_format import (
    QUANT_METHOD,
    VERSION,
    Stored,
    decode,
    encode,
    encode_integers,
)
from dlp_plugin.engines.vllm import SparseConfig, SparseLinearMethod

KINDS = ("planes", "values", "integers", "dense")
HIDDEN, HEADS, KV_HEADS, HEAD = 128, 8, 2, 24
WIDTHS = {"q": HEADS * HEAD, "k": KV_HEADS * HEAD, "v": KV_HEADS * HEAD, "gate": 200, "up": 200}
WIDTHS |= {"in_qkv": 96, "in_z": 32}
# Names of the checkpoint to those of vLLM; the last is Qwen3.5's, of four shards three of which
# come as one.
FUSED: dict[str, dict[str, object]] = {
    "qkv_proj": {"q": "q", "k": "k", "v": "v"},
    "gate_up_proj": {"gate": 0, "up": 1},
    "in_qkvz": {"in_qkv": (0, 1, 2), "in_z": 3},
}


def stored_as(kind: str, out: int, width: int):
    """A weight as it is stored, and decoded; ``dense`` ones are not stored."""
    weight = torch.randn(out, width) * (torch.rand(out, width) < 0.3)
    if kind == "integers":
        integers = torch.randint(16, (out, width), dtype=torch.uint8)
        words = torch.randint(2**31, (-(-out // 8), width // 8), dtype=torch.int32)
        scale = torch.rand(out, width // 8).bfloat16()
        stored, parts = encode_integers(integers, scale, words, bits=4, group_size=8)
        return stored, parts, decode(stored, parts)
    weight = {"planes": weight.sign().bfloat16(), "values": weight, "dense": weight}[kind]
    stored, parts = (None, {}) if kind == "dense" else encode(weight)
    return stored, parts or {"weight": weight}, weight


def config_of(linears: dict[str, Stored]) -> SparseConfig:
    entries = {name: stored.to_config() for name, stored in linears.items()}
    config = SparseConfig.from_config(
        {"quant_method": QUANT_METHOD, "version": VERSION, "linears": entries}
    )
    config.packed_modules_mapping = {name: list(shards) for name, shards in FUSED.items()}
    return config


def layer_of(name: str, config: SparseConfig | None, dtype: torch.dtype) -> torch.nn.Module:
    given = {"bias": False, "quant_config": config, "prefix": name, "params_dtype": dtype}
    if name == "qkv_proj":
        return layers.QKVParallelLinear(HIDDEN, HEAD, HEADS, KV_HEADS, **given)
    if name == "gate_up_proj":
        return layers.MergedColumnParallelLinear(HIDDEN, [WIDTHS["gate"], WIDTHS["up"]], **given)
    if name == "in_qkvz":
        return layers.MergedColumnParallelLinear(HIDDEN, [32] * 4, **given)
    if name.endswith("column"):
        return layers.ColumnParallelLinear(HIDDEN, 200, **given)
    if name == "row":
        return layers.RowParallelLinear(200, HIDDEN, **given)
    return layers.ReplicatedLinear(HIDDEN, 200, **given)


def load(layer: torch.nn.Module, tensors: dict[str, torch.Tensor], shard: object) -> None:
    for part, tensor in tensors.items():
        target = getattr(layer, part)
        target.weight_loader(target, tensor, *([] if shard is None else [shard]))


def compare(name: str, shards: list, dtype: torch.dtype) -> None:
    """Load a layer from dense shards, and one from packed ones that decodes and one that does not.

    :param shards: of each its name in the checkpoint and in vLLM, and what is stored of it
    """
    linears = {linear: stored for linear, _, (stored, _, _) in shards if stored}
    expected = layer_of(name, None, dtype)
    expected.weight.data.fill_(float("nan"))
    for _, shard, (_, _, weight) in shards:
        load(expected, {"weight": weight}, shard)
    wanted = expected.weight.data
    assert not wanted.isnan().any()
    for kernels in "off", "":
        found = layer_of(name, config_of(linears), dtype)
        assert isinstance(found.quant_method, SparseLinearMethod) == bool(linears)
        for _, shard, (_, parts, _) in shards:
            load(found, parts, shard)
        held = found.weight.data
        with patch.dict(os.environ, DLP_KERNELS=kernels):
            found.quant_method.process_weights_after_loading(found)
        assert list(dict(found.named_parameters())) == ["weight"]
        packed = dict(found.named_buffers()).keys() - {"packed_number"}
        assert bool(packed) == (bool(linears) and not kernels)
        if kernels:
            assert torch.equal(held, wanted), (name, dtype, [shard[0] for shard in shards])
        multiplies(found, wanted, (name, dtype, kernels))


def multiplies(layer: torch.nn.Module, weight: torch.Tensor, what: object) -> None:
    """Whether a layer gives its products but for rounding.

    :param weight: rounded to the dtype of the layer, as those that are packed are not
    """
    x, bias = torch.randn(3, weight.shape[1]), torch.randn(len(weight))
    x, bias = x.to(weight.dtype), bias.to(weight.dtype)
    for given in None, bias:
        product = layer.quant_method.apply(layer, x, given)
        assert product.dtype == weight.dtype, what
        true = x.double() @ weight.double().T + (0 if given is None else given.double())
        size = x.double().abs() @ weight.double().abs().T + bias.abs()
        assert ((product - true).abs() <= 4 * torch.finfo(x.dtype).eps * size).all(), what


def test_the_log_says_once_why_weights_are_decoded() -> None:
    stored, parts, _ = stored_as("planes", 200, HIDDEN)
    with (
        TestCase().assertLogs("vllm.dlp_plugin.engines.vllm") as log,
        patch.dict(os.environ, DLP_KERNELS="off"),
    ):
        for _ in range(2):
            layer = layer_of("column", config_of({"column": stored}), torch.bfloat16)
            load(layer, parts, None)
            layer.quant_method.process_weights_after_loading(layer)
    (told,) = log.output
    assert "Packed weights are decoded to dense ones: the kernels are turned off by " in told


def test_names_of_the_checkpoint_become_those_of_vllm() -> None:
    stored, parts, _ = stored_as("planes", 200, HIDDEN)
    config = config_of({"model.language_model.column": stored})
    mapper = WeightsMapper(orig_to_new_prefix={"model.language_model.": "language_model.model."})
    for _ in range(2):  # nested models each do it
        config.apply_vllm_mapper(mapper)
    layer = layer_of("language_model.model.column", config, torch.bfloat16)
    del parts["weight_table"]
    load(layer, parts, None)
    refused(
        "the checkpoint lacks model.language_model.column.weight_table: fetch",
        layer.quant_method.process_weights_after_loading,
        layer,
    )


def test_what_vllm_cannot_do_is_refused() -> None:
    stored, *_ = stored_as("planes", 200, HIDDEN)
    config = config_of({"lm_head": stored, "model.experts.0.up_proj": stored})
    for prefix, name in {"lm_head": "lm_head", "model.experts": "model.experts.0.up_proj"}.items():
        said = f"{name} is packed, but vLLM's Module takes dense weights only: unpack"
        refused(said, config.get_quant_method, torch.nn.Module(), prefix)
    assert config.get_quant_method(torch.nn.Module(), "model.attn") is None
    said = "a is packed, and vLLM permutes the rows of a falcon model's weights"
    refused(said, config.maybe_update_config, "a", SimpleNamespace(model_type="falcon"))
    config.maybe_update_config("a", SimpleNamespace(model_type="falcon_h1"))


def test_what_vllm_is_told_to_quantize_as_it_loads_is_refused() -> None:
    args = QuantizationConfigArgs(linear="fp8_per_tensor", ignore=["*qkv_proj"])
    config = config_of({"q": stored_as("planes", WIDTHS["q"], HIDDEN)[0]})
    config.online_quantization_config = OnlineQuantizationConfig(args)
    assert isinstance(layer_of("qkv_proj", config, torch.bfloat16).quant_method, SparseLinearMethod)
    args.ignore.clear()
    said = "the checkpoint is packed (dlp-sparse) and cannot be quantized when it is loaded"
    refused(said, layer_of, "qkv_proj", config, torch.bfloat16)
    refused("(quantization_config of qkv_proj)", layer_of, "qkv_proj", config, torch.bfloat16)


def test_a_weight_that_vllm_asks_for_is_dense() -> None:
    """Latent attention takes its weight apart, which is marked before it is loaded."""
    stored, parts, weight = stored_as("planes", 200, HIDDEN)
    layer = layer_of("column", config_of({"column": stored}), torch.bfloat16)
    layer._cpu_skip_gemm_dispatch = True
    load(layer, parts, None)
    layer.quant_method.process_weights_after_loading(layer)
    assert torch.equal(layer.weight, weight)
    x = torch.randn(3, HIDDEN).bfloat16()
    assert torch.equal(layer(x)[0], torch.nn.functional.linear(x, weight))


def test_what_is_copied_otherwise_than_by_rows_is_dense() -> None:
    """Loaders of some models take what is between by indices, such as Mamba's."""
    stored, parts, weight = stored_as("planes", 200, HIDDEN)
    layer = layer_of("column", config_of({"column": stored}), torch.bfloat16)
    del layer.weight.weight_loader

    def rows_of_two_parts(parameter: torch.Tensor, loaded: torch.Tensor) -> None:
        for rows in slice(0, 60), slice(60, 200):
            parameter.data[rows, ...] = loaded[rows]

    layer.weight.weight_loader = rows_of_two_parts
    load(layer, parts, None)
    held = layer.weight.data
    layer.quant_method.process_weights_after_loading(layer)
    assert torch.equal(held, weight)
    x = torch.randn(3, HIDDEN).bfloat16()
    torch.testing.assert_close(layer(x)[0], x @ weight.T)


def test_a_layer_is_freed() -> None:
    """VLLM keeps what it needs to load anew, loaders among it, as long as the layer lives."""
    layer = layer_of("row", config_of({"row": stored_as("planes", HIDDEN, 200)[0]}), torch.bfloat16)
    record_metadata_for_reloading(layer)
    kept = ref(layer)
    del layer
    gc.collect()
    assert kept() is None


def refused(message: str, function: Callable[..., object], *arguments: object) -> None:
    try:
        function(*arguments)
    except ValueError as error:
        told = str(error)
    else:
        told = "nothing"
    assert message in told, told


def test_every_kind_has_the_slices_of_every_rank() -> None:
    for size, dtype in itertools.product((1, 2, 4), (torch.bfloat16, torch.float32)):
        for rank in range(size):
            with as_rank(rank, size):
                for first, second in itertools.product(KINDS, repeat=2):
                    kinds = first, second, KINDS[KINDS.index(first) - KINDS.index(second)]
                    for name, fused in FUSED.items():
                        compare(name, mixed(fused, kinds), dtype)
                for kind in KINDS[:-1]:
                    whole = stored_as(kind, sum(WIDTHS[name] for name in "qkv"), HIDDEN)
                    compare("qkv_proj", [("qkv_proj", None, whole)], dtype)
                    for name in ("column", "replicated"):
                        compare(name, [(name, None, stored_as(kind, 200, HIDDEN))], dtype)
                    compare("row", [("row", None, stored_as(kind, HIDDEN, 200))], dtype)


def mixed(fused: dict[str, object], kinds: tuple[str, ...]) -> list:
    return [
        (name, shard, stored_as(kind, WIDTHS[name], HIDDEN))
        for (name, shard), kind in zip(fused.items(), kinds, strict=False)
    ]


@contextmanager
def as_rank(rank: int, size: int) -> Iterator[None]:
    """Have vLLM take this for one of several tensor-parallel processes."""
    answers = {
        "get_tensor_model_parallel_rank": lambda: rank,
        "get_tensor_model_parallel_world_size": lambda: size,
    }
    with patch.multiple(layers, **answers), patch.multiple(parameter, **answers):
        yield


if __name__ == "__main__":
    torch.manual_seed(0)
    with as_rank(0, 1):
        test_the_log_says_once_why_weights_are_decoded()
        test_names_of_the_checkpoint_become_those_of_vllm()
        test_what_vllm_cannot_do_is_refused()
        test_what_vllm_is_told_to_quantize_as_it_loads_is_refused()
        test_a_weight_that_vllm_asks_for_is_dense()
        test_what_is_copied_otherwise_than_by_rows_is_dense()
        test_a_layer_is_freed()
    test_every_kind_has_the_slices_of_every_rank()
