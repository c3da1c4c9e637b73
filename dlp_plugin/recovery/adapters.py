"""Loading adapters of peft, and checks of what they do to a model.

Of peft these are the functions and attributes of ``PeftModel`` that it documents, and of an
adapter's configuration ``init_lora_weights`` and ``kasa_config``.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dlp_plugin.checkpoints.files import check_weight_files
from dlp_plugin.checkpoints.loading import load_dense, load_tokenizer
from dlp_plugin.recovery.layers import AdapterLayer
from dlp_plugin.recovery.masks import is_offloaded, is_plain, on_meta

if TYPE_CHECKING:
    from peft import PeftModel

# Initialisations of LoRA that subtract from the base weights, or round them.
_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")

# How peft saves a module's name, its weight, and in which dimension of what there are tokens
_PREFIX = "base_model.model."
_WHOLE = ("weight", "base_layer.weight")
_ROWS = {**dict.fromkeys(_WHOLE, 0), "lora_B.weight": 0, "lora_embedding_A": 1}


def load_adapter(folder: str | Path, base: str | None = None) -> tuple[PeftModel, Any]:
    """Load a saved adapter and the causal language model that it belongs to.

    :param folder: as ``peft_model.save_pretrained()`` writes it
    :param base: the model; None for the one that the adapter was trained on
    :return: the model with the adapter on it, and the tokenizer: the one beside the adapter,
        or the base model's; the embeddings have as many rows as in training
    :raises ValueError: if the folder holds no adapter, a damaged one, or one of another model
    """
    _need_peft()
    from peft import PeftConfig, PeftModel, load_peft_weights, set_peft_model_state_dict

    if not (Path(folder) / "adapter_config.json").is_file():
        raise ValueError(f"{folder} holds no adapter_config.json: give an adapter's folder")
    check_weight_files(folder)
    base = base or PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
    if not base:
        raise ValueError(f"the adapter in {folder} does not say what model it is for: name it")
    model: Any = load_dense(base)
    trained_with = (Path(folder) / "tokenizer_config.json").is_file()
    tokenizer: Any = load_tokenizer(str(folder) if trained_with else base)
    weights = load_peft_weights(str(folder), device="cpu")
    _resize_embeddings(model, weights, len(tokenizer), folder)
    leaves = (name for name, module in model.named_modules() if not [*module.children()])
    places = tuple(f"{_PREFIX}{name}." for name in leaves)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Found missing adapter keys")
            adapted = PeftModel.from_pretrained(model, str(folder))
    except (RuntimeError, UserWarning) as error:  # another shape, or modules that it lacks
        reason = next((line for line in str(error).splitlines()[1:] if line.strip()), str(error))
        raise ValueError(_unfit(folder, base, reason.strip())) from error
    # Loaded once more, to be told what is left over; peft knows the names of transformers 4
    result: Any = set_peft_model_state_dict(adapted, weights)
    for key in sorted(result.unexpected_keys):
        if not key.startswith(places):  # others are what peft saves twice
            raise ValueError(_unfit(folder, base, f"which has no place for {key}"))
    return adapted, tokenizer


def _resize_embeddings(
    model: Any, weights: Mapping[str, torch.Tensor], tokens: int, folder: str | Path
) -> None:
    """Give the embeddings and the head as many rows as they had in training.

    Padded ones have more than there are tokens, shrunk ones less than the base model. Where the
    adapter says nothing of them, there is a row for every token at least.

    :param weights: of the adapter's file
    :param tokens: how many the tokenizer has
    :raises ValueError: if they had more rows than the base model, and the file does not hold them
    """
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    here = ends[0].weight.shape[0]
    own: dict[int, set[str]] = {}  # the names of each weight; of a tied one two
    for name, module in model.named_modules():
        if module in ends:
            own.setdefault(id(module.weight), set()).add(f"{_PREFIX}{name}.")
    found = [
        weights[place + part].shape[dimension]
        for places in own.values()
        for place, (part, dimension) in product(sorted(places), _ROWS.items())
        if place + part in weights
    ]
    rows = found[0] if found else max(here, tokens)
    for places in own.values() if found and rows > here else ():
        if not any(place + part in weights for place in places for part in _WHOLE):
            raise ValueError(
                f"the adapter in {folder} was trained with {rows} rows of "
                f"{min(places).removeprefix(_PREFIX)}weight, which its file does not hold: save "
                "the base model as it was trained on, and name it (--base)"
            )
    if rows != here:
        model.resize_token_embeddings(rows)


def _unfit(folder: str | Path, base: str, reason: str) -> str:
    return (
        f"the adapter in {folder} does not fit {base} ({reason}): name the model that it was "
        "trained on (--base), or save the adapter again"
    )


def adapted_base(peft_model: PeftModel) -> torch.nn.Module:
    """Return the model that adapters are around.

    :param peft_model: with adapters
    :raises ImportError: if peft is not installed
    :raises ValueError: if it is no ``PeftModel`` or one inside another, or its adapters do not
        change weights
    """
    _need_peft()
    from peft import PeftModel

    if not isinstance(peft_model, PeftModel):
        raise ValueError(
            f"the model is a {type(peft_model).__name__}, not a PeftModel: give what "
            "get_peft_model() (without mixed=True) or PeftModel.from_pretrained() returned"
        )
    if not hasattr(peft_model.base_model, "merge_and_unload"):
        kinds = sorted({type(one).__name__ for one in peft_model.peft_config.values()})
        raise ValueError(
            f"adapters of {', '.join(kinds)} do not change weights, so there is nothing "
            "to mask or merge: save them beside the pruned model"
        )
    base: torch.nn.Module = peft_model.get_base_model()
    if isinstance(base, PeftModel):
        raise ValueError("a PeftModel is inside this PeftModel: call get_peft_model() once")
    return base


def chosen_adapters(peft_model: PeftModel, adapter_names: list[str] | None) -> list[str]:
    """Return the adapters that are named, the active ones for None.

    :param peft_model: with adapters
    :param adapter_names: names of adapters; None for the active ones
    :raises ValueError: if the model has no such adapter, or it is no list
    """
    if adapter_names is None:
        return list(peft_model.active_adapters)
    unknown = [name for name in adapter_names if name not in peft_model.peft_config]
    if isinstance(adapter_names, str) or unknown:
        raise ValueError(
            f"adapter_names is {adapter_names!r}: give a list of names out of "
            f"{list(peft_model.peft_config)}"
        )
    return adapter_names


def check_inits(peft_model: PeftModel, adapter_names: list[str], remedy: str) -> None:
    """Check that no adapter's initialisation changed the base weights.

    :param peft_model: with adapters
    :param adapter_names: names of the adapters to check
    :param remedy: what the error advises
    :raises ValueError: with the remedy, if one did; an adapter that was loaded says so too
    """
    for name in adapter_names:
        config = peft_model.peft_config[name]
        init = getattr(config, "init_lora_weights", None)
        if getattr(config, "kasa_config", None) is not None:
            init = "KaSA"
        if init == "KaSA" or (isinstance(init, str) and init.lower().startswith(_CHANGING_INITS)):
            raise ValueError(
                f"the initialisation of adapter {name!r} ({init}) changed the base weights, "
                f"whose zeros no longer are the masks: {remedy}"
            )


def check_unmerged(name: str, layer: AdapterLayer) -> None:
    """Check that a layer's weight is still the base model's.

    :param name: of the module that the layer adapts
    :param layer: to check
    :raises ValueError: if an adapter is merged into it
    """
    if layer.merged:
        raise ValueError(
            f"{', '.join(layer.merged_adapters)} is already merged into {name}: call "
            "peft_model.unmerge_adapter() first"
        )


def check_values(name: str, owner: torch.nn.Module, values: torch.Tensor) -> None:
    """Check that weights can be read, and that peft can change them.

    :param name: full name of the module, for the error
    :param owner: the module, called ``name``, that they are a parameter of
    :param values: the weights
    :raises ValueError: if they are on the meta device, quantized or offloaded
    """
    if values.is_meta:
        raise ValueError(on_meta(name))
    if not is_plain(values):
        raise ValueError(f"{name} has weights of {values.dtype}: load the model unquantized")
    if is_offloaded(owner):
        raise ValueError(
            f"{name} is offloaded, as in models that oneshot() returned, and peft's changes to it "
            "would be lost: call remove_dispatch(model) of compressed_tensors.offload first"
        )


def _need_peft() -> None:
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise ImportError("adapters need peft: pip install 'dlp_plugin[lora]'") from error
