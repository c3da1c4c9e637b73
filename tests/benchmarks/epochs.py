"""The epochs of the stages, and how that of scoring grows.

Run by run.py; on its own only for one model that stays on disk: python epochs.py FOLDER SAMPLES
"""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from common import DEVICE, ROUNDS, SHIPPED, Stamp, finish, peak, reset_peak, samples
from compressed_tensors.offload import load_offloaded_model
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from loguru import logger
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
)

import dlp_plugin
from dlp_plugin import DLPModifier

STAGE = {"sparsity": 0.7, "targets": ["Linear"], "ignore": ["re:.*lm_head"]}
# On a GPU a model of 1.1 billion parameters; on a CPU what ends in minutes.
BLOCKS, WIDTH, TOKENS = (16, 2048, 65536) if torch.cuda.is_available() else (4, 1024, 16384)


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

    What takes minutes, as it inverts matrices, runs in the first round only.
    """
    rounds = []
    with TemporaryDirectory() as plans:
        for number in range(ROUNDS):
            seconds = {"bare forward pass": bare_forward(folder, dataset)}
            work = {"DLP": DLPModifier(sparsity=0.7, plan_path=f"{plans}/plan.json")}
            if pruners:
                work["Wanda"] = WandaPruningModifier(**STAGE)
            if pruners and number == 0:
                work["SparseGPT"] = SparseGPTModifier(**STAGE)
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


def stages_that_repair() -> dict[str, dict[str, float]]:
    """The epochs of stages on the shipped model, which is dense before each."""
    stages = {
        "SparseGPT": (dlp_plugin.SparseGPTModifier, {}),
        "SparseGPT, polished": (dlp_plugin.SparseGPTModifier, {"polish": True}),
        "ADMM": (dlp_plugin.ADMMPruningModifier, {}),
        "ADMM, reconstructed": (dlp_plugin.ADMMPruningModifier, {"reconstruct": 2}),
    }
    dataset, found = samples(128, 256), {}
    for name, (kind, fields) in stages.items():
        rounds = [epochs(SHIPPED, dataset, {name: kind(**STAGE, **fields)}) for _ in range(ROUNDS)]
        found[name] = {"seconds": statistics.median(one[name] for one in rounds)}
    return found


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
            command = [sys.executable, __file__, folder, str(count)]
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
    print(json.dumps(result))


if __name__ == "__main__":
    measure_growth(sys.argv[1], int(sys.argv[2]))
