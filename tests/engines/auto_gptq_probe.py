"""Run with AutoGPTQ's interpreter: the logits of a checkpoint on given tokens.

python auto_gptq_probe.py <checkpoint> <prompts.json> <logits.safetensors>
"""

import json
import sys
from pathlib import Path

import torch
from auto_gptq import AutoGPTQForCausalLM
from safetensors.torch import save_file


def main(checkpoint: str, prompts: str, result: str) -> None:
    model = AutoGPTQForCausalLM.from_quantized(
        checkpoint,
        device="cpu",
        use_triton=False,
        disable_exllama=True,
        disable_exllamav2=True,
        torch_dtype=torch.float32,
    )
    token_ids = torch.tensor(json.loads(Path(prompts).read_text()))
    with torch.inference_mode():
        logits = model(input_ids=token_ids).logits
    save_file({"logits": logits}, result)


if __name__ == "__main__":
    main(*sys.argv[1:])
