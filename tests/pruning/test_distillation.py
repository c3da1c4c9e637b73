"""Distillation: a field of every pruning stage, through ``oneshot()``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from families import FAMILIES, make
from helpers import (
    EVERY,
    PRUNERS,
    VOCABULARY,
    Logged,
    MakeModel,
    assert_same,
    divergence,
    kept_on_disk,
    linears_of,
    masks,
    random_samples,
    refuses,
    run,
    sharpened,
    weights_of,
)
from torch.nn import functional
from transformers import LlamaForCausalLM

from dlp_plugin import (
    ADMMPruningModifier,
    DLPModifier,
    MaskedGPTQModifier,
    OneShotMagnitudeModifier,
    WandaPruningModifier,
)
from dlp_plugin.pruning.base import DISTILLING
from dlp_plugin.pruning.distillation import Distillation
from dlp_plugin.pruning.training import SEED, survivors

MANY = random_samples(32, 64)
SAMPLES = torch.tensor(MANY["input_ids"])
EVERY_STAGE = [*PRUNERS, ADMMPruningModifier]

Model = torch.nn.Module
distance = partial(divergence, samples=SAMPLES)


@pytest.fixture
def sharp(make_model: MakeModel) -> Callable[[], Model]:
    return lambda dtype=torch.float32: sharpened(make_model(dtype))


def logs(model: Model, samples: torch.Tensor = SAMPLES) -> torch.Tensor:
    return model(samples).logits.float().log_softmax(-1)


class TestTraining:
    @pytest.mark.parametrize("stage", EVERY_STAGE)
    def test_the_masks_hold_and_predictions_come_nearer(
        self, sharp: Callable[[], Model], stage: type
    ) -> None:
        plain = run(sharp(), [stage(sparsity=0.6, **EVERY)], MANY)
        distilled = run(sharp(), [stage(sparsity=0.6, distill=2, **EVERY)], MANY)
        assert_same(masks(distilled), masks(plain))
        assert distance(distilled, sharp()) < 0.9 * distance(plain, sharp())

    def test_it_is_adam_on_the_divergence(self, sharp: Callable[[], Model]) -> None:
        """Written out: a step a sample, every eighth from the last one kept to measure on."""
        model, dense, twin = sharp(), sharp(), sharp()
        batches = [{"input_ids": sample[None]} for sample in SAMPLES[:16]]
        distillation = Distillation(model, batches, epochs=1)
        with torch.no_grad():
            for each in (model, twin):
                for linear in linears_of(each.model.layers).values():
                    linear.weight[linear.weight.abs() < 0.02] = 0
        weights = survivors(linears_of(model.model.layers).values())
        distillation.train(model.model.layers, weights, DISTILLING)

        weights = list(twin.model.layers.parameters())
        seen = [place for place in range(16) if place % 8 != 7]
        order = torch.randperm(len(seen), generator=torch.Generator().manual_seed(SEED))
        adam = torch.optim.Adam(weights)
        alive = [(weight != 0) | (weight.ndim == 1) for weight in weights]
        for step, place in enumerate(order):
            sample = SAMPLES[[seen[int(place)]]]
            wanted = logs(dense, sample).detach()
            loss = functional.kl_div(logs(twin, sample), wanted, log_target=True, reduction="sum")
            adam.zero_grad()
            (loss / sample.numel()).backward()
            for weight, mask in zip(weights, alive, strict=True):
                weight.grad *= mask
            adam.param_groups[0]["lr"] = DISTILLING * (1 - step / len(order))
            adam.step()
        assert distance(model, dense) == pytest.approx(distance(twin, dense), rel=1e-4)
        for name, value in weights_of(twin).items():
            moved = (value - dense.state_dict()[name]).norm()
            assert (weights_of(model)[name] - value).norm() <= 0.01 * moved, name

    def test_what_is_trained(self, sharp: Callable[[], Model]) -> None:
        """Surviving weights and norms of blocks that are pruned; nothing else."""
        ignore = [*EVERY["ignore"], "re:.*k_proj", r"re:model\.layers\.1\."]
        stage = WandaPruningModifier(sparsity=0.5, distill=1, targets=["Linear"], ignore=ignore)
        model, dense = run(sharp(), [stage], MANY), sharp().state_dict()
        changed = {n for n, value in weights_of(model).items() if not torch.equal(value, dense[n])}
        attention = [f"self_attn.{kind}_proj" for kind in "qvo"]
        mlp = [f"mlp.{kind}_proj" for kind in ("gate", "up", "down")]
        norms = ["input_layernorm", "post_attention_layernorm"]
        assert changed == {
            f"model.layers.{number}.{kind}.weight"
            for number in (0, 2)
            for kind in [*attention, *mlp, *norms]
        }

    def test_after_reconstruction_it_goes_on(
        self, sharp: Callable[[], Model], logged: Logged
    ) -> None:
        def stage(**fields: object) -> ADMMPruningModifier:
            return ADMMPruningModifier(sparsity=0.6, reconstruct=2, **EVERY, **fields)

        plain = run(sharp(), [DLPModifier(), stage()], MANY)
        first = run(sharp(), [DLPModifier(), stage(distill=2)], MANY)
        (told,) = [m for m in logged() if m.startswith("distilled")]
        start, least = (float(one.split()[0]) for one in told.partition("before ")[2].split("->"))
        assert least < start
        assert distance(first, sharp()) < distance(plain, sharp())
        again = run(sharp(), [DLPModifier(), stage(distill=2)], MANY)
        assert_same(weights_of(again), weights_of(first))

    def test_padding_does_not_count(self, sharp: Callable[[], Model]) -> None:
        def rows(number: int, padding: int) -> dict[str, list[int]]:
            ids = [*MANY[number]["input_ids"], *[0] * padding]
            return {"input_ids": ids, "attention_mask": [1] * 64 + [0] * padding}

        def distilled(padding: int) -> Model:
            data = Dataset.from_list([rows(number, padding) for number in range(16)])
            return run(sharp(), [OneShotMagnitudeModifier(sparsity=0.6, distill=1, **EVERY)], data)

        found, expected = weights_of(distilled(8)), weights_of(distilled(0))
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, atol=1e-6, rtol=1e-4)

    def test_a_model_that_gains_nothing_is_left_as_it_is(
        self, sharp: Callable[[], Model], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("dlp_plugin.pruning.base.DISTILLING", 1e3)
        plain = run(sharp(), [WandaPruningModifier(sparsity=0.5, **EVERY)], MANY)
        spoilt = run(sharp(), [WandaPruningModifier(sparsity=0.5, distill=1, **EVERY)], MANY)
        assert_same(weights_of(spoilt), weights_of(plain))

    def test_predictions_that_are_not_finite(
        self, sharp: Callable[[], Model], logged: Logged
    ) -> None:
        model = sharp()
        with torch.no_grad():
            model.lm_head.weight[0] = torch.nan
        stage = OneShotMagnitudeModifier(sparsity=0.5, distill=1, **EVERY)
        before = weights_of(run(model, [stage], MANY))
        model = sharp()
        plain = run(model, [OneShotMagnitudeModifier(sparsity=0.5, **EVERY)], MANY)
        del before["lm_head.weight"]
        assert_same(before, {n: v for n, v in weights_of(plain).items() if n != "lm_head.weight"})
        assert any("predicts nothing finite" in message for message in logged("WARNING"))

    def test_nothing_is_left_behind(self, sharp: Callable[[], Model]) -> None:
        """The head computes, and there are no gradients and hooks."""
        model = sharp()
        run(model, [WandaPruningModifier(sparsity=0.5, distill=1, **EVERY)], MANY)
        assert model(SAMPLES[:1]).logits.isfinite().all()
        assert all(parameter.grad is None for parameter in model.parameters())
        assert not any(module._forward_hooks for module in model.modules())

    def test_a_pipeline_that_runs_the_model_whole(self, sharp: Callable[[], Model]) -> None:
        """``pipeline="basic"`` runs with gradients on, and with caches."""
        stage = {"sparsity": 0.6, **EVERY}
        plain = run(sharp(), [WandaPruningModifier(**stage)], MANY, pipeline="basic")
        stages = [WandaPruningModifier(distill=1, **stage)]
        distilled = run(sharp(), stages, MANY, pipeline="basic")
        assert_same(masks(distilled), masks(plain))
        assert distance(distilled, sharp()) < distance(plain, sharp())
        assert all(parameter.grad is None for parameter in distilled.parameters())


class TestModels:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_weights_keep_their_dtype(
        self, sharp: Callable[..., Model], dtype: torch.dtype
    ) -> None:
        plain = run(sharp(dtype), [WandaPruningModifier(sparsity=0.6, **EVERY)], MANY)
        model = run(sharp(dtype), [WandaPruningModifier(sparsity=0.6, distill=2, **EVERY)], MANY)
        assert {value.dtype for value in weights_of(model).values()} == {dtype}
        assert distance(model, sharp(dtype)) < distance(plain, sharp(dtype))

    def test_mixtures_of_experts(self, tmp_path: Path) -> None:
        family = FAMILIES["mixtral"]
        model = make(family.config(), tmp_path, family.kind)
        ignore = [*EVERY["ignore"], *family.ignore]
        stage = ADMMPruningModifier(sparsity=0.5, distill=1, targets=["Linear"], ignore=ignore)
        run(model, [DLPModifier(alpha=0.1), stage], MANY)
        inside = {name for names in family.linears(model).values() for name in names}
        assert any("experts" in name for name in inside)
        for name in inside:
            assert 0.3 < float((linears_of(model)[name].weight == 0).float().mean()) < 0.7, name

    def test_tied_embeddings_stay(self, tmp_path: Path) -> None:
        family = FAMILIES["qwen2"]
        config = family.config()
        config.tie_word_embeddings = True
        model = make(config, tmp_path, family.kind)
        before = weights_of(model)["model.embed_tokens.weight"]
        run(model, [WandaPruningModifier(sparsity=0.5, distill=1, **EVERY)], MANY)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert torch.equal(model.lm_head.weight, before)

    def test_a_model_on_disk(self, sharp: Callable[[], Model], tmp_path: Path) -> None:
        """The same weights as of one in memory."""

        def stage() -> OneShotMagnitudeModifier:
            return OneShotMagnitudeModifier(sparsity=0.5, distill=1, **EVERY)

        model = kept_on_disk(sharp(), tmp_path)
        run(model, [stage()], MANY)
        in_memory = LlamaForCausalLM.from_pretrained(tmp_path / "source")
        run(in_memory, [stage()], MANY)
        for name, value in weights_of(in_memory).items():
            torch.testing.assert_close(model.state_dict()[name].cpu(), value, atol=1e-5, rtol=1e-4)

    def test_four_bits_afterwards_keep_every_zero(self, sharp: Callable[[], Model]) -> None:
        def stages(**fields: object) -> list[object]:
            return [
                WandaPruningModifier(sparsity=0.6, **EVERY, **fields),
                MaskedGPTQModifier(
                    config_groups={
                        "group_0": {
                            "targets": ["Linear"],
                            "weights": {"num_bits": 4, "strategy": "group", "group_size": 32},
                        }
                    },
                    ignore=EVERY["ignore"],
                ),
            ]

        plain = run(sharp(), stages(), MANY)
        distilled = run(sharp(), stages(distill=2), MANY)
        lost = sum(
            int((linear.weight[~masks(plain)[name]] != 0).sum())
            for name, linear in linears_of(distilled).items()
        )
        assert lost == 0
        assert distance(distilled, sharp()) < distance(plain, sharp())


class TestBadInput:
    def test_a_model_that_predicts_no_next_token(self, tmp_path: Path) -> None:
        family = FAMILIES["bert"]
        model = make(family.config(), tmp_path, family.kind)
        ignore = ["re:.*predictions.decoder"]
        stage = WandaPruningModifier(sparsity=0.5, distill=1, targets=["Linear"], ignore=ignore)
        refuses(model, "WandaPruningModifier.distill .* needs a causal language model", stage)

    def test_one_batch(self, make_model: MakeModel) -> None:
        stage = WandaPruningModifier(sparsity=0.5, distill=1, **EVERY)
        with pytest.raises(ValueError, match="distill holds out one of eight batches.*one: give"):
            run(make_model(), [stage], random_samples(1))

    def test_no_samples(self, make_model: MakeModel) -> None:
        stage = OneShotMagnitudeModifier(sparsity=0.5, distill=1, **EVERY)
        with pytest.raises(ValueError, match="distill needs calibration samples.*dataset="):
            run(make_model(), [stage], None)

    def test_too_little_memory(
        self, make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("dlp_plugin.pruning.distillation.NEEDED", 10**12)
        stage = WandaPruningModifier(sparsity=0.5, distill=1, **EVERY)
        refuses(make_model(), "WandaPruningModifier.distill needs .* GB on one device", stage)

    def test_a_negative_number_of_epochs(self) -> None:
        with pytest.raises(ValueError, match="distill"):
            WandaPruningModifier(sparsity=0.5, distill=-1)

    def test_all_modifiers_at_once(self, make_model: MakeModel) -> None:
        stages = [WandaPruningModifier(sparsity=0.5, distill=1, **EVERY)]
        stages.append(MaskedGPTQModifier(scheme="W8A8", **EVERY))
        message = "distill trains before the next modifier begins.*pipeline='independent'"
        with pytest.raises(ValueError, match=message):
            run(make_model(), stages, MANY, pipeline="sequential")

    def test_a_token_without_embedding(self, make_model: MakeModel) -> None:
        stage = WandaPruningModifier(sparsity=0.5, distill=1, **EVERY)
        data = Dataset.from_dict({"input_ids": [[1, 2], [3, VOCABULARY]]})
        with pytest.raises(ValueError, match=str(VOCABULARY)):
            run(make_model(), [stage], data)
