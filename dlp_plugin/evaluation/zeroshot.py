"""Measures zero-shot accuracy with lm-evaluation-harness, which the extra ``eval`` installs."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets.exceptions import DatasetGenerationError
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from dlp_plugin.evaluation.finite import check_finite
from dlp_plugin.evaluation.perplexity import perplexity
from dlp_plugin.evaluation.vocabulary import check_tokens

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

__all__ = ["TASK_SETS", "load_tasks", "zero_shot"]

TASK_SETS = {
    "paper7": (
        "boolq",
        "rte",
        "hellaswag",
        "winogrande",
        "arc_easy",
        "arc_challenge",
        "openbookqa",
    ),
}
METRICS = ("acc", "acc_stderr", "acc_norm", "acc_norm_stderr")
SEED = 0


def zero_shot(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: str | Sequence[str],
    *,
    batch_size: int = 8,
    limit: int | None = None,
    task_folder: str | Path | None = None,
) -> dict[str, dict[str, float]]:
    """Measure a causal language model's zero-shot accuracy on tasks of lm-evaluation-harness.

    The score of a choice is the sum of its tokens' log-probabilities, in float32 whatever the
    model's dtype. ``acc_norm`` divides it by the number of the choice's characters. The papers of
    Wanda, OWL and DLP report ``acc``. Built-in tasks fetch their data from the hub; a task of your
    own from the place that its YAML file names. The global seeds of Python, numpy and torch are
    set. The model's training mode is restored.

    :param model: a causal language model of transformers
    :param tokenizer: of the model; it is not changed
    :param tasks: names of tasks, groups or tags, or ``paper7``: BoolQ, RTE, HellaSwag,
        WinoGrande, ARC easy and challenge, OpenbookQA
    :param batch_size: choices evaluated together, at least 1
    :param limit: number of questions per task, counted from the first, at least 1; all by default
    :param task_folder: folder with YAML files of further tasks, which override built-in tasks of
        the same name; relative paths in them start at the current folder
    :return: task to ``acc`` and ``acc_stderr``, and to ``acc_norm`` and ``acc_norm_stderr`` if the
        task has them (no standard errors with a single question); ``mean`` to the mean ``acc``
    :raises ImportError: if lm-evaluation-harness is not installed
    :raises ValueError: before evaluating, if a task is unknown or has no accuracy, a number is out
        of bounds, or the model computes NaN; afterwards, if the score of a choice is not finite
    """
    for name, number in {"batch_size": batch_size, "limit": limit}.items():
        if number is not None and number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
    loaded = load_tasks(tasks, task_folder)
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    class Checked(HFLM):  # type: ignore[misc]
        """Refuses scores that are not finite, from which the harness would still pick a choice."""

        def loglikelihood(self, *args: Any, **kwargs: Any) -> list[tuple[float, bool]]:
            scores: list[tuple[float, bool]] = super().loglikelihood(*args, **kwargs)
            for score, _ in scores:
                check_finite(
                    score, f"the log-probability of a choice by {model.name_or_path}", model
                )
            return scores

    few = perplexity(model, [torch.arange(1, 5)])
    if math.isnan(few):  # refused before the long evaluation
        check_finite(few, f"the perplexity of {model.name_or_path} on a few tokens", model)
    was_training = model.training
    try:
        with _hushed("lm_eval.models.huggingface"):
            wrapped = Checked(
                pretrained=model,
                tokenizer=deepcopy(tokenizer),  # the harness may add a padding token
                batch_size=batch_size,
                softmax_dtype="float32",
            )
        found = evaluate(wrapped, {"tasks": loaded}, limit=limit, log_samples=False)["results"]
    except IndexError:
        known = torch.tensor(list(tokenizer.get_vocab().values()))
        check_tokens(model, [known])
        raise
    finally:
        model.train(was_training)

    results = {
        name: {
            metric: float(found[name][f"{metric},none"])
            for metric in METRICS
            if isinstance(found[name].get(f"{metric},none"), float)
        }
        for name in loaded
    }
    mean = sum(result["acc"] for result in results.values()) / len(results)
    return {**results, "mean": {"acc": mean}}


def load_tasks(tasks: str | Sequence[str], task_folder: str | Path | None = None) -> dict[str, Any]:
    """Load tasks of lm-evaluation-harness, set up for zero-shot.

    The global seeds of Python, numpy and torch are set.

    :param tasks: as :func:`zero_shot` takes them
    :param task_folder: as :func:`zero_shot` takes it
    :return: name to task; sets and groups are replaced by their tasks
    :raises ImportError: if lm-evaluation-harness is not installed
    :raises ValueError: if a task is unknown, has no accuracy, or its questions cannot be read
    """
    try:
        from lm_eval.tasks import TaskManager  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "zero-shot accuracy needs lm-evaluation-harness: pip install 'dlp_plugin[eval]'"
        ) from error

    names = _names(tasks)
    set_seed(SEED)
    manager = _manager(names, task_folder)
    loaded: dict[str, Any] = {}
    for name in names:
        try:
            loaded |= manager.load([name])["tasks"]
        except (OSError, DatasetGenerationError) as error:
            raise ValueError(
                f"the questions of task {name} cannot be read ({error}): check the paths in its "
                "YAML file, which are relative to the current folder"
            ) from None
    for name, task in loaded.items():
        if "acc" not in task.aggregation():
            raise ValueError(
                f"task {name} is not measured by accuracy but by "
                f"{', '.join(task.aggregation())}; leave it out"
            )
        task.set_config("num_fewshot", 0)
        task.set_fewshot_seed(SEED)
    return loaded


def _names(tasks: str | Sequence[str]) -> list[str]:
    """Replace sets by their tasks, and remove duplicates."""
    asked = [tasks] if isinstance(tasks, str) else tasks
    names = dict.fromkeys(name for entry in asked for name in TASK_SETS.get(entry, (entry,)))
    if not names:
        raise ValueError(f"no task given; name some, or one of the sets {', '.join(TASK_SETS)}")
    return list(names)


def _manager(names: list[str], task_folder: str | Path | None) -> TaskManager:
    """Return a task manager for these tasks, without the built-in ones if the folder has all.

    The built-in tasks take seconds to load.
    """
    from lm_eval.tasks import TaskManager

    if task_folder is not None:
        if not Path(task_folder).is_dir():
            raise ValueError(f"task_folder {task_folder} is not a folder; give one of YAML files")
        manager = TaskManager(include_path=task_folder, include_defaults=False)
        if set(names) <= set(manager.all_tasks):
            return manager
    manager = TaskManager(include_path=task_folder)
    for name in names:
        if name not in manager.all_tasks:
            close = get_close_matches(name, manager.all_tasks)
            raise ValueError(
                f"task {name!r} is unknown"
                + (f"; did you mean {' or '.join(close)}?" if close else "")
                + "; `lm-eval ls tasks` lists those that come with lm-evaluation-harness, and "
                f"task_folder ({task_folder or 'not given'}) is where a YAML file of your own "
                f"is looked for; sets: {', '.join(TASK_SETS)}"
            )
    return manager


@contextmanager
def _hushed(name: str) -> Iterator[None]:
    """Suppress a logger's warnings; the harness warns about a model that is passed in memory."""
    log = logging.getLogger(name)
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
