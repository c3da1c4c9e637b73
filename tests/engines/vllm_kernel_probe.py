"""Run with vLLM's interpreter: whether the library it loads on this processor has an operator.

python vllm_kernel_probe.py <operator> <result.json>
"""

import json
import sys
from pathlib import Path

import torch
from vllm.platforms import current_platform


def main(operator: str, result: str) -> None:
    current_platform.import_kernels()
    Path(result).write_text(json.dumps(hasattr(torch.ops._C, operator)))


if __name__ == "__main__":
    main(*sys.argv[1:])
