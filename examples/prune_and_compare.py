"""The full job on one model: dense; uniform, DLP, refined DLP at 70 %; 4 bits; the best there is.

    python examples/prune_and_compare.py                      # the small model shipped here
    python examples/prune_and_compare.py MODEL --calibration a.txt --test b.txt

MODEL is a folder or an id on the hub; the texts are files or datasets.
"""

import argparse
import os
import time
from pathlib import Path
from tempfile import TemporaryDirectory

os.environ.setdefault("TQDM_DISABLE", "1")  # no bars; torch imports tqdm, which reads this once

import torch
import yaml
from accelerate.utils import align_module_device
from loguru import logger
from rich.console import Console
from rich.table import Table

from dlp_plugin import last_plans, pack
from dlp_plugin.checkpoints.inspect import inspect_checkpoint, zeros_lost, zstd_bytes
from dlp_plugin.checkpoints.loading import apply_recipe, load_model, load_tokenizer
from dlp_plugin.checkpoints.placing import let_go
from dlp_plugin.cli.log import show_log
from dlp_plugin.cli.speed import speed_table
from dlp_plugin.comparison.results import quantizing
from dlp_plugin.comparison.speeds import cache_bytes, speeds
from dlp_plugin.comparison.storing import group_size_of
from dlp_plugin.evaluation.perplexity import perplexity
from dlp_plugin.evaluation.text import (
    beginning,
    calibrate_on,
    calibration_set,
    read_tokens,
    token_windows,
)
from dlp_plugin.planning.view import plot
from dlp_plugin.planning.view import table as plan_table

HERE = Path(__file__).parent
RECIPES = HERE.parent / "recipes"
SAMPLES = 128
BEST = "dlp_admm_distilled_w4a16.yaml"


def grouped(recipe: str, columns: int) -> str:
    """A recipe of this repository, its 4 bits, if any, in groups of so many columns."""
    stages = yaml.safe_load((RECIPES / recipe).read_text())
    for stage in stages.values():
        for quantizer in stage.get("quantization_modifiers", {}).values():
            written = quantizing(4, columns, distill=quantizer.get("distill", 0))
            stage.update(yaml.safe_load(written)["quantization_stage"])
    return yaml.safe_dump(stages, sort_keys=False)


def sparsity_of(model: torch.nn.Module) -> float:
    """Zeros among the weights of all Linears but the head."""
    head = model.get_output_embeddings()
    linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    zeros = 0
    for linear in linears:
        with align_module_device(linear):  # of a model that is spread over devices
            zeros += int((linear.weight == 0).sum())
    return zeros / sum(linear.weight.numel() for linear in linears)


def show_speed(folder: Path, console: Console) -> None:
    """What zeros gain in time and memory, where weights are read from memory at all."""
    size, cache = inspect_checkpoint(folder).bytes_on_disk, cache_bytes() or 0
    if size < 2 * cache:
        console.print(
            f"speed: not measured, as these {size / 1e6:.0f} MB lie in the processor's cache of "
            f"{cache / 1e6:.0f} MB, where zeros gain nothing; on a larger model: dlp-plugin speed"
        )
    else:
        console.print(speed_table(speeds(folder), folder.name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default=str(HERE / "small_model"))
    parser.add_argument("--calibration", default=str(HERE / "text" / "calibration.txt"))
    parser.add_argument("--test", default=str(HERE / "text" / "test.txt"))
    parser.add_argument("--length", type=int, default=256, help="tokens per sample and window")
    parser.add_argument("--output", type=Path, default=Path("pruned_model"))
    parser.add_argument("--verbose", action="store_true", help="show all that llm-compressor says")
    arguments = parser.parse_args()
    if arguments.output.exists():
        parser.error(f"--output {arguments.output} exists already; name another folder")
    show_log(arguments.verbose)
    columns = group_size_of(arguments.model)
    tokenizer = load_tokenizer(arguments.model)
    tokens = read_tokens(arguments.calibration, tokenizer)
    dataset = calibration_set(tokens, arguments.length, SAMPLES, beginning(tokenizer))
    tokens = read_tokens(arguments.test, tokenizer)
    windows = token_windows(tokens, arguments.length, beginning(tokenizer))

    def apply(
        recipe: str, model: str | Path = arguments.model, output: Path | None = None
    ) -> torch.nn.Module:
        text = grouped(recipe, columns)
        return apply_recipe(model, text, output, **calibrate_on(dataset, tokenizer))

    arguments.output.mkdir(parents=True)
    pruned, quantized, best = (arguments.output / name for name in ("pruned", "w4a16", "best"))
    steps = {
        "dense": lambda: load_model(arguments.model),
        "uniform": lambda: apply("uniform_wanda.yaml"),
        "DLP, alpha 0.15": lambda: apply("dlp_wanda.yaml"),
        "DLP, alpha auto, refined": lambda: apply("dlp_refined_wanda.yaml", output=pruned),
        "the same, loaded": lambda: load_model(pruned),
        "the same + W4A16": lambda: apply("w4a16.yaml", pruned, output=quantized),
        "the same + W4A16, loaded": lambda: load_model(quantized),
        "best: ADMM ... W4A16": lambda: apply(BEST, output=best),
        "the best, loaded": lambda: load_model(best),
    }
    console = Console()
    table = Table("", "zeros", "perplexity", "ratio to dense", "seconds", title="perplexity")
    dense, plan, failed = 0.0, None, ""
    for number, (name, step) in enumerate(steps.items(), 1):
        console.print(f"{number} of {len(steps)}: {name}", highlight=False)
        started = time.time()
        try:
            model = step()
        except ValueError as error:  # such as a model that distillation has no memory for
            failed = f"{name}: {error}"
            break
        seconds = time.time() - started
        value = perplexity(model, windows)
        dense = dense or value
        zeros = sparsity_of(model)
        let_go(model)  # before the next is loaded
        row = f"{zeros:.4f}", f"{value:.3f}", f"{value / dense:.3f}", f"{seconds:.1f}"
        table.add_row(name, *row)
        if name == "DLP, alpha auto, refined":
            (plan,) = last_plans()
            plan.save(arguments.output / "plan.json")
            plot(plan, arguments.output / "plan.png")

    if plan is not None:
        console.print(plan_table(plan))
    console.print(table)
    if failed:
        raise SystemExit(failed)
    sizes = Table("", "MB on disk", "under zstd", "packed", title="sizes")
    folders = {"refined": pruned, "refined + W4A16": quantized, "best": best}
    for name, folder in folders.items():
        parts = [inspect_checkpoint(folder).bytes_on_disk, zstd_bytes(folder)]
        with TemporaryDirectory() as packed:
            try:
                pack(folder, packed)
                parts.append(inspect_checkpoint(packed).bytes_on_disk)
            except ValueError as error:  # such as experts in 4 bits
                logger.warning("{}", error)
        sizes.add_row(name, *(f"{part / 1e6:.2f}" for part in parts))
    lost = sum(zeros_lost(pruned, quantized).values())

    console.print(sizes)
    console.print(f"pruned weights that came back with 4 bits: {lost}")
    show_speed(pruned, console)
    console.print(f"saved in {arguments.output}: pruned/, w4a16/, best/, plan.json, plan.png")


if __name__ == "__main__":
    main()
