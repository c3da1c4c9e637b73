"""Recover a pruned model: DLP to 70 %, train, merge, 4 bits; what each step costs and loses.

    python examples/recover_with_lora.py                      # the small model shipped here
    python examples/recover_with_lora.py MODEL --train a.txt --test b.txt \
        --steps 2000 --rate 2e-3

Trains in three ways: LoRA as usual, LoRA under the masks, and all weights under the masks.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from loguru import logger
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from rich.table import Table

from dlp_plugin.checkpoints.inspect import zeros_lost
from dlp_plugin.checkpoints.loading import apply_recipe, load_config, load_model, load_tokenizer
from dlp_plugin.evaluation.perplexity import perplexity
from dlp_plugin.evaluation.text import (
    beginning,
    calibrate_on,
    calibration_set,
    read_tokens,
    token_windows,
)
from dlp_plugin.recovery import hold_masks, mask_updates, sparse_merge

HERE = Path(__file__).parent
RECIPES = HERE.parent / "recipes"
SAMPLES = 128
BATCH = 8
LORA = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")


def train(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    tokens: torch.Tensor,
    length: int,
    steps: int,
) -> None:
    """Train on random windows, with a learning rate that falls to zero."""
    generator = torch.Generator().manual_seed(0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    model.train()
    for _ in range(steps):
        starts = torch.randint(len(tokens) - length, (BATCH,), generator=generator).tolist()
        batch = torch.stack([tokens[start : start + length] for start in starts])
        batch = batch.to(model.device)
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default=str(HERE / "small_model"))
    parser.add_argument("--calibration", default=str(HERE / "text" / "calibration.txt"))
    parser.add_argument("--train", help="text to train on; by default that of --calibration")
    parser.add_argument("--test", default=str(HERE / "text" / "test.txt"))
    parser.add_argument("--length", type=int, default=256, help="tokens per sample and window")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--rate", type=float, default=5e-4, help="learning rate of LoRA")
    parser.add_argument("--recipe", type=Path, default=RECIPES / "dlp_refined_wanda.yaml")
    parser.add_argument("--output", type=Path, default=Path("recovered_model"))
    arguments = parser.parse_args()
    if arguments.output.exists():
        parser.error(f"--output {arguments.output} exists already; name another folder")

    logger.disable("llmcompressor.utils.metric_logging")
    logger.remove()  # our progress, and of the others the warnings
    shown = {"": "WARNING", "dlp_plugin": "INFO"}
    logger.add(sys.stderr, level=0, format="{level}: {message}", filter=shown)
    tokenizer = load_tokenizer(arguments.model)
    first = beginning(tokenizer)
    dataset = calibration_set(
        read_tokens(arguments.calibration, tokenizer), arguments.length, SAMPLES, first
    )
    tokens = torch.tensor(read_tokens(arguments.train or arguments.calibration, tokenizer))
    windows = token_windows(read_tokens(arguments.test, tokenizer), arguments.length, first)
    arguments.output.mkdir(parents=True)
    pruned = arguments.output / "pruned"
    table = Table("", "perplexity", "zeros lost", "seconds", title="recovery")

    def apply(recipe: Path, model: str | Path, output: Path) -> None:
        apply_recipe(model, str(recipe), output, **calibrate_on(dataset, tokenizer))

    def save(model: torch.nn.Module, name: str) -> Path:
        model.to(load_config(pruned).dtype)
        model.save_pretrained(arguments.output / name)
        tokenizer.save_pretrained(arguments.output / name)
        return arguments.output / name

    def show(name: str, model: torch.nn.Module | Path, started: float | None = None) -> None:
        """One row; a folder's zeros are compared with the pruned model's."""
        seconds = "" if started is None else f"{time.time() - started:.0f}"
        lost = ""
        if isinstance(model, Path):
            lost, model = f"{sum(zeros_lost(pruned, model).values()):,}", load_model(model)
        table.add_row(name, f"{perplexity(model, windows):.3f}", lost, seconds)

    show("dense", load_model(arguments.model))
    started = time.time()
    apply(arguments.recipe, arguments.model, pruned)
    show("pruned", load_model(pruned), started)

    for name in ("LoRA", "LoRA, masked"):
        torch.manual_seed(0)
        started = time.time()
        adapted = get_peft_model(load_model(pruned).float(), LORA)
        if name == "LoRA, masked":
            mask_updates(adapted)
        adapters = [p for p in adapted.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(adapters, arguments.rate)
        train(adapted, optimizer, tokens, arguments.length, arguments.steps)
        show(f"{name}: trained", adapted, started)
        adapted.save_pretrained(arguments.output / name)
        if name == "LoRA":
            again = PeftModel.from_pretrained(load_model(pruned).float(), arguments.output / name)
            show(f"{name}: merge_and_unload", save(again.merge_and_unload(), "filled"))
        merged = save(sparse_merge(adapted), f"{name}, merged")
        show(f"{name}: sparse_merge", merged)

    packed = arguments.output / "w4a16"
    started = time.time()
    apply(RECIPES / "w4a16.yaml", merged, packed)
    show("LoRA, masked: sparse_merge, W4A16", packed, started)

    started = time.time()
    model = load_model(pruned).float()
    optimizer = torch.optim.AdamW(model.parameters(), arguments.rate / 4)
    hold_masks(model, optimizer)
    train(model, optimizer, tokens, arguments.length, arguments.steps)
    show("all weights, masked", save(model, "all weights"), started)

    Console().print(table)


if __name__ == "__main__":
    main()
