"""A task of lm-evaluation-harness, made of the shipped text."""

import itertools
import json
from pathlib import Path

from helpers import TASK, TEST_TEXT

QUESTIONS, CHOICES = 64, 4
CONTEXT = 400  # characters
CONTINUATIONS = (70, 80, 90)  # in turn, so that length matters


def questions() -> list[dict]:
    """Which of four continuations is the passage's own? The others are other passages'."""
    text = TEST_TEXT.read_text(encoding="utf-8")
    step = len(text) // QUESTIONS
    cuts = [text.index(" ", number * step + CONTEXT) for number in range(QUESTIONS)]
    lengths = itertools.cycle(CONTINUATIONS)
    continuations = [text[cut + 1 :][:length].rstrip() for cut, length in zip(cuts, lengths)]

    def question(number: int) -> dict:
        answer = number % CHOICES
        others = [(number + 11 * (choice - answer)) % QUESTIONS for choice in range(CHOICES)]
        return {
            "context": text[cuts[number] - CONTEXT : cuts[number]].lstrip(),
            "choices": [continuations[other] for other in others],  # its own at ``answer``
            "answer": answer,
        }

    return [question(number) for number in range(QUESTIONS)]


def write_task(
    folder: Path,
    name: str = "continuation",
    metrics: tuple[str, ...] = ("acc", "acc_norm"),
    output_type: str = "multiple_choice",
) -> None:
    data = folder / "questions.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in questions()))
    text = TASK.format(name=name, data=data, cache=folder / "cache", output_type=output_type)
    text += "".join(f"  - metric: {metric}\n" for metric in metrics)
    (folder / f"{name}.yaml").write_text(text)
