"""What training brings after each pruner; run by run.py.

Whether reconstruction makes training unnecessary: the shipped model at 70 %, by one refined
plan, then LoRA under the masks as the example of recovery trains it.
"""

import sys

import torch
from common import DEVICE, ROOT, SHIPPED, TEST_TEXT, TEXT, samples
from compressed_tensors.offload import remove_dispatch
from peft import get_peft_model
from plans import SPARSITY, plan
from transformers import AutoTokenizer

from dlp_plugin.checkpoints.loading import apply_recipe
from dlp_plugin.comparison.results import recipe_of
from dlp_plugin.evaluation.perplexity import perplexity
from dlp_plugin.evaluation.text import calibrate_on, read_tokens, token_windows
from dlp_plugin.recovery import mask_updates

sys.path.append(str(ROOT / "examples"))
from recover_with_lora import LORA, train

STEPS, RATE = 120, 5e-4  # the example's own
PRUNERS = ("wanda", "wanda-reconstructed", "admm", "admm-reconstructed")


def recovery() -> dict[str, dict[str, float]]:
    """Perplexity on the test text: pruned, and trained."""
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED)
    dataset = samples(128, 256)
    tokens = torch.tensor(read_tokens(TEXT, tokenizer))
    windows = token_windows(read_tokens(TEST_TEXT, tokenizer), 256)
    refined = plan(alpha=0.0, refine=16)
    results = {}
    for pruner in PRUNERS:
        recipe = recipe_of(refined, pruner)
        model = apply_recipe(str(SHIPPED), recipe, **calibrate_on(dataset, tokenizer))
        model = remove_dispatch(model).float().to(DEVICE)
        found = {"pruned": perplexity(model, windows)}
        torch.manual_seed(0)
        adapted = get_peft_model(model, LORA)
        mask_updates(adapted)
        adapters = [p for p in adapted.parameters() if p.requires_grad]
        train(adapted, torch.optim.AdamW(adapters, RATE), tokens, 256, STEPS)
        found["LoRA, masked"] = perplexity(adapted, windows)
        results[f"{pruner}, {SPARSITY:.0%}"] = found
    return results
