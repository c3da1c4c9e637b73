"""One process of a distributed run: prunes a saved model and saves what comes out.

    python -m torch.distributed.run --nproc-per-node 2 distributed_probe.py JOB.json

Run by ``test_distributed.py``, which makes the job.
"""

import json
import sys
from pathlib import Path

import torch
from datasets import Dataset
from helpers import run
from torch import distributed as dist
from transformers import AutoModelForCausalLM

from dlp_plugin import last_plans


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    dist.init_process_group("gloo")
    rows = job["rows"]
    if not job["same_rows_on_all"]:
        rows = rows[dist.get_rank() :: dist.get_world_size()]
    for number, recipe in enumerate(job["recipes"]):
        model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
        run(model, recipe, Dataset.from_list(rows))
        (plan,) = last_plans()
        out = Path(job["out"]) / f"recipe{number}-rank{dist.get_rank()}"
        out.mkdir()
        plan.save(out / "plan.json")
        weights = {name: weight.detach().clone() for name, weight in model.state_dict().items()}
        torch.save(weights, out / "weights.pt")
    dist.barrier()
    dist.destroy_process_group()


main()
