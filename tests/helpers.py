"""What the tests share besides fixtures: places, recipes, runs, naive twins."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import yaml
from compressed_tensors.offload import load_offloaded_model, remove_dispatch
from compressed_tensors.offload.cache import DiskCache
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers import Modifier
from loguru import logger
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner, Result

from dlp_plugin import OneShotMagnitudeModifier, SparseGPTModifier, WandaPruningModifier
from dlp_plugin.cli import app

ROOT = Path(__file__).parents[1]
SHIPPED = ROOT / "examples" / "small_model"
CALIBRATION_TEXT = ROOT / "examples" / "text" / "calibration.txt"
TEST_TEXT = ROOT / "examples" / "text" / "test.txt"

CALIBRATE = ["--data", str(CALIBRATION_TEXT), "--samples", "8", "--length", "64"]
"""The terminal's options for a small calibration set."""
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
"""What weights are stored in."""
VOCABULARY = 256
"""Of the tiny models and their tokenizer."""
EVERY = {"targets": ["Linear"], "ignore": ["re:.*lm_head"]}
"""A stage's fields: every Linear but the output layer."""
PRUNERS = [WandaPruningModifier, SparseGPTModifier, OneShotMagnitudeModifier]
"""The package's own stages."""

TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
  cache_dir: {cache}
output_type: {output_type}
test_split: test
doc_to_text: context
doc_to_target: answer
doc_to_choice: choices
metric_list:
"""
"""A task of lm-evaluation-harness in YAML; the metrics follow."""

Parts = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""Name of a Linear to its weight and its input channels' norms."""
MakeModel = Callable[..., LlamaForCausalLM]
"""The fixture ``make_model``."""


class Logged:
    """What the fixture ``logged`` gives: ``logged("WARNING")`` since the test began."""

    def __init__(self) -> None:
        self.records: list[dict] = []

    def __call__(self, level: str = "INFO", by: str = "") -> list[str]:
        """Messages of this level and above, of all packages or of one."""
        least = logger.level(level).no
        return [
            each["message"]
            for each in self.records
            if each["level"].no >= least and each["name"].startswith(by)
        ]


def recipe(
    dlp: dict | None = None, pruner: str = "WandaPruningModifier", **stage: object
) -> dict[str, object]:
    """A recipe as YAML reads it: DLPModifier with its fields, and a stage at 70 %."""
    fields = {"sparsity": 0.7, **EVERY, **stage}
    return {"pruning_stage": {"pruning_modifiers": {"DLPModifier": dlp or {}, pruner: fields}}}


def command(*arguments: object, code: int = 0) -> Result:
    """What ``dlp-plugin`` does in this process; it must end with this code."""
    with patch.dict(os.environ):  # where it sets whether there are progress bars
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result


def deny_writing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if there were no permission to write results; root may write everywhere."""
    make = Path.mkdir

    def mkdir(path: Path, *arguments: object, **options: object) -> None:
        if ".part" in path.name:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        make(path, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", mkdir)


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that oneshot() can save; the tests feed token ids."""
    words = {str(number): number for number in range(VOCABULARY)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="0")),
        unk_token="0",
        pad_token="0",
    )


def random_samples(samples: int = 8, length: int = 32, seed: int = 0) -> Dataset:
    """Token ids without padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCABULARY, (samples, length), generator=generator)
    return Dataset.from_dict(
        {"input_ids": ids.tolist(), "attention_mask": [[1] * length] * samples}
    )


def run(model: torch.nn.Module, recipe: object, dataset: Dataset | None, **arguments: object):
    """The real ``oneshot()`` with every choice that could differ between runs made.

    :return: the model; off an accelerator that it visited, unless it stays on disk
    """
    done = oneshot(
        model=model,
        recipe=yaml.safe_dump(recipe, sort_keys=False) if isinstance(recipe, dict) else recipe,
        dataset=dataset,
        tokenizer=arguments.pop("tokenizer", None) or word_tokenizer(),
        shuffle_calibration_samples=False,
        num_calibration_samples=512 if dataset is None else len(dataset),
        **arguments,
    )
    on_disk = any(isinstance(module._parameters, DiskCache) for module in done.modules())
    return remove_dispatch(done).cpu() if torch.cuda.is_available() and not on_disk else done


def prune(model: torch.nn.Module, *recipe: object, **arguments: object) -> torch.nn.Module:
    """:func:`run` on random samples: modifiers, or one recipe as a mapping, a text or a file."""
    modifiers = isinstance(recipe[0], Modifier)
    return run(model, list(recipe) if modifiers else recipe[0], random_samples(), **arguments)


def refuses(model: torch.nn.Module, message: str, *recipe: object, **arguments: object) -> None:
    """:func:`prune` stops with this message, and no weight has changed."""
    before = weights_of(model)
    with pytest.raises(ValueError, match=message):
        prune(model, *recipe, **arguments)
    assert_same(weights_of(model), before)


def kept_on_disk(model: torch.nn.Module, folder: Path, **arguments: object) -> torch.nn.Module:
    """The same model, loaded so that its weights stay on disk but for a few; what is left there
    is in ``folder / "offload"``.

    :param arguments: of ``from_pretrained()`` besides
    """
    model.save_pretrained(folder / "source")
    word_tokenizer().save_pretrained(folder / "source")
    with load_offloaded_model():
        found = AutoModelForCausalLM.from_pretrained(
            folder / "source",
            dtype=model.dtype,
            device_map="auto_offload",
            max_memory={"cpu": 1 << 10},
            offload_folder=str(folder / "offload"),
            **arguments,
        )
    assert any((folder / "offload").iterdir()), "the model fits into memory"
    return found


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of the model's state, which later changes leave alone."""
    return {name: value.detach().clone().cpu() for name, value in model.state_dict().items()}


def masks(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Which weights of every Linear are not zero."""
    return {name: linear.weight != 0 for name, linear in linears_of(model).items()}


def sharpened(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """The same model, whose predictions differ from token to token, as a trained one's do."""
    with torch.no_grad():
        model.lm_head.weight *= 20
    return model


@torch.no_grad()
def divergence(model: torch.nn.Module, other: torch.nn.Module, samples: torch.Tensor) -> float:
    """Kullback-Leibler divergence per token from what the other one predicts."""
    wanted, found = (each(samples).logits.float().log_softmax(-1) for each in (other, model))
    return float((wanted.exp() * (wanted - found)).sum(-1).mean())


def assert_same(found: Mapping[str, object], expected: Mapping[str, object]) -> None:
    """The same names, and tensors of the same dtype, shape and values; NaN equals NaN."""
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def random_weight(rows: int, columns: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Heavier tails than a plain normal's: its rows differ in scale."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(rows, 1, generator=generator, dtype=torch.float64) * 2
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return (weight * scale.exp() * 0.02).to(dtype)


def random_parts(shapes: list[tuple[int, int]], dtype: torch.dtype, seed: int = 0) -> Parts:
    """A block's weights and the norms of their input channels, ``linear0`` and on."""
    generator = torch.Generator().manual_seed(seed)
    return {
        f"linear{i}": (
            random_weight(*shape, dtype, seed + i),
            torch.randn(shape[1], generator=generator).exp(),
        )
        for i, shape in enumerate(shapes)
    }


def zeros(linear: torch.nn.Linear) -> int:
    """Number of weights that are zero."""
    return int((linear.weight == 0).sum())


def zeros_per_group(weight: torch.Tensor, m: int) -> set[int]:
    """How many zeros the groups of M consecutive weights of the rows have."""
    return set((weight == 0).unflatten(1, (-1, m)).sum(2).flatten().tolist())


def linears_of(model: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    """Every Linear by its full name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}


@contextmanager
def recorded_inputs(model: torch.nn.Module) -> Iterator[dict[str, list[torch.Tensor]]]:
    """Every Linear's inputs in float64, ``[tokens, in]`` per call."""
    inputs: dict[str, list[torch.Tensor]] = {}
    hooks = [
        linear.register_forward_pre_hook(
            lambda _, args, name=name: inputs.setdefault(name, []).append(
                args[0].detach().double().reshape(-1, args[0].shape[-1]).cpu()
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
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device)  # whose products in bfloat16 are not another's to the bit
    with recorded_inputs(model) as inputs:
        for row in dataset:
            model(**{key: torch.tensor([value], device=device) for key, value in row.items()})
    return naive_scores_of(model.cpu(), inputs, blocks)


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
