"""Commands on checkpoints: ``inspect``, ``pack``, ``unpack`` and ``export-gptq``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from dlp_plugin.cli.common import TrustRemoteCode, console, progress_bar, reporting_errors

if TYPE_CHECKING:
    from dlp_plugin.checkpoints.inspect import Checkpoint
    from dlp_plugin.checkpoints.packing import Packed

__all__ = ["export_gptq", "inspect", "pack", "show_zeros", "unpack"]


def inspect(
    folder: Annotated[Path, typer.Argument(help="Folder of a saved model.")],
    linears: Annotated[bool, typer.Option(help="One row per Linear instead of per block.")] = False,
    group: Annotated[
        int,
        typer.Option(
            min=0, help="The M of an N:M pattern. Counts the zeros in every M weights of a row."
        ),
    ] = 0,
    against: Annotated[
        Path | None,
        typer.Option(help="A pruned checkpoint. Counts those of its zeros that FOLDER has lost."),
    ] = None,
) -> None:
    """Count the zeros in a checkpoint's files, block by block.

    Reads the safetensors files and builds no model. Weights of 4 and 8 bits are dequantized to be
    counted, and a folder of `dlp-plugin pack` is unpacked.
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
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Write a 4-bit or 8-bit checkpoint in the GPTQ format, for AutoGPTQ, exllama and others.

    The weights stay the same, and so do the zeros.
    """
    with reporting_errors(host=False, trust_remote_code=trust_remote_code):
        from dlp_plugin.checkpoints.gptq_format import export_gptq as export

        export(folder, output)
        console.print("written:", str(output), markup=False)


def pack(
    folder: Annotated[Path, typer.Argument(help="A pruned checkpoint: 16 bits, W4A16 or W8A16.")],
    output: Annotated[Path, typer.Argument(help="Folder to write; new or empty.")],
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Write a pruned checkpoint in the sparse format: the mask, and the weights that are not zero.

    Nothing is lost: transformers (after `import dlp_plugin`) and vLLM load the same weights, bit
    for bit. `dlp-plugin unpack` restores the checkpoint.
    """
    with reporting_errors(host=False, trust_remote_code=trust_remote_code):
        from dlp_plugin.checkpoints.packing import pack as write

        with progress_bar("Packing", 1) as advance:
            packed = write(folder, output, advance)
        console.print(_sizes_table(folder, output, packed))


def unpack(
    folder: Annotated[Path, typer.Argument(help="A folder that `dlp-plugin pack` wrote.")],
    output: Annotated[Path, typer.Argument(help="Folder to write; new or empty.")],
) -> None:
    """Restore the checkpoint that `dlp-plugin pack` packed."""
    with reporting_errors(host=False):
        from dlp_plugin.checkpoints.packing import unpack as write

        with progress_bar("Unpacking", 1) as advance:
            write(folder, output, advance)
        console.print("written:", str(output), markup=False)


def show_zeros(folder: Path, linears: bool = False, group: int = 0) -> None:
    """Read a checkpoint and print its table of zeros.

    :param folder: of the checkpoint
    :param linears: print one row per Linear instead of one per block
    :param group: M of the N:M pattern to look for; 0 for none
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
        f"{_megabytes(found.bytes_if_sparse)} as 1 bit per weight and the weights that are not zero"
    )
    return table


def _sizes_table(source: Path, output: Path, packed: Packed) -> Table:
    from dlp_plugin.checkpoints.files import bytes_on_disk
    from dlp_plugin.checkpoints.inspect import zstd_bytes

    before, after = (bytes_on_disk(folder) for folder in (source, output))
    compressed = zstd_bytes(source)
    table = Table(title=f"{escape(str(source))} packed")
    for column in ("", "before", "under zstd", "packed"):
        table.add_column(column, justify="right" if table.columns else "left")
    table.add_row("files", *(_megabytes(size) for size in (before, compressed, after)))
    parts = (f"{size / before:.3f}" for size in (before, compressed, after))
    table.add_row("of the size before", *parts)
    one, other = (8 * size / packed.weights for size in (packed.bytes_before, packed.bytes_after))
    table.add_row("bits per weight of packed Linears", f"{one:.2f}", "", f"{other:.2f}")
    table.caption = f"{len(packed.linears)} Linears of blocks packed, {packed.dense} left dense"
    return table


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.2f} MB"
