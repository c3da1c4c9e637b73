"""Checks the files of packed checkpoints against ``config.json``, and edits their README.md."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch

from dlp_plugin.checkpoints.files import opening, read_config, weight_files
from dlp_plugin.checkpoints.stored import PARTS, QUANT_METHOD, Stored, read_stored

__all__ = ["README", "check_parts", "packed_linears", "with_card", "with_note", "without_card"]

README = "README.md"
_CARD = """\
> Packed by dlp_plugin: `import dlp_plugin` before `AutoModelForCausalLM.from_pretrained(...)`. On a
> CPU the model then computes with the packed weights; elsewhere they are decoded. vLLM reads this
> folder if dlp_plugin is installed. `dlp-plugin unpack` restores the folder that was packed.

"""
_NOTE = """\
> This card describes the model before it was changed by dlp_plugin. Its figures do not hold for
> these weights.

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
    """Find the packed Linears of a checkpoint, and check that their files are complete.

    :param folder: of the checkpoint
    :return: full name of every packed Linear to how it is stored; empty if it is not packed
    :raises FileNotFoundError: if a file that the index names is missing
    :raises ValueError: as :func:`check_parts` does, and if a file is damaged, or the checkpoint
        was packed by a newer version
    """
    quantization = (read_config(folder) or {}).get("quantization_config") or {}
    if quantization.get("quant_method") != QUANT_METHOD:
        return {}
    linears = read_stored(quantization, str(folder))
    check_parts(linears, weight_files(folder))
    return linears


def check_parts(linears: Mapping[str, Stored], places: Mapping[str, str | Path]) -> None:
    """Check by the files' headers that every part of every packed Linear is there.

    :param linears: the packed Linears that ``config.json`` lists
    :param places: full name of every tensor to its file
    :raises ValueError: naming tensor and file, if a part is missing, belongs to a Linear that
        ``config.json`` does not list, or has another shape or dtype
    """
    again = "fetch it or pack the checkpoint again"
    for key, place in places.items():
        name, _, part = key.rpartition(".")
        if part in PARTS and name not in linears:
            raise ValueError(f"{place} holds {key}, which config.json does not list: {again}")
    opened = opening()
    for name, stored in linears.items():
        dtypes = stored.part_dtypes()
        held = [places[key] for part in dtypes if (key := f"{name}.{part}") in places]
        for part, shape in stored.part_shapes().items():
            key = f"{name}.{part}"
            if key not in places:
                where = f"{held[0]} lacks" if held else "no file holds"
                raise ValueError(f"{where} {key}, which config.json lists: {again}")
            found = opened(places[key]).get_slice(key)
            dtype = _DTYPES.get(found.get_dtype())
            if tuple(found.get_shape()) != shape or dtype != dtypes[part]:
                raise ValueError(
                    f"{key} of {places[key]} is {found.get_dtype()} {found.get_shape()}, but "
                    f"config.json says {dtypes[part]} {list(shape)}: {again}"
                )


def with_card(text: bytes) -> bytes:
    """Insert a note on how to load the packed checkpoint into README.md, after the front matter.

    :param text: content of README.md, UTF-8
    :return: the new content
    """
    return _inserted(_CARD, text)


def with_note(text: bytes) -> bytes:
    """Insert a note into the README.md of a changed model that it is the source's, if it has none.

    :param text: content of README.md, UTF-8
    :return: the new content
    """
    return text if _NOTE.partition("\n")[0].encode() in text else _inserted(_NOTE, text)


def without_card(text: bytes) -> bytes:
    """Remove the note of :func:`with_card`, in the wording of any release.

    :param text: content of README.md, UTF-8
    :return: the new content
    """
    return re.sub(
        rb"^> Packed by dlp_plugin: .*\n(> .*\n)*\n", b"", text, count=1, flags=re.MULTILINE
    )


def _inserted(note: str, text: bytes) -> bytes:
    front = re.match(rb"---\r?\n.*?\r?\n---\r?\n\s*", text, re.DOTALL)
    place = front.end() if front else 0
    return text[:place] + note.encode() + text[place:]
