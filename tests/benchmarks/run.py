"""What scoring costs: python tests/benchmarks/run.py [--json results.json] [--only PART]

Five parts: the statistic of one large block, its pruning by magnitude, the epochs of the
stages, how the cost of an epoch grows, and a step of training under masks. Ratios of what is
measured side by side in this one run, medians of several rounds. Where there is a CUDA device,
the last three run on it, the epochs on a larger model.
"""

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from compressed_tensors.offload import load_offloaded_model, remove_dispatch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from loguru import logger
from peft import LoraConfig, get_peft_model
from pydantic import PrivateAttr
from rich.console import Console
from rich.table import Table
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
)

from dlp_plugin import DLPModifier, OneShotMagnitudeModifier
from dlp_plugin.evaluation.text import calibration_set, read_tokens
from dlp_plugin.pruning.stages import smallest
from dlp_plugin.recovery import hold_masks, mask_updates
from dlp_plugin.scoring.scores import block_score

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "examples" / "small_model"
TEXT = ROOT / "examples" / "text" / "calibration.txt"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# On a GPU a model of 1.1 billion parameters; on a CPU what ends in minutes.
BLOCKS, WIDTH, TOKENS = (16, 2048, 65536) if torch.cuda.is_available() else (4, 1024, 16384)
LLAMA_2_7B_BLOCK = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]
ROUNDS = 3


def block() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Seven Linears with 202 million bf16 weights, and norms of their channels."""
    generator = torch.Generator().manual_seed(0)
    return {
        f"linear{i}": (
            torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator),
            torch.rand(shape[1], generator=generator) * 10,
        )
        for i, shape in enumerate(LLAMA_2_7B_BLOCK)
    }


def naive(parts: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> float:
    scores = [(w.abs().float() * norms).flatten() for w, norms in parts.values()]
    return torch.cat(scores).median().item()


def read_once(parts: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
    for weight, _ in parts.values():
        weight.view(torch.int64).amax()


def sort(parts: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
    for weight, _ in parts.values():
        order = weight.abs().flatten().float().sort()
        mask = torch.zeros(weight.numel(), dtype=torch.bool)
        mask[order.indices[: int(weight.numel() * 0.7)]] = True


def select(parts: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
    for weight, _ in parts.values():
        smallest(weight, int(weight.numel() * 0.7))


STATISTIC: dict[str, Callable] = {
    "naive": naive,
    "median": block_score,
    "mean": lambda parts: block_score(parts, "mean"),
    "read once": read_once,
}
MAGNITUDE: dict[str, Callable] = {"sorting": sort, "OneShotMagnitudeModifier": select}
WAYS = STATISTIC | MAGNITUDE


def peak_megabytes(way: str) -> float:
    """Peak memory beyond the weights, in a process of its own."""
    command = [sys.executable, __file__, "--peak", way]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return float(output.split()[-1])


def measure_peak(way: str) -> None:
    parts = block()
    before = reset_peak()
    WAYS[way](parts)
    print(peak() - before)


def reset_peak() -> float:
    """Make this process's peak memory start anew (Linux); what it holds now, in MB."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def peak() -> float:
    """Peak memory of this process since it was last reset, in MB."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status).group(1)) / 1024


def statistic() -> dict[str, dict[str, float]]:
    parts = block()
    assert block_score(parts) == naive(parts)
    return side_by_side(STATISTIC, parts)


def magnitude() -> dict[str, dict[str, float]]:
    return side_by_side(MAGNITUDE, block())


def side_by_side(ways: dict[str, Callable], parts: dict) -> dict[str, dict[str, float]]:
    times: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(ROUNDS):
        for way, call in ways.items():
            started = time.perf_counter()
            call(parts)
            times[way].append(time.perf_counter() - started)
    seconds = {way: statistics.median(values) for way, values in times.items()}
    return {
        way: {
            "seconds": seconds[way],
            "peak megabytes": peak_megabytes(way),
        }
        for way in ways
    }


def training(steps: int = 8) -> dict[str, dict[str, float]]:
    """Seconds of one step of training the shipped model at 70 %, on 8 windows of 256 tokens."""
    ids = torch.tensor(samples(8, 256)["input_ids"]).to(DEVICE)
    updates = {}
    for way in ("LoRA", "LoRA, masked", "DoRA", "DoRA, masked", "all weights", "all, held"):
        model: Any = oneshot(
            model=AutoModelForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32),
            recipe=[OneShotMagnitudeModifier(sparsity=0.7, ignore=["re:.*lm_head"])],
            tokenizer=AutoTokenizer.from_pretrained(SHIPPED),
        )
        model = remove_dispatch(model).to(DEVICE)
        if "RA" in way:
            config = LoraConfig(r=16, target_modules="all-linear", use_dora="DoRA" in way)
            model = get_peft_model(model, config)
        if "masked" in way:
            mask_updates(model)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3)
        if "held" in way:
            hold_masks(model, optimizer)
        updates[way] = model, optimizer
    times: dict[str, list[float]] = {way: [] for way in updates}
    for _ in range(steps):
        for way, (model, optimizer) in updates.items():
            started = time.perf_counter()
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            finish()
            times[way].append(time.perf_counter() - started)
    return {way: {"seconds": statistics.median(values)} for way, values in times.items()}


class Stamp(Modifier):
    """Notes the time between two epochs."""

    _time: float = PrivateAttr(default=0.0)

    def on_initialize(self, state, **kwargs) -> bool:
        return True

    def on_calibration_start(self, state, event, **kwargs) -> None:
        self._time = time.perf_counter()


def widened(folder: Path, blocks: int, width: int) -> None:
    """Save a random model of the shipped one's architecture at another size."""
    shipped = AutoConfig.from_pretrained(SHIPPED)
    factor = width // shipped.hidden_size
    config = LlamaConfig(
        vocab_size=shipped.vocab_size,
        hidden_size=width,
        intermediate_size=shipped.intermediate_size * factor,
        num_hidden_layers=blocks,
        num_attention_heads=max(shipped.num_attention_heads * factor // 4, 2),
        num_key_value_heads=max(shipped.num_key_value_heads * factor // 4, 1),
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    AutoTokenizer.from_pretrained(SHIPPED).save_pretrained(folder)


def samples(count: int, length: int) -> Dataset:
    tokens = read_tokens(TEXT, AutoTokenizer.from_pretrained(SHIPPED))
    return calibration_set(tokens * (count * length // len(tokens) + 1), length, count)


@torch.no_grad()
def bare_forward(folder: Path, dataset: Dataset) -> float:
    """Seconds of one pass through embedding and blocks, by nothing but the model."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", attn_implementation="eager"
    ).model.to(DEVICE)
    ids = torch.tensor(dataset["input_ids"]).to(DEVICE)
    model(ids[:1], use_cache=False)
    finish()
    started = time.perf_counter()
    for row in ids:
        model(row[None], use_cache=False)
    finish()
    return time.perf_counter() - started


def finish() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def epochs(folder: Path, dataset: Dataset, work: dict[str, Modifier]) -> dict[str, float]:
    """Seconds of each modifier's epoch, in one run of the real ``oneshot()``."""
    stamps = [Stamp() for _ in range(len(work) + 1)]
    recipe: list[Modifier] = [stamps[0]]
    for modifier, stamp in zip(work.values(), stamps[1:], strict=True):
        recipe += [modifier, stamp]
    oneshot(
        model=str(folder),
        recipe=recipe,
        dataset=dataset,
        tokenizer=AutoTokenizer.from_pretrained(SHIPPED),
        num_calibration_samples=len(dataset),
        max_seq_length=len(dataset[0]["input_ids"]),
        shuffle_calibration_samples=False,
    )
    times = [stamp._time for stamp in stamps]
    return {name: end - start for name, start, end in zip(work, times, times[1:], strict=False)}


def stages(folder: Path, dataset: Dataset, pruners: bool = True) -> dict[str, float]:
    """Median seconds of the DLP, Wanda and SparseGPT epochs and of a bare forward pass.

    SparseGPT, whose minutes go to inverting Hessians, runs in the first round only.
    """
    stage = {"sparsity": 0.7, "targets": ["Linear"], "ignore": ["re:.*lm_head"]}
    rounds = []
    with TemporaryDirectory() as plans:
        for number in range(ROUNDS):
            seconds = {"bare forward pass": bare_forward(folder, dataset)}
            work = {"DLP": DLPModifier(sparsity=0.7, plan_path=f"{plans}/plan.json")}
            if pruners:
                work["Wanda"] = WandaPruningModifier(**stage)
            if pruners and number == 0:
                work["SparseGPT"] = SparseGPTModifier(**stage)
            rounds.append(seconds | epochs(folder, dataset, work))
    return {
        name: statistics.median(one[name] for one in rounds if name in one) for name in rounds[0]
    }


def stages_by_length() -> dict[str, dict[str, float]]:
    """The epochs on the shipped model, and on one of width 1,024 at three lengths."""
    results = {"shipped, 128 x 256": stages(SHIPPED, samples(128, 256))}
    with TemporaryDirectory() as folder:
        widened(Path(folder), BLOCKS, WIDTH)
        for length in (128, 512, 2048):
            count = TOKENS // length
            results[f"width {WIDTH}, {count} x {length}"] = stages(
                Path(folder), samples(count, length)
            )
        results[f"width {WIDTH}, 128 x 512"] = stages(Path(folder), samples(128, 512), False)
    return results


def growth() -> dict[str, dict[str, float]]:
    """The DLP epoch alone as one of blocks, width and samples grows, weights on disk."""
    results = {}
    for name, sizes in {
        "start: 2 blocks, width 512, 8 samples": (2, 512, 8),
        "blocks x 2": (4, 512, 8),
        "blocks x 4": (8, 512, 8),
        "samples x 2": (2, 512, 16),
        "samples x 4": (2, 512, 32),
        "width x 2": (2, 1024, 8),
    }.items():
        blocks, width, count = sizes
        with TemporaryDirectory() as folder:
            widened(Path(folder), blocks, width)
            command = [sys.executable, __file__, "--growth", folder, str(count)]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        results[name] = json.loads(output.splitlines()[-1])
    return results


def measure_growth(folder: str, count: int) -> None:
    """One DLP epoch on a model that stays on disk; prints seconds and peak memory as JSON."""
    logger.remove()
    with load_offloaded_model(), TemporaryDirectory() as offload:
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype="auto",
            device_map="auto_offload",
            max_memory={"cpu": 1 << 20},
            offload_folder=offload,
        )
        size = sum(p.numel() * p.itemsize for p in model.parameters()) / 2**20
        dataset, plan = samples(count, 256), Path(folder) / "plan.json"
        seconds, peaks = [], []
        for _ in range(ROUNDS + 1):  # the first one warms up
            before = reset_peak()
            if torch.accelerator.is_available():
                torch.accelerator.reset_peak_memory_stats()
            started = time.perf_counter()
            oneshot(
                model=model,
                recipe=[DLPModifier(sparsity=0.7, plan_path=str(plan))],
                dataset=dataset,
                tokenizer=AutoTokenizer.from_pretrained(SHIPPED),
                shuffle_calibration_samples=False,
            )
            seconds.append(time.perf_counter() - started)
            peaks.append(peak() - before)
    result = {
        "seconds": statistics.median(seconds[1:]),
        "model megabytes": size,
        "peak megabytes": peaks[0],
    }
    if torch.accelerator.is_available():
        result["peak accelerator megabytes"] = torch.accelerator.max_memory_allocated() / 2**20
    print(json.dumps(result))


def show(console: Console, title: str, results: dict[str, dict[str, float]], base: str) -> None:
    """One row per result, one column per quantity, and its ratio to the base."""
    names = list(next(iter(results.values())))
    if base in names:  # ratios within a row
        table = Table("", *names, title=title)
        for row, found in results.items():
            cells = [
                f"{found[n]:.2f} s ({found[n] / found[base]:.2f})" if n in found else ""
                for n in names
            ]
            table.add_row(row, *cells)
    else:  # ratios of the first column to a row's
        table = Table("", *names, f"to {base}", title=title)
        for row, found in results.items():
            ratio = found["seconds"] / results[base]["seconds"]
            table.add_row(row, *(f"{value:.2f}" for value in found.values()), f"{ratio:.2f}")
    console.print(table)


PARTS = {
    "statistic": statistic,
    "magnitude": magnitude,
    "stages": stages_by_length,
    "growth": growth,
    "training": training,
}
BASES = {
    "statistic": "naive",
    "magnitude": "sorting",
    "stages": "bare forward pass",
    "training": "LoRA",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="file to write the results to")
    parser.add_argument("--only", choices=PARTS, help="one part of the suite")
    parser.add_argument("--peak", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--growth", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak:
        return measure_peak(arguments.peak)
    if arguments.growth:
        return measure_growth(arguments.growth[0], int(arguments.growth[1]))
    logger.remove()
    console = Console()
    machine = f"{processor()}, {os.cpu_count()} cores, torch {torch.__version__}"
    if torch.cuda.is_available():
        machine += f", {torch.cuda.get_device_name()}"
    results: dict[str, object] = {"machine": machine}
    for part in [arguments.only] if arguments.only else PARTS:
        found = results[part] = PARTS[part]()
        show(console, part, found, BASES.get(part, next(iter(found))))
    console.print(machine)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


def processor() -> str:
    """The processor's name (Linux)."""
    names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    main()
