"""Code that the commands share: the app, option types, calibration, progress bars and errors."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from dlp_plugin.checkpoints.trust import trusting_remote_code
from dlp_plugin.cli.log import show_log
from dlp_plugin.planning.methods import options

__all__ = [
    "Column",
    "Config",
    "Data",
    "Ignore",
    "Length",
    "MaskStructure",
    "MeasuredSplit",
    "Model",
    "Samples",
    "Seed",
    "Split",
    "Targets",
    "TestConfig",
    "TestSplit",
    "TrustRemoteCode",
    "WindowLength",
    "app",
    "calibration_arguments",
    "checked_length",
    "console",
    "joined_processes",
    "method_names",
    "progress_bar",
    "reporting_errors",
]

app = typer.Typer(
    help=(
        "Prune language models inside llm-compressor, with a separate sparsity for every block "
        "(DLP).\n\n"
        "A run in three steps: `dlp-plugin oneshot` prunes a model by a recipe and "
        "saves it. `dlp-plugin inspect` counts the zeros that were written. `dlp-plugin ppl` and "
        "`zero-shot` measure the model. `score` makes a plan without pruning, and `show` prints "
        "it. `compare` finds the best method for a model.\n\n"
        "`dlp-plugin --debug COMMAND ...` shows the traceback of an error. `dlp-plugin --verbose "
        "COMMAND ...` shows the log of llm-compressor."
    ),
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
console = Console()

Model = Annotated[str, typer.Argument(help="A model id on the hub, or a local folder.")]
Data = Annotated[
    str,
    typer.Option(
        "--data",
        "--dataset",
        help="A text, a data file (.jsonl, .csv, .parquet ...), a folder of such files, or the "
        "name of a dataset on the hub or in llm-compressor (`open_platypus`).",
        show_default=False,
    ),
]
_CONFIG = "The configuration of the dataset of `{}`, e.g. `wikitext-2-raw-v1`."
Config = Annotated[
    str | None,
    typer.Option("--config", "--dataset-config-name", help=_CONFIG.format("--data")),
]
TestConfig = Annotated[str | None, typer.Option(help=_CONFIG.format("--test"))]
_SPLIT = "The split of the dataset of `{}`. Not needed for a file or a folder with one split."
Split = Annotated[str | None, typer.Option(help=_SPLIT.format("--data"), show_default="train")]
MeasuredSplit = Annotated[
    str | None, typer.Option(help=_SPLIT.format("--data"), show_default="test")
]
TestSplit = Annotated[str | None, typer.Option(help=_SPLIT.format("--test"), show_default="test")]
Column = Annotated[
    str,
    typer.Option(
        "--column",
        "--text-column",
        help="A dataset's column of texts or of chats. Chats go through the chat template.",
    ),
]
Samples = Annotated[
    int,
    typer.Option(
        "--samples",
        "--num-calibration-samples",
        min=1,
        help="Number of calibration samples, spread evenly over the text. (`oneshot()` in Python "
        "takes 512 rows in random order by default.)",
    ),
]
Seed = Annotated[
    int | None,
    typer.Option(help="Seed to draw the samples at random instead of evenly."),
]
Targets = Annotated[
    list[str] | None,
    typer.Option(
        help="Modules to prune: a class, a name or a `re:` pattern. May be repeated.",
        show_default="Linear",
    ),
]
Ignore = Annotated[
    list[str] | None,
    typer.Option(help="Modules to leave dense: a name or a `re:` pattern. May be repeated."),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run code that comes with the model. Read it first."),
]
MaskStructure = Annotated[
    str | None,
    typer.Option(help="Plan for an N:M pattern: `4:8` is 4 zeros in every 8 weights on average."),
]
_USUAL_LENGTH = "what the model can take, at most 2048"
Length = Annotated[
    int | None,
    typer.Option(
        "--length",
        "--max-seq-length",
        min=2,
        help="Tokens per sample. (`oneshot()` in Python takes rows at their full length by "
        "default.)",
        show_default=_USUAL_LENGTH,
    ),
]
WindowLength = Annotated[
    int | None,
    typer.Option(
        "--length",
        "--max-seq-length",
        min=2,
        help="Tokens per window.",
        show_default=_USUAL_LENGTH,
    ),
]


def method_names() -> str:
    """List the allocation methods for a help text."""
    return ", ".join(f"`{name}`" for name in options())


@dataclass
class _Settings:
    """Options that come before the command, and apply to all commands."""

    debug: bool = False
    verbose: bool = False


_settings = _Settings()


@app.callback()
def _take_options(
    debug: Annotated[bool, typer.Option(help="Show the traceback of an error.")] = False,
    verbose: Annotated[
        bool,
        typer.Option(help="Show the log and progress bars of llm-compressor and other packages."),
    ] = False,
) -> None:
    _settings.debug = debug
    _settings.verbose = verbose


def calibration_arguments(
    model: str,
    data: str,
    config: str | None,
    split: str | None,
    column: str,
    length: int | None,
    samples: int,
    seed: int | None,
) -> dict[str, Any]:
    """Make the calibration data, as arguments of llm-compressor's ``oneshot()``.

    With several processes each gets its share of the samples.

    :param model: a local folder, or an id on the hub
    :param data: a text, a data file, a folder or a dataset
    :param config: the dataset's configuration
    :param split: the dataset's split
    :param column: the dataset's column that holds the text
    :param length: tokens per sample; None for the default of :func:`checked_length`
    :param samples: number of samples, over all processes
    :param seed: if given, samples are drawn at random
    :return: keyword arguments
    :raises ValueError: if the data does not suit, or the model has no embedding for a token
    """
    from compressed_tensors.distributed import is_distributed
    from torch import distributed as dist

    from dlp_plugin.checkpoints.loading import load_config, load_tokenizer
    from dlp_plugin.evaluation.text import (
        beginning,
        calibrate_on,
        calibration_set,
        read_tokens,
    )
    from dlp_plugin.evaluation.vocabulary import check_vocabulary

    length = checked_length(model, length)
    tokenizer = load_tokenizer(model)
    # A file is read whole, so that its samples spread over it. A dataset is read as far as needed,
    # and eight times as far if samples are drawn at random.
    wanted = samples * length * (1 if seed is None else 8)
    limit = None if Path(data).is_file() else wanted
    tokens = read_tokens(data, tokenizer, config=config, split=split, column=column, limit=limit)
    check_vocabulary(max(tokens), load_config(model).get_text_config().vocab_size, model)
    dataset = calibration_set(tokens, length, samples, beginning(tokenizer), seed)
    if is_distributed():
        dataset = dataset.shard(num_shards=dist.get_world_size(), index=dist.get_rank())
    return calibrate_on(dataset, tokenizer)


def checked_length(model: str, length: int | None) -> int:
    """Choose the number of tokens per sample or window.

    :param model: a local folder, or an id on the hub
    :param length: the user's choice; None for the model's positions, at most 2048
    :return: tokens
    :raises ValueError: if the model has fewer positions than ``length``
    """
    from dlp_plugin.checkpoints.loading import load_config

    config = load_config(model).get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    if length is None:
        return min(2048, positions or 2048)
    if positions and length > positions:
        raise ValueError(
            f"--length {length} is more than the {positions} positions of {model}: give at most "
            f"{positions}"
        )
    return length


@contextmanager
def progress_bar(what: str, total: float) -> Iterator[Callable[[float], None]]:
    """Show a progress bar.

    :param what: description of the work
    :param total: amount of the work
    :return: a function that advances the bar by an amount
    """
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
def joined_processes() -> Iterator[bool]:
    """Join the other processes of a torchrun.

    :return: whether this is the first or only process
    :raises ValueError: if there are more processes than accelerators
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield True
        return
    import torch
    from compressed_tensors.distributed import init_dist, is_source_process
    from torch import distributed as dist

    if torch.accelerator.is_available():
        asked, there = int(os.environ["LOCAL_WORLD_SIZE"]), torch.accelerator.device_count()
        if asked > there:
            raise ValueError(
                f"torchrun started {asked} processes, but this machine has {there} accelerators: "
                f"start at most {there} (--nproc-per-node {there})"
            )
        init_dist()
    else:
        dist.init_process_group("gloo")
    try:
        yield is_source_process()
    finally:
        dist.destroy_process_group()


@contextmanager
def reporting_errors(host: bool = True, trust_remote_code: bool = False) -> Iterator[None]:
    """Set up the log (:func:`dlp_plugin.cli.log.show_log`), and print errors as one message.

    :param host: whether the command needs llm-compressor
    :param trust_remote_code: whether code that comes with a model may run
    :raises typer.Exit: with code 1, after printing an error
    """
    try:
        show_log(_settings.verbose, host)
        with trusting_remote_code(trust_remote_code):
            yield
    except typer.Exit:
        raise
    except Exception as error:
        if _settings.debug:
            raise
        Console(stderr=True).print(
            f"[bold red]error:[/] {escape(_message(error))}", highlight=False, soft_wrap=True
        )
        raise typer.Exit(1) from error


def _message(error: Exception) -> str:
    """Write an error as one message; errors that the user cannot fix get the name of their type."""
    message = str(error).strip() or type(error).__name__
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        field = ".".join(str(part) for part in (error.title, *first["loc"]))
        message = f"{field}: {first['msg'].removeprefix('Value error, ')}"
    if not isinstance(error, (ValueError, OSError, ImportError)):
        message = f"{type(error).__name__}: {message.splitlines()[0]}"
        message += " (dlp-plugin --debug COMMAND shows where)"
    return message
