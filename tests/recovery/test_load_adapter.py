"""Saved adapters are loaded as they were trained: embeddings of any size, experts of before."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from adapted_models import MakeModel, adapted, logits_of, lora, prune, refilled
from families import FAMILIES, make
from helpers import word_tokenizer
from safetensors.torch import save_file

from dlp_plugin.recovery import load_adapter, masks_of, sparse_merge

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings"),
    pytest.mark.filterwarnings("ignore:.*save_embedding_layers"),
]
EMBEDDING = ["q_proj", "embed_tokens"]
SETTINGS = {
    "resized": {},
    "saved": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "embedding": {"target_modules": EMBEDDING},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "both, tied": {"target_modules": EMBEDDING, "ensure_weight_tying": True},
}
# Of what is not tied peft saves the end that is adapted: new rows of the other are nowhere
NOT_SAVED = {"embedding": "lm_head", "both, tied": "lm_head", "head": "model.embed_tokens"}


def saved(model: torch.nn.Module, folder: Path) -> Path:
    """A base model, as adapters name theirs."""
    model.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    model.config.name_or_path = model.name_or_path = str(folder)
    return folder


@pytest.mark.parametrize("rows", [320, 200, 256], ids=["padded", "shrunk", "same"])
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_of_another_size_than_the_tokenizer(
    make_model: MakeModel, settings: str, rows: int, tied: bool, tmp_path: Path
) -> None:
    model = prune(make_model(tie_word_embeddings=tied))
    masks = masks_of(model)
    base = saved(model, tmp_path / "base")
    model.resize_token_embeddings(rows, mean_resizing=False)
    peft_model = adapted(model, lora(**{"target_modules": ["q_proj"], **SETTINGS[settings]}))
    trained = logits_of(peft_model)
    peft_model.save_pretrained(tmp_path / "adapter")
    word_tokenizer().save_pretrained(tmp_path / "adapter")
    if rows > 256 and not tied and (other := NOT_SAVED.get(settings)):
        with pytest.raises(ValueError, match=f"320 rows of {other}.weight, which its file does n"):
            load_adapter(tmp_path / "adapter", str(base))
        base = saved(peft_model.unload(), tmp_path / "larger")
    loaded, tokenizer = load_adapter(tmp_path / "adapter", str(base))
    torch.testing.assert_close(logits_of(loaded), trained)
    assert len(tokenizer) == 256
    merged = sparse_merge(loaded, allow_dense=True)
    assert merged.config.vocab_size == merged.lm_head.weight.shape[0] == rows
    assert refilled(merged, masks) == 0


def test_more_tokens_than_rows(make_model: MakeModel, tmp_path: Path) -> None:
    """Where the adapter's file says nothing, there is a row for every token."""
    model = prune(make_model())
    base = saved(model, tmp_path / "base")
    adapted(model, lora()).save_pretrained(tmp_path / "adapter")
    tokenizer = word_tokenizer()
    tokenizer.add_tokens(["<one>", "<two>"])
    tokenizer.save_pretrained(tmp_path / "adapter")
    loaded, tokenizer = load_adapter(tmp_path / "adapter", str(base))
    assert loaded.get_input_embeddings().weight.shape[0] == len(tokenizer) == 258


NAMES = {  # of an expert's Linears in transformers 4: the fused ones, and what brings it down
    "mixtral": ("block_sparse_moe.experts", ["w1", "w3"], "w2"),
    "qwen3_moe": ("mlp.experts", ["gate_proj", "up_proj"], "down_proj"),
}


@torch.no_grad()
def pruned_mixture(family: str, folder: Path) -> torch.nn.Module:
    model = make(FAMILIES[family].config(), folder)
    for parameter in model.parameters():
        if parameter.ndim == 3:
            parameter.masked_fill_(torch.rand(parameter.shape) < 0.6, 0)
    return model


@pytest.mark.parametrize("family", NAMES)
def test_experts_under_the_names_of_transformers_4(family: str, tmp_path: Path) -> None:
    """Each was a Linear; now a layer has one tensor of all, to which peft brings them."""
    model = pruned_mixture(family, tmp_path)
    place, fused, down = NAMES[family]
    parts, updates = {}, {}
    for depth, layer in enumerate(model.model.layers):
        experts = layer.mlp.experts
        shapes = dict.fromkeys(fused, (experts.down_proj.shape[2], 64))
        shapes[down] = (64, experts.down_proj.shape[2])
        for expert in range(4):
            for name, (rows, columns) in shapes.items():
                low, high = torch.randn(4, columns), torch.randn(rows, 4)
                key = f"base_model.model.model.layers.{depth}.{place}.{expert}.{name}"
                parts |= {f"{key}.lora_A.weight": low, f"{key}.lora_B.weight": high}
                updates[depth, expert, name] = 2 * high @ low
    base, folder = saved(model, tmp_path / "base"), tmp_path / "adapter"
    folder.mkdir()
    save_file(parts, folder / "adapter_model.safetensors")
    lora(target_modules=[*fused, down], base_model_name_or_path=str(base)).save_pretrained(folder)

    merged = sparse_merge(load_adapter(folder)[0])
    for depth, layer in enumerate(model.model.layers):
        dense, found = layer.mlp.experts, merged.model.layers[depth].mlp.experts
        for expert in range(4):
            gate_up = torch.cat([updates[depth, expert, name] for name in fused])
            changes = {"gate_up_proj": gate_up, "down_proj": updates[depth, expert, down]}
            for name, change in changes.items():
                before = getattr(dense, name)[expert].detach()
                expected = torch.where(before != 0, before + change, 0)
                torch.testing.assert_close(getattr(found, name)[expert].detach(), expected)


def test_an_expert_that_the_model_has_not(tmp_path: Path) -> None:
    model = pruned_mixture("mixtral", tmp_path)
    base, folder = saved(model, tmp_path / "base"), tmp_path / "adapter"
    adapted(model, lora(target_modules=["q_proj"])).save_pretrained(folder)
    weights = peft.load_peft_weights(str(folder), device="cpu")
    key = "base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight"
    save_file({**weights, key: torch.zeros(4, 64)}, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"does not fit .*which has no place for .*layers\.9\."):
        load_adapter(folder, str(base))
