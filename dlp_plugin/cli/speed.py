"""The command ``speed``: load time, memory and tokens per second."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from dlp_plugin.cli.common import TrustRemoteCode, console, reporting_errors

if TYPE_CHECKING:
    from dlp_plugin.comparison.speeds import Speed

__all__ = ["speed", "speed_table"]


def speed(
    folder: Annotated[Path, typer.Argument(help="A pruned checkpoint, packed or not.")],
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 512,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate.")] = 32,
    batches: Annotated[str, typer.Option(help="Batch sizes, separated by commas.")] = "1,8",
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of torch.", show_default="torch's own choice")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="How often each figure is measured.")] = 2,
    output: Annotated[
        Path | None, typer.Option("--json", help="JSON file to write the figures to.")
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Measure load time, memory and tokens per second of a pruned model, dense and sparse.

    Runs on the CPU of this machine, which should be idle. A folder that is not packed is first
    packed into a temporary folder.
    """
    with reporting_errors(trust_remote_code=trust_remote_code):
        from dlp_plugin.comparison.speeds import speeds
        from dlp_plugin.files import check_writable, replacing

        if output is not None:
            check_writable(output)
        found = speeds(
            folder,
            prompt=prompt,
            tokens=tokens,
            batches=_numbers(batches),
            threads=threads,
            rounds=rounds,
        )
        console.print(speed_table(found, str(folder)))
        if output is not None:
            with replacing(output) as beside:
                figures = {way: one.to_json() for way, one in found.items()}
                beside.write_text(json.dumps(figures, indent=2) + "\n")


def _numbers(text: str) -> list[int]:
    numbers = [int(part) if part.strip().isdecimal() else 0 for part in text.split(",")]
    if min(numbers) < 1:
        raise ValueError(f"--batches is {text!r}: give batch sizes, separated by commas, e.g. 1,8")
    return numbers


def speed_table(found: dict[str, Speed], name: str) -> Table:
    """Make a table of the results of the dense and the sparse model, and the gain.

    :param found: as :func:`dlp_plugin.comparison.speeds.speeds` returns it
    :param name: of the checkpoint
    :return: a table for the terminal (rich)
    """
    from dlp_plugin.comparison.speeds import cache_bytes

    dense, sparse = found["dense"], found["sparse"]
    table = Table(title=f"{escape(name)}, dense and sparse")
    for column in ("", "dense", "sparse", "gain"):
        table.add_column(column, justify="right" if table.columns else "left")

    def row(what: str, one: float | None, other: float | None, less: bool, form: str) -> None:
        if one is None or other is None:
            return
        gain = one / other if less else other / one
        table.add_row(what, format(one, form), format(other, form), f"{gain:.2f}")

    row("load, s", dense.load, sparse.load, True, ".1f")
    row("weights in memory, MB", dense.weights / 1e6, sparse.weights / 1e6, True, ",.1f")
    if dense.peak is not None and sparse.peak is not None:
        row("peak while loading, MB", dense.peak / 1e6, sparse.peak / 1e6, True, ",.1f")
    row("prompt, tokens/s", dense.prefill, sparse.prefill, False, ",.1f")
    for batch, rate in dense.decode.items():
        texts = "1 text" if batch == 1 else f"{batch} texts"
        row(f"writing {texts}, tokens/s", rate, sparse.decode[batch], False, ",.1f")
    cache = cache_bytes()
    if cache is not None and dense.weights < 2 * cache:
        table.caption = (
            f"The processor's cache of {cache / 1e6:,.0f} MB holds most of these weights. Sparse "
            "products gain more on larger models, whose weights are read from memory."
        )
    return table
