"""Run with vLLM's interpreter: its layers hold the same slices of packed weights as of dense ones.

    python vllm_probe_layers.py

Every kind of Linear, for every rank of 1, 2 and 4 processes, of which there is only this one:
what vLLM asks about them is answered here.
"""

import gc
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from unittest.mock import patch
from weakref import ref

import torch
from vllm.model_executor import parameter
from vllm.model_executor.layers import linear as layers
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
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
    """Load a layer from packed shards and one from dense ones.

    :param shards: of each its name in the checkpoint and in vLLM, and what is stored of it
    """
    linears = {linear: stored for linear, _, (stored, _, _) in shards if stored}
    config = config_of(linears)
    found, expected = layer_of(name, config, dtype), layer_of(name, None, dtype)
    for layer in found, expected:
        layer.weight.data.fill_(float("nan"))
    assert isinstance(found.quant_method, SparseLinearMethod) == bool(linears)
    for _, shard, (_, parts, weight) in shards:
        load(found, parts, shard)
        load(expected, {"weight": weight}, shard)
    weight = found.weight.data
    with patch.object(UnquantizedLinearMethod, "process_weights_after_loading"):
        found.quant_method.process_weights_after_loading(found)
    assert list(dict(found.named_parameters())) == ["weight"]
    assert not weight.isnan().any()
    assert torch.equal(weight, expected.weight.data), (name, dtype, [s[0] for s in shards])


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
        said = f"{name} is packed, and vLLM's Module takes dense weights only: unpack"
        refused(said, config.get_quant_method, torch.nn.Module(), prefix)
    assert config.get_quant_method(torch.nn.Module(), "model.attn") is None
    said = "a is packed, and vLLM moves the rows of a falcon model's weights"
    refused(said, config.maybe_update_config, "a", SimpleNamespace(model_type="falcon"))
    config.maybe_update_config("a", SimpleNamespace(model_type="falcon_h1"))


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
                for kinds in itertools.product(KINDS, repeat=3):
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
        test_names_of_the_checkpoint_become_those_of_vllm()
        test_what_vllm_cannot_do_is_refused()
        test_a_layer_is_freed()
    test_every_kind_has_the_slices_of_every_rank()
