"""Packed checkpoints as they lie on disk: what config.json says, held against the files."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch

from dlp_plugin.checkpoints.files import read_config, slices, weight_files
from dlp_plugin.checkpoints.stored import PARTS, QUANT_METHOD, Stored, read_stored

__all__ = ["README", "check_parts", "packed_linears", "with_card", "without_card"]

README = "README.md"
_CARD = """\
> Packed by dlp_plugin: `import dlp_plugin` before `AutoModelForCausalLM.from_pretrained(...)`,
> which then runs the weights as they are packed on a CPU, and decodes them elsewhere. vLLM knows
> it where dlp_plugin is installed, and `dlp-plugin unpack` writes the folder that this was packed
> from.

"""

_DTYPES = {
    "U8": torch.uint8,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
}


def packed_linears(folder: Path) -> dict[str, Stored]:
    """Every Linear that a checkpoint holds packed; none if it is not packed.

    :raises FileNotFoundError: if it lacks a file that its index names
    :raises ValueError: as :func:`check_parts` does, and if a file is damaged, or it is packed by
        a newer version
    """
    quantization = (read_config(folder) or {}).get("quantization_config") or {}
    if quantization.get("quant_method") != QUANT_METHOD:
        return {}
    linears = read_stored(quantization, str(folder))
    check_parts(linears, weight_files(folder))
    return linears


def check_parts(linears: Mapping[str, Stored], places: Mapping[str, str | Path]) -> None:
    """Make sure from the files' headers that every part of every packed Linear is there.

    :param linears: as config.json has them
    :param places: full name of every tensor to its file
    :raises ValueError: naming tensor and file, if one is missing, is none of config.json's
        Linears', or has another shape or dtype
    """
    again = "fetch it or pack the checkpoint again"
    for key, place in places.items():
        name, _, part = key.rpartition(".")
        if part in PARTS and name not in linears:
            raise ValueError(f"{place} holds {key}, which config.json does not list: {again}")
    with slices(places) as of_file:
        for name, stored in linears.items():
            dtypes = stored.part_dtypes()
            held = [places[key] for part in dtypes if (key := f"{name}.{part}") in places]
            for part, shape in stored.part_shapes().items():
                key = f"{name}.{part}"
                if key not in places:
                    where = f"{held[0]} lacks" if held else "no file holds"
                    raise ValueError(f"{where} {key}, which config.json lists: {again}")
                found = of_file(key)
                dtype = _DTYPES.get(found.get_dtype())
                if tuple(found.get_shape()) != shape or dtype != dtypes[part]:
                    raise ValueError(
                        f"{key} of {places[key]} is {found.get_dtype()} {found.get_shape()}, and "
                        f"by config.json {dtypes[part]} {list(shape)}: {again}"
                    )


def with_card(text: bytes) -> bytes:
    """README.md with a word on how to load what is packed, behind the front matter."""
    front = re.match(rb"---\r?\n.*?\r?\n---\r?\n\s*", text, re.DOTALL)
    place = front.end() if front else 0
    return text[:place] + _CARD.encode() + text[place:]


def without_card(text: bytes) -> bytes:
    """README.md less that word, in whatever release's."""
    return re.sub(
        rb"^> Packed by dlp_plugin: .*\n(> .*\n)*\n", b"", text, count=1, flags=re.MULTILINE
    )
