"""What compared models are measured by: perplexity on a text, and accuracy on tasks."""

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
    """What is measured of every model.

    :param windows: test text, int64 ``[tokens]`` each, as
        :func:`dlp_plugin.evaluation.text.token_windows` cuts it
    :param tasks: names of tasks or sets, as :func:`dlp_plugin.evaluation.zeroshot.zero_shot`
        takes them, to measure accuracy on too
    :param questions: per task, the first ones; all by default
    :param task_folder: folder with YAML files of tasks
    """

    windows: Sequence[torch.Tensor]
    tasks: Sequence[str] = ()
    questions: int | None = None
    task_folder: str | Path | None = None

    def names(self) -> list[str]:
        """The tasks, sets spelled out.

        :raises ImportError: if there are any, and lm-evaluation-harness is not installed
        :raises ValueError: if one is unknown, has no accuracy or no questions at hand
        """
        return list(load_tasks(self.tasks, self.task_folder)) if self.tasks else []

    def accuracy(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[str]
    ) -> dict[str, float]:
        """Share of a task's questions that a model answers rightly, for each of some tasks."""
        if not tasks:
            return {}
        found = zero_shot(
            model, tokenizer, tasks, limit=self.questions, task_folder=self.task_folder
        )
        return {task: found[task]["acc"] for task in tasks}

    def perplexity(self, model: Any) -> float:
        """On the test text."""
        return perplexity(model, self.windows)
