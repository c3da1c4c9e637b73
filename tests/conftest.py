"""What the tests share: tiny random models, calibration sets, the naive definition."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from llmcompressor import oneshot
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import dlp_plugin  # noqa: F401 (registers the modifier)
from dlp_plugin.evaluation.text import calibration_set, read_tokens

ROOT = Path(__file__).parents[1]
SHIPPED = ROOT / "examples" / "small_model"
CALIBRATION_TEXT = ROOT / "examples" / "text" / "calibration.txt"
TEST_TEXT = ROOT / "examples" / "text" / "test.txt"

VOCABULARY = 256


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that oneshot() can save; the tests feed token ids."""
    words = {str(number): number for number in range(VOCABULARY)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="0")),
        unk_token="0",
        pad_token="0",
    )


def random_samples(samples: int = 8, length: int = 32, seed: int = 0) -> Dataset:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCABULARY, (samples, length), generator=generator)
    return Dataset.from_dict(
        {"input_ids": ids.tolist(), "attention_mask": [[1] * length] * samples}
    )


def run(model: torch.nn.Module, recipe: object, dataset: Dataset | None, **arguments: object):
    """The real ``oneshot()`` with every choice that could differ between runs made."""
    return oneshot(
        model=model,
        recipe=recipe,
        dataset=dataset,
        tokenizer=arguments.pop("tokenizer", None) or word_tokenizer(),
        shuffle_calibration_samples=False,
        num_calibration_samples=512 if dataset is None else len(dataset),
        **arguments,
    )


def zeros(linear: torch.nn.Linear) -> int:
    return int((linear.weight == 0).sum())


def linears_of(model: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}


@contextmanager
def recorded_inputs(model: torch.nn.Module) -> Iterator[dict[str, list[torch.Tensor]]]:
    """Every Linear's inputs in float64, ``[tokens, in]`` per call."""
    inputs: dict[str, list[torch.Tensor]] = {}
    hooks = [
        linear.register_forward_pre_hook(
            lambda _, args, name=name: inputs.setdefault(name, []).append(
                args[0].detach().double().reshape(-1, args[0].shape[-1])
            )
        )
        for name, linear in linears_of(model).items()
    ]
    yield inputs
    for hook in hooks:
        hook.remove()


@torch.no_grad()
def naive_scores_of(
    model: torch.nn.Module,
    inputs: dict[str, list[torch.Tensor]],
    blocks: dict[str, list[str]],
) -> dict[str, dict[str, float]]:
    """Section 3.3 of the paper as written, in float64, all scores of a block at once.

    :param blocks: block name to the names of its Linears that count
    :return: block name to its unimportance by ``median`` and by ``mean``
    """
    linears = linears_of(model)
    result = {}
    for block, names in blocks.items():
        norms = {name: torch.cat(inputs[name]).norm(dim=0) for name in names}
        scores = torch.cat([(linears[n].weight.double().abs() * norms[n]).flatten() for n in names])
        result[block] = {"median": scores.median().item(), "mean": scores.mean().item()}
    return result


@torch.no_grad()
def naive_scores(
    model: torch.nn.Module, dataset: Dataset, blocks: dict[str, list[str]]
) -> dict[str, dict[str, float]]:
    """:func:`naive_scores_of` on what a plain forward pass of the whole model shows."""
    with recorded_inputs(model) as inputs:
        for row in dataset:
            model(**{key: torch.tensor([value]) for key, value in row.items()})
    return naive_scores_of(model, inputs, blocks)


def naive_sparsities(scores: list[float], sparsity: float, alpha: float) -> list[float]:
    """The released code's arithmetic for blocks of equal size, without clipping."""
    u = torch.tensor(scores, dtype=torch.float64)
    importance = 1 - u / u.sum()
    spread = importance.max() - importance.min()
    k = 2 * alpha * (importance - importance.min()) / spread
    return (1 - (k - k.mean() + (1 - sparsity))).tolist()


def as_if_loaded(model: torch.nn.Module, folder: Path) -> torch.nn.Module:
    """Give a model made in memory the origin on disk that ``oneshot()`` asks for."""
    model.config.save_pretrained(folder)
    model.config.name_or_path = model.name_or_path = str(folder)
    return model


@pytest.fixture
def make_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., LlamaForCausalLM]:
    """A Llama with three blocks whose importance differs, the same at every call."""

    def make(dtype: torch.dtype = torch.float32, **changes: object) -> LlamaForCausalLM:
        torch.manual_seed(0)
        settings = {
            "vocab_size": VOCABULARY,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "attn_implementation": "eager",  # what the host calibrates with
        }
        model = LlamaForCausalLM(LlamaConfig(**{**settings, **changes}))
        with torch.no_grad():
            for depth, layer in enumerate(model.model.layers):
                for module in layer.modules():
                    if isinstance(module, torch.nn.Linear):
                        module.weight *= 1 + 0.3 * ((depth * 2) % 3)
        return as_if_loaded(model.to(dtype), folder)

    folder = tmp_path_factory.mktemp("origin")
    return make


@pytest.fixture(scope="session")
def calibration() -> Dataset:
    """32 samples of 128 tokens of the text that the repository ships."""
    from transformers import AutoTokenizer

    tokens = read_tokens(CALIBRATION_TEXT, AutoTokenizer.from_pretrained(SHIPPED))
    return calibration_set(tokens, 128, 32)
