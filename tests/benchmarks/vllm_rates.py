"""Run with vLLM's interpreter: tokens per second that it writes, and the memory of its process.

    python vllm_rates.py <checkpoint> <texts at a time> ...

The time of a further token is that of 36 less that of 4, over 32.
"""

import json
import statistics
import sys
import time
from pathlib import Path


def main(folder: str, batches: list[int]) -> None:
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=folder,
        skip_tokenizer_init=True,
        max_model_len=256,
        dtype="bfloat16",
        enforce_eager=True,
    )

    def seconds(batch: int, tokens: int) -> float:
        sampling = SamplingParams(
            temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False
        )
        prompts = [{"prompt_token_ids": [5 + n] * 16} for n in range(batch)]
        started = time.perf_counter()
        llm.generate(prompts, sampling, use_tqdm=False)
        return time.perf_counter() - started

    rates: dict[str, float] = {}
    for batch in batches:
        seconds(batch, 4)
        steps = [seconds(batch, 36) - seconds(batch, 4) for _ in range(3)]
        rates[f"{batch}"] = batch * 32 / statistics.median(steps)
    status = Path("/proc/self/status").read_text()
    rates["memory"] = float(status.partition("RssAnon:")[2].split()[0]) * 1024
    print(json.dumps(rates))


if __name__ == "__main__":  # vLLM starts processes that import this file
    main(sys.argv[1], [int(each) for each in sys.argv[2:]])
