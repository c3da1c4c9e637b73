"""Which files make up a checkpoint, and whether they are complete.

All code that reads an index, a safetensors header or ``config.json`` does it through this module.
compressed-tensors has a reader too. It accepts an index or file in any subfolder as the
checkpoint's, does not check that the files named by the index exist, and takes seconds to import.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from loguru import logger
from safetensors import SafetensorError, safe_open

__all__ = [
    "INDEX",
    "WEIGHTS",
    "bytes_on_disk",
    "check_alike",
    "check_weight_files",
    "copy_others",
    "opening",
    "read_config",
    "read_index",
    "shards",
    "weight_files",
    "write_json",
]

INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
WEIGHTS = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack"),
    *(".onnx", ".onnx_data"),
)
"""Suffixes of files that hold weights in some format."""
# What config.json calls the number of a layer's experts
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
# A tensor of an expert's Linear: what holds the experts, the number, the Linear
_EXPERT = re.compile(r"(?P<module>((?:.*\.)?experts\.)\d+(\..+))\.[^.]+")
# Where transformers saves the chat templates of a tokenizer that has several.
_TEMPLATES = "additional_chat_templates"


def shards(folder: Path) -> list[Path]:
    """Find the safetensors files that hold a checkpoint's weights.

    They are chosen as transformers chooses them: ``model.safetensors`` if it exists, otherwise the
    files that the index names. So an adapter or a leftover file in the folder is ignored. Without
    either, all safetensors files of the folder are taken.

    :param folder: of the checkpoint
    :return: paths in name order, at least one
    :raises FileNotFoundError: if the folder has no such file, or lacks one that the index names
    :raises ValueError: if the index is damaged
    """
    files = [folder / name for name in sorted(set(_places(folder).values()))]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(
                f"{file} is missing, which {INDEX} names: fetch or save the checkpoint again"
            )
    if not files and (folder / _SINGLE).is_file():
        files = [folder / _SINGLE]
    files = files or sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(
            f"{folder} holds no .safetensors file; give the folder of a saved model"
        )
    return files


def bytes_on_disk(folder: Path) -> int:
    """Sum the sizes of a checkpoint's safetensors files.

    :param folder: of the checkpoint
    :return: bytes
    :raises FileNotFoundError: as :func:`shards` does
    """
    return sum(file.stat().st_size for file in shards(folder))


def copy_others(source: Path, target: Path, but: Collection[str] = ()) -> None:
    """Copy all files of a checkpoint except its weights and ``config.json``, byte for byte.

    :param source: folder of the checkpoint
    :param target: folder to copy into
    :param but: names of further files to leave out
    """
    for path in source.iterdir():
        if path.name.endswith((*WEIGHTS, ".index.json")) or path.name in ("config.json", *but):
            continue
        if path.is_file():
            shutil.copy(path, target)
        elif path.name == _TEMPLATES:
            shutil.copytree(path, target / path.name, dirs_exist_ok=True)


def weight_files(folder: Path) -> dict[str, Path]:
    """Map the full name of every tensor of a checkpoint to the file that holds it.

    If several files hold a tensor, the index decides.

    :param folder: of the checkpoint
    :return: full name to file
    :raises FileNotFoundError: as :func:`shards` does
    :raises ValueError: naming the file, if one is damaged or lacks a tensor that the index names;
        naming the weight, if an expert is missing or of another shape
    """
    held = [(key, file) for file in shards(folder) for key in _keys(file)]
    said = [(key, folder / name) for key, name in _places(folder).items()]
    for key, file in sorted(set(said).difference(held)):
        raise ValueError(
            f"{file} does not hold {key}, as {INDEX} says: fetch or save the checkpoint again"
        )
    found = dict(held + said)
    _check_experts(folder, found)
    return found


def check_alike(
    kind: str, held: Mapping[str, Sequence[int] | None], count: int, where: str
) -> None:
    """Make sure that every expert of a layer has a weight, all of one shape.

    :param kind: name of the weight in the files, with ``{}`` for the expert's number
    :param held: name of every expert's weight there is to its shape; None where it is not known
    :param count: number of the layer's experts
    :param where: the folder they are from, for errors
    :raises ValueError: naming the weight that is missing, or is unlike the others
    """
    for key in map(kind.format, range(count)):
        if key not in held:
            raise ValueError(
                f"no file of {where} holds {key}, and the layer has {count} experts: "
                "fetch or save the checkpoint again"
            )
    shapes = {key: list(shape) for key, shape in held.items() if shape is not None}
    first = next(iter(shapes), "")
    for key, shape in shapes.items():
        if shape != shapes[first]:
            raise ValueError(
                f"{key} of {where} is {shape}, and {first} {shapes[first]}: "
                "experts of a layer have one shape; fetch or save the checkpoint again"
            )


def _check_experts(folder: Path, places: Mapping[str, Path]) -> None:
    """See to experts that are held one by one, where ``config.json`` tells how many there are."""
    config = read_config(folder) or {}
    config |= config.get("text_config") or {}
    count = next((n for key in _EXPERTS if isinstance(n := config.get(key), int)), 0)
    kinds: dict[str, dict[str, Sequence[int] | None]] = {}
    opened = opening()
    for key in places if count else ():
        if expert := _EXPERT.fullmatch(key):
            kind, name = f"{expert[2]}{{}}{expert[3]}.weight", f"{expert['module']}.weight"
            held = kinds.setdefault(kind, {})
            if key == name:
                held[name] = opened(places[key]).get_slice(key).get_shape()
            else:  # a bias, or a part of a weight that is stored in parts
                held.setdefault(name, None)
    for kind, held in kinds.items():
        check_alike(kind, held, count, str(folder))


def opening() -> Callable[..., Any]:
    """What opens safetensors files, each once, to read tensors into memory of their own.

    ``get_slice`` of a file gives a tensor's shape and dtype without reading it.

    Opening reads the names of all tensors in a file: done for every tensor, it would take most of
    the time where there are thousands of experts. Files are closed when it is let go of.

    :return: file, and framework if it is not ``pt``, to what ``safe_open`` gives
    """
    return cache(lambda file, framework="pt": safe_open(file, framework=framework, backend="pread"))


def check_weight_files(folder: str | Path) -> None:
    """Check by their headers that a folder's safetensors files are all there and complete.

    Call it before transformers loads the folder, because its errors do not name the file. A folder
    without safetensors files passes: its weights may have another format.

    :param folder: of the checkpoint
    :raises FileNotFoundError: if a file that the index names is missing
    :raises ValueError: naming the file, if one is damaged or lacks a tensor that the index names
    """
    folder = Path(folder)
    if (folder / INDEX).is_file() or any(folder.glob("*.safetensors")):
        weight_files(folder)


def read_config(folder: Path) -> dict[str, Any] | None:
    """Read ``config.json``.

    :param folder: of the checkpoint
    :return: its content; None if there is no such file
    :raises ValueError: if the file is not JSON, or not a mapping
    """
    return _read_json(folder / "config.json")


def read_index(folder: Path) -> dict[str, Any] | None:
    """Read a checkpoint's index.

    An index is ignored if ``model.safetensors`` exists and the index does not name it: then one of
    the two is a leftover, and transformers loads ``model.safetensors``.

    :param folder: of the checkpoint
    :return: its content; None if there is no index or it is ignored
    :raises ValueError: if the index is damaged
    """
    content = _read_json(folder / INDEX)
    if content is None:
        return None
    weight_map: Any = content.get("weight_map")
    names = list(weight_map.values()) if isinstance(weight_map, dict) else []
    if not names or not all(isinstance(name, str) for name in names):
        raise ValueError(
            f"{folder / INDEX} has no weight_map from tensors to files: fetch or save the "
            "checkpoint again"
        )
    if (folder / _SINGLE).is_file() and _SINGLE not in names:
        _tell_of_two_sets(folder)
        return None
    return content


@cache
def _tell_of_two_sets(folder: Path) -> None:
    logger.warning(
        "{0} holds {1} and an index of other files: {1} is used here, as in transformers, but vLLM "
        "uses the index; remove the one that is not wanted",
        folder,
        _SINGLE,
    )


def _places(folder: Path) -> dict[str, str]:
    """Map tensors to file names by the index; empty if :func:`read_index` returns none."""
    return dict((read_index(folder) or {}).get("weight_map", {}))


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write a mapping as JSON in the layout that transformers uses.

    :param file: to write; replaced if it exists
    :param content: the mapping
    """
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _read_json(file: Path) -> dict[str, Any] | None:
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{file} is not valid JSON ({error}): fetch or save the checkpoint again"
        ) from None
    if not isinstance(content, dict):
        raise ValueError(
            f"{file} holds a {type(content).__name__} instead of a mapping: fetch or save the "
            "checkpoint again"
        )
    return content


def _keys(file: Path) -> list[str]:
    try:
        with safe_open(file, framework="np") as opened:
            return list(opened.keys())
    except SafetensorError as error:
        raise ValueError(
            f"{file} is damaged or incomplete ({error}): fetch or save the checkpoint again"
        ) from None
