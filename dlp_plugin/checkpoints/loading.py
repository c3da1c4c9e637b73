"""The one place that loads a causal language model from disk or hub, and saves a pruned one.

What is loaded here is what the checkpoint holds, all of it: missing or unexpected weights are
an error. It is float32 on a CPU that has no arithmetic in the checkpoint's dtype, and saved in
that dtype again (:mod:`dlp_plugin.precision`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from compressed_tensors.distributed import is_source_process
from compressed_tensors.offload import remove_dispatch
from llmcompressor import oneshot
from llmcompressor.recipe import Recipe
from llmcompressor.utils.dev import get_main_device
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    CompressedTensorsConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from dlp_plugin.files import check_vacant, replacing
from dlp_plugin.host import warn_of_lost_zeros
from dlp_plugin.precision import Stored, narrow, widen

__all__ = [
    "apply_recipe",
    "load_config",
    "load_model",
    "load_stored",
    "load_to_prune",
    "load_tokenizer",
]

_SHOWN = 3


def load_model(name: str | Path) -> PreTrainedModel:
    """Load a model to measure it, on the accelerator if there is one.

    :param name: a local folder, or an id on the hub
    :raises FileNotFoundError: if there is no such folder
    :raises ValueError: if its files are damaged, or do not hold the weights that it has
    """
    model: Any = load_stored(name)
    device = get_main_device()
    widen(model, device)
    return model.to(device)  # type: ignore[no-any-return]


def load_to_prune(name: str | Path) -> tuple[PreTrainedModel, Stored]:
    """Load a model for ``oneshot()``, which places it itself; a quantized one is dequantized.

    :return: the model, and its checkpoint's dtypes for :func:`dlp_plugin.precision.narrow`
    :raises FileNotFoundError: as :func:`load_model` does, likewise ``ValueError``
    """
    quantization = getattr(load_config(name), "quantization_config", None) or {}
    if quantization.get("quant_method") == "compressed-tensors":
        model = load_stored(name, quantization_config=CompressedTensorsConfig(dequantize=True))
    else:
        model = load_stored(name)
    return model, widen(model, get_main_device())


def apply_recipe(
    name: str | Path, recipe: Any, output: str | Path | None = None, **calibration: Any
) -> PreTrainedModel:
    """Load a model, apply a recipe to it as ``oneshot()`` does, and save it.

    The folder appears whole or not at all. Of several processes the first writes it.

    :param output: folder to save in, in the checkpoint's dtype; missing or empty
    :param calibration: ``oneshot()``'s further arguments, a ``tokenizer`` among them
    :return: the model, as it was saved if it was
    :raises FileExistsError: before anything is loaded, if ``output`` holds something
    """
    if output is not None:
        check_vacant(output)
    model, stored = load_to_prune(name)
    warn_of_lost_zeros(model, Recipe.create_instance(recipe).modifiers, None)
    pruned: Any = oneshot(model=model, recipe=recipe, **calibration)
    if output is not None:
        if stored.dtypes:
            narrow(remove_dispatch(pruned), stored)
        # The host writes the model on the first process only, and all take part.
        with replacing(output) if is_source_process() else TemporaryDirectory() as folder:
            pruned.save_pretrained(folder, save_compressed=True)
            calibration["tokenizer"].save_pretrained(folder)
    return pruned  # type: ignore[no-any-return]


def load_config(name: str | Path) -> Any:
    """Load a model's configuration.

    :raises FileNotFoundError: if there is no such folder
    """
    with _fetching(name):
        return AutoConfig.from_pretrained(name)


def load_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer.

    :raises FileNotFoundError: if there is no such folder
    """
    with _fetching(name):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name)
    return tokenizer


def load_stored(name: str | Path, **arguments: Any) -> PreTrainedModel:
    """Load a model in the checkpoint's dtype, all of it and nothing else.

    :param arguments: further ones of ``from_pretrained()``
    :raises FileNotFoundError: as :func:`load_model` does, likewise ``ValueError``
    """
    auto: Any = AutoModelForCausalLM
    with _fetching(name):
        model, info = auto.from_pretrained(
            name, dtype="auto", output_loading_info=True, **arguments
        )
    for kind in ("missing", "unexpected"):
        if keys := sorted(info[f"{kind}_keys"]):
            more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
            raise ValueError(
                f"{name} does not hold the weights of a {type(model).__name__}: "
                f"{', '.join(keys[:_SHOWN])}{more} {'is' if len(keys) == 1 else 'are'} {kind}, so "
                "what was loaded is not what was saved; save it again under the names that "
                "transformers gives its weights"
            )
    return model  # type: ignore[no-any-return]


@contextmanager
def _fetching(name: str | Path) -> Iterator[None]:
    """Tell in one line what is wrong with a folder or name; a path is no name on the hub."""
    path = Path(name)
    pathlike = path.is_absolute() or str(name).startswith((".", "~")) or len(path.parts) > 2
    if not path.is_dir() and (pathlike or path.exists()):
        what = "is a file, not a folder" if path.exists() else "does not exist"
        raise FileNotFoundError(f"model {name} {what}: give the folder of a saved model")
    try:
        yield
    except SafetensorError as error:
        raise ValueError(
            f"the weights of {name} cannot be read ({error}): a file is damaged or was not "
            "written to its end; fetch or save it again"
        ) from error
    except (OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if path.is_dir():
            raise ValueError(f"{name} holds no model that can be loaded: {reason}") from error
        raise OSError(
            f"{name} is no folder here, and the hub does not give it ({reason}): check the name, "
            "and the network"
        ) from error
