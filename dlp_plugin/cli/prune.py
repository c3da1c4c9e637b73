"""Commands that write a pruned model: ``oneshot`` and ``merge``."""

from __future__ import annotations

from pathlib import Path
from shutil import rmtree
from tempfile import TemporaryDirectory
from typing import Annotated

import typer
from loguru import logger

from dlp_plugin.cli.checkpoints import show_zeros
from dlp_plugin.cli.common import (
    Column,
    Config,
    Data,
    Length,
    Model,
    Samples,
    Seed,
    Split,
    TrustRemoteCode,
    calibration_arguments,
    console,
    joined_processes,
    reporting_errors,
)
from dlp_plugin.files import check_vacant, exit_on_sigterm, replacing, reserved

__all__ = ["merge", "oneshot"]


def oneshot(
    model: Model,
    recipe: Annotated[Path, typer.Option(exists=True, dir_okay=False, help="A YAML recipe.")],
    data: Data,
    output: Annotated[
        Path,
        typer.Option("--output", "--output-dir", help="Folder to save the model in; new or empty."),
    ],
    sparsity: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="Replaces every sparsity that the recipe states, but not REAP's share of experts. "
            "For another N:M pattern change its `mask_structure` instead.",
        ),
    ] = None,
    pack: Annotated[
        bool, typer.Option("--pack", help="Save the model in the sparse format.")
    ] = False,
    config: Config = None,
    split: Split = None,
    column: Column = "text",
    samples: Samples = 128,
    length: Length = None,
    seed: Seed = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Prune (and quantize) a model by a recipe and save it.

    Example: `dlp-plugin oneshot MODEL --recipe recipes/dlp_wanda.yaml --data text.txt
    --output MODEL-pruned`
    """
    with (
        reporting_errors(trust_remote_code=trust_remote_code),
        joined_processes() as first,
        reserved(output, first),
    ):
        from dlp_plugin import last_plans
        from dlp_plugin.checkpoints.loading import apply_recipe
        from dlp_plugin.modifiers.recipe import check_recipe, with_sparsity
        from dlp_plugin.planning.view import table

        check_vacant(output)
        check_recipe(recipe)
        chosen = str(recipe) if sparsity is None else with_sparsity(recipe, sparsity)
        calibration = calibration_arguments(
            model, data, config, split, column, length, samples, seed
        )
        if pack:
            from dlp_plugin.checkpoints.packing import pack as write_packed

            # The unpacked model lies in a folder that the next run removes if this one is killed.
            place = replacing(output) if first else TemporaryDirectory()
            with exit_on_sigterm(), place as room:
                saved, packed = Path(room) / "saved", Path(room) / "packed"
                saved.parent.mkdir(exist_ok=True)
                apply_recipe(model, chosen, saved, **calibration)
                if first:
                    try:
                        write_packed(saved, packed)
                    except ValueError as error:
                        logger.warning("{} is saved without packing: {}", output, error)
                        saved.rename(packed)
                    rmtree(saved, ignore_errors=True)
                    for file in packed.iterdir():
                        file.rename(file.parents[1] / file.name)
                    packed.rmdir()
        else:
            apply_recipe(model, chosen, output, **calibration)
        if first:
            for plan in last_plans():
                console.print(table(plan))
            show_zeros(output)


def merge(
    adapter: Annotated[Path, typer.Argument(help="Folder of an adapter, as peft saves it.")],
    output: Annotated[Path, typer.Argument(help="Folder to save the model in; new or empty.")],
    base: Annotated[
        str | None,
        typer.Option(help="The pruned model.", show_default="the one the adapter was trained on"),
    ] = None,
    allow_dense: Annotated[
        bool, typer.Option(help="Also merge into modules that were never pruned.")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Merge an adapter (LoRA and others of peft) into a pruned model, keeping every zero.

    Needs the extra `lora`: `pip install '.[lora]'` in a copy of the repository. To quantize the
    result: `dlp-plugin oneshot OUTPUT --recipe recipes/w4a16.yaml ...`
    """
    with reporting_errors(trust_remote_code=trust_remote_code), reserved(output):
        from dlp_plugin.checkpoints.saving import save_like
        from dlp_plugin.recovery import load_adapter, sparse_merge

        check_vacant(output)
        adapted, tokenizer = load_adapter(adapter, base)
        source = str(adapted.get_base_model().name_or_path)
        merged = sparse_merge(adapted, allow_dense=allow_dense)
        with replacing(output) as folder:
            save_like(source, merged, folder, tokenizer)
        show_zeros(output)
