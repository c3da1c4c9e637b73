"""Converts pack-quantized checkpoints of llm-compressor to the format of GPTQ's own tools.

Both formats hold the same integers and differ in how these are packed. compressed-tensors packs
signed integers along a row of the ``[out, in]`` matrix; GPTQ packs unsigned integers along a
column. So the conversion is exact. Schemes that the GPTQ format cannot hold are refused.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
)
from compressed_tensors.utils.safetensors_load import update_safetensors_index
from loguru import logger
from safetensors.torch import save_file
from transformers import PreTrainedModel

from dlp_plugin.checkpoints.files import (
    copy_others,
    opening,
    read_config,
    read_index,
    weight_files,
    write_json,
)
from dlp_plugin.checkpoints.names import linears_of_blocks
from dlp_plugin.checkpoints.old_readers import readable_config, rewrite_tokenizer
from dlp_plugin.checkpoints.sources import built
from dlp_plugin.files import check_vacant, replacing, reserved

__all__ = ["export_gptq"]

_QUANTIZED_LOCALS = {"weight_packed", "weight_scale", "weight_shape", "weight_zero_point"}

Fetch = Callable[[str], torch.Tensor]


def export_gptq(source: str | Path | PreTrainedModel, output: str | Path) -> None:
    """Write a pack-quantized checkpoint, or model in memory, as a GPTQ-format checkpoint.

    A quantized Linear becomes ``qweight``, ``qzeros``, ``scales`` and ``g_idx`` (see
    :func:`_gptq_tensors`). Every other tensor and file of the checkpoint is copied unchanged,
    shard by shard. Zeros stay zeros: in both formats a weight is 0 where its integer equals its
    zero point. A tied head is written too, as AutoGPTQ does. Without it AutoGPTQ's loader leaves
    head and embedding at zero. ``desc_act`` is always false, because activation ordering of
    today's llm-compressor (``actorder: weight``, or ``static``) leaves the groups in order.

    AutoGPTQ and vLLM read the result, with these limits: in and out features must be multiples of
    32 (both), every Linear of a block must be quantized (AutoGPTQ), integers must be symmetric
    (vLLM) and have 4 bits (vLLM on a CPU).

    :param source: folder of a 4-bit or 8-bit weight-only checkpoint that ``oneshot``
        wrote, strategy ``group`` or ``channel``; or the model that ``oneshot`` returned, which is
        saved to a temporary folder first and then exported without a tokenizer
    :param output: folder to write; it is made, or may exist if it is empty
    :raises FileNotFoundError: if ``source`` has no config or weights or lacks a shard, or
        the parent of ``output`` is missing
    :raises FileExistsError: if ``output`` is not empty
    :raises BlockingIOError: if another run is writing ``output``
    :raises ValueError: if a file is damaged, the checkpoint is not pack-quantized, or the
        GPTQ format cannot hold its scheme or one of its modules
    """
    output = Path(output)
    with reserved(output):
        check_vacant(output)
        if not isinstance(source, PreTrainedModel):
            return _export(Path(source), output)
        with tempfile.TemporaryDirectory() as folder:
            source.save_pretrained(folder)
            return _export(Path(folder), output)


def _export(source: Path, output: Path) -> None:
    config = _read_config(source)
    args = _only_scheme(_quantization_of(source, config))
    places = weight_files(source)
    shards = sorted(set(places.values()))
    opened = opening()
    modules = {key.removesuffix(".weight_packed") for key in places if _is_packed(key)}

    def fetch(key: str) -> torch.Tensor:
        tensor: torch.Tensor = opened(places[key]).get_tensor(key)
        return tensor

    model = built(source)
    dense = linears_of_blocks(model, places) - modules
    settings = _settings(args, modules, dense)
    tied: dict[str, str] = model.all_tied_weights_keys  # tied name to the name in the files
    twins = {kept: name for name, kept in tied.items() if name not in places}
    with replacing(output) as beside:
        beside.mkdir()
        weight_map: dict[str, str] = {}
        size = 0
        for shard in shards:
            tensors: dict[str, torch.Tensor] = {}
            for key in (key for key, place in places.items() if place == shard):
                module, _, local = key.rpartition(".")
                if _is_packed(key):
                    tensors.update(_gptq_tensors(module, args, places, fetch))
                elif module not in modules or local not in _QUANTIZED_LOCALS:
                    tensors[key] = fetch(key)
                    if key in twins:
                        tensors[twins[key]] = tensors[key].clone()
            save_file(tensors, beside / shard.name, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(tensors, shard.name)
            size += sum(tensor.nbytes for tensor in tensors.values())
        if read_index(source):
            update_safetensors_index(beside, size, weight_map)
        readable = readable_config({**config, "quantization_config": None})
        write_json(beside / "config.json", {**readable, "quantization_config": settings})
        write_json(beside / "quantize_config.json", settings)
        copy_others(source, beside, ["quantize_config.json"])
        rewrite_tokenizer(beside)
        logger.info(f"{len(modules)} modules of {source} written in GPTQ format to {output}")


def _read_config(source: Path) -> dict[str, Any]:
    config = read_config(source)
    if config is None:
        raise FileNotFoundError(f"{source} holds no config.json; give the folder of a saved model")
    return config


def _quantization_of(source: Path, config: Mapping[str, Any]) -> QuantizationConfig:
    found = config.get("quantization_config") or {}
    kind = (found.get("quant_method"), found.get("format"))
    if kind != ("compressed-tensors", "pack-quantized"):
        raise ValueError(
            f"{source} is not pack-quantized (quant_method {kind[0]}, format {kind[1]}); "
            "give a checkpoint that oneshot() wrote with a weight-only scheme such as W4A16"
        )
    return QuantizationConfig.model_validate(found)


def _only_scheme(config: QuantizationConfig) -> QuantizationArgs:
    """Return the scheme that all quantized weights of a checkpoint share.

    :raises ValueError: if there are several schemes, or the GPTQ format cannot hold the scheme
    """
    if config.kv_cache_scheme is not None:
        raise ValueError("kv_cache_scheme is set, but GPTQ holds weights only; quantize without it")
    groups = {n: g for n, g in config.config_groups.items() if isinstance(g, QuantizationScheme)}
    for name, group in groups.items():
        for field in ("input_activations", "output_activations"):
            if getattr(group, field) is not None:
                raise ValueError(
                    f"{name} has {field}, but GPTQ holds weights only; "
                    "use a weight-only scheme such as W4A16"
                )
    # Fields that describe the stored weights; observers and the like matter in calibration only.
    kept = {"num_bits", "type", "symmetric", "strategy", "group_size"}
    schemes: list[tuple[str, QuantizationArgs]] = []
    for name, group in groups.items():
        if group.weights is None:
            raise ValueError(f"{name} has no weights; use a weight-only scheme such as W4A16")
        schemes.append((name, group.weights))
    first, args = schemes[0]
    for name, other in schemes[1:]:
        if args.model_dump(include=kept) != other.model_dump(include=kept):
            raise ValueError(
                f"{first} and {name} differ in their weights' scheme, but GPTQ holds one for "
                "all; quantize every Linear alike"
            )
    if args.type != "int" or args.num_bits not in (4, 8):
        raise ValueError(
            f"{first} has num_bits {args.num_bits} of type {args.type}, but the export supports "
            "type int with 4 or 8 bits; quantize with W4A16 or W8A16"
        )
    if args.strategy not in ("group", "channel"):
        raise ValueError(
            f"{first} has strategy {args.strategy}, but the GPTQ format supports group and "
            "channel; quantize with one of them"
        )
    return args


def _settings(args: QuantizationArgs, modules: set[str], dense: set[str]) -> dict[str, Any]:
    """Make the settings for ``quantization_config`` and ``quantize_config.json``.

    :param modules: full names of the quantized modules
    :param dense: full names of the blocks' Linears that are not quantized; GPTQModel and vLLM
        look these up in ``dynamic``
    """
    left: dict[str, Any] = {f"-:^{re.escape(name)}$": {} for name in sorted(dense)}
    return {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "bits": args.num_bits,
        "group_size": args.group_size if args.strategy == "group" else -1,
        "sym": args.symmetric,
        "desc_act": False,
        "lm_head": any(name.split(".")[-1] == "lm_head" for name in modules),
        **({"dynamic": left} if left else {}),
    }


def _gptq_tensors(
    module: str, args: QuantizationArgs, places: Mapping[str, Path], fetch: Fetch
) -> dict[str, torch.Tensor]:
    """Convert one Linear to GPTQ format, with ``pack = 32 / bits`` and g groups of columns.

    - ``qweight`` int32 ``[in / pack, out]``: integers in [0, 2^bits)
    - ``qzeros`` int32 ``[g, out / pack]``: the groups' zero points *minus one*
    - ``scales`` ``[g, out]``: weight = (integer - zero point) * scale
    - ``g_idx`` int32 ``[in]``: each column's group

    :param module: full name of the Linear
    :param places: full name of every tensor to its file
    :param fetch: reads a tensor by its full name
    :return: full names to tensors
    :raises ValueError: if the module does not fit the format
    """
    bits = args.num_bits
    pack = 32 // bits
    if f"{module}.weight_g_idx" in places:
        raise ValueError(
            f"{module} has a weight_g_idx, which llm-compressor wrote for actorder group and "
            "no longer reads; quantize again with actorder weight"
        )
    shape = torch.Size(fetch(f"{module}.weight_shape").tolist())
    rows, columns = shape
    if rows % pack or columns % pack:
        raise ValueError(
            f"{module} is {rows} x {columns} (out x in), but GPTQ packs {pack} integers of "
            f"{bits} bits into a word and needs multiples of {pack}; "
            f"put the module on the ignore list and quantize again"
        )
    scale = fetch(f"{module}.weight_scale")  # [out, g]
    # compressed-tensors' integers are signed; the offset makes them unsigned.
    offset = 2 ** (bits - 1)
    packed = fetch(f"{module}.weight_packed")
    weight = unpack_from_int32(packed, bits, shape).int() + offset  # [out, in]
    group = columns // scale.shape[1]
    if args.symmetric:
        zero = torch.full(scale.shape, offset, dtype=torch.int32)  # [out, g]
    else:
        stored = fetch(f"{module}.weight_zero_point")
        zero = unpack_from_int32(stored, bits, scale.shape, packed_dim=0).int() + offset
        # GPTQ stores the zero point minus one, so it cannot store 0, the zero point of a group
        # without negative weights. For such a group q * s is written as ((top - q) - top) * -s.
        top = 2**bits - 1
        turned = zero == 0
        weight = torch.where(turned.repeat_interleave(group, dim=1), top - weight, weight)
        zero = torch.where(turned, top, zero)
        scale = torch.where(turned, -scale, scale)
    return {
        f"{module}.qweight": _pack(weight.T, bits),
        f"{module}.qzeros": _pack(zero - 1, bits).T.contiguous(),
        f"{module}.scales": _in_half_if_exact(scale).T.contiguous(),
        f"{module}.g_idx": torch.arange(columns, dtype=torch.int32) // group,
    }


def _pack(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack each ``32 / bits`` integers of a column into a word; the first takes the lowest bits.

    :param values: int32 ``[n, m]`` in [0, 2^bits)
    :return: int32 ``[n * bits / 32, m]``
    """
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    rows, columns = values.shape
    words = values.reshape(rows // len(shifts), len(shifts), columns) << shifts[:, None]
    # The shifted integers share no bits, so their sum is their bitwise or.
    return words.sum(dim=1, dtype=torch.int32)


def _in_half_if_exact(scale: torch.Tensor) -> torch.Tensor:
    """Convert scales to float16, which GPTQ's tools write, unless that would round one of them.

    Engines cast scales to the dtype they compute in, so another dtype is read too. Bfloat16 scales
    between 2^-17 and 65504 convert exactly; float32 scales seldom do.
    """
    half = scale.half()
    return half if torch.equal(half.to(scale.dtype), scale) else scale


def _is_packed(key: str) -> bool:
    return key.endswith(".weight_packed")
