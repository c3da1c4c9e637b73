"""How compared models are stored: their group size for quantization, and whether to pack them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compressed_tensors.utils import match_named_modules
from loguru import logger

from dlp_plugin.checkpoints.files import bytes_on_disk
from dlp_plugin.checkpoints.packing import pack
from dlp_plugin.checkpoints.sources import built

__all__ = ["group_size_of", "smaller"]

_GROUPS = (128, 64, 32)


def group_size_of(model: str, ignore: Sequence[str] = ()) -> int:
    """Find the largest group size, 128, 64 or 32, that divides the columns of all Linears.

    :param model: a local folder, or an id on the hub
    :param ignore: names or ``re:`` patterns of modules that are not quantized
    :return: columns that share a scale
    :raises ValueError: naming a Linear whose columns no group size divides
    """
    bare = built(model)
    columns: list[tuple[str, Any]] = [
        (name, module.in_features)
        for name, module in match_named_modules(bare, ["Linear"], [*ignore, "re:.*lm_head"])
    ]
    for name, fused in bare.named_parameters():  # fused experts may be transposed: check both dims
        if fused.ndim == 3 and "experts" in name.split("."):
            columns += [(name, size) for size in fused.shape[1:]]
    for group in _GROUPS:
        if all(each % group == 0 for _, each in columns):
            return group
    name, width = next((name, each) for name, each in columns if each % _GROUPS[-1])
    raise ValueError(
        "bits: weights are quantized in groups of 128, 64 or 32 columns, but none of these divides "
        f"the {width} columns of {name}: leave it at 16 bits"
    )


def smaller(saved: Path) -> Path:
    """Pack a checkpoint, and choose the smaller of the two.

    :param saved: folder of the checkpoint; the packed one is written beside it
    :return: folder of the checkpoint with fewer bytes; ``saved`` if it cannot be packed
    """
    packed = saved.with_name("packed")
    try:
        pack(saved, packed)
    except ValueError as error:
        logger.info(f"Not packed: {error}")
        return saved
    return min(packed, saved, key=bytes_on_disk)
