"""Serve what prune_and_compare.py saved, in vLLM (an environment of its own):

    python examples/serve_with_vllm.py pruned_model/w4a16

or, as a server: vllm serve pruned_model/w4a16

In bfloat16 vLLM's CPU build rounds the activations of 4-bit Linears to 8 bits too, on
processors with AMX; there --dtype float16 computes what the checkpoint says.
"""

import argparse

from vllm import LLM, SamplingParams

PROMPTS = ["This PEP proposes", "Abstract\n========\n\n"]

if __name__ == "__main__":  # vLLM starts processes that import this file
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="folder of a checkpoint")
    parser.add_argument("--dtype", default="auto", help="what vLLM computes in")
    arguments = parser.parse_args()
    llm = LLM(model=arguments.model, dtype=arguments.dtype, enforce_eager=True)
    for output in llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=40)):
        print(repr(output.prompt), "->", repr(output.outputs[0].text))
