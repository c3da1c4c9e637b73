"""Commands on plans, which prune nothing: ``score`` makes one, ``show`` shows it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dlp_plugin.cli.common import (
    Column,
    Config,
    Data,
    Ignore,
    Length,
    MaskStructure,
    Model,
    Samples,
    Seed,
    Split,
    Targets,
    TrustRemoteCode,
    calibration_arguments,
    console,
    joined_processes,
    method_names,
    reporting_errors,
)
from dlp_plugin.planning.methods import method_of, options

if TYPE_CHECKING:
    from dlp_plugin.modifiers.base import AllocationModifier

__all__ = ["score", "show"]

_STRENGTHS = ", ".join(f"{name} {method_of(name)().strength}" for name in options())


def score(
    model: Model,
    data: Data,
    output: Annotated[Path, typer.Option(help="JSON file to write the plan to.")],
    method: Annotated[str, typer.Option(help=f"How blocks are scored: {method_names()}.")] = "dlp",
    sparsity: Annotated[
        float | None, typer.Option(help="Target over all blocks; by default 0.7, or N / M.")
    ] = None,
    mask_structure: MaskStructure = None,
    strength: Annotated[
        str | None,
        typer.Option(
            "--strength",
            "--alpha",
            help="How far the sparsities differ, by the method's own measure (of `dlp` half their "
            "range), or `auto`.",
            show_default=_STRENGTHS,
        ),
    ] = None,
    refine: Annotated[
        int, typer.Option(min=0, help="Steps of a search that improves the plan; 16 are many.")
    ] = 0,
    search: Annotated[
        str,
        typer.Option(help="`gradient`, or `evolution`: trial and error, without backward passes."),
    ] = "gradient",
    statistic: Annotated[
        str | None,
        typer.Option(
            help="`median` (paper) or `mean` (its code); of `dlp` only.", show_default="median"
        ),
    ] = None,
    targets: Targets = None,
    ignore: Ignore = None,
    config: Config = None,
    split: Split = None,
    column: Column = "text",
    samples: Samples = 128,
    length: Length = None,
    seed: Seed = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Score a model's blocks and write the plan; the model stays as it is.

    A recipe prunes from it with the method's modifier, `DLPModifier: {from_plan: plan.json}`,
    at this or another sparsity and strength, without scoring again.
    """
    with reporting_errors(trust_remote_code=trust_remote_code), joined_processes() as first:
        from dlp_plugin.checkpoints.loading import apply_recipe
        from dlp_plugin.files import check_writable
        from dlp_plugin.planning.view import table

        check_writable(output)
        modifier = _modifier(
            method,
            strength,
            statistic,
            sparsity=0.7 if sparsity is None and mask_structure in (None, "0:0") else sparsity,
            mask_structure=mask_structure,
            refine=refine,
            search=search,
            targets=targets or ["Linear"],
            ignore=ignore or [],
            plan_path=str(output),
        )
        calibration = calibration_arguments(
            model, data, config, split, column, length, samples, seed
        )
        apply_recipe(model, modifier, **calibration)
        assert modifier.plan is not None
        if first:
            console.print(table(modifier.plan))


def _modifier(
    name: str, strength: str | None, statistic: str | None, **fields: Any
) -> AllocationModifier:
    """The modifier of a method.

    :param strength: a number or ``auto``; by default the method's own
    :param statistic: as DLP has it; by default DLP's own
    :param fields: that the modifiers of all methods share
    :raises ValueError: if there is no such method, or it cannot be used so
    """
    import dlp_plugin

    method = method_of(name)
    if strength is not None:
        fields[method.strength_field] = _strength(strength)
    if statistic is not None:
        if "statistic" not in method.model_fields:
            raise ValueError(
                f"--statistic is DLP's, and {method.title} has none: leave it out, or take "
                "--method dlp"
            )
        fields["statistic"] = statistic
    modifier: AllocationModifier = getattr(dlp_plugin, method.modifier)(**fields)
    return modifier


def _strength(text: str) -> float | str:
    if text == "auto":
        return text
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"--strength is {text!r}: give a number, or auto") from None


def show(
    plan: Annotated[Path, typer.Argument(help="A plan file.")],
    plot: Annotated[Path | None, typer.Option(help="Picture to draw, e.g. plan.png.")] = None,
    sparsity: Annotated[float | None, typer.Option(help="Look at it at another target.")] = None,
    mask_structure: MaskStructure = None,
    strength: Annotated[
        float | None,
        typer.Option("--strength", "--alpha", help="Look at it at another strength."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="JSON file to write what is shown to.")
    ] = None,
) -> None:
    """Show a plan as a table, and as a picture; at another target it is another plan."""
    with reporting_errors(host=False):
        from dlp_plugin.files import check_writable
        from dlp_plugin.planning.plan import Plan
        from dlp_plugin.planning.view import plot as draw
        from dlp_plugin.planning.view import table

        for path in (output, plot):
            if path is not None:
                check_writable(path)
        found = Plan.load(plan).at(
            target=sparsity, strength=strength, mask_structure=mask_structure
        )
        console.print(table(found))
        if output is not None:
            found.save(output)
            console.print("written:", str(output), markup=False)
        if plot is not None:
            draw(found, plot)
            console.print("drawn:", str(plot), markup=False)
