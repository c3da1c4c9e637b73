"""How plans depend on what they are made from: samples to score on and to judge on, steps and
starts of a search.

No times, so that the figures do not depend on what else the machine does. Run by run.py; on
its own it draws refine.png from results/run.json: python tests/benchmarks/plans.py
"""

import json
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from common import SHIPPED, TEST_TEXT, samples
from compressed_tensors.utils import patch_attr
from llmcompressor import oneshot
from transformers import AutoModelForCausalLM, AutoTokenizer

from dlp_plugin import DLPModifier, Plan, WandaPruningModifier, last_plans
from dlp_plugin.evaluation.perplexity import perplexity
from dlp_plugin.evaluation.text import read_tokens, token_windows
from dlp_plugin.scoring import calibration

SPARSITY = 0.7
STEPS = {"evolution": 20, "gradient": 16}
MORE_STEPS, JUDGED = (4, 8, 16, 32), (512, 1024, 2048, 4096, 8192)


def plan(**fields: Any) -> Plan:
    """DLP's plan for the shipped model at 70 %, on 128 samples of 256 tokens."""
    dataset = samples(128, 256)
    with TemporaryDirectory() as folder:
        oneshot(
            model=str(SHIPPED),
            recipe=[
                DLPModifier(sparsity=SPARSITY, plan_path=str(Path(folder) / "plan.json"), **fields)
            ],
            dataset=dataset,
            tokenizer=AutoTokenizer.from_pretrained(SHIPPED),
            num_calibration_samples=len(dataset),
            max_seq_length=256,
            shuffle_calibration_samples=False,
        )
    (found,) = last_plans()
    return found


def fewer_samples() -> dict[str, dict[str, float]]:
    """How far the blocks' sparsities lie from those with all 128 samples."""
    everything = plan()
    results = {}
    for count in (8, 16, 32, 64):
        pairs = zip(plan(num_samples=count).blocks, everything.blocks, strict=True)
        apart = [abs(some.sparsity - all_.sparsity) for some, all_ in pairs]
        results[f"{count}"] = {"largest": max(apart), "mean": sum(apart) / len(apart)}
    return results


def search() -> dict[str, list[dict[str, float]]]:
    """The paths of searches by evolution and by gradient from three plans."""
    results = {}
    starts = {"uniform": 0.0, "DLP, alpha auto": "auto", "DLP, alpha 0.15": 0.15}
    for (kind, steps), (name, alpha) in product(STEPS.items(), starts.items()):
        path = plan(alpha=alpha, refine=steps, search=kind).search
        results[f"{kind} from {name}"] = [step.model_dump() for step in path]
    return results


def refining() -> dict[str, dict[str, float]]:
    """Perplexity behind plans of more steps, and of plans that are judged on more tokens."""
    results = {f"{steps} steps": pruned(steps) for steps in MORE_STEPS}
    for tokens in JUDGED:
        with patch_attr(calibration, "_JUDGED", tokens):
            results[f"judged on {tokens:,} tokens"] = pruned(STEPS["gradient"])
    return results


def pruned(steps: int) -> dict[str, float]:
    """Perplexity of the shipped model behind Wanda by a refined plan."""
    model = AutoModelForCausalLM.from_pretrained(SHIPPED)
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED)
    dataset = samples(128, 256)
    oneshot(
        model=model,
        tokenizer=tokenizer,
        recipe=[
            DLPModifier(sparsity=SPARSITY, refine=steps),
            WandaPruningModifier(targets=["Linear"], ignore=["re:.*lm_head"], sparsity=SPARSITY),
        ],
        dataset=dataset,
        num_calibration_samples=len(dataset),
        max_seq_length=256,
        shuffle_calibration_samples=False,
    )
    windows = token_windows(read_tokens(TEST_TEXT, tokenizer), 256)
    return {"perplexity": perplexity(model, windows)}


Paths = dict[str, list[tuple[int, float]]]


def draw(models: dict[str, Paths], file: Path) -> None:
    """Divergence over tokens run: a panel for every model, a line for every search."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(models), 3.5), layout="constrained")
    for axes, (model, paths) in zip(figure.subplots(1, len(models)), models.items(), strict=True):
        for search, path in paths.items():
            axes.plot(*zip(*path, strict=True), label=search)
        axes.set(
            xlabel="tokens run (a backward pass counts as two forward passes)",
            xscale="log",
            ylabel="divergence from dense (nats per token)",
            title=model,
            ylim=(0, None),
        )
        axes.legend(fontsize="small")
    figure.savefig(file, dpi=90)


def paths_of(results: Path) -> dict[str, Paths]:
    """What was measured of searches, by model."""
    run = json.loads((results / "run.json").read_text())["search"]["results"]
    shipped = {
        search: [(step["tokens"], step["divergence"]) for step in path]
        for search, path in run.items()
    }
    real = json.loads((results / "real_model.json").read_text())["real model"]["results"]
    of_real = {method: path["0.6"] for method, path in real["searches"].items()}
    return {f"shipped model, {100 * SPARSITY:.0f} %": shipped, "SmolLM2-135M, 60 %": of_real}


if __name__ == "__main__":
    here = Path(__file__).parent
    draw(paths_of(here / "results"), here / "refine.png")
