"""Run with vLLM's interpreter: what it generates from a checkpoint, and how likely it
finds each token of the prompts.

    python vllm_probe.py <checkpoint> <dtype> <prompts.json> <new tokens> <result.json>
"""

import json
import os
import sys
from pathlib import Path

os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"  # GiB
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # two processes less to start, half the time


def main(checkpoint: str, dtype: str, prompts: str, new_tokens: str, result: str) -> None:
    from vllm import LLM, SamplingParams

    token_ids = json.loads(Path(prompts).read_text())
    llm = LLM(
        model=checkpoint,
        enforce_eager=True,
        max_model_len=256,
        dtype=dtype,
    )
    sampling = SamplingParams(
        temperature=0,
        max_tokens=int(new_tokens),
        ignore_eos=True,
        detokenize=False,
        prompt_logprobs=0,
        logprobs=0,
    )
    inputs = [{"prompt_token_ids": ids} for ids in token_ids]
    outputs = llm.generate(inputs, sampling, use_tqdm=False)
    found = []
    for ids, output in zip(token_ids, outputs, strict=True):
        # The first token has no predecessors, and so no probability.
        likely = [place[token] for token, place in zip(ids[1:], output.prompt_logprobs[1:])]
        found.append(
            {
                "generated": list(output.outputs[0].token_ids),
                "prompt_logprobs": [entry.logprob for entry in likely],
            }
        )
    Path(result).write_text(json.dumps(found))


if __name__ == "__main__":  # vLLM starts processes that import this file
    main(*sys.argv[1:])
