"""Run with vLLM's interpreter: what it generates from several checkpoints, one after another.

    python vllm_probe_packed.py <jobs.json> <result.json>

A job is what ``LLM`` takes, but for ``kernels``, which is what ``DLP_KERNELS`` is meanwhile. The
result has for each tokens with their log-probabilities, and for every Linear (of the first process)
the bytes of all its tensors and those of its weight in bfloat16; or the error that there was.
"""

import json
import os
import sys
from pathlib import Path

os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"  # GiB
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # two processes less to start
os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # a function is sent to the processes


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
    kernels = os.environ.get("DLP_KERNELS", "")
    for job in asked["jobs"]:
        llm = None
        os.environ["DLP_KERNELS"] = job.pop("kernels", kernels)
        job = {"enforce_eager": True, "max_model_len": 256, "disable_log_stats": True, **job}
        try:
            llm = LLM(**job)
            outputs = llm.generate(inputs, sampling, use_tqdm=False)
            found.append(
                {
                    "said": [tokens_and_logprobs(output) for output in outputs],
                    "bytes": llm.apply_model(bytes_of_linears)[0],
                }
            )
        except Exception as error:
            found.append(str(error))
        del llm
        cleanup_dist_env_and_memory()
    Path(result).write_text(json.dumps(found))


def bytes_of_linears(model) -> dict[str, list[int]]:
    from vllm.model_executor.layers.linear import LinearBase

    found = {}
    for name, module in model.named_modules():
        if isinstance(module, LinearBase):
            held = [*module.parameters(), *module.buffers()]
            columns = getattr(module, "input_size_per_partition", module.input_size)
            dense = 2 * sum(module.output_partition_sizes) * columns
            found[name] = [sum(tensor.nbytes for tensor in held), dense]
    return found


def tokens_and_logprobs(output) -> list:
    (generated,) = output.outputs
    places = [*output.prompt_logprobs[1:], *generated.logprobs]
    tokens = [*output.prompt_token_ids[1:], *generated.token_ids]
    return [[token, place[token].logprob] for token, place in zip(tokens, places, strict=True)]


if __name__ == "__main__":  # vLLM starts processes that import this file
    main(*sys.argv[1:])
