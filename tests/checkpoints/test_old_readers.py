"""Exported checkpoints as tools with transformers 4 read them."""

from __future__ import annotations

import json
from pathlib import Path

from helpers import MakeModel, word_tokenizer
from packed_checkpoints import quantize
from transformers import AutoTokenizer

from dlp_plugin.checkpoints.gptq_format import export_gptq
from dlp_plugin.checkpoints.old_readers import readable_config

SCALED = {"rope_type": "linear", "factor": 2.0, "rope_theta": 500000.0}
PLAIN = {"rope_type": "default", "rope_theta": 20000.0}


def test_an_export_has_the_fields_of_both(make_model: MakeModel, tmp_path: Path) -> None:
    source = quantize(make_model(rope_parameters=SCALED), tmp_path / "source")
    word_tokenizer().save_pretrained(source)
    saved = json.loads((source / "tokenizer_config.json").read_text())
    assert saved["tokenizer_class"] == "TokenizersBackend", "transformers names another class"
    export_gptq(source, tmp_path / "gptq")
    config = json.loads((tmp_path / "gptq" / "config.json").read_text())
    assert config["rope_parameters"] == SCALED
    assert config["rope_theta"] == 500000.0
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    assert config["torch_dtype"] == config["dtype"]
    settings = json.loads((tmp_path / "gptq" / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not {"backend", "is_local", "local_files_only"} & settings.keys()
    assert AutoTokenizer.from_pretrained(tmp_path / "gptq")("7")["input_ids"] == [7]


def test_linears_that_stayed_dense_are_named(make_model: MakeModel, tmp_path: Path) -> None:
    """vLLM and GPTQModel take a pattern behind ``-:`` for modules that are not quantized."""
    ignore = ["lm_head", "re:.*layers.1.self_attn.o_proj"]
    source = quantize(make_model(), tmp_path / "source", ignore=ignore)
    export_gptq(source, tmp_path / "gptq")
    settings = json.loads((tmp_path / "gptq" / "quantize_config.json").read_text())
    assert settings["dynamic"] == {r"-:^model\.layers\.1\.self_attn\.o_proj$": {}}
    config = json.loads((tmp_path / "gptq" / "config.json").read_text())
    assert config["quantization_config"] == settings


def test_no_scaling_where_there_is_none() -> None:
    assert readable_config({"rope_parameters": PLAIN}) == {
        "rope_parameters": PLAIN,
        "rope_theta": 20000.0,
    }


def test_what_a_configuration_says_itself_stays() -> None:
    said = {"rope_parameters": PLAIN, "rope_theta": 1.0, "dtype": "float16", "torch_dtype": "auto"}
    assert readable_config(said) == said


def test_nested_configurations() -> None:
    found = readable_config({"text_config": {"rope_parameters": PLAIN}, "dtype": "bfloat16"})
    assert found["text_config"]["rope_theta"] == 20000.0
    assert "rope_theta" not in found


def test_parameters_by_kind_of_layer_have_no_place_there() -> None:
    """Gemma 3 has one set for sliding windows, another for all else."""
    said = {"rope_parameters": {"full_attention": SCALED, "sliding_attention": PLAIN}}
    assert readable_config(said) == said
