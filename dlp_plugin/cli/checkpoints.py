"""Commands on what is on disk: ``inspect``, ``export-gptq``; and the table of zeros."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from dlp_plugin.cli.common import console, progress_bar, reporting_errors

if TYPE_CHECKING:
    from dlp_plugin.checkpoints.inspect import Checkpoint

__all__ = ["export_gptq", "inspect", "show_zeros"]


def inspect(
    folder: Annotated[Path, typer.Argument(help="Folder of a saved model.")],
    linears: Annotated[bool, typer.Option(help="One row per Linear, not per block.")] = False,
    group: Annotated[
        int,
        typer.Option(min=0, help="M of N:M: how many zeros has every group of M weights of a row?"),
    ] = 0,
    against: Annotated[
        Path | None,
        typer.Option(help="A pruned checkpoint: how many of its zeros are lost in FOLDER?"),
    ] = None,
) -> None:
    """Count the zeros that a checkpoint really holds, block by block.

    Reads the safetensors files and builds no model. Packed 4-bit weights count as
    what they dequantize to.
    """
    with reporting_errors(host=False):
        from dlp_plugin.checkpoints.inspect import zeros_lost

        show_zeros(folder, linears, group)
        if against is not None:
            lost = zeros_lost(against, folder)
            console.print(f"zeros of {against} lost: {sum(lost.values()):,}", markup=False)
            if any(lost.values()):
                console.print({name: count for name, count in lost.items() if count})
                raise typer.Exit(1)


def export_gptq(
    folder: Annotated[Path, typer.Argument(help="A W4A16 or W8A16 checkpoint of oneshot().")],
    output: Annotated[Path, typer.Argument(help="Folder to write; new or empty.")],
) -> None:
    """Write a packed checkpoint in the GPTQ format, for AutoGPTQ, exllama and others.

    The numbers stay the same: what dequantizes to zero does so afterwards.
    """
    with reporting_errors(host=False):
        from dlp_plugin.checkpoints.gptq_format import export_gptq as export

        export(folder, output)
        console.print("written:", str(output), markup=False)


def show_zeros(folder: Path, linears: bool = False, group: int = 0) -> None:
    """Read a checkpoint and print its table of zeros.

    :param linears: one row per Linear, not per block
    :param group: M of N:M, to count the zeros of every group of M weights; 0 for none
    """
    from dlp_plugin.checkpoints.inspect import inspect_checkpoint

    with progress_bar("Reading the checkpoint", 1) as advance:
        found = inspect_checkpoint(folder, advance, group)
    console.print(_zeros_table(found, linears, group))


def _zeros_table(found: Checkpoint, linears: bool, group: int) -> Table:
    from dlp_plugin.checkpoints.inspect import zstd_bytes

    table = Table(title=f"Zeros in {escape(str(found.folder))}")
    columns = ["linear" if linears else "block", "weights", "zeros", "sparsity"]
    for column in [*columns, f"in every {group}"] if group else columns:
        table.add_column(column, justify="right" if table.columns else "left")
    blocks = found.blocks

    def add(name: str, zeros: Any) -> None:
        row = [name, f"{zeros.weights:,}", f"{zeros.zeros:,}", f"{zeros.sparsity:.4f}"]
        if group and zeros.in_group is not None:
            least, most = zeros.in_group
            row.append(str(least) if least == most else f"{least} to {most}")
        table.add_row(*row)

    outside = found.outside
    for name, zeros in (found.linears if linears else blocks).items():
        if not linears or name not in outside:
            add(name, zeros)
    if blocks:
        table.add_section()
        first, *rest = blocks.values()
        add("all blocks", sum(rest, start=first))
    for name, zeros in outside.items():
        add(name, zeros)
    table.caption = (
        f"{found.quantization or 'not quantized'}; {_megabytes(found.bytes_on_disk)} on disk, "
        f"{_megabytes(zstd_bytes(found.folder))} under zstd, "
        f"{_megabytes(found.bytes_if_sparse)} if an engine stored 1 bit a weight and the values"
    )
    return table


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.2f} MB"
