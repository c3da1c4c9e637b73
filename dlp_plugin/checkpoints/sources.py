"""Where a checkpoint is, on disk or on the hub, and what it says of itself, without its weights."""

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
    :raises FileNotFoundError: if there is no such folder
    :raises ValueError: if it cannot be read
    """
    with fetching(name, "model"):
        return AutoConfig.from_pretrained(name, trust_remote_code=trusts_remote_code())


def load_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer.

    :raises FileNotFoundError: if there is no such folder
    :raises ValueError: if it has none, or a damaged one
    """
    with fetching(name, "tokenizer"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            name, trust_remote_code=trusts_remote_code()
        )
    return tokenizer


def model_class(config: Any) -> Any:
    """What loads a model: the class that ``config.json`` names, where transformers has it.

    Elsewhere that of causal language models, which of some families loads a part only.

    :param config: a configuration as :func:`load_config` gives it
    """
    for name in getattr(config, "architectures", None) or ():
        kind: Any = getattr(transformers, name, None)
        known = isinstance(kind, type) and issubclass(kind, PreTrainedModel)
        if known and isinstance(config, kind.config_class or ()):
            return kind
    return AutoModelForCausalLM


def built(name: str | Path) -> PreTrainedModel:
    """The model that a checkpoint is of, on the meta device, without weights.

    :param name: a local folder, or an id on the hub
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
    """The folder that holds a checkpoint's files: of one on the hub the cache's, less weights."""
    if Path(name).is_dir():
        return Path(name)
    with fetching(name, "model"):
        return Path(snapshot_download(str(name), ignore_patterns=[f"*{each}" for each in WEIGHTS]))


@contextmanager
def fetching(name: str | Path, what: str) -> Iterator[None]:
    """Tell in one line what is wrong with a folder or name; a path is no name on the hub.

    :param what: what is looked for in it, ``model`` or ``tokenizer``
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
            f"the weights of {name} cannot be read ({error}): a file is damaged or was not "
            "written to its end; fetch or save it again"
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
            f"{name} is no folder here, and the hub does not give it ({reason}): check the name, "
            "and the network"
        ) from error


def _first_line(error: Exception) -> str:
    """What an error says, in one line; one that ends in a colon is an announcement only."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = lines[0] if lines else type(error).__name__
    return " ".join([told, *lines[1:4]]) if told.endswith(":") else told
