"""Commands on plans: ``score`` makes one, ``show`` prints it. Neither prunes."""

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
    method: Annotated[str, typer.Option(help=f"Allocation method: {method_names()}.")] = "dlp",
    sparsity: Annotated[
        float | None,
        typer.Option(help="Target over all blocks.", show_default="0.7, or N / M"),
    ] = None,
    mask_structure: MaskStructure = None,
    strength: Annotated[
        str | None,
        typer.Option(
            "--strength",
            "--alpha",
            help="How far the blocks' sparsities may differ, in the method's own unit (for `dlp` "
            "half their range). `auto` selects it on held-out samples.",
            show_default=_STRENGTHS,
        ),
    ] = None,
    refine: Annotated[
        int, typer.Option(min=0, help="Steps of a search that improves the plan. 16 is usual.")
    ] = 0,
    search: Annotated[
        str,
        typer.Option(help="`gradient`, or `evolution`, which needs no backward passes."),
    ] = "gradient",
    statistic: Annotated[
        str | None,
        typer.Option(
            help="For `dlp` only: `median` (the paper) or `mean` (its released code).",
            show_default="median",
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
    """Score a model's blocks and write the plan, without pruning.

    A recipe prunes by the plan with the method's modifier, `DLPModifier: {from_plan: plan.json}`.
    It may state another sparsity or strength; the blocks are not scored again.
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
    """Make the modifier of a method.

    :param strength: a number or ``auto``; None for the method's default
    :param statistic: of DLP; None for its default
    :param fields: of the modifiers of all methods
    :raises ValueError: if there is no such method, or a value does not suit it
    """
    import dlp_plugin

    method = method_of(name)
    if strength is not None:
        fields[method.strength_field] = _strength(strength)
    if statistic is not None:
        if "statistic" not in method.model_fields:
            raise ValueError(
                f"--statistic is for DLP only, not for {method.title}: leave it out, or use "
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
    plan: Annotated[
        Path, typer.Argument(help="A plan file, or a recipe (.yaml) that holds plans.")
    ],
    plot: Annotated[Path | None, typer.Option(help="Picture file to draw, e.g. plan.png.")] = None,
    sparsity: Annotated[
        float | None, typer.Option(help="Show the plan for another target.")
    ] = None,
    mask_structure: MaskStructure = None,
    strength: Annotated[
        float | None,
        typer.Option("--strength", "--alpha", help="Show the plan for another strength."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="JSON file to write the shown plan to.")
    ] = None,
) -> None:
    """Show a plan as a table or a picture, also for another target or strength."""
    with reporting_errors(host=False):
        from dlp_plugin.files import check_writable
        from dlp_plugin.modifiers.recipe import plans_of
        from dlp_plugin.planning.plan import Plan
        from dlp_plugin.planning.view import plot as draw
        from dlp_plugin.planning.view import table

        for path in (output, plot):
            if path is not None:
                check_writable(path)
        held = plans_of(plan) if plan.suffix in (".yaml", ".yml") else [Plan.load(plan)]
        if len(held) > 1 and (output or plot):
            raise ValueError(
                f"{plan} holds {len(held)} plans, and --output and --plot take one: leave them out"
            )
        for each in held:
            found = each.at(target=sparsity, strength=strength, mask_structure=mask_structure)
            console.print(table(found))
        if output is not None:
            found.save(output)
            console.print("written:", str(output), markup=False)
        if plot is not None:
            draw(found, plot)
            console.print("drawn:", str(plot), markup=False)
