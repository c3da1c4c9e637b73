"""Settings as readers with transformers 4 know them, for formats whose readers those are.

They take a default, and say nothing, where a field has a name that came with transformers 5.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dlp_plugin.checkpoints.files import write_json

__all__ = ["readable_config", "rewrite_tokenizer"]

_TOKENIZER = "tokenizer_config.json"


def readable_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with the fields of transformers 4 beside those of transformers 5.

    :param config: what stands in config.json; nested ones are seen to as well
    """
    found = {k: readable_config(v) if k.endswith("_config") and isinstance(v, Mapping) else v
             for k, v in config.items()}  # fmt: skip
    rope = found.get("rope_parameters")
    if isinstance(rope, Mapping) and "rope_theta" in rope:
        found.setdefault("rope_theta", rope["rope_theta"])
        others = {key: value for key, value in rope.items() if key != "rope_theta"}
        if others.get("rope_type", "default") != "default":
            found.setdefault("rope_scaling", others)
    if "dtype" in found:
        found.setdefault("torch_dtype", found["dtype"])
    return found


def rewrite_tokenizer(folder: Path) -> None:
    """Name a class that transformers 4 has too in a folder's tokenizer_config.json.

    What transformers 5 calls ``TokenizersBackend`` is ``PreTrainedTokenizerFast`` to both.
    """
    file = folder / _TOKENIZER
    if not file.is_file():
        return
    settings = json.loads(file.read_text(encoding="utf-8"))
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        for name in ("backend", "is_local", "local_files_only"):
            settings.pop(name, None)
        write_json(file, settings)
