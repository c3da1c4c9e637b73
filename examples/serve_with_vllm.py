"""Serve what prune_and_compare.py saved, in vLLM (an environment of its own):

    python examples/serve_with_vllm.py pruned_model/w4a16

or, as a server: vllm serve pruned_model/w4a16 --max-model-len 256 --dtype float16

In bfloat16 vLLM's CPU build rounds the activations of 4-bit Linears to 8 bits too, on
processors with AMX; float16 computes what the checkpoint says.
"""

import sys

from vllm import LLM, SamplingParams

PROMPTS = ["This PEP proposes", "Abstract\n========\n\n"]

if __name__ == "__main__":  # vLLM starts processes that import this file
    llm = LLM(model=sys.argv[1], max_model_len=256, dtype="float16", enforce_eager=True)
    for output in llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=40)):
        print(repr(output.prompt), "->", repr(output.outputs[0].text))
