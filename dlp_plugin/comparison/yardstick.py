"""Measures compared models: perplexity on a text, and accuracy on tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from dlp_plugin.evaluation.perplexity import perplexity
from dlp_plugin.evaluation.zeroshot import load_tasks, zero_shot

__all__ = ["Yardstick"]


@dataclass(frozen=True)
class Yardstick:
    """The measurements that every model gets.

    :param windows: test text, int64 ``[tokens]`` each, as
        :func:`dlp_plugin.evaluation.text.token_windows` cuts it
    :param tasks: tasks or sets to measure accuracy on, as
        :func:`dlp_plugin.evaluation.zeroshot.zero_shot` takes them
    :param questions: number of questions per task, counted from the first; all by default
    :param task_folder: folder with YAML files of tasks
    """

    windows: Sequence[torch.Tensor]
    tasks: Sequence[str] = ()
    questions: int | None = None
    task_folder: str | Path | None = None

    def names(self) -> list[str]:
        """Return the names of the tasks; sets are replaced by their tasks.

        :raises ImportError: if there are tasks, but lm-evaluation-harness is not installed
        :raises ValueError: if a task is unknown, has no accuracy, or its questions cannot be read
        """
        return list(load_tasks(self.tasks, self.task_folder)) if self.tasks else []

    def accuracy(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[str]
    ) -> dict[str, float]:
        """Measure the accuracy on some tasks.

        :param model: to measure
        :param tokenizer: of the model
        :param tasks: names of the tasks
        :return: task to the fraction of its questions that the model answers correctly
        """
        if not tasks:
            return {}
        found = zero_shot(
            model, tokenizer, tasks, limit=self.questions, task_folder=self.task_folder
        )
        return {task: found[task]["acc"] for task in tasks}

    def perplexity(self, model: Any) -> float:
        """Return a model's perplexity on the test text."""
        return perplexity(model, self.windows)
