"""Finds a checkpoint on disk or on the hub; loads its configuration and tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from dlp_plugin.checkpoints.files import WEIGHTS
from dlp_plugin.checkpoints.trust import trusts_remote_code

__all__ = [
    "built",
    "fetching",
    "load_config",
    "load_tokenizer",
    "local_folder",
    "model_class",
]


_REMEDIES = {
    "model": "fetch or save it again",
    "tokenizer": "copy the tokenizer's files from the model that it was made from",
}


def load_config(name: str | Path) -> Any:
    """Load a model's configuration.

    :param name: a local folder, or an id on the hub
    :return: the configuration
    :raises FileNotFoundError: if there is no such folder
    :raises OSError: if the hub does not provide it
    :raises ValueError: if the configuration cannot be read
    """
    with fetching(name, "model"):
        return AutoConfig.from_pretrained(name, trust_remote_code=trusts_remote_code())


def load_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer.

    :param name: a local folder, or an id on the hub
    :return: the tokenizer
    :raises FileNotFoundError: if there is no such folder
    :raises OSError: if the hub does not provide it
    :raises ValueError: if the tokenizer is missing or damaged
    """
    with fetching(name, "tokenizer"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            name, trust_remote_code=trusts_remote_code()
        )
    return tokenizer


def model_class(config: Any) -> Any:
    """Return the class that loads a model: the class in ``config.json`` if transformers has it.

    Otherwise it is ``AutoModelForCausalLM``, which loads only a part of some multimodal models.

    :param config: as :func:`load_config` returns it
    :return: the class
    """
    for name in getattr(config, "architectures", None) or ():
        kind: Any = getattr(transformers, name, None)
        known = isinstance(kind, type) and issubclass(kind, PreTrainedModel)
        if known and isinstance(config, kind.config_class or ()):
            return kind
    return AutoModelForCausalLM


def built(name: str | Path) -> PreTrainedModel:
    """Build a checkpoint's model on the meta device, without weights.

    :param name: a local folder, or an id on the hub
    :return: the model
    :raises ValueError: as :func:`load_config` does
    """
    config = load_config(name)
    kind = model_class(config)
    with fetching(name, "model"), torch.device("meta"):
        if kind is AutoModelForCausalLM:
            kind = partial(kind.from_config, trust_remote_code=trusts_remote_code())
        model: PreTrainedModel = kind(config)
    return model


def local_folder(name: str | Path) -> Path:
    """Return the folder that holds a checkpoint's files.

    For an id on the hub, all files but the weights are downloaded to the cache.

    :param name: a local folder, or an id on the hub
    :return: the local folder
    :raises OSError: if the hub does not provide the files
    """
    if Path(name).is_dir():
        return Path(name)
    with fetching(name, "model"):
        return Path(snapshot_download(str(name), ignore_patterns=[f"*{each}" for each in WEIGHTS]))


@contextmanager
def fetching(name: str | Path, what: str) -> Iterator[None]:
    """Turn errors of loading into one-line errors that name the folder or id, and the remedy.

    A name that looks like a path is never looked up on the hub.

    :param name: a local folder, or an id on the hub
    :param what: what is loaded, ``model`` or ``tokenizer``
    :raises FileNotFoundError: if ``name`` is a path without a folder
    :raises ValueError: if files are missing, damaged, or need code of their own
    :raises ImportError: if a package is missing
    :raises OSError: if the hub does not provide it
    """
    path = Path(name)
    pathlike = path.is_absolute() or str(name).startswith((".", "~")) or len(path.parts) > 2
    if not path.is_dir() and (pathlike or path.exists()):
        kind = "is a file, not a folder" if path.exists() else "does not exist"
        raise FileNotFoundError(f"model {name} {kind}: give the folder of a saved model")
    try:
        yield
    except SafetensorError as error:
        raise ValueError(
            f"the weights of {name} cannot be read ({error}): a file is damaged or incomplete; "
            "fetch or save it again"
        ) from error
    except ImportError as error:
        raise ImportError(f"{name} needs more packages: {_first_line(error)}") from error
    except (OSError, ValueError) as error:
        if "trust_remote_code=True" in str(error):
            raise ValueError(
                f"{name} comes with code of its own, which is not run unless you trust it: read "
                "the .py files beside it, then add --trust-remote-code (in Python `with "
                "dlp_plugin.checkpoints.trust.trusting_remote_code():`)"
            ) from error
        reason = _first_line(error)
        if path.is_dir():
            raise ValueError(
                f"{name} holds no {what} that can be loaded ({reason}): {_REMEDIES[what]}"
            ) from error
        raise OSError(
            f"{name} is not a local folder, and the hub does not provide it ({reason}): check the "
            "name, and the network"
        ) from error


def _first_line(error: Exception) -> str:
    """Return an error's first line; if it ends in a colon, with the three lines after it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = lines[0] if lines else type(error).__name__
    return " ".join([told, *lines[1:4]]) if told.endswith(":") else told
