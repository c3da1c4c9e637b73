"""Generation settings that transformers reads and will not save, which many checkpoints have."""

from __future__ import annotations

from typing import Any

from loguru import logger

__all__ = ["make_savable"]

# What has an effect with sampling only, and what with beams only, and what means "off"
_SAMPLING = (
    "temperature",
    "top_p",
    "min_p",
    "top_h",
    "typical_p",
    "top_k",
    "epsilon_cutoff",
    "eta_cutoff",
)
_BEAMS = ("early_stopping", "length_penalty")


def make_savable(model: Any, quiet: bool = False) -> None:
    """Take out of a model's generation settings what has no effect and would not be saved.

    Saving comes last, and would lose all the work before it.

    :param model: a model of transformers; changed in place
    :param quiet: no warning, where the source's settings are saved as they are
    :raises ValueError: if that is not enough, saying what is wrong
    """
    settings = getattr(model, "generation_config", None)
    if settings is None or _wrong(settings) is None:
        return
    idle = [] if settings.do_sample else [*_SAMPLING]
    idle += [] if (settings.num_beams or 1) > 1 else [*_BEAMS]
    taken = {name: value for name in idle if (value := getattr(settings, name, None)) is not None}
    for name in taken:
        setattr(settings, name, None)
    if wrong := _wrong(settings):
        for name, value in taken.items():
            setattr(settings, name, value)
        raise ValueError(
            f"the generation settings of {model.name_or_path or type(model).__name__} cannot be "
            f"saved ({wrong}): mend generation_config.json, or model.generation_config"
        )
    if quiet:
        return
    logger.warning(
        "Generation settings without effect ({}), which transformers does not save, are left out",
        ", ".join(f"{name} {value}" for name, value in taken.items()),
    )


def _wrong(settings: Any) -> str | None:
    """Why settings cannot be saved, in one line; None if they can."""
    try:
        settings.validate(strict=True)
    except ValueError as error:
        return " ".join(str(error).split())
    return None
