"""Polish and reconstruction: fields of every pruning stage, through ``oneshot()``."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from families import FAMILIES, make
from helpers import (
    EVERY,
    PRUNERS,
    VOCABULARY,
    Logged,
    MakeModel,
    as_if_loaded,
    assert_same,
    kept_on_disk,
    linears_of,
    masks,
    prune,
    random_samples,
    refuses,
    run,
    weights_of,
)
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from dlp_plugin import ADMMPruningModifier, DLPModifier, WandaPruningModifier, last_plans

MANY = random_samples(32, 64)
SAMPLES = torch.tensor(MANY["input_ids"])
EVERY_STAGE = [*PRUNERS, ADMMPruningModifier]


@torch.no_grad()
def error(model: torch.nn.Module, dense: torch.nn.Module) -> float:
    """Of the last block's outputs, on the calibration samples."""
    found, wanted = (each.model(SAMPLES).last_hidden_state for each in (model, dense))
    return float((found - wanted).square().mean())


def without_later_blocks(stage: type, **fields: object) -> object:
    """A stage on the first block, whose mask depends on no repair before it."""
    return stage(targets=[r"re:model\.layers\.0\..*proj"], sparsity=0.6, **fields)


def trained(model: torch.nn.Module, *recipe: object) -> torch.nn.Module:
    """On so many samples that what is learned from some holds for others."""
    return run(model, list(recipe), MANY)


class TestPolish:
    @pytest.mark.parametrize("stage", PRUNERS)
    def test_the_mask_stays_and_less_is_lost(self, make_model: MakeModel, stage: type) -> None:
        plain = prune(make_model(), without_later_blocks(stage))
        polished = prune(make_model(), without_later_blocks(stage, polish=True))
        assert_same(masks(polished), masks(plain))
        assert error(polished, make_model()) < error(plain, make_model())

    def test_it_is_off_by_default_but_for_admm(self) -> None:
        assert [stage(sparsity=0.5).polish for stage in EVERY_STAGE] == [False, False, False, True]

    def test_sparsegpt_with_an_n_for_every_block(self, make_model: MakeModel) -> None:
        def stage(**fields: object) -> list[object]:
            return [DLPModifier(alpha=0.3), PRUNERS[1](mask_structure="4:8", **EVERY, **fields)]

        plain, polished = prune(make_model(), *stage()), prune(make_model(), *stage(polish=True))
        assert len({block.sparsity for block in last_plans()[0].blocks}) > 1
        for name, linear in linears_of(polished).items():
            other = linears_of(plain)[name].weight
            assert int((linear.weight == 0).sum()) == int((other == 0).sum())
        assert error(polished, make_model()) < error(plain, make_model())

    def test_what_is_not_pruned_is_not_touched(self, make_model: MakeModel) -> None:
        stage = WandaPruningModifier(
            sparsity=[0.0, 0.5, 0.5], targets=["LlamaDecoderLayer"], polish=True
        )
        model = prune(make_model(), stage)
        assert_same(weights_of(model.model.layers[0]), weights_of(make_model().model.layers[0]))


class TestReconstruction:
    @pytest.mark.parametrize("stage", EVERY_STAGE)
    def test_the_masks_hold_and_less_is_lost(self, make_model: MakeModel, stage: type) -> None:
        plain = trained(make_model(), without_later_blocks(stage))
        repaired = trained(make_model(), without_later_blocks(stage, reconstruct=3))
        assert_same(masks(repaired), masks(plain))
        assert error(repaired, make_model()) < error(plain, make_model())

    def test_what_is_trained(self, make_model: MakeModel) -> None:
        """Surviving weights and norms of a pruned block; nothing that was not pruned."""
        stage = without_later_blocks(WandaPruningModifier, reconstruct=1, ignore=["re:.*k_proj"])
        model, dense = trained(make_model(), stage), make_model()
        changed = {
            name
            for name, value in weights_of(model).items()
            if not torch.equal(value, dense.state_dict()[name])
        }
        block = "model.layers.0."
        kinds = ["q_proj", "v_proj", "o_proj"]
        assert changed == {
            *(f"{block}self_attn.{kind}.weight" for kind in kinds),
            *(f"{block}mlp.{kind}_proj.weight" for kind in ("gate", "up", "down")),
            *(f"{block}{kind}_layernorm.weight" for kind in ("input", "post_attention")),
        }

    def test_biases_are_trained_too(self, tmp_path: Path) -> None:
        torch.manual_seed(0)
        config = Qwen2Config(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
        )
        model = as_if_loaded(Qwen2ForCausalLM(config), tmp_path)
        before = weights_of(model)
        run(model, [WandaPruningModifier(sparsity=0.5, reconstruct=1, **EVERY)], MANY)
        name = "model.layers.1.self_attn.q_proj.bias"
        assert not torch.equal(weights_of(model)[name], before[name])

    def test_it_tells_what_was_gained_and_gives_the_same_again(
        self, make_model: MakeModel, logged: Logged
    ) -> None:
        def stage() -> ADMMPruningModifier:
            return ADMMPruningModifier(sparsity=0.6, reconstruct=2, **EVERY)

        first = trained(make_model(), DLPModifier(), stage())
        told = [m for m in logged() if m.startswith("reconstructed model.layers.")]
        assert len(told) == 3
        for message in told:
            start, least = message.partition("outputs ")[2].split(" -> ")
            assert float(least) < float(start)
        assert_same(weights_of(trained(make_model(), DLPModifier(), stage())), weights_of(first))

    def test_the_later_blocks_make_up_for_the_earlier_ones(self, make_model: MakeModel) -> None:
        """What they aim at is what the dense model has there, not what they would have given."""
        samples = [WandaPruningModifier(sparsity=0.6, reconstruct=2, **EVERY)]
        repaired = trained(make_model(), *samples)
        plain = trained(make_model(), WandaPruningModifier(sparsity=0.6, **EVERY))
        assert error(repaired, make_model()) < 0.8 * error(plain, make_model())

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_a_block_that_gains_nothing_is_left_as_it_is(
        self, make_model: MakeModel, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
    ) -> None:
        monkeypatch.setattr("dlp_plugin.pruning.reconstruction.RATE", 1e3)

        def model() -> torch.nn.Module:
            torch.manual_seed(0)
            wide = make_model(dtype)
            for parameter in wide.parameters():  # more digits than training computes with
                parameter.data += 1e-9 * torch.randn_like(parameter)
            return wide

        plain = trained(model(), WandaPruningModifier(sparsity=0.5, **EVERY))
        spoilt = trained(model(), WandaPruningModifier(sparsity=0.5, reconstruct=1, **EVERY))
        assert_same(weights_of(spoilt), weights_of(plain))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_weights_keep_their_dtype(self, make_model: MakeModel, dtype: torch.dtype) -> None:
        model = prune(make_model(dtype), ADMMPruningModifier(sparsity=0.5, reconstruct=1, **EVERY))
        assert {value.dtype for value in weights_of(model).values()} == {dtype}

    def test_mixtures_of_experts(self, tmp_path: Path) -> None:
        torch.manual_seed(0)
        config = MixtralConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_local_experts=4,
            num_experts_per_tok=1,
        )
        model = as_if_loaded(MixtralForCausalLM(config), tmp_path)
        stage = ADMMPruningModifier(sparsity=0.5, reconstruct=2, **EVERY)
        stage.ignore = ["re:.*lm_head", "re:.*gate$"]
        run(model, [DLPModifier(alpha=0.1), stage], MANY)
        experts = [linear for name, linear in linears_of(model).items() if "experts" in name]
        assert len(experts) == 2 * 4 * 3
        assert all(0.3 < float((linear.weight == 0).float().mean()) < 0.7 for linear in experts)

    def test_a_model_on_disk(self, make_model: MakeModel, tmp_path: Path) -> None:
        """The same weights as of one in memory."""
        model = kept_on_disk(make_model(), tmp_path)

        def stage() -> ADMMPruningModifier:
            return ADMMPruningModifier(sparsity=0.5, reconstruct=1, **EVERY)

        run(model, [stage()], MANY)
        in_memory = LlamaForCausalLM.from_pretrained(tmp_path / "source")
        run(in_memory, [stage()], MANY)
        assert_same(masks(model), masks(in_memory))
        for name, value in weights_of(in_memory).items():
            torch.testing.assert_close(model.state_dict()[name].cpu(), value, atol=1e-5, rtol=1e-4)


class TestOddPipelines:
    """What the breaking of a model into parts, or no parts at all, does to repairs."""

    @pytest.mark.parametrize("stage", EVERY_STAGE)
    def test_blocks_that_the_host_does_not_tell_of_as_through(
        self, stage: type, tmp_path: Path
    ) -> None:
        """BART's encoder is traced into code that names none of its modules."""
        torch.manual_seed(0)
        sizes = dict.fromkeys(["encoder_ffn_dim", "decoder_ffn_dim"], 64)
        heads = dict.fromkeys(["encoder_attention_heads", "decoder_attention_heads"], 2)
        config = BartConfig(
            vocab_size=VOCABULARY, d_model=32, encoder_layers=2, decoder_layers=2, **sizes, **heads
        )
        model = as_if_loaded(BartForConditionalGeneration(config), tmp_path)
        run(model, [stage(sparsity=0.5, polish=True, reconstruct=1, **EVERY)], random_samples())
        for name, linear in linears_of(model).items():
            if name != "lm_head":
                assert 0.4 < float((linear.weight == 0).float().mean()) < 0.6, name

    @pytest.mark.parametrize("stage", EVERY_STAGE)
    def test_blocks_that_are_applied_several_times(
        self, stage: type, tmp_path: Path, logged: Logged
    ) -> None:
        """They are dense the first time only, and so reconstructed once."""
        family = FAMILIES["albert"]
        model = make(family.config(), tmp_path, family.kind)
        ignore = ["re:.*predictions.decoder"]  # which has the embeddings' weight
        run(
            model,
            [stage(sparsity=0.5, polish=True, reconstruct=1, ignore=ignore)],
            random_samples(),
            sequential_targets=family.sequential_targets,
        )
        told = [m.split(":")[0] for m in logged() if m.startswith("reconstructed")]
        names = family.linears(model)
        assert told == [f"reconstructed {block}" for block in names]
        linears = linears_of(model)
        for name in [name for block in names.values() for name in block]:
            assert 0.4 < float((linears[name].weight == 0).float().mean()) < 0.6, name

    def test_all_at_once_and_nothing_is_held(self, make_model: MakeModel) -> None:
        """``pipeline="basic"`` runs with gradients on, and with caches."""
        stage = WandaPruningModifier(sparsity=0.5, polish=True, reconstruct=1, **EVERY)
        model = make_model()
        run(model, [stage], MANY, pipeline="basic")
        plain = run(
            make_model(), [WandaPruningModifier(sparsity=0.5, **EVERY)], MANY, pipeline="basic"
        )
        assert_same(masks(model), masks(plain))
        assert error(model, make_model()) < error(plain, make_model())
        assert all(parameter.grad is None for parameter in model.parameters())

    def test_two_blocks_in_a_part(self, make_model: MakeModel) -> None:
        def stage(**fields: object) -> WandaPruningModifier:
            return WandaPruningModifier(sparsity=0.6, **EVERY, **fields)

        arguments = {"sequential_targets_per_subgraph": 2}
        plain = run(make_model(), [stage()], MANY, **arguments)
        repaired = run(make_model(), [stage(reconstruct=2)], MANY, **arguments)
        assert error(repaired, make_model()) < 0.8 * error(plain, make_model())

    def test_a_block_that_is_left_out(self, make_model: MakeModel, logged: Logged) -> None:
        ignore = [*EVERY["ignore"], r"re:model\.layers\.1\."]
        stage = ADMMPruningModifier(sparsity=0.6, reconstruct=1, targets=["Linear"], ignore=ignore)
        model = trained(make_model(), stage)
        assert_same(weights_of(model.model.layers[1]), weights_of(make_model().model.layers[1]))
        told = [m.split(":")[0] for m in logged() if m.startswith("reconstructed")]
        assert told == [f"reconstructed model.layers.{number}" for number in (0, 2)]

    @pytest.mark.parametrize("stage", EVERY_STAGE)
    def test_a_pipeline_without_samples(self, make_model: MakeModel, stage: type) -> None:
        stage = stage(sparsity=0.5, polish=True, **EVERY)
        refuses(make_model(), "no calibration sample.*datafree", stage, pipeline="datafree")


class TestBadInput:
    def test_inputs_that_are_not_finite(self, make_model: MakeModel) -> None:
        model = make_model()
        with torch.no_grad():
            model.model.layers[0].input_layernorm.weight[3] = torch.inf
        stage = WandaPruningModifier(sparsity=0.5, polish=True, **EVERY)
        refuses(model, r"inputs of model\.layers\.0\.self_attn\.q_proj hold infinite", stage)

    @pytest.mark.parametrize("fields", [{"polish": True}, {"reconstruct": 1}])
    def test_magnitude_without_samples(self, make_model: MakeModel, fields: dict) -> None:
        (field,) = fields
        stage = PRUNERS[2](sparsity=0.5, **EVERY, **fields)
        model = make_model()
        with pytest.raises(ValueError, match=f"{field} needs calibration samples.*dataset="):
            run(model, [stage], None)

    @pytest.mark.parametrize("stage", [*PRUNERS[:2], ADMMPruningModifier])
    def test_a_stage_without_samples(self, make_model: MakeModel, stage: type) -> None:
        message = f"{stage.__name__} needs calibration samples.*: pass dataset=... to oneshot()"
        with pytest.raises(ValueError, match=re.escape(message).replace(r"\.\*", ".*")):
            run(make_model(), [stage(sparsity=0.5, **EVERY)], None)

    def test_several_processes_and_a_model_on_disk(
        self, make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("dlp_plugin.pruning.base.is_distributed", lambda: True)
        model = kept_on_disk(make_model(), tmp_path)
        stage = WandaPruningModifier(sparsity=0.5, **EVERY)
        with pytest.raises(ValueError, match="q_proj lies on disk, where several processes cannot"):
            run(model, [stage], MANY)

    def test_one_batch_to_reconstruct_on(self, make_model: MakeModel) -> None:
        stage = WandaPruningModifier(sparsity=0.5, reconstruct=1, **EVERY)
        with pytest.raises(ValueError, match="reconstruct holds out one of eight batch.*one: give"):
            run(make_model(), [stage], random_samples(1))

    def test_a_negative_number_of_epochs(self) -> None:
        with pytest.raises(ValueError, match="reconstruct"):
            WandaPruningModifier(sparsity=0.5, reconstruct=-1)

    def test_what_is_no_linear(self, make_model: MakeModel) -> None:
        model = make_model()
        model.model.layers[0].extra = torch.nn.Conv2d(3, 3, 3)
        refuses(
            model,
            r"model\.layers\.0\.extra is a Conv2d, and WandaPruningModifier\.polish takes Linears",
            WandaPruningModifier(sparsity=0.5, targets=["LlamaDecoderLayer"], polish=True),
        )
