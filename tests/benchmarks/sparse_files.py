"""How small packed folders are, and how fast they load: python tests/benchmarks/sparse_files.py

Sizes on the shipped model, pruned by magnitude within every row; decoding of one large matrix on
one thread; and loading of a larger model by transformers, each in a process of its own, packed
beside what it was packed from, from files that the system has in memory.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from common import ROUNDS, SHIPPED, peak, reset_peak
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from loguru import logger
from record import add, here
from rich.console import Console
from rich.table import Table
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CompressedTensorsConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from dlp_plugin import SparseConfig
from dlp_plugin.checkpoints.files import bytes_on_disk
from dlp_plugin.checkpoints.inspect import zstd_bytes
from dlp_plugin.checkpoints.packing import pack
from dlp_plugin.checkpoints.sparse_format import decode, encode, encode_integers

SPARSITIES: tuple[float | str, ...] = (0.5, 0.6, 0.7, 0.8, "2:4")
GROUP = 128
PAGE = 1024  # weights; no page of memory holds fewer
KINDS = ("bfloat16", "4 bits")
LLAMA = {
    "vocab_size": 4096,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
}


def prune_rows(weight: torch.Tensor, sparsity: float | str) -> None:
    """Zero the smallest of every row, or of every four where it is 2:4."""
    groups = weight.unflatten(1, (-1, 4)) if sparsity == "2:4" else weight
    count = round((0.5 if sparsity == "2:4" else sparsity) * groups.shape[-1])
    smallest = groups.abs().float().argsort(dim=-1, stable=True)[..., :count]
    groups.scatter_(-1, smallest, 0)


def save(
    model: PreTrainedModel, folder: Path, sparsity: float | str, bits: str, group: int = GROUP
) -> None:
    """Prune a model's blocks and save it, in 4 bits by rounding if asked to."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "layers" in name:
            prune_rows(module.weight.data, sparsity)
    if bits == "4 bits":
        args = QuantizationArgs(num_bits=4, strategy="group", group_size=group)
        scheme = QuantizationScheme(targets=["Linear"], weights=args)
        modifier = QuantizationModifier(ignore=["lm_head"], config_groups={"group_0": scheme})
        oneshot(model=model, recipe=modifier, tokenizer=AutoTokenizer.from_pretrained(SHIPPED))
    model.save_pretrained(folder)


def sizes(model: str = SHIPPED, group: int = GROUP) -> dict[str, dict[str, float]]:
    """Files of a model in MB, and bits per weight of its pruned Linears."""
    results = {}
    for bits in KINDS:
        for sparsity in SPARSITIES:
            with tempfile.TemporaryDirectory() as folder:
                source, packed = Path(folder) / "source", Path(folder) / "packed"
                save(AutoModelForCausalLM.from_pretrained(model), source, sparsity, bits, group)
                found = pack(source, packed)
                row = sparsity if isinstance(sparsity, str) else f"{sparsity:.0%}"
                results[f"{bits}, {row}"] = {
                    "plain MB": bytes_on_disk(source) / 1e6,
                    "under zstd MB": zstd_bytes(source) / 1e6,
                    "packed MB": bytes_on_disk(packed) / 1e6,
                    "plain bits": 8 * found.bytes_before / found.weights,
                    "packed bits": 8 * found.bytes_after / found.weights,
                    "of bfloat16": found.bytes_after / (2 * found.weights),
                }
    return results


def decoding() -> dict[str, dict[str, float]]:
    """GB of dense weight a second on one thread, of a matrix of 4096 x 4096."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    normal, results = torch.randn(4096, 4096), {}
    for sparsity in (0.5, 0.7):
        pruned = normal.clone()
        prune_rows(pruned, sparsity)
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            weight = pruned.to(dtype)
            stored, parts = encode(weight)
            results[f"{str(dtype).removeprefix('torch.')}, {sparsity:.0%}"] = {
                "decoded GB/s": rate(weight.nbytes, lambda s=stored, p=parts: decode(s, p)),
                "encoded GB/s": rate(weight.nbytes, lambda w=weight: encode(w)),
                "copied GB/s": rate(weight.nbytes, weight.clone),
            }
        for bits in (4, 8):
            middle = 1 << bits - 1
            integers = (pruned * middle / 4).round().clamp(-middle, middle - 1) + middle
            arguments = (integers.to(torch.uint8), torch.rand(4096, 4096 // GROUP).bfloat16(), None)
            again = {"bits": bits, "group_size": GROUP}
            stored, parts = encode_integers(*arguments, **again)
            size = 2 * normal.numel()
            results[f"{bits} bits to bfloat16, {sparsity:.0%}"] = {
                "decoded GB/s": rate(size, lambda s=stored, p=parts: decode(s, p)),
                "encoded GB/s": rate(size, lambda a=arguments, b=again: encode_integers(*a, **b)),
                "copied GB/s": rate(size, normal.bfloat16().clone),
            }
    return results


def rate(size: int, action: Callable[[], object]) -> float:
    """GB a second, the median of several rounds after one that warms up."""
    seconds = []
    for _ in range(ROUNDS + 1):
        started = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - started)
    return size / statistics.median(seconds[1:]) / 1e9


def loading() -> dict[str, dict[str, float]]:
    """Seconds and memory of ``from_pretrained()`` and of touching every page, at 70 %."""
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for bits in KINDS:
            torch.manual_seed(0)
            model = LlamaForCausalLM(LlamaConfig(**LLAMA)).bfloat16()
            source = Path(folder) / bits
            model.config.save_pretrained(Path(folder) / "origin")
            model.config.name_or_path = model.name_or_path = str(Path(folder) / "origin")
            save(model, source, 0.7, bits)
            pack(source, source.with_name(f"{bits}, packed"))
            del model
            for each in (source, source.with_name(f"{bits}, packed")):
                rows = [measured(each) for _ in range(ROUNDS)]
                results[each.name] = {
                    "seconds": statistics.median(row[0] for row in rows),
                    "model MB": rows[0][1],
                    "peak MB": statistics.median(row[2] for row in rows),
                    "file MB": bytes_on_disk(each) / 1e6,
                }
    return results


def measured(folder: Path) -> tuple[float, ...]:
    """Loading in a process of its own: seconds, size of the model, and peak above the start."""
    command = [sys.executable, __file__, "--load", str(folder)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return tuple(float(number) for number in done.stdout.splitlines()[-1].split())


def load(folder: str) -> None:
    """Load a dense model, and print what :func:`measured` reads; 4 bits as bfloat16."""
    again = {}
    if folder.endswith("packed"):
        again = {"quantization_config": SparseConfig(dequantize=True)}
    elif Path(folder).name == "4 bits":
        again = {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    AutoModelForCausalLM.from_pretrained(SHIPPED)  # what is imported on the way
    before = reset_peak()
    started = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(folder, **again)
    for parameter in model.parameters():  # dense ones are read when they are used
        parameter.detach().flatten()[::PAGE].sum()
    seconds = time.perf_counter() - started
    size = sum(parameter.nbytes for parameter in model.parameters())
    print(seconds, size / 1e6, (peak() - before) * 1.048576)


def show(title: str, results: dict[str, dict[str, float]]) -> Table:
    """One row per result, one column per quantity."""
    table = Table("", *next(iter(results.values())), title=title)
    for row, found in results.items():
        table.add_row(row, *(f"{value:.3f}" for value in found.values()))
    return table


PARTS = {"sizes": sizes, "decoding": decoding, "loading": loading}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="file to add the results to")
    parser.add_argument("--only", choices=PARTS)
    parser.add_argument("--model", help="the sizes of another one, 4 bits in groups of 64")
    parser.add_argument("--load", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    logger.remove()
    if arguments.load:
        load(arguments.load)
        return
    console = Console(width=110)
    if arguments.model:
        facts, results = here(), sizes(arguments.model, 64)
        console.print(show("sizes", results))
        if arguments.json:
            add(arguments.json, {"sparse files: a real model": {**facts, "results": results}})
        return
    for part in [arguments.only] if arguments.only else PARTS:
        facts, results = here(), PARTS[part]()
        console.print(show(part, results))
        if arguments.json:
            add(arguments.json, {f"sparse files: {part}": {**facts, "results": results}})


if __name__ == "__main__":
    main()
