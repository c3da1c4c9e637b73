"""What masking GPTQ keeps, gains and costs: python tests/benchmarks/masked_gptq.py

Three tables on the shipped model: zeros lost, perplexity after pruning and 4 bits, and
time and memory against the stock modifier, side by side in this one run.
"""

import argparse
import itertools
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from common import SHIPPED, TEST_TEXT, Stamp, peak, reset_peak, samples
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.gptq import GPTQModifier
from loguru import logger
from record import add, here
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import dlp_plugin
from dlp_plugin import MaskedGPTQModifier
from dlp_plugin.comparison.names import pruner_named
from dlp_plugin.evaluation.perplexity import perplexity
from dlp_plugin.evaluation.text import read_tokens, token_windows

TOKENIZER = AutoTokenizer.from_pretrained(SHIPPED)
KINDS = {"stock": GPTQModifier, "masked": MaskedGPTQModifier}
PRUNERS = ("wanda", "sparsegpt", "sparsegpt-polished", "admm", "admm-reconstructed")
ROUNDS = 5


def run(model: torch.nn.Module, recipe: list[Modifier], dataset: Dataset) -> torch.nn.Module:
    return oneshot(
        model=model,
        recipe=recipe,
        dataset=dataset,
        tokenizer=TOKENIZER,
        num_calibration_samples=len(dataset),
        shuffle_calibration_samples=False,
    )


def load(weights: dict[str, torch.Tensor] | None = None) -> torch.nn.Module:
    model = AutoModelForCausalLM.from_pretrained(SHIPPED, dtype="auto")
    if weights is not None:
        model.load_state_dict(weights)
    return model


def linears(model: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    found = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    return {name: linear for name, linear in found.items() if name != "lm_head"}


def pruned(pruner: str, sparsity: float, structure: str, dataset: Dataset) -> dict:
    chosen = pruner_named(pruner)
    stage = getattr(dlp_plugin, chosen.modifier)(
        sparsity=sparsity,
        mask_structure=structure,
        targets=["Linear"],
        ignore=["re:.*lm_head"],
        **chosen.fields,
    )
    return run(load(), [stage], dataset).state_dict()


def masks_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: linear.weight == 0 for name, linear in linears(model).items()}


def came_back(model: torch.nn.Module, masks: dict[str, torch.Tensor]) -> float:
    """Share of the pruned weights that are zero no longer."""
    back = sum(int((m.weight[masks[n]] != 0).sum()) for n, m in linears(model).items())
    return back / sum(int(mask.sum()) for mask in masks.values())


def quantizer(kind: type, bits: int, symmetric: bool, group: int | None, actorder: str | None):
    weights = QuantizationArgs(
        num_bits=bits,
        symmetric=symmetric,
        strategy="channel" if group is None else "group",
        group_size=group,
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    return kind(config_groups={"group_0": scheme}, ignore=["lm_head"], actorder=actorder)


def zeros_lost() -> list[dict]:
    dataset = samples(16, 256)
    schemes = {
        "W4 group 128": (4, True, 128),
        "W4 group 128 asymmetric": (4, False, 128),
        "W4 channel": (4, True, None),
        "W8 channel": (8, True, None),
    }
    rows = []
    for pruner, structure in itertools.product(("wanda", "sparsegpt"), ("0:0", "2:4")):
        weights = pruned(pruner, 0.7 if structure == "0:0" else 0.5, structure, dataset)
        for (scheme, args), actorder in itertools.product(
            schemes.items(), (None, "static", "weight")
        ):
            if args[2] is None and actorder == "weight":
                continue
            row = {
                "pruner": pruner,
                "structure": "70 %" if structure == "0:0" else structure,
                "scheme": scheme,
                "ordering": actorder or "none",
            }
            for name, kind in KINDS.items():
                model = load(weights)
                masks = masks_of(model)
                run(model, [quantizer(kind, *args, actorder)], dataset)
                row[name] = came_back(model, masks)
            rows.append(row)
    return rows


def perplexities() -> list[dict]:
    dataset = samples(128, 256)
    tokens = read_tokens(TEST_TEXT, TOKENIZER)
    windows = token_windows(tokens, 256)
    rows = [{"pruner": "", "sparsity": 0.0, "pruned": perplexity(load(), windows)}]
    for pruner, sparsity in itertools.product(PRUNERS, (0.5, 0.7)):
        weights = pruned(pruner, sparsity, "0:0", dataset)
        row = {
            "pruner": pruner,
            "sparsity": sparsity,
            "pruned": perplexity(load(weights), windows),
        }
        for name, kind in KINDS.items():
            model = load(weights)
            masks = masks_of(model)
            run(model, [quantizer(kind, 4, True, 128, "static")], dataset)
            row[name] = perplexity(model, windows)
            row[f"{name}, came back"] = came_back(model, masks)
            if name == "stock":
                with torch.no_grad():
                    for module, linear in linears(model).items():
                        linear.weight[masks[module]] = 0
                row["stock, masked again"] = perplexity(model, windows)
        rows.append(row)
    return rows


def one_epoch(kind: type, folder: str) -> tuple[float, float]:
    """Seconds of one epoch on two blocks of width 1,024, and the process's peak in MB."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    config.save_pretrained(folder)
    model.config.name_or_path = model.name_or_path = folder
    with torch.no_grad():
        for linear in linears(model).values():
            linear.weight[torch.rand(linear.weight.shape) < 0.7] = 0
    start, end = Stamp(), Stamp()
    dataset = samples(16, 256)
    reset_peak()
    run(model, [start, quantizer(kind, 4, True, 128, "static"), end], dataset)
    return end._time - start._time, peak()


def cost() -> dict[str, dict[str, float]]:
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in KINDS}
    for _ in range(ROUNDS):
        for name in KINDS:
            command = [sys.executable, __file__, "--epoch", name]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            seconds, megabytes = output.split()[-2:]
            found[name].append((float(seconds), float(megabytes)))
    return {
        name: {
            "seconds": statistics.median(seconds for seconds, _ in values),
            "peak_megabytes": statistics.median(megabytes for _, megabytes in values),
        }
        for name, values in found.items()
    }


def show_zeros(rows: list[dict]) -> Table:
    keys = ["pruner", "structure", "scheme", "ordering"]
    table = Table(*keys, *KINDS, title="pruned weights that came back")
    for row in rows:
        table.add_row(*(row[key] for key in keys), *(f"{row[name]:.2%}" for name in KINDS))
    return table


def show_perplexities(rows: list[dict]) -> Table:
    columns = ["pruned", "stock", "stock, masked again", "masked"]
    lost = [f"{name}, came back" for name in KINDS]
    table = Table("pruner", "sparsity", *columns, *lost, title="perplexity, W4A16 group 128")
    for row in rows:
        values = [f"{row[name]:.2f}" if name in row else "" for name in columns]
        values += [f"{row[name]:.1%}" if name in row else "" for name in lost]
        table.add_row(row["pruner"], f"{row['sparsity']:.0%}", *values)
    return table


def show_cost(rows: dict[str, dict[str, float]]) -> Table:
    table = Table("", "seconds", "peak MB", title="one epoch, two blocks of width 1,024")
    for name, row in rows.items():
        table.add_row(name, f"{row['seconds']:.2f}", f"{row['peak_megabytes']:.0f}")
    return table


PARTS = {
    "perplexity": (perplexities, show_perplexities),
    "cost": (cost, show_cost),
    "zeros": (zeros_lost, show_zeros),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="file to add the results to")
    parser.add_argument("--only", choices=PARTS)
    parser.add_argument("--epoch", choices=KINDS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    logger.remove()
    if arguments.epoch:
        with tempfile.TemporaryDirectory() as folder:
            print(*one_epoch(KINDS[arguments.epoch], folder))
        return
    console = Console(width=110)
    for part in [arguments.only] if arguments.only else PARTS:
        measure, show = PARTS[part]
        facts, results = here(), measure()
        console.print(show(results))
        if arguments.json:
            add(arguments.json, {f"4 bits: {part}": {**facts, "results": results}})


if __name__ == "__main__":
    main()
