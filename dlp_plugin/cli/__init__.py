"""The terminal command ``dlp-plugin``."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from loguru import logger
from pydantic import ValidationError
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from dlp_plugin.checkpoints.inspect import Checkpoint

app = typer.Typer(
    help=(
        "Prune language models with a sparsity for every block (DLP), inside "
        "llm-compressor.\n\n"
        "A run in three steps: `dlp-plugin oneshot` prunes a model by a recipe and "
        "saves it, `dlp-plugin inspect` shows what zeros were written, `dlp-plugin ppl` and "
        "`zero-shot` measure what they cost. `score` and `show` make and look at a plan only, "
        "`compare` tells which method is best for a model.\n\n"
        "`dlp-plugin --debug COMMAND ...` shows the traceback of an error."
    ),
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
console = Console()
_debug = False

Model = Annotated[str, typer.Argument(help="A model id on the hub, or a local folder.")]
Data = Annotated[
    str,
    typer.Option(
        help="A text file, or a dataset as `datasets.load_dataset` knows it.", show_default=False
    ),
]
Config = Annotated[
    str | None, typer.Option(help="The dataset's configuration, e.g. `wikitext-2-raw-v1`.")
]
Split = Annotated[str, typer.Option(help="The dataset's split.")]
Column = Annotated[str, typer.Option(help="The dataset's text column.")]
Samples = Annotated[
    int, typer.Option(min=1, help="Calibration samples, spread evenly over the text.")
]
MaskStructure = Annotated[
    str | None, typer.Option(help="For stages of this structure: 4:8 is 4 of every 8 on average.")
]
Length = Annotated[
    int | None,
    typer.Option(
        min=2,
        help="Tokens per sample or window; by default what the model can take, at most 2048.",
    ),
]


@app.callback()
def _settings(
    debug: Annotated[bool, typer.Option(help="Show the traceback of an error.")] = False,
) -> None:
    global _debug
    _debug = debug


@app.command()
def oneshot(
    model: Model,
    recipe: Annotated[Path, typer.Option(exists=True, dir_okay=False, help="A YAML recipe.")],
    data: Data,
    output: Annotated[Path, typer.Option(help="Folder to save the model in; new or empty.")],
    config: Config = None,
    split: Split = "train",
    column: Column = "text",
    samples: Samples = 128,
    length: Length = None,
) -> None:
    """Prune (and quantize) a model by a recipe and save it.

    Example: `dlp-plugin oneshot MODEL --recipe recipes/dlp_wanda.yaml --data text.txt
    --output MODEL-pruned`
    """
    with _told(), _processes() as first:
        from dlp_plugin import last_plans
        from dlp_plugin.checkpoints.inspect import inspect_checkpoint
        from dlp_plugin.checkpoints.loading import apply_recipe
        from dlp_plugin.files import check_vacant
        from dlp_plugin.modifiers.recipe import check_recipe

        check_vacant(output)
        check_recipe(recipe)
        apply_recipe(
            model,
            str(recipe),
            output,
            **_calibration(model, data, config, split, column, length, samples),
        )
        if not first:
            return
        for plan in last_plans():
            console.print(plan.table())
        with _progress("Reading the checkpoint", 1) as advance:
            found = inspect_checkpoint(output, advance)
        console.print(_zeros_table(found))


@app.command()
def score(
    model: Model,
    data: Data,
    output: Annotated[Path, typer.Option(help="JSON file to write the plan to.")],
    sparsity: Annotated[
        float | None, typer.Option(help="Target over all blocks; by default 0.7, or N / M.")
    ] = None,
    mask_structure: MaskStructure = None,
    alpha: Annotated[
        str, typer.Option(help="Half the range of the sparsities, or `auto`.")
    ] = "0.15",
    refine: Annotated[
        int, typer.Option(min=0, help="Generations of a search that improves the plan.")
    ] = 0,
    statistic: Annotated[str, typer.Option(help="`median` (paper) or `mean` (its code).")] = (
        "median"
    ),
    config: Config = None,
    split: Split = "train",
    column: Column = "text",
    samples: Samples = 128,
    length: Length = None,
) -> None:
    """Score a model's blocks and write the plan; the model stays as it is.

    A recipe prunes from it with `DLPModifier: {from_plan: plan.json}`, at this or
    another sparsity and alpha, without scoring again.
    """
    with _told(), _processes() as first:
        from dlp_plugin import DLPModifier
        from dlp_plugin.checkpoints.loading import apply_recipe
        from dlp_plugin.files import check_writable

        check_writable(output)
        modifier = DLPModifier(
            sparsity=0.7 if sparsity is None and mask_structure in (None, "0:0") else sparsity,
            mask_structure=mask_structure,
            alpha=alpha if alpha == "auto" else _number(alpha, "--alpha"),
            refine=refine,
            statistic=statistic,
            plan_path=str(output),
        )
        calibration = _calibration(model, data, config, split, column, length, samples)
        apply_recipe(model, modifier, **calibration)
        assert modifier.plan is not None
        if first:
            console.print(modifier.plan.table())


@app.command()
def show(
    plan: Annotated[Path, typer.Argument(help="A plan file.")],
    plot: Annotated[Path | None, typer.Option(help="Picture to draw, e.g. plan.png.")] = None,
    sparsity: Annotated[float | None, typer.Option(help="Look at it at another target.")] = None,
    mask_structure: MaskStructure = None,
    alpha: Annotated[float | None, typer.Option(help="Look at it at another alpha.")] = None,
    output: Annotated[
        Path | None, typer.Option(help="JSON file to write what is shown to.")
    ] = None,
) -> None:
    """Show a plan as a table, and as a picture; at another target it is another plan."""
    with _told(host=False):
        from dlp_plugin.files import check_writable
        from dlp_plugin.planning.plan import Plan

        for path in (output, plot):
            if path is not None:
                check_writable(path)
        found = Plan.load(plan).at(target=sparsity, alpha=alpha, mask_structure=mask_structure)
        console.print(found.table())
        if output is not None:
            found.save(output)
            console.print("written:", str(output), markup=False)
        if plot is not None:
            found.plot(plot)
            console.print("drawn:", str(plot), markup=False)


@app.command()
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
    with _told(host=False):
        from dlp_plugin.checkpoints.inspect import inspect_checkpoint, zeros_lost

        with _progress("Reading the checkpoint", 1) as advance:
            found = inspect_checkpoint(folder, advance, group)
        console.print(_zeros_table(found, linears, group))
        if against is not None:
            lost = zeros_lost(against, folder)
            console.print(f"zeros of {against} lost: {sum(lost.values()):,}", markup=False)
            if any(lost.values()):
                console.print({name: count for name, count in lost.items() if count})
                raise typer.Exit(1)


@app.command()
def merge(
    adapter: Annotated[Path, typer.Argument(help="Folder of an adapter, as peft saves it.")],
    output: Annotated[Path, typer.Argument(help="Folder to save the model in; new or empty.")],
    base: Annotated[
        str | None,
        typer.Option(help="The pruned model; by default what the adapter was trained on."),
    ] = None,
    allow_dense: Annotated[
        bool, typer.Option(help="Merge into modules that were never pruned, too.")
    ] = False,
) -> None:
    """Merge an adapter (LoRA and others of peft) into a pruned model, keeping every zero.

    Needs `pip install 'dlp_plugin[lora]'`. To quantize what comes out:
    `dlp-plugin oneshot OUTPUT --recipe recipes/w4a16.yaml ...`
    """
    with _told():
        from dlp_plugin.checkpoints.inspect import inspect_checkpoint
        from dlp_plugin.files import check_vacant, replacing
        from dlp_plugin.recovery import load_adapter, sparse_merge

        check_vacant(output)
        adapted, tokenizer = load_adapter(adapter, base)
        merged: Any = sparse_merge(adapted, allow_dense=allow_dense)
        with replacing(output) as folder:
            merged.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        with _progress("Reading the checkpoint", 1) as advance:
            found = inspect_checkpoint(output, advance)
        console.print(_zeros_table(found))


@app.command()
def export_gptq(
    folder: Annotated[Path, typer.Argument(help="A W4A16 or W8A16 checkpoint of oneshot().")],
    output: Annotated[Path, typer.Argument(help="Folder to write; new or empty.")],
) -> None:
    """Write a packed checkpoint in the GPTQ format, for AutoGPTQ, exllama and others.

    The numbers stay the same: what dequantizes to zero does so afterwards.
    """
    with _told(host=False):
        from dlp_plugin.checkpoints.gptq_format import export_gptq as export

        export(folder, output)
        console.print("written:", str(output), markup=False)


@app.command()
def ppl(
    model: Model,
    data: Data,
    config: Config = None,
    split: Split = "test",
    column: Column = "text",
    length: Length = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows at a time.")] = 8,
) -> None:
    """Measure a model's perplexity on a text or dataset.

    Windows do not overlap, and every token after a window's first counts once.
    """
    with _told():
        from dlp_plugin.checkpoints.loading import load_model, load_tokenizer
        from dlp_plugin.evaluation.causal import check_causal
        from dlp_plugin.evaluation.perplexity import perplexity
        from dlp_plugin.evaluation.text import beginning, read_tokens, token_windows

        length = _checked_length(model, length)
        tokenizer = load_tokenizer(model)
        tokens = read_tokens(data, tokenizer, config=config, split=split, column=column)
        windows = token_windows(tokens, length, beginning(tokenizer))
        loaded = load_model(model)
        check_causal(loaded, "ppl measures perplexity")
        with _progress("Measuring", len(windows)) as advance:
            value = perplexity(loaded, windows, batch_size, advance)
        console.print(
            f"perplexity {value:.4f} ({len(tokens):,} tokens in {len(windows):,} windows "
            f"of {length})"
        )


@app.command()
def compare(
    model: Model,
    data: Data,
    test: Annotated[
        str,
        typer.Option(help="What to measure perplexity on: a text or dataset.", show_default=False),
    ],
    output: Annotated[
        Path, typer.Option(help="Folder for the results; what it holds is not measured again.")
    ],
    methods: Annotated[
        str,
        typer.Option(
            help="With commas: `uniform`, `dlp`, `owl`, `alpha-pruning`, `linear`; with a strength "
            "`dlp:0.1`, a chosen one `dlp:auto`, improved by a search `dlp-refined`."
        ),
    ] = "uniform,dlp,dlp:auto,owl,alpha-pruning,linear:auto",
    sparsities: Annotated[
        str, typer.Option(help="With commas; `4:8` is 4 of every 8 weights on average.")
    ] = "0.5,0.6,0.7",
    pruners: Annotated[
        str, typer.Option(help="With commas: `wanda`, `sparsegpt`, `magnitude`.")
    ] = "wanda",
    refine: Annotated[int, typer.Option(min=0, help="Generations, for `-refined`.")] = 0,
    write_recipe: Annotated[
        Path | None, typer.Option(help="YAML file to write the best recipe to.")
    ] = None,
    sparsity: Annotated[
        str | None, typer.Option(help="The sparsity it shall have; by default the highest.")
    ] = None,
    config: Config = None,
    split: Split = "train",
    column: Column = "text",
    test_config: Config = None,
    test_split: Split = "test",
    samples: Samples = 128,
    length: Length = None,
) -> None:
    """Compare methods, sparsities and pruners on a model, by perplexity.

    Blocks are scored once for all methods; a run that was interrupted goes on when the
    command is repeated. The folder gets results.json, table.md, perplexity.png,
    sparsities.png and, where plans were refined, search.png. The best recipe is that of the
    least perplexity over methods and pruners at one sparsity; it holds its plan, and
    `dlp-plugin oneshot` runs it as it is.
    """
    with _told():
        from dlp_plugin.comparison.run import Cell, target_named
        from dlp_plugin.comparison.run import compare as run
        from dlp_plugin.evaluation.text import beginning, read_tokens, token_windows
        from dlp_plugin.files import check_writable, replacing

        def tell(cell: Cell) -> None:
            console.print(
                f"{cell.pruner} {cell.target} {cell.method}: {cell.perplexity:.4f} "
                f"({cell.seconds:.0f} s)",
                highlight=False,
            )

        wanted = [target_named(text) for text in sparsities.split(",")]
        best_at = None if sparsity is None else target_named(sparsity)
        if best_at not in (None, *wanted):
            raise ValueError(f"--sparsity {sparsity} is none of --sparsities {sparsities}")
        if write_recipe is not None:
            check_writable(write_recipe)
        calibration = _calibration(model, data, config, split, column, length, samples)
        tokenizer, length = calibration["tokenizer"], calibration["max_seq_length"]
        tokens = read_tokens(test, tokenizer, config=test_config, split=test_split, column=column)
        found = run(
            model,
            calibration,
            token_windows(tokens, length, beginning(tokenizer)),
            output,
            methods=methods.split(","),
            sparsities=wanted,
            pruners=pruners.split(","),
            generations=refine,
            report=tell,
        )
        console.print(found.table())
        with replacing(output / "table.md") as beside:
            beside.write_text(found.markdown())
        if write_recipe is not None:
            with replacing(write_recipe) as beside:
                beside.write_text(found.recipe(best_at))
            best = found.best(best_at)
            console.print(
                f"{best.method} at {best.target} with {best.pruner} written:",
                str(write_recipe),
                markup=False,
            )
        found.draw(output)
        console.print("written:", str(output), markup=False)


@app.command()
def zero_shot(
    model: Model,
    tasks: Annotated[
        list[str], typer.Argument(help="Tasks of lm-evaluation-harness, or the set `paper7`.")
    ],
    batch_size: Annotated[int, typer.Option(min=1, help="Choices at a time.")] = 8,
    limit: Annotated[int | None, typer.Option(min=1, help="Questions per task.")] = None,
    task_folder: Annotated[
        Path | None, typer.Option(help="Folder with YAML files of tasks of your own.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="JSON file to write the result to.")] = None,
) -> None:
    """Measure a model's accuracy on tasks, without examples or training.

    `paper7` is what the pruning papers report: BoolQ, RTE, HellaSwag, WinoGrande, ARC
    easy and challenge, OpenbookQA; and the mean. Needs `pip install 'dlp_plugin[eval]'`.
    """
    with _told():
        from dlp_plugin.checkpoints.loading import load_model, load_tokenizer
        from dlp_plugin.evaluation.zeroshot import zero_shot as measure
        from dlp_plugin.files import check_writable, replacing

        if output is not None:
            check_writable(output)
        found = measure(
            load_model(model),
            load_tokenizer(model),
            tasks,
            batch_size=batch_size,
            limit=limit,
            task_folder=task_folder,
        )
        table = Table(title=f"Zero-shot accuracy of {escape(model)}")
        for column in ("task", "acc", "acc_norm"):
            table.add_column(column, justify="right" if table.columns else "left")
        for task, values in found.items():
            if task == "mean":
                table.add_section()
            table.add_row(task, *(_with_error(values, metric) for metric in ("acc", "acc_norm")))
        console.print(table)
        if output is not None:
            with replacing(output) as beside:
                beside.write_text(json.dumps(found, indent=2) + "\n")


def _with_error(values: dict[str, float], metric: str) -> str:
    """A measured value and its standard error, as far as there are any."""
    if metric not in values:
        return ""
    error = values.get(f"{metric}_stderr")
    return f"{values[metric]:.4f}" + ("" if error is None else f" ± {error:.4f}")


def _number(text: str, option: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{option} is {text!r}: give a number, or auto") from None


def _calibration(
    model: str,
    data: str,
    config: str | None,
    split: str,
    column: str,
    length: int | None,
    samples: int,
) -> dict[str, Any]:
    """Arguments of llm-compressor's ``oneshot()`` that say what to calibrate on.

    Of several processes each gets its share.
    """
    from compressed_tensors.distributed import is_distributed
    from torch import distributed as dist

    from dlp_plugin.checkpoints.loading import load_tokenizer
    from dlp_plugin.evaluation.text import beginning, calibration_set, read_tokens

    length = _checked_length(model, length)
    tokenizer = load_tokenizer(model)
    # A file is read whole, so that its samples spread over it; a dataset as far as needed.
    limit = None if Path(data).is_file() else samples * length
    tokens = read_tokens(data, tokenizer, config=config, split=split, column=column, limit=limit)
    dataset = calibration_set(tokens, length, samples, beginning(tokenizer))
    if is_distributed():
        dataset = dataset.shard(num_shards=dist.get_world_size(), index=dist.get_rank())
    return {
        "tokenizer": tokenizer,
        "dataset": dataset,
        "num_calibration_samples": len(dataset),
        "max_seq_length": length,
        "shuffle_calibration_samples": False,
    }


def _checked_length(model: str, length: int | None) -> int:
    """Tokens per sample or window: as asked for, if the model has positions for so many."""
    from dlp_plugin.checkpoints.loading import load_config

    config = load_config(model).get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    if length is None:
        return min(2048, positions or 2048)
    if positions and length > positions:
        raise ValueError(
            f"--length {length} is more than the {positions} positions that {model} has: give "
            f"{positions} at most"
        )
    return length


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.2f} MB"


def _zeros_table(found: Checkpoint, linears: bool = False, group: int = 0) -> Table:
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


@contextmanager
def _progress(what: str, total: float) -> Iterator[Callable[[float], None]]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(what, total=total)
        yield lambda done: progress.advance(task, done)


@contextmanager
def _processes() -> Iterator[bool]:
    """Join the other processes of a torchrun; is this the first, or the only one?"""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield True
        return
    import torch
    from compressed_tensors.distributed import init_dist, is_source_process
    from torch import distributed as dist

    if torch.accelerator.is_available():
        init_dist()
    else:
        dist.init_process_group("gloo")
    try:
        yield is_source_process()
    finally:
        dist.destroy_process_group()


@contextmanager
def _told(host: bool = True) -> Iterator[None]:
    """Show an error as one message; of the log our progress, and the warnings of others.

    :param host: whether llm-compressor will be needed; importing it sets up a log of its own
    """
    try:
        if host:
            import llmcompressor  # noqa: F401

            logger.disable("llmcompressor.utils.metric_logging")
        show_log()
        yield
    except typer.Exit:
        raise
    except Exception as error:
        if _debug:
            raise
        message = str(error).strip() or type(error).__name__
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            field = ".".join(str(part) for part in (error.title, *first["loc"]))
            message = f"{field}: {first['msg'].removeprefix('Value error, ')}"
        if not isinstance(error, (ValueError, OSError, ImportError)):
            message = f"{type(error).__name__}: {message.splitlines()[0]}"
            message += " (dlp-plugin --debug COMMAND shows where)"
        Console(stderr=True).print(
            f"[bold red]error:[/] {escape(message)}", highlight=False, soft_wrap=True
        )
        raise typer.Exit(1) from error


def show_log() -> None:
    """Show our own progress and everybody's warnings; of several processes the first's."""
    first = os.environ.get("RANK", "0") == "0"
    logger.remove()
    logger.add(
        sys.stderr,
        level=0,
        format="{level}: {message}",
        filter={"": "WARNING", "dlp_plugin": "INFO" if first else "WARNING"},
    )
