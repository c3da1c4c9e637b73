"""Train the small Llama that this repository ships, or a mixture of experts, from any text file.

    python examples/train_small_model.py --train train.txt --valid valid.txt --out my_model
    python examples/train_small_model.py ... --out my_mixture --experts 8

Byte-level BPE tokenizer with 4,096 entries, 12 blocks, grouped-query attention, every
Linear's input a multiple of 128 (so that 4-bit groups of 128 fit). Two CPU cores do the
default 16 million tokens in under an hour. With ``--experts`` it is a Mixtral that has two of
them compute every token; of 8 experts it has 10 million parameters.
"""

import argparse
import math
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from dlp_plugin.evaluation.perplexity import perplexity
from dlp_plugin.evaluation.text import token_windows

VOCABULARY = 4096
WINDOW = 256
BATCH = 16
PEAK_LEARNING_RATE = 3e-3
WARMUP = 0.03
WEIGHT_DECAY = 0.1
CHOSEN = 2  # experts that compute a token
BALANCE = 0.02  # what the loss counts of experts that are used unevenly
END_OF_TEXT = "<|endoftext|>"


def train_tokenizer(text_file: Path) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train([str(text_file)], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
    )


def make_model(tokenizer: PreTrainedTokenizerFast, experts: int) -> PreTrainedModel:
    """A Llama, or a Mixtral of so many experts, each half as wide as the Llama's layer."""
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 12,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": WINDOW,
        "tie_word_embeddings": True,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if not experts:
        return LlamaForCausalLM(LlamaConfig(**settings))
    settings |= {"intermediate_size": 256, "sliding_window": None}
    config = MixtralConfig(
        **settings,
        num_local_experts=experts,
        num_experts_per_tok=CHOSEN,
        router_aux_loss_coef=BALANCE,
    )
    model = MixtralForCausalLM(config)
    model.set_experts_implementation("eager")  # on a CPU a fifth faster than grouped products
    return model


@torch.no_grad()
def shares(model: PreTrainedModel, windows: Sequence[torch.Tensor]) -> torch.Tensor:
    """How often every expert of every block is chosen ``[blocks, experts]``; evenly it is 1."""
    counts = torch.zeros(len(model.model.layers), model.config.num_local_experts)
    for window in windows:
        found = model(input_ids=window[None], use_cache=False, output_router_logits=True)
        chosen = torch.stack(found.router_logits).topk(CHOSEN, dim=-1).indices
        counts += torch.nn.functional.one_hot(chosen, counts.shape[1]).sum((1, 2))
    return counts / counts.mean(1, keepdim=True)


def learning_rate(done: float) -> float:
    """Linear warm-up, then cosine to a hundredth; ``done`` runs from 0 to 1."""
    if done < WARMUP:
        return PEAK_LEARNING_RATE * (done + 1e-3) / (WARMUP + 1e-3)
    cosine = 0.5 * (1 + math.cos(math.pi * (done - WARMUP) / (1 - WARMUP)))
    return PEAK_LEARNING_RATE * (0.01 + 0.99 * cosine)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", type=Path, required=True, help="text to learn")
    parser.add_argument("--valid", type=Path, required=True, help="text to judge by")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--tokens", type=float, default=16e6, help="tokens to see")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--experts", type=int, default=0, help="of a mixture, 2 or more")
    parser.add_argument("--compile", action="store_true", help="use torch.compile")
    arguments = parser.parse_args()
    if arguments.experts and arguments.experts < CHOSEN:
        parser.error(f"--experts is {arguments.experts}: write {CHOSEN} or more, or leave it out")

    torch.manual_seed(arguments.seed)
    tokenizer = train_tokenizer(arguments.train)
    stream = torch.tensor(tokenizer(arguments.train.read_text())["input_ids"])
    valid = token_windows(tokenizer(arguments.valid.read_text())["input_ids"], WINDOW)
    model = make_model(tokenizer, arguments.experts)
    balance = {"output_router_logits": True} if arguments.experts else {}  # has the loss count it
    steps = int(arguments.tokens / (BATCH * WINDOW))
    print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {steps} steps; "
        f"{len(stream):,} training tokens"
    )

    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": WEIGHT_DECAY},
            {"params": vectors, "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
        fused=True,
    )
    forward = torch.compile(model) if arguments.compile else model

    order = torch.empty(0, dtype=torch.int64)
    started = time.time()
    for step in range(steps):
        if len(order) < BATCH:  # a new epoch starts its windows at a new offset
            offset = int(torch.randint(WINDOW, (1,)))
            windows = stream[offset:].unfold(0, WINDOW, WINDOW)
            order = torch.randperm(len(windows))
        ids, order = windows[order[:BATCH]], order[BATCH:]
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step / steps)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = forward(input_ids=ids, labels=ids, use_cache=False, **balance).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == steps - 1:
            speed = (step + 1) * BATCH * WINDOW / (time.time() - started)
            print(f"step {step}: loss {loss.item():.3f}, {speed:.0f} tokens/s", flush=True)
        if step % 1000 == 999:
            print(
                f"  validation perplexity {perplexity(model, valid[:100]):.2f}",
                flush=True,
            )

    if arguments.experts:
        used = shares(model, valid[:16])
        print(f"experts are chosen {used.min():.2f} to {used.max():.2f} times as often as evenly")
    model = model.to(torch.bfloat16)
    model.save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)
    print(f"validation perplexity {perplexity(model, valid):.2f}; saved {arguments.out}")


if __name__ == "__main__":
    main()
