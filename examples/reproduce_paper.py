"""The headline figures of the DLP paper: perplexity at 70 %, uniform, OWL and DLP.

    python examples/reproduce_paper.py                       # LLaMA-2-7B: a GPU, the hub
    python examples/reproduce_paper.py --model examples/small_model --length 256 --samples 16 \
        --calibration examples/text/calibration.txt --test examples/text/test.txt

Six runs of oneshot(), each on the model loaded anew. As in the paper: 128 samples of 2,048
tokens of C4, perplexity on the test part of WikiText-2 in whole windows of 2,048, the text
joined by blank lines and tokenized at once. Unlike there: the samples are consecutive windows
of C4's first documents strung together, not random crops of single long ones.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from compressed_tensors.offload import remove_dispatch
from datasets import load_dataset
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from loguru import logger
from prune_and_compare import sparsity_of
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from dlp_plugin import DLPModifier, OWLModifier
from dlp_plugin.checkpoints.loading import apply_recipe, load_to_prune, load_tokenizer
from dlp_plugin.checkpoints.placing import let_go, placed
from dlp_plugin.evaluation.perplexity import perplexity
from dlp_plugin.evaluation.text import calibrate_on, calibration_set, read_tokens, token_windows

SPARSITY = 0.7
ALPHA = 0.15
PUBLISHED = {  # LLaMA-2-7B at 70 %
    "Wanda": {"uniform": 76.84, "OWL": 30.58, "DLP": 22.79},
    "SparseGPT": {"uniform": 27.84, "OWL": 19.71, "DLP": 18.58},
}
PRUNERS = {"Wanda": WandaPruningModifier, "SparseGPT": SparseGPTModifier}
METHODS = ("uniform", "OWL", "DLP")


def recipe(pruner: str, method: str) -> list[Modifier]:
    stage = PRUNERS[pruner](sparsity=SPARSITY, targets=["Linear"], ignore=["re:.*lm_head"])
    if method == "uniform":
        return [stage]
    if method == "DLP":
        return [DLPModifier(alpha=ALPHA), stage]
    return [OWLModifier(owl_m=5, owl_lmbda=0.08), stage]


def windows_of(source: str, tokenizer: PreTrainedTokenizerBase, length: int) -> list[torch.Tensor]:
    """Whole windows, tokenized in one go: a tokenizer may put a mark before every text."""
    if Path(source).is_file():
        text = Path(source).read_text(encoding="utf-8-sig")
    else:
        text = "\n\n".join(load_dataset(source, "wikitext-2-raw-v1", split="test")["text"])
    windows = token_windows(tokenizer(text, verbose=False)["input_ids"], length)
    return [window for window in windows if len(window) == length]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="meta-llama/Llama-2-7b-hf")
    parser.add_argument("--calibration", default="allenai/c4", help="C4 or a text file")
    parser.add_argument("--test", default="Salesforce/wikitext", help="WikiText or a text file")
    parser.add_argument("--length", type=int, default=2048, help="tokens per sample and window")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--pruners", nargs="+", choices=PRUNERS, default=list(PRUNERS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    arguments = parser.parse_args()

    logger.disable("llmcompressor.utils.metric_logging")
    logger.remove()  # our progress, and of the others the warnings
    shown = {"": "WARNING", "dlp_plugin": "INFO"}
    logger.add(sys.stderr, level=0, format="{level}: {message}", filter=shown)
    console = Console()
    tokenizer = load_tokenizer(arguments.model)
    windows = windows_of(arguments.test, tokenizer, arguments.length)
    # A file is read whole, so that its samples spread over it; C4 as far as needed.
    from_file = Path(arguments.calibration).is_file()
    tokens = read_tokens(
        arguments.calibration,
        tokenizer,
        config="en",
        limit=None if from_file else arguments.samples * arguments.length,
    )
    dataset = calibration_set(tokens, arguments.length, arguments.samples)

    def measure(model: torch.nn.Module) -> tuple[float, float]:
        """Perplexity and sparsity of a model, which is used up."""
        # oneshot() leaves weights on the CPU, to visit the GPU at every use
        model = placed(remove_dispatch(model))
        result = perplexity(model, windows, batch_size=1), sparsity_of(model)
        let_go(model)
        return result

    started = time.time()
    dense, _ = measure(load_to_prune(arguments.model)[0])
    columns = ("pruner", "method", "zeros", "perplexity", "published, LLaMA-2-7B", "seconds")
    table = Table(*columns, title=f"{arguments.model} at {SPARSITY:.0%}")
    table.add_row("", "dense", "0", f"{dense:.2f}", "", f"{time.time() - started:.0f}")
    for pruner in arguments.pruners:
        table.add_section()
        for method in arguments.methods:
            started = time.time()
            model = apply_recipe(
                arguments.model,
                recipe(pruner, method),
                **calibrate_on(dataset, tokenizer),
            )
            value, zeros = measure(model)
            published = f"{PUBLISHED[pruner][method]:.2f}"
            seconds = f"{time.time() - started:.0f}"
            table.add_row(pruner, method, f"{zeros:.4f}", f"{value:.2f}", published, seconds)
            console.print(f"{pruner}, {method}: {value:.2f}")  # the runs are long
    console.print(table)


if __name__ == "__main__":
    main()
