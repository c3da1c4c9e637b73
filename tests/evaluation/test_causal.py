"""A next-token loss means something only where no token sees the next."""

from pathlib import Path

import pytest
import torch
from families import FAMILIES, make
from helpers import MakeModel, as_if_loaded, refuses
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    LlamaModel,
)

from dlp_plugin import DLPModifier, WandaPruningModifier
from dlp_plugin.evaluation.causal import check_causal

TINY = {
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def test_a_causal_model_passes_in_its_mode(make_model: MakeModel) -> None:
    model = make_model().train()
    check_causal(model, "this")
    assert model.training
    check_causal(make_model(torch.bfloat16), "this")


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    model = make(family.config(), tmp_path, family.kind)
    if family.kind in (AutoModelForCausalLM, AutoModelForImageTextToText):
        check_causal(model, "this")
    else:
        with pytest.raises(ValueError, match=f"this, .* but {type(model).__name__} is not one: it"):
            check_causal(model, "this")


def test_it_costs_one_pass(make_model: MakeModel) -> None:
    """And both samples are in it, as experts round otherwise with other numbers of rows."""
    model, shapes = make_model(), []
    model.register_forward_pre_hook(
        lambda _, __, given: shapes.append(given["input_ids"].shape), with_kwargs=True
    )
    check_causal(model, "this")
    assert shapes == [(2, 4)]


@pytest.mark.parametrize("kind", [BertForMaskedLM, BertLMHeadModel])
def test_one_that_attends_both_ways(kind: type) -> None:
    """Loaded as a causal language model, BERT attends both ways all the same."""
    torch.manual_seed(0)
    message = f"this, which needs a causal .*{kind.__name__} is not one: its predictions change"
    with pytest.raises(ValueError, match=message):
        check_causal(kind(BertConfig(**TINY)), "this")


def test_bert_as_a_decoder_is_causal() -> None:
    check_causal(BertLMHeadModel(BertConfig(**TINY, is_decoder=True)), "this")


def test_one_with_an_encoder() -> None:
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 64}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    model = BartForConditionalGeneration(BartConfig(**sizes, **heads))
    with pytest.raises(ValueError, match="it has an encoder"):
        check_causal(model, "this")


def test_one_without_a_head(make_model: MakeModel) -> None:
    model = LlamaModel(make_model().config)
    with pytest.raises(ValueError, match="it has no head that predicts tokens"):
        check_causal(model, "this")


def test_refine_on_one_is_refused_before_any_work(tmp_path) -> None:
    model = as_if_loaded(BertLMHeadModel(BertConfig(**TINY)), tmp_path)
    stage = WandaPruningModifier(sparsity=0.5, targets=["Linear"], ignore=["re:.*decoder"])
    refuses(model, "refine judge by loss, which needs a causal", DLPModifier(refine=1), stage)
