"""Makes settings readable by transformers 4, which readers of the GPTQ format still use.

transformers 4 does not know field names that came with transformers 5, and silently uses defaults
in their place.
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
    """Add the field names of transformers 4 beside those of transformers 5.

    :param config: content of ``config.json``; nested configurations are changed too
    :return: a new configuration
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
    """Change the tokenizer class in ``tokenizer_config.json`` to one that transformers 4 has too.

    ``TokenizersBackend`` of transformers 5 is called ``PreTrainedTokenizerFast`` in both versions.

    :param folder: of the checkpoint; one without that file is left as it is
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
