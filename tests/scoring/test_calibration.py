"""Calibration batches: the first so many samples, and padding that does not count."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from helpers import (
    EVERY,
    ROOT,
    Logged,
    MakeModel,
    linears_of,
    random_samples,
    run,
    word_tokenizer,
    zeros,
)
from llmcompressor import oneshot
from torch.utils.data import DataLoader, RandomSampler

from dlp_plugin import DLPModifier, Plan, WandaPruningModifier
from dlp_plugin.scoring.calibration import scoring_batches, split, together


def batch(*rows: list[int], **more: torch.Tensor) -> dict[str, torch.Tensor]:
    """Token 0 is padding."""
    ids = torch.tensor(rows)
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), **more}


def ids(batches: list[dict[str, torch.Tensor]]) -> list[list[list[int]]]:
    return [one["input_ids"].tolist() for one in batches]


class TestScoringBatches:
    def test_full_batches_stay_as_they_are(self) -> None:
        full = batch([1, 2], [3, 4])
        assert scoring_batches([full])[0] is full
        unmasked = {"input_ids": torch.tensor([[0, 1]])}
        assert scoring_batches([unmasked])[0] is unmasked

    def test_a_padded_batch_falls_into_samples_without_padding(self) -> None:
        left_and_right = batch([0, 0, 1], [2, 3, 0], [4, 5, 6], position_ids=torch.zeros(3, 3))
        batches = scoring_batches([left_and_right])
        assert ids(batches) == [[[1]], [[2, 3]], [[4, 5, 6]]]
        assert [one["attention_mask"].tolist() for one in batches] == [[[1]], [[1, 1]], [[1] * 3]]
        assert [one["position_ids"].shape for one in batches] == [(1, 1), (1, 2), (1, 3)]

    def test_what_does_not_run_over_tokens_is_left_alone(self) -> None:
        image = torch.zeros(7, 4)
        (one,) = scoring_batches([batch([1, 0, 0], pixel_values=image)])
        assert one["input_ids"].tolist() == [[1]]
        assert one["pixel_values"] is image

    def test_samples_of_a_batch_that_cannot_be_told_apart_are_left_and_told(
        self, logged: Logged
    ) -> None:
        patches = batch([1, 0], [2, 3], pixel_values=torch.zeros(7, 4))
        assert scoring_batches([patches]) == [patches]
        (warning,) = logged("WARNING")
        assert "pixel_values of shape (7, 4)" in warning
        assert "batch_size=1" in warning

    def test_encoder_and_decoder_have_masks_of_their_own(self) -> None:
        pair = batch(
            [1, 0],
            decoder_input_ids=torch.tensor([[4, 5]]),
            decoder_attention_mask=torch.tensor([[1, 1]]),
        )
        (one,) = scoring_batches([pair])
        assert one["input_ids"].tolist() == [[1]]
        assert one["decoder_input_ids"].tolist() == [[4, 5]]

    @pytest.mark.parametrize(("count", "expected"), [(1, [[[1]]]), (2, [[[1], [2]]])])
    def test_first_samples_of_a_batch(self, count: int, expected: list) -> None:
        assert ids(scoring_batches([batch([1], [2], [3])], count)) == expected

    def test_first_samples_over_batches(self) -> None:
        batches = [batch([1], [2]), batch([3], [4]), batch([5], [6])]
        assert ids(scoring_batches(batches, 3)) == [[[1], [2]], [[3]]]
        assert ids(scoring_batches(batches, 4)) == [[[1], [2]], [[3], [4]]]
        assert len(scoring_batches(batches, 99)) == 3

    def test_samples_of_padding_only_do_not_count(self) -> None:
        assert ids(scoring_batches([batch([1, 2], [0, 0])])) == [[[1, 2]]]
        with pytest.raises(ValueError, match="holds no token"):
            scoring_batches([batch([0, 0])])

    @pytest.mark.parametrize(
        ("bad", "tensors"),
        [
            (batch([]), r"\{'input_ids': \[1, 0\], 'attention_mask': \[1, 0\]\}"),
            ({"labels": torch.ones(1, 2)}, r"\{'labels': \[1, 2\]\}"),
            ({"input_ids": None}, r"\{\}"),
            (None, r"\{\}"),
        ],
    )
    def test_a_batch_without_tokens_is_an_error(self, bad: object, tensors: str) -> None:
        message = (
            rf"batch 2 of the calibration data has no input_ids \(tensors: {tensors}\): leave such "
            r"rows out, e.g. dataset\.filter"
        )
        with pytest.raises(ValueError, match=message):
            scoring_batches([batch([1, 2]), bad])
        assert len(scoring_batches([batch([1, 2]), bad], 1)) == 1  # which is not looked at

    def test_other_models_have_other_inputs(self) -> None:
        image = {"pixel_values": torch.ones(1, 3, 2, 2)}
        assert scoring_batches([image], main_input="pixel_values") == [image]
        with pytest.raises(ValueError, match="batch 1 of the calibration data has no input_ids"):
            scoring_batches([image])


def texts() -> list[list[int]]:
    """Eight samples of unequal length, without the padding token 0."""
    generator = torch.Generator().manual_seed(0)
    lengths = [5, 32, 17, 9, 32, 3, 24, 11]
    return [torch.randint(1, 256, (n,), generator=generator).tolist() for n in lengths]


def rows(ids: list[list[int]], side: str | None, length: int = 40) -> Dataset:
    """Samples padded to one length, or not at all."""

    def pad(values: list[int], filler: int) -> list[int]:
        padding = [filler] * (length - len(values))
        return {"left": padding + values, "right": values + padding, None: values}[side]

    return Dataset.from_list(
        [{"input_ids": pad(s, 0), "attention_mask": pad([1] * len(s), 0)} for s in ids]
    )


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (None, r"batch \d of the calibration data cannot be made from its rows \(.*NoneType"),
        ([1, None], r"batch \d of the calibration data cannot be made from its rows \(.*NoneType"),
        ([], r"batch \d of the calibration data has no input_ids \(.*\[1, 0\]"),
    ],
)
def test_rows_without_tokens_are_told_before_anything_is_pruned(
    make_model: MakeModel, bad: list | None, message: str
) -> None:
    """The host's own sampler stumbles over null rows first, where it does not shuffle."""
    model = make_model()
    stage = WandaPruningModifier(sparsity=0.5, **EVERY)
    with pytest.raises(ValueError, match=f"{message}.*: leave such rows out"):
        oneshot(
            model=model,
            recipe=[DLPModifier(), stage],
            dataset=Dataset.from_dict({"input_ids": [[1, 2, 3], bad, [4, 5, 6]]}),
            tokenizer=word_tokenizer(),
            num_calibration_samples=3,
            shuffle_calibration_samples=True,
        )
    assert {zeros(linear) for linear in linears_of(model).values()} == {0}


def tokens(batches: list[dict[str, torch.Tensor]]) -> int:
    return sum(one["input_ids"].numel() for one in batches)


class TestSplit:
    def test_a_quarter_spread_over_the_data_judges(self) -> None:
        scored, judging = split([batch([place] * 4) for place in range(1, 9)])
        assert ids(judging) == [[[4] * 4], [[8] * 4]]
        assert ids(scored) == [[[place] * 4] for place in (1, 2, 3, 5, 6, 7)]

    def test_it_judges_on_no_more_tokens_than_tell_plans_apart(self) -> None:
        """A quarter of 64 samples of 2,048 tokens would be 32,768."""
        scored, judging = split([batch([place] * 2048) for place in range(1, 65)])
        assert [one["input_ids"][0, 0].item() for one in judging] == list(range(8, 65, 8))
        assert tokens(judging) == 16_384
        assert tokens(scored) == 56 * 2048

    def test_a_sample_longer_than_that_judges_alone(self) -> None:
        long = {"inputs_embeds": torch.zeros(1, 20_000, 2)}
        scored, judging = split([long] * 8)
        assert (len(scored), len(judging)) == (7, 1)


class TestTogether:
    def test_neighbours_are_joined_and_large_batches_taken_apart(self) -> None:
        """Of four tokens each; a longer sample stays whole."""
        given = [batch([1, 2]), batch([3, 4]), batch([5, 6], [7, 8], [9, 1]), batch([2] * 5)]
        found = together(given, 4)
        assert ids(found) == [[[1, 2], [3, 4]], [[5, 6], [7, 8]], [[9, 1]], [[2] * 5]]
        assert all(one["attention_mask"].shape == one["input_ids"].shape for one in found)

    def test_samples_are_cut_beginnings_first(self) -> None:
        given = [batch([1, 2, 3, 4, 5], [6, 7, 8, 9, 1]), batch([2, 3, 4])]
        found = ids(together(given, 2, cut=True))
        assert found[:3] == [[[1, 2]], [[6, 7]], [[2, 3]]]
        assert found[3:] == [[[3, 4]], [[8, 9]], [[4], [5]], [[1]]]

    def test_what_is_not_one_value_a_token_stays_as_it_is(self) -> None:
        given = [batch([1, 2, 3], pixels=torch.zeros(1, 3, 4))]
        assert together(given, 2, cut=True) == given


@pytest.mark.parametrize(
    ("side", "arguments"),
    [
        ("right", {}),
        ("left", {}),
        ("right", {"batch_size": 4}),
        ("left", {"batch_size": 3}),
        (None, {"batch_size": 4, "data_collator": "padding"}),
    ],
)
def test_a_padded_set_gives_the_plan_of_the_unpadded_one(
    make_model: MakeModel, tmp_path: Path, side: str | None, arguments: dict
) -> None:
    def plan(dataset: Dataset, **arguments: object) -> Plan:
        path = tmp_path / "plan.json"
        run(make_model(), [DLPModifier(sparsity=0.6, plan_path=str(path))], dataset, **arguments)
        return Plan.load(path)

    plain = plan(rows(texts(), None))
    padded = plan(rows(texts(), side), **arguments)
    assert [b.score for b in padded.blocks] == pytest.approx(
        [b.score for b in plain.blocks], rel=1e-6
    )
    assert [b.sparsity for b in padded.blocks] == pytest.approx(
        [b.sparsity for b in plain.blocks], abs=1e-6
    )


def test_num_samples_scores_on_the_first(make_model: MakeModel, tmp_path: Path) -> None:
    def plan(dataset: Dataset, **dlp: object) -> Plan:
        path = tmp_path / "plan.json"
        modifier = DLPModifier(sparsity=0.6, plan_path=str(path), **dlp)
        run(make_model(), [modifier], dataset)
        return Plan.load(path)

    dataset = random_samples(8)
    assert plan(dataset, num_samples=3) == plan(dataset.select(range(3)))
    assert plan(dataset, num_samples=99) == plan(dataset)
    with pytest.raises(ValueError, match=r"num_samples\n.*greater than or equal to 1"):
        DLPModifier(num_samples=0)


def test_peak_memory_does_not_grow_with_blocks_that_stay_on_disk() -> None:
    """One block at a time is in memory: 34 MB of weights here, and what scoring takes.

    Two peaks are not compared: how much freed memory a process holds before differs.
    """
    probe = ROOT / "tests" / "offload_probe.py"
    done = subprocess.run(
        [sys.executable, str(probe), "8"], check=True, stdout=subprocess.PIPE, text=True
    )
    weights, peak = (float(number) for number in done.stdout.split()[-2:])
    assert weights > 250
    assert peak < 140


def test_a_loader_that_shuffles_gives_the_same_each_time() -> None:
    """As the host's does by default, from torch's generator, which is left as it was."""
    rows = [{"input_ids": torch.tensor([number])} for number in range(16)]
    loader = DataLoader(rows, sampler=RandomSampler(rows))
    first = scoring_batches(loader)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert [b["input_ids"].item() for b in scoring_batches(loader)] == [
        b["input_ids"].item() for b in first
    ]
    assert sorted(b["input_ids"].item() for b in first) == list(range(16))
    assert torch.equal(torch.get_rng_state(), state)
