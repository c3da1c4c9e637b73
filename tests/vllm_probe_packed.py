"""Run with vLLM's interpreter: what it generates from several checkpoints, one after another.

    python vllm_probe_packed.py <jobs.json> <result.json>

A job is a checkpoint, a dtype and a number of tensor-parallel processes; the result has, for
each, tokens and log-probabilities, or the error that there was instead.
"""

import json
import os
import sys
from pathlib import Path

os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"  # GiB
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # two processes less to start


def main(jobs: str, result: str) -> None:
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    asked = json.loads(Path(jobs).read_text())
    sampling = SamplingParams(
        temperature=0,
        max_tokens=16,
        ignore_eos=True,
        detokenize=False,
        prompt_logprobs=0,
        logprobs=0,
    )
    inputs = [{"prompt_token_ids": ids} for ids in asked["prompts"]]
    found = []
    for job in asked["jobs"]:
        llm = None
        try:
            llm = LLM(enforce_eager=True, max_model_len=256, disable_log_stats=True, **job)
            found.append(
                [tokens_and_logprobs(one) for one in llm.generate(inputs, sampling, use_tqdm=False)]
            )
        except Exception as error:
            found.append(str(error))
        del llm
        cleanup_dist_env_and_memory()
    Path(result).write_text(json.dumps(found))


def tokens_and_logprobs(output) -> list:
    (generated,) = output.outputs
    places = [*output.prompt_logprobs[1:], *generated.logprobs]
    tokens = [*output.prompt_token_ids[1:], *generated.token_ids]
    return [[token, place[token].logprob] for token, place in zip(tokens, places, strict=True)]


if __name__ == "__main__":  # vLLM starts processes that import this file
    main(*sys.argv[1:])
