"""Tiny random models of many families, for the tests that run them all."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from compressed_tensors.utils.match import is_match
from datasets import Dataset
from helpers import VOCABULARY, as_if_loaded, linears_of, random_samples
from torch.utils.data import DataLoader
from transformers import (
    AlbertConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
    BartConfig,
    BertConfig,
    BloomConfig,
    CLIPVisionConfig,
    DeepseekV3Config,
    DistilBertConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteConfig,
    JambaConfig,
    Lfm2Config,
    LlamaConfig,
    LlavaConfig,
    MistralConfig,
    MixtralConfig,
    ModernBertConfig,
    NemotronHConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
    Qwen2_5_VLConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
    WhisperConfig,
)

from dlp_plugin.scoring.blocks import outer_block

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
}
NO_HEAD_DIM = {k: v for k, v in SIZES.items() if k != "head_dim"}
NO_GROUPS = {k: v for k, v in NO_HEAD_DIM.items() if k != "num_key_value_heads"}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
SMALL_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
OPT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "ffn_dim": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "word_embed_proj_dim": 32,
    "pad_token_id": 0,
}
DEEPSEEK = {
    **NO_HEAD_DIM,
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "first_k_dense_replace": 1,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "moe_intermediate_size": 32,
}
QWEN3_NEXT = {
    **SIZES,
    **SMALL_EXPERTS,
    "shared_expert_intermediate_size": 32,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
JAMBA = {
    **NO_HEAD_DIM,
    "attn_layer_period": 3,
    "attn_layer_offset": 1,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
    "num_experts": 4,
    "mamba_d_state": 8,
    "use_mamba_kernels": False,
}
NEMOTRON_H = {
    **SIZES,
    "hybrid_override_pattern": "M*-",  # a Mamba, an attention and an MLP block
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "ssm_state_size": 8,
    "n_groups": 1,
}
NEMOTRON_H_EXPERTS = {
    **NEMOTRON_H,
    "hybrid_override_pattern": "M*E",
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32,
    "topk_group": 1,
}
ENCODER_DECODER = {
    "vocab_size": VOCABULARY,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "pad_token_id": 0,
    "decoder_start_token_id": 0,
}
AUDIO = {**ENCODER_DECODER, "num_mel_bins": 8, "max_source_positions": 16}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
IMAGE = VOCABULARY - 1


def llava() -> LlavaConfig:
    tower = CLIPVisionConfig(**VISION, num_hidden_layers=2, image_size=16, patch_size=8)
    return LlavaConfig(
        text_config=LlamaConfig(**SIZES),
        vision_config=tower,
        image_token_index=IMAGE,
        vision_feature_layer=-1,
    )


def qwen2_5_vl() -> Qwen2_5_VLConfig:
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3]}
    tower = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2}
    return Qwen2_5_VLConfig(
        text_config={**SIZES, "rope_scaling": rope},
        vision_config={**tower, "out_hidden_size": 64, "patch_size": 8},
        image_token_id=IMAGE,
        video_token_id=IMAGE - 1,
        vision_start_token_id=IMAGE - 2,
        vision_end_token_id=IMAGE - 3,
    )


def text() -> Dataset:
    return random_samples()


def text_pairs() -> Dataset:
    """Samples whose decoder reads another, shorter text."""
    return text().add_column("decoder_input_ids", random_samples(length=12, seed=1)["input_ids"])


def images() -> Dataset:
    """Text with an image of 16 x 16 pixels, which is 2 x 2 patches, as its first 4 tokens."""
    rows = text().map(
        lambda row: {"input_ids": [IMAGE] * 4 + [i % (IMAGE - 3) for i in row["input_ids"][4:]]}
    )
    pixels = torch.randn(len(rows), 3, 16, 16, generator=torch.Generator().manual_seed(1))
    return rows.add_column("pixel_values", pixels.tolist())


def audio() -> Dataset:
    pairs = text_pairs().select_columns("decoder_input_ids")
    sound = torch.randn(len(pairs), 8, 32, generator=torch.Generator().manual_seed(1))
    return pairs.add_column("input_features", sound.tolist())


@dataclass(frozen=True)
class Family:
    """A tiny model, and what of it is to be pruned.

    :param config: makes the configuration
    :param blocks: where the blocks are, to the number of Linears to be pruned in each
    :param ignore: what the stage is told to leave
    :param unseen: pattern of Linears whose weight the model reads past their ``forward``:
        they stay dense, and count neither here nor in the plan
    :param routers: pattern of the Linears that route, and stay dense as no target names them
    :param sequential_targets: class of the blocks, where transformers declares none
    :param kind: what makes the model
    :param samples: makes the calibration samples
    """

    config: Callable[[], PreTrainedConfig]
    blocks: dict[str, list[int]]
    ignore: list[str] = field(default_factory=list)
    unseen: str = "re:nothing"
    routers: str = "re:nothing"
    sequential_targets: list[str] | None = None
    kind: type = AutoModelForCausalLM
    samples: Callable[[], Dataset] = text

    def linears(self, model: torch.nn.Module) -> dict[str, list[str]]:
        """Names of the Linears to be pruned, by block, as the table has them."""
        blocks = [f"{at}.{i}" for at, counts in self.blocks.items() for i in range(len(counts))]
        names: dict[str, list[str]] = {block: [] for block in blocks}
        for name, linear in linears_of(model).items():
            block = outer_block(name, blocks)
            if block and not is_match(name, linear, [self.unseen, self.routers, *self.ignore]):
                names[block].append(name)
        expected = [count for counts in self.blocks.values() for count in counts]
        assert [len(group) for group in names.values()] == expected
        return names

    def calibration(self) -> Dataset | DataLoader:
        """The samples as ``oneshot()`` takes them."""
        samples = self.samples()
        if "input_ids" not in samples.column_names:  # the host drops such rows of a Dataset
            return DataLoader(samples.with_format("torch"))
        return samples


FAMILIES: dict[str, Family] = {
    "llama": Family(lambda: LlamaConfig(**SIZES), {"model.layers": [7] * 3}),
    "mistral": Family(lambda: MistralConfig(**SIZES, sliding_window=16), {"model.layers": [7] * 3}),
    "qwen2": Family(  # biases, tied embeddings
        lambda: Qwen2Config(**SIZES, tie_word_embeddings=True), {"model.layers": [7] * 3}
    ),
    "qwen3": Family(lambda: Qwen3Config(**SIZES), {"model.layers": [7] * 3}),
    "gemma2": Family(lambda: Gemma2Config(**SIZES, sliding_window=16), {"model.layers": [7] * 3}),
    "gemma3": Family(
        lambda: Gemma3TextConfig(**SIZES, sliding_window=16), {"model.layers": [7] * 3}
    ),
    "olmo2": Family(lambda: Olmo2Config(**SIZES), {"model.layers": [7] * 3}),
    "granite": Family(lambda: GraniteConfig(**NO_HEAD_DIM), {"model.layers": [7] * 3}),
    "phi": Family(lambda: PhiConfig(**NO_HEAD_DIM), {"model.layers": [6] * 3}),
    "phi3": Family(lambda: Phi3Config(**SIZES), {"model.layers": [4] * 3}),
    "opt": Family(lambda: OPTConfig(**OPT), {"model.decoder.layers": [6] * 3}),
    "bloom": Family(
        lambda: BloomConfig(vocab_size=VOCABULARY, hidden_size=64, n_layer=3, n_head=4),
        {"transformer.h": [4] * 3},
    ),
    "falcon": Family(lambda: FalconConfig(**NO_GROUPS), {"transformer.h": [4] * 3}),
    "gpt_neox": Family(lambda: GPTNeoXConfig(**NO_GROUPS), {"gpt_neox.layers": [4] * 3}),
    # Experts, all of which the host shows every token
    "mixtral": Family(lambda: MixtralConfig(**SIZES, **EXPERTS), {"model.layers": [4 + 3 * 4] * 3}),
    "qwen3_moe": Family(
        lambda: Qwen3MoeConfig(**SIZES, **SMALL_EXPERTS), {"model.layers": [4 + 3 * 4] * 3}
    ),
    "gpt_oss": Family(
        lambda: GptOssConfig(**SIZES, **EXPERTS, sliding_window=16),
        {"model.layers": [4 + 3 * 4] * 3},
    ),
    "deepseek_v3": Family(  # the first block is dense
        lambda: DeepseekV3Config(**DEEPSEEK),
        {"model.layers": [4 + 3, 4 + 3 + 3 * 4, 4 + 3 + 3 * 4]},
        ignore=["re:.*kv_b_proj"],  # its input has four dimensions, and the stages take three
    ),
    # Blocks of several kinds
    "qwen3_next": Family(
        lambda: Qwen3NextConfig(**QWEN3_NEXT),
        {"model.layers": [3 + 3 + 3 * 4, 4 + 3 + 3 * 4, 3 + 3 + 3 * 4]},
        routers="re:.*shared_expert_gate$",
    ),
    "jamba": Family(
        lambda: JambaConfig(**JAMBA),
        {"model.layers": [3 + 3, 4 + 3 * 4, 3 + 3]},
        unseen="re:.*dt_proj",
        routers="re:.*router$",
    ),
    "nemotron_h": Family(lambda: NemotronHConfig(**NEMOTRON_H), {"model.layers": [2, 4, 2]}),
    "nemotron_h_experts": Family(  # which have no gate
        lambda: NemotronHConfig(**NEMOTRON_H_EXPERTS), {"model.layers": [2, 4, 2 + 2 * 4]}
    ),
    "lfm2": Family(
        lambda: Lfm2Config(**NO_HEAD_DIM, layer_types=["conv", "full_attention", "conv"]),
        {"model.layers": [2 + 3, 4 + 3, 2 + 3]},
    ),
    # Encoders
    "bert": Family(
        lambda: BertConfig(**NO_GROUPS), {"bert.encoder.layer": [6] * 3}, kind=AutoModelForMaskedLM
    ),
    "modernbert": Family(
        lambda: ModernBertConfig(**NO_GROUPS, local_attention=16),
        {"model.layers": [4] * 3},
        kind=AutoModelForMaskedLM,
    ),
    "distilbert": Family(
        lambda: DistilBertConfig(
            vocab_size=VOCABULARY, dim=64, hidden_dim=96, n_layers=3, n_heads=4
        ),
        {"distilbert.transformer.layer": [6] * 3},
        sequential_targets=["TransformerBlock"],
        kind=AutoModelForMaskedLM,
    ),
    "albert": Family(  # two blocks, each applied three times, by turns
        lambda: AlbertConfig(**NO_GROUPS, embedding_size=32, inner_group_num=2),
        {"albert.encoder.albert_layer_groups.0.albert_layers": [6] * 2},
        sequential_targets=["AlbertLayer"],
        kind=AutoModelForMaskedLM,
    ),
    # Encoders with decoders
    "bart": Family(
        lambda: BartConfig(**ENCODER_DECODER),
        {"model.encoder.layers": [6] * 2, "model.decoder.layers": [10] * 2},
        kind=AutoModelForSeq2SeqLM,
        samples=text_pairs,
    ),
    "whisper": Family(
        lambda: WhisperConfig(**AUDIO),
        {"model.encoder.layers": [6] * 2, "model.decoder.layers": [10] * 2},
        kind=AutoModelForSpeechSeq2Seq,
        samples=audio,
    ),
    # Vision and language
    "llava": Family(
        llava,
        {
            "model.vision_tower.encoder.layers": [6] * 2,
            "model.language_model.layers": [7] * 3,
        },
        kind=AutoModelForImageTextToText,
        samples=images,
    ),
    "llava_language_only": Family(
        llava,
        {"model.language_model.layers": [7] * 3},
        ignore=["re:.*vision_tower.*"],
        kind=AutoModelForImageTextToText,
        samples=images,
    ),
    "qwen2_5_vl_on_text": Family(
        qwen2_5_vl,
        {"model.language_model.layers": [7] * 3},
        ignore=["re:.*visual.*"],
        kind=AutoModelForImageTextToText,
    ),
}


def make(
    config: PreTrainedConfig,
    folder: Path,
    kind: type = AutoModelForCausalLM,
    attention: str = "eager",
) -> torch.nn.Module:
    torch.manual_seed(0)
    model = kind.from_config(config, attn_implementation=attention).float().eval()
    for parameter in model.parameters():  # unlike blocks, and no weight at exactly zero
        parameter.data += 0.02 * (1 + torch.rand(())) * torch.randn(parameter.shape)
    return as_if_loaded(model, folder)
