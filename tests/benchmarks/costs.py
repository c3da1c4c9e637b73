"""What a large model costs: python tests/benchmarks/costs.py [--only PART]

- ``blocks``: one block of the shapes of Llamas with random weights; seconds and peak memory of
  every stage, on two numbers of tokens, in a process each, through the real ``oneshot()``;
- ``end to end``: a random checkpoint of 1.1 billion parameters pruned by ``dlp-plugin oneshot``.

Seconds are those that the process computes (CPU time), on one thread, so that others on the machine
count little. What is measured already is not measured again.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch
from common import LLAMA, ROOT, SHIPPED, TEXT, peak, reset_peak
from datasets import Dataset
from large import LENGTH, SHAPES
from llmcompressor import oneshot
from llmcompressor.modifiers import Modifier
from loguru import logger
from pydantic import PrivateAttr
from record import RESULTS, add, here
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

import dlp_plugin
from dlp_plugin.scoring.blocks import Block
from dlp_plugin.search.judge import Judge
from dlp_plugin.search.masks import Masks
from dlp_plugin.search.slopes import Slopes

FEW, TWICE = (4,), (4, 8)
STAGE = {"sparsity": 0.6, "targets": ["Linear"], "ignore": ["re:.*lm_head"]}
STAGES: dict[str, tuple[type[Modifier], dict[str, object]]] = {
    "scoring": (dlp_plugin.DLPModifier, {"sparsity": 0.6}),
    "magnitude": (dlp_plugin.OneShotMagnitudeModifier, STAGE),
    "Wanda": (dlp_plugin.WandaPruningModifier, STAGE),
    "SparseGPT": (dlp_plugin.SparseGPTModifier, STAGE),
    "Wanda, reconstructed": (dlp_plugin.WandaPruningModifier, STAGE | {"reconstruct": 2}),
    "ADMM": (dlp_plugin.ADMMPruningModifier, STAGE),
    "masked GPTQ": (
        dlp_plugin.MaskedGPTQModifier,
        {"scheme": "W4A16", "targets": ["Linear"], "ignore": ["re:.*lm_head"]},
    ),
}
SEARCHES = ("a step of refine", "judging")
# What is measured, on how many samples; the page scales the rest
MEASURED: dict[str, dict[str, tuple[int, ...]]] = {
    "1.1 B": dict.fromkeys(("scoring", "Wanda", "SparseGPT"), TWICE),
    "1 B": {
        **dict.fromkeys((*STAGES, *SEARCHES, "packing"), FEW),
        **dict.fromkeys(("scoring", "Wanda", "SparseGPT"), TWICE),
        **dict.fromkeys(("Wanda, reconstructed", "masked GPTQ", "judging"), TWICE),
    },
    "8 B": {
        **dict.fromkeys(("scoring", "Wanda"), TWICE),
        **dict.fromkeys(("magnitude", "a step of refine", "packing", "SparseGPT"), FEW),
    },
    "70 B": {"scoring": (1, 2), "magnitude": (1,)},
}
VOCABULARIES = (256, 32768)

Results = dict[str, Any]
Model = TypeVar("Model", bound=PreTrainedModel)


def timed(kind: type[Modifier]) -> type[Modifier]:
    """A modifier that tells its epoch's seconds and peak, without the host's tracing before it."""

    class Timed(kind):
        _started: float = PrivateAttr(default=0.0)
        _before: float = PrivateAttr(default=0.0)
        _found: dict[str, float] = PrivateAttr(default_factory=dict)

        def on_calibration_start(self, state, event, **kwargs) -> None:  # DLP's pass comes last
            self._before, self._started = reset_peak(), time.process_time()
            super().on_calibration_start(state, event, **kwargs)

        def on_finalize(self, state, **kwargs) -> bool:
            seconds = time.process_time() - self._started
            self._found = {"seconds": seconds, "peak megabytes": peak() - self._before}
            return super().on_finalize(state, **kwargs)

    return Timed


def random_llama(folder: Path, **config: int) -> LlamaForCausalLM:
    return random_model(LlamaForCausalLM, LlamaConfig(**config), folder)


def random_model(kind: type[Model], config: PreTrainedConfig, folder: Path) -> Model:
    """A model of random bfloat16 weights, with an origin in a folder."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = kind(config)
    model = model.to_empty(device="cpu").bfloat16().eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data.fill_(1)
        else:
            parameter.data.normal_(0, 0.02)
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    model.config.save_pretrained(folder)
    model.config.name_or_path = model.name_or_path = str(folder)
    return model


def block_of(shape: str, folder: Path, vocabulary: int) -> LlamaForCausalLM:
    hidden, mlp, heads, kv = SHAPES[shape]
    return random_llama(
        folder,
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=kv,
    )


def measured(shape: str, stage: str, samples: int, vocabulary: int = 256) -> dict[str, float]:
    """What a stage costs on one block."""
    with TemporaryDirectory() as folder:
        model = block_of(shape, Path(folder) / "origin", vocabulary)
        return cost_of(stage, model, samples, Path(folder))


def cost_of(stage: str, model: PreTrainedModel, samples: int, folder: Path) -> dict[str, float]:
    """Seconds, and peak memory beyond the process with its model, of a stage on random tokens."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (samples, LENGTH), generator=generator)
    linears = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    del linears["lm_head"]
    if stage in ("masked GPTQ", "packing"):
        for linear in linears.values():
            linear.weight.data.masked_fill_(linear.weight.abs() < 0.0168, 0)  # 60 %
    if stage in STAGES:
        return in_oneshot(model, stage, ids, folder)
    masks = Masks(linears, {n: torch.rand(m.in_features) + 0.1 for n, m in linears.items()})
    batches, sparsities = [{"input_ids": row[None]} for row in ids], dict.fromkeys(linears, 0.6)
    slopes = Slopes(model, [Block("model.layers.0", linears)], masks, batches)
    work: dict[str, Callable[[], object]] = {
        "a step of refine": lambda: slopes.at(sparsities, [0]),
        "judging": lambda: Judge(model, masks, batches).loss(sparsities),
        "packing": lambda: dlp_plugin.pack(model, folder / "packed"),
    }
    return timed_call(work[stage])


def timed_call(work: Callable[[], object]) -> dict[str, float]:
    before, started = reset_peak(), time.process_time()
    work()
    seconds = time.process_time() - started
    return {"seconds": seconds, "peak megabytes": peak() - before}


def in_oneshot(
    model: PreTrainedModel, stage: str, ids: torch.Tensor, folder: Path
) -> dict[str, float]:
    """One epoch of the real ``oneshot()``."""
    kind, fields = STAGES[stage]
    plan = {"plan_path": str(folder / "plan.json")} if stage == "scoring" else {}
    modifier: Any = timed(kind)(**fields, **plan)
    rows = {"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()}
    oneshot(
        model=model,
        recipe=[modifier],
        dataset=Dataset.from_dict(rows),
        tokenizer=AutoTokenizer.from_pretrained(SHIPPED),
        num_calibration_samples=len(ids),
        max_seq_length=LENGTH,
        shuffle_calibration_samples=False,
    )
    return modifier._found


def blocks(results: Results, keep: Callable[[], None]) -> None:
    """Every stage of every shape: shape -> stage -> samples -> figures."""
    for shape, stages in MEASURED.items():
        for stage, counts in stages.items():
            for samples in counts:
                known = results.setdefault(shape, {}).setdefault(stage, {})
                if str(samples) not in known:
                    known[str(samples)] = in_a_process(shape, stage, samples)
                    keep()
    for vocabulary in VOCABULARIES:
        known = results.setdefault("vocabulary", {}).setdefault("a step of refine", {})
        if str(vocabulary) not in known:
            known[str(vocabulary)] = in_a_process("1 B", "a step of refine", 2, vocabulary)
            keep()


def in_a_process(*arguments: object, script: str = __file__) -> dict[str, float]:
    command = [sys.executable, script, "--measure", *map(str, arguments)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1])


def end_to_end(results: Results, keep: Callable[[], None]) -> None:
    """The terminal's ``oneshot`` on 8 samples of 512 tokens: pruner -> figures."""
    for recipe, pruner in {"dlp_wanda": "Wanda", "dlp_sparsegpt": "SparseGPT"}.items():
        if pruner in results:
            continue
        with TemporaryDirectory() as folder:
            source = Path(folder) / "source"
            random_llama(source, **LLAMA).save_pretrained(source)
            AutoTokenizer.from_pretrained(SHIPPED).save_pretrained(source)
            command = [sys.executable, "-m", "dlp_plugin", "oneshot", str(source)]
            command += ["--recipe", str(ROOT / "recipes" / f"{recipe}.yaml"), "--data", str(TEXT)]
            command += ["--output", f"{folder}/pruned", "--samples", "8", "--length", "512"]
            process = subprocess.Popen(command)
            _, status, usage = os.wait4(process.pid, 0)
            assert status == 0, command
        results[pruner] = {
            "seconds": usage.ru_utime + usage.ru_stime,
            "peak megabytes": usage.ru_maxrss / 1024,
        }
        keep()


PARTS = {"blocks": blocks, "end to end": end_to_end}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=RESULTS / "costs.json")
    parser.add_argument("--only", choices=PARTS, help="one part")
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    logger.remove()
    torch.set_num_threads(1)
    if arguments.measure:
        shape, stage, *numbers = arguments.measure
        print(json.dumps(measured(shape, stage, *map(int, numbers))))
        return
    for part in [arguments.only] if arguments.only else PARTS:
        name = f"costs: {part}"
        known = json.loads(arguments.json.read_text()) if arguments.json.exists() else {}
        facts, results = here(threads=1), known.get(name, {}).get("results", {})

        def keep() -> None:
            add(arguments.json, {name: {**facts, "results": results}})

        PARTS[part](results, keep)


if __name__ == "__main__":
    main()
