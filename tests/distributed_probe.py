"""One process of a distributed run: prunes a saved model and saves what comes out.

    python -m torch.distributed.run --nproc-per-node 2 distributed_probe.py JOB.json

Run by ``test_distributed.py``, which makes the job.
"""

import json
import sys
from pathlib import Path

import torch
from conftest import run
from datasets import Dataset
from torch import distributed as dist
from transformers import AutoModelForCausalLM

from dlp_plugin import last_plans


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    dist.init_process_group("gloo")
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    rows = job["rows"]
    if not job["same_rows_on_all"]:
        rows = rows[dist.get_rank() :: dist.get_world_size()]
    out = Path(job["out"]) / f"rank{dist.get_rank()}"
    out.mkdir()
    run(model, job["recipe"], Dataset.from_list(rows), **job["arguments"])
    (plan,) = last_plans()
    plan.save(out / "plan.json")
    torch.save({k: v.detach().clone() for k, v in model.state_dict().items()}, out / "weights.pt")
    dist.barrier()
    dist.destroy_process_group()


main()
