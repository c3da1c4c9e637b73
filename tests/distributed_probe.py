"""One process of a distributed run: prunes a saved model and saves what comes out.

    python -m torch.distributed.run --nproc-per-node 2 distributed_probe.py

Run by ``test_distributed.py``, in a folder where it has put model and job.
"""

import json
import time
from pathlib import Path

import torch
from datasets import Dataset
from helpers import run
from torch import distributed as dist
from transformers import AutoModelForCausalLM

from dlp_plugin import last_plans
from dlp_plugin.planning.methods import METHODS
from dlp_plugin.planning.methods.dlp import DLP


class Slow(DLP):
    """The first process still looks at the last block when the other could prune it."""

    def score(self, depth, parts) -> float:
        if depth == 2 and dist.get_rank() == 0:
            time.sleep(0.2)
        return super().score(depth, parts)


def main() -> None:
    job = json.loads(Path("job.json").read_text())
    dist.init_process_group("gloo")
    METHODS["dlp"] = Slow
    for number, (recipe, shared) in enumerate(job["recipes"]):
        rows = job["rows"]
        if not shared:
            rows = rows[dist.get_rank() :: dist.get_world_size()]
        model = AutoModelForCausalLM.from_pretrained("model", dtype=torch.float32)
        run(model, recipe, Dataset.from_list(rows))
        (plan,) = last_plans()
        out = Path(f"recipe{number}-rank{dist.get_rank()}")
        out.mkdir()
        plan.save(out / "plan.json")
        weights = {name: weight.detach().clone() for name, weight in model.state_dict().items()}
        torch.save(weights, out / "weights.pt")
    dist.barrier()
    dist.destroy_process_group()


main()
