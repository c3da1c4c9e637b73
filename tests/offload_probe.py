"""Peak memory of scoring a model that stays on disk.

    python offload_probe.py BLOCKS

Prints the model's size and the peak beyond what the process held before, in MB.
"""

import re
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from compressed_tensors.offload import load_offloaded_model
from helpers import VOCABULARY, random_samples, run, word_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from dlp_plugin import DLPModifier


def peak() -> float:
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status).group(1)) / 1024


def main() -> None:
    blocks = int(sys.argv[1])
    with TemporaryDirectory() as folder:
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=blocks,
            num_attention_heads=8,
            num_key_value_heads=8,
        )
        torch.manual_seed(0)
        LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
        word_tokenizer().save_pretrained(folder)
        with load_offloaded_model():
            model = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=torch.bfloat16,
                device_map="auto_offload",
                max_memory={"cpu": 1 << 20},
                offload_folder=f"{folder}/offload",
            )
        size = sum(p.numel() * p.itemsize for p in model.parameters()) / 2**20
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = peak()
        plan = f"{folder}/plan.json"
        run(model, [DLPModifier(sparsity=0.7, plan_path=plan)], random_samples(4, 64))
        print(size, peak() - before)


main()
