"""Loads causal language models from disk or hub, and saves pruned ones.

Missing or unexpected weights are an error, so a model that loads holds exactly what the checkpoint
holds. On a CPU without arithmetic in the checkpoint's dtype the model computes in float32; it is
saved in the checkpoint's dtype again (:mod:`dlp_plugin.precision`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from compressed_tensors.distributed import is_source_process
from compressed_tensors.offload import remove_dispatch
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization.quantization.mixin import QuantizationMixin
from llmcompressor.recipe import Recipe
from llmcompressor.utils.dev import get_main_device
from transformers import PreTrainedModel

from dlp_plugin.checkpoints.files import check_weight_files
from dlp_plugin.checkpoints.placing import placed
from dlp_plugin.checkpoints.quantized import as_plain, check_known, dequantizing, quantization_of
from dlp_plugin.checkpoints.saving import save_like
from dlp_plugin.checkpoints.sources import fetching, load_config, load_tokenizer, model_class
from dlp_plugin.checkpoints.stored import QUANT_METHOD
from dlp_plugin.checkpoints.trust import trusts_remote_code
from dlp_plugin.experts import save_under_source_names
from dlp_plugin.files import check_vacant, replacing, reserved
from dlp_plugin.generation import make_savable
from dlp_plugin.host import warn_of_lost_zeros
from dlp_plugin.precision import Stored, narrow, widen

__all__ = [
    "apply_recipe",
    "check_prunable",
    "load_config",
    "load_dense",
    "load_model",
    "load_stored",
    "load_to_prune",
    "load_tokenizer",
]

_SHOWN = 3


def load_model(name: str | Path) -> PreTrainedModel:
    """Load a model to measure it, on the accelerator if there is one.

    A model that does not fit on the accelerator is spread over several devices
    (:func:`dlp_plugin.checkpoints.placing.placed`). A packed model stays packed on a CPU with
    kernels, and is decoded elsewhere.

    :param name: a local folder, or an id on the hub
    :return: the model, ready to compute
    :raises FileNotFoundError: if there is no such folder
    :raises ValueError: if files are damaged, or weights are missing or unexpected
    """
    device = get_main_device()
    quantization = quantization_of(load_config(name))
    packed = quantization.get("quant_method") == QUANT_METHOD
    arguments = dequantizing(str(name), quantization) if packed and device.type != "cpu" else {}
    model = load_stored(name, **arguments)
    widen(model, device)
    return placed(model)


def check_prunable(name: str | Path) -> None:
    """Raise the errors of :func:`load_to_prune` that show without loading any weights.

    :param name: a local folder, or an id on the hub
    :raises FileNotFoundError: as :func:`load_model` does
    :raises ValueError: as :func:`load_model` does, and if the model cannot be dequantized
    """
    dequantizing(str(name), quantization_of(load_config(name)))
    if Path(name).is_dir():
        check_weight_files(name)


def load_to_prune(name: str | Path) -> tuple[PreTrainedModel, Stored]:
    """Load a model for ``oneshot()``, which places it itself; a quantized model is dequantized.

    :param name: a local folder, or an id on the hub
    :return: the model, and its checkpoint's dtypes for :func:`dlp_plugin.precision.narrow`
    :raises FileNotFoundError: as :func:`load_model` does
    :raises ValueError: as :func:`load_dense` does
    """
    model = load_dense(name)
    return model, widen(model, get_main_device())


def load_dense(name: str | Path) -> PreTrainedModel:
    """Load a model to change and save it, in the checkpoint's dtype; dequantized if need be.

    :param name: a local folder, or an id on the hub
    :return: the model, on the CPU
    :raises FileNotFoundError: as :func:`load_model` does
    :raises ValueError: as :func:`load_model` does, and if the model cannot be dequantized, or its
        generation settings could not be saved
    """
    quantization = quantization_of(load_config(name))
    arguments = dequantizing(str(name), quantization)
    model = load_stored(name, **arguments)
    # A packed model is plain once it is decoded.
    if arguments and quantization["quant_method"] != QUANT_METHOD:
        model = as_plain(model)
    make_savable(model, quiet=True)
    return model


def apply_recipe(
    name: str | Path, recipe: Any, output: str | Path | None = None, **calibration: Any
) -> PreTrainedModel:
    """Load a model, apply a recipe to it as ``oneshot()`` does, and save it.

    The output folder appears complete or not at all. With several processes the first writes it.

    :param name: a local folder, or an id on the hub
    :param recipe: as ``oneshot()`` takes it
    :param output: folder to save in, in the checkpoint's dtype; must be missing or empty. None
        saves nothing
    :param calibration: further arguments of ``oneshot()``; ``tokenizer`` must be among them
    :return: the model after the recipe
    :raises FileExistsError: before anything is loaded, if ``output`` is not empty
    """
    with ExitStack() as stack:
        if output is not None:
            stack.enter_context(reserved(output, is_source_process()))
            check_vacant(output)
        model, stored = load_to_prune(name)
        stack.enter_context(_origin_as_dense(name, model))
        modifiers = Recipe.create_instance(recipe).modifiers
        warn_of_lost_zeros(model, modifiers, None)
        trusted = trusts_remote_code()
        pruned: Any = oneshot(
            model=model, recipe=recipe, trust_remote_code_model=trusted, **calibration
        )
        if output is not None:
            if not any(isinstance(each, QuantizationMixin) for each in modifiers):
                save_under_source_names(pruned)  # as no stock modifier asks for
            if stored.dtypes:
                narrow(remove_dispatch(pruned), stored)
            # All processes must call the host's save, which writes on the first one only.
            with replacing(output) if is_source_process() else TemporaryDirectory() as folder:
                tokenizer = calibration["tokenizer"]
                save_like(name, pruned, Path(folder), tokenizer, save_compressed=True)
    return pruned  # type: ignore[no-any-return]


@contextmanager
def _origin_as_dense(name: str | Path, model: PreTrainedModel) -> Iterator[None]:
    """Show the host a configuration without quantization if the model was dequantized.

    The host reads the configuration at the model's ``name_or_path``, and refuses quantized models.
    """
    if not quantization_of(load_config(name)):
        yield
        return
    config: Any = model.config
    with TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        origin, config.name_or_path = config.name_or_path, folder
        try:
            yield
        finally:
            config.name_or_path = origin


def load_stored(name: str | Path, **arguments: Any) -> PreTrainedModel:
    """Load a model in the checkpoint's dtype; missing or unexpected weights are an error.

    :param name: a local folder, or an id on the hub
    :param arguments: further arguments of ``from_pretrained()``
    :return: the model
    :raises FileNotFoundError: as :func:`load_model` does
    :raises ValueError: as :func:`load_model` does
    """
    config = load_config(name)
    check_known(str(name), quantization_of(config))
    if Path(name).is_dir():
        check_weight_files(name)
    with fetching(name, "model"):
        model, info = model_class(config).from_pretrained(
            name,
            dtype="auto",
            output_loading_info=True,
            trust_remote_code=trusts_remote_code(),
            **arguments,
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
