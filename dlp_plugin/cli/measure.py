"""Commands that measure models: ``ppl``, ``zero-shot``, and ``compare`` for many at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from dlp_plugin.cli.common import (
    Column,
    Config,
    Data,
    Ignore,
    Length,
    MeasuredSplit,
    Model,
    Samples,
    Seed,
    Split,
    Targets,
    TestConfig,
    TestSplit,
    TrustRemoteCode,
    WindowLength,
    calibration_arguments,
    checked_length,
    console,
    method_names,
    progress_bar,
    reporting_errors,
)

if TYPE_CHECKING:
    from dlp_plugin.comparison.results import Cell, Comparison

__all__ = ["compare", "ppl", "zero_shot"]

TaskFolder = Annotated[
    Path | None, typer.Option(help="Folder with YAML files of tasks of your own.")
]


def ppl(
    model: Model,
    data: Data,
    config: Config = None,
    split: MeasuredSplit = None,
    column: Column = "text",
    length: WindowLength = None,
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="Windows per batch.", show_default="as many as hold 2,048 tokens"),
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Measure a model's perplexity on a text or dataset.

    The text is cut into windows that do not overlap. Every token except the first of a window
    counts once.
    """
    with reporting_errors(trust_remote_code=trust_remote_code):
        from dlp_plugin.checkpoints.loading import load_model, load_tokenizer
        from dlp_plugin.evaluation.causal import check_causal
        from dlp_plugin.evaluation.finite import check_finite
        from dlp_plugin.evaluation.perplexity import perplexity
        from dlp_plugin.evaluation.text import beginning, read_tokens, token_windows

        length = checked_length(model, length)
        tokenizer = load_tokenizer(model)
        tokens = read_tokens(
            data, tokenizer, config=config, split=split, usual_split="test", column=column
        )
        windows = token_windows(tokens, length, beginning(tokenizer))
        loaded = load_model(model)
        check_causal(loaded, "ppl measures perplexity")
        with progress_bar("Measuring", len(windows)) as advance:
            value = perplexity(loaded, windows, batch_size, advance)
        check_finite(value, f"the perplexity of {model}", loaded)
        console.print(
            f"perplexity {value:.4f} ({len(tokens):,} tokens in {len(windows):,} windows "
            f"of {length})"
        )


def zero_shot(
    model: Model,
    tasks: Annotated[
        list[str],
        typer.Argument(
            help="Tasks of lm-evaluation-harness, separated by commas or spaces, or `paper7`."
        ),
    ],
    batch_size: Annotated[int, typer.Option(min=1, help="Choices per batch.")] = 8,
    limit: Annotated[
        int | None,
        typer.Option(
            min=1, help="Use only so many questions of each task, the first.", show_default="all"
        ),
    ] = None,
    task_folder: TaskFolder = None,
    output: Annotated[Path | None, typer.Option(help="JSON file to write the result to.")] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Measure a model's zero-shot accuracy on tasks.

    `paper7` stands for the seven tasks of the pruning papers: BoolQ, RTE, HellaSwag, WinoGrande,
    ARC easy and challenge, OpenbookQA. The mean over all tasks is shown too. Needs
    the extra `eval`: `pip install '.[eval]'` in a copy of the repository.
    """
    asked = [task for one in tasks for task in one.split(",") if task]
    with reporting_errors(trust_remote_code=trust_remote_code):
        from dlp_plugin.checkpoints.loading import load_model, load_tokenizer
        from dlp_plugin.evaluation.zeroshot import zero_shot as measure
        from dlp_plugin.files import check_writable, replacing

        if output is not None:
            check_writable(output)
        found = measure(
            load_model(model),
            load_tokenizer(model),
            asked,
            batch_size=batch_size,
            limit=limit,
            task_folder=task_folder,
        )
        console.print(_accuracy_table(model, found))
        if output is not None:
            with replacing(output) as beside:
                beside.write_text(json.dumps(found, indent=2) + "\n")


def _accuracy_table(model: str, found: dict[str, dict[str, float]]) -> Table:
    table = Table(title=f"Zero-shot accuracy of {escape(model)}")
    for column in ("task", "acc", "acc_norm"):
        table.add_column(column, justify="right" if table.columns else "left")
    for task, values in found.items():
        if task == "mean":
            table.add_section()
        table.add_row(task, *(_with_error(values, metric) for metric in ("acc", "acc_norm")))
    return table


def _with_error(values: dict[str, float], metric: str) -> str:
    """Format a measured value and its standard error, if there are any."""
    if metric not in values:
        return ""
    error = values.get(f"{metric}_stderr")
    return f"{values[metric]:.4f}" + ("" if error is None else f" ± {error:.4f}")


def compare(
    model: Model,
    data: Data,
    test: Annotated[
        str,
        typer.Option(help="A text or dataset to measure perplexity on.", show_default=False),
    ],
    output: Annotated[
        Path, typer.Option(help="Folder for the results. Results in it are not measured again.")
    ],
    methods: Annotated[
        str,
        typer.Option(
            help=f"Methods, separated by commas: `uniform`, {method_names()}. `dlp:0.1` states the "
            "strength, `dlp:auto` selects it on held-out samples. `dlp-refined` improves the plan "
            "by gradients, `dlp-evolved` by evolution."
        ),
    ] = "uniform,dlp,dlp:auto,owl,alpha-pruning,linear:auto",
    sparsities: Annotated[
        str,
        typer.Option(
            help="Targets, separated by commas. `4:8` is 4 zeros in every 8 weights on average."
        ),
    ] = "0.5,0.6,0.7",
    pruners: Annotated[
        str,
        typer.Option(
            help="Pruning stages, separated by commas: `wanda`, `sparsegpt`, `admm`, `magnitude`. "
            "The suffix `-polished` refits the remaining weights by least squares. "
            "`-reconstructed` trains every block to return the same as the dense block, "
            "`-distilled` the whole model to predict the same as the dense model. Examples: "
            "`wanda-polished`, `sparsegpt-polished-reconstructed-distilled`."
        ),
    ] = "wanda",
    bits: Annotated[
        str,
        typer.Option(
            help="Bits per weight, separated by commas. `16` leaves the weights as they are. `8` "
            "and `4` quantize the pruned models by GPTQ that keeps the zeros, and the dense model "
            "too. `3` and `2` quantize the dense model only."
        ),
    ] = "16",
    sizes: Annotated[
        bool,
        typer.Option(
            help="Also measure megabytes on disk, packed if that is smaller. Always on with "
            "fewer than 16 bits."
        ),
    ] = False,
    refine: Annotated[int, typer.Option(min=1, help="Steps of `-refined`.")] = 16,
    evolve: Annotated[int, typer.Option(min=1, help="Generations of `-evolved`.")] = 40,
    tasks: Annotated[
        str | None,
        typer.Option(help="Also measure accuracy on tasks, as `dlp-plugin zero-shot` names them."),
    ] = None,
    task_folder: TaskFolder = None,
    questions: Annotated[
        int | None,
        typer.Option(
            min=1, help="Use only so many questions of each task, the first.", show_default="all"
        ),
    ] = None,
    windows: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Measure only so many windows of the test text, spread evenly over it.",
            show_default="all",
        ),
    ] = None,
    test_length: Annotated[
        int | None,
        typer.Option(min=2, help="Tokens per window of the test text.", show_default="--length"),
    ] = None,
    write_recipe: Annotated[
        Path | None,
        typer.Option(help="YAML file to write the recipe of the least perplexity to."),
    ] = None,
    sparsity: Annotated[
        str | None,
        typer.Option(
            help="The target of that recipe, one of `--sparsities`.", show_default="the highest"
        ),
    ] = None,
    targets: Targets = None,
    ignore: Ignore = None,
    config: Config = None,
    split: Split = None,
    column: Column = "text",
    test_config: TestConfig = None,
    test_split: TestSplit = None,
    samples: Samples = 128,
    length: Length = None,
    seed: Seed = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Compare methods, sparsities, pruners and bits by perplexity, accuracy and bytes.

    Blocks are scored once for all methods. Repeat the command to continue an interrupted run.
    The folder gets results.json, table.md, perplexity.png and sparsities.png. Refined plans add
    search.png, and sizes add bytes.png. The recipe of `--write-recipe` has the least perplexity
    over the methods, pruners and bits of the command at one sparsity. For a recipe at 4 bits repeat
    the command with `--bits 4`. The recipe contains its plan, and `dlp-plugin oneshot` can run it.
    """
    with reporting_errors(trust_remote_code=trust_remote_code):
        from dlp_plugin.comparison.names import EVERY, Scope
        from dlp_plugin.comparison.pictures import draw
        from dlp_plugin.comparison.run import compare as run
        from dlp_plugin.comparison.view import markdown, table
        from dlp_plugin.comparison.yardstick import Yardstick
        from dlp_plugin.evaluation.text import (
            beginning,
            evenly_spread,
            read_tokens,
            token_windows,
        )
        from dlp_plugin.files import check_writable, replacing
        from dlp_plugin.planning.view import check_drawable

        check_drawable("a comparison")
        aims, best_at = _targets(sparsities, sparsity)
        if write_recipe is not None:
            check_writable(write_recipe)
        calibration = calibration_arguments(
            model, data, config, split, column, length, samples, seed
        )
        tokenizer = calibration["tokenizer"]
        test_length = checked_length(model, test_length or calibration["max_seq_length"])
        tokens = read_tokens(
            test,
            tokenizer,
            config=test_config,
            split=test_split,
            usual_split="test",
            column=column,
        )
        cut = token_windows(tokens, test_length, beginning(tokenizer))
        yardstick = Yardstick(
            cut if windows is None else evenly_spread(cut, windows),
            tasks.split(",") if tasks else (),
            questions,
            task_folder,
        )
        found = run(
            model,
            calibration,
            yardstick,
            output,
            methods=methods.split(","),
            sparsities=aims,
            pruners=pruners.split(","),
            bits=bits.split(","),
            sizes=sizes,
            refine=refine,
            evolve=evolve,
            scope=Scope(tuple(targets or EVERY.targets), tuple(ignore or ())),
            report=_tell,
        )
        console.print(table(found))
        with replacing(output / "table.md") as beside:
            beside.write_text(markdown(found))
        draw(found, output)
        console.print("written:", str(output), markup=False)
        if write_recipe is not None:
            _write_best(found, best_at, write_recipe)


def _targets(sparsities: str, sparsity: str | None) -> tuple[list[str], str | None]:
    """Parse the targets to compare at, and the target of the best recipe.

    :raises ValueError: if the latter is not among the former
    """
    from dlp_plugin.comparison.names import target_named

    targets = [target_named(text) for text in sparsities.split(",")]
    best_at = None if sparsity is None else target_named(sparsity)
    if best_at not in (None, *targets):
        raise ValueError(f"--sparsity {sparsity} is not one of --sparsities {sparsities}")
    return targets, best_at


def _tell(cell: Cell) -> None:
    bits = "" if cell.bits == 16 else f", {cell.bits} bits"
    size = "" if cell.bytes is None else f" in {cell.bytes / 1e6:.2f} MB"
    console.print(
        f"{cell.pruner} {cell.target} {cell.method}{bits}: {cell.perplexity:.4f}{size} "
        f"({cell.seconds:.0f} s)",
        highlight=False,
    )


def _write_best(found: Comparison, target: str | None, path: Path) -> None:
    """Write the best recipe at a target; by default at the highest sparsity."""
    from dlp_plugin.files import replacing

    with replacing(path) as beside:
        beside.write_text(found.recipe(target))
    best = found.best(target)
    bits = "" if best.bits == 16 else f" and {best.bits} bits"
    console.print(
        f"{best.method} at {best.target} with {best.pruner}{bits} written:", str(path), markup=False
    )
