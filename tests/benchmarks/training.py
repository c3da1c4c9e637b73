"""What a step of training costs under masks; run by run.py."""

import statistics
import time
from typing import Any

import torch
from common import DEVICE, SHIPPED, finish, samples
from compressed_tensors.offload import remove_dispatch
from llmcompressor import oneshot
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from dlp_plugin import OneShotMagnitudeModifier
from dlp_plugin.recovery import hold_masks, mask_updates


def training(steps: int = 8) -> dict[str, dict[str, float]]:
    """Seconds of one step of training the shipped model at 70 %, on 8 windows of 256 tokens."""
    ids = torch.tensor(samples(8, 256)["input_ids"]).to(DEVICE)
    updates = {}
    for way in ("LoRA", "LoRA, masked", "DoRA", "DoRA, masked", "all weights", "all, held"):
        model: Any = oneshot(
            model=AutoModelForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32),
            recipe=[OneShotMagnitudeModifier(sparsity=0.7, ignore=["re:.*lm_head"])],
            tokenizer=AutoTokenizer.from_pretrained(SHIPPED),
        )
        model = remove_dispatch(model).to(DEVICE)
        if "RA" in way:
            config = LoraConfig(r=16, target_modules="all-linear", use_dora="DoRA" in way)
            model = get_peft_model(model, config)
        if "masked" in way:
            mask_updates(model)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3)
        if "held" in way:
            hold_masks(model, optimizer)
        updates[way] = model, optimizer
    times: dict[str, list[float]] = {way: [] for way in updates}
    for _ in range(steps):
        for way, (model, optimizer) in updates.items():
            started = time.perf_counter()
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            finish()
            times[way].append(time.perf_counter() - started)
    return {way: {"seconds": statistics.median(values)} for way, values in times.items()}
