"""Peak memory of scoring a model that stays on disk.

    python offload_probe.py BLOCKS

Prints the model's size and the peak beyond what the process held before, in MB.
"""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from helpers import VOCABULARY, kept_on_disk, random_samples, run
from transformers import LlamaConfig, LlamaForCausalLM

from dlp_plugin import DLPModifier
from dlp_plugin.comparison.memory import peak, reset_peak


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
        model = kept_on_disk(LlamaForCausalLM(config).bfloat16(), Path(folder))
        size = sum(p.numel() * p.itemsize for p in model.parameters()) / 2**20
        reset_peak()
        before = peak()
        plan = f"{folder}/plan.json"
        run(model, [DLPModifier(sparsity=0.7, plan_path=plan)], random_samples(4, 64))
        print(size, (peak() - before) / 2**20)


main()
