"""Float32 where the processor has no arithmetic in a model's dtype."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import EVERY, MakeModel, assert_same, prune, random_samples, weights_of, word_tokenizer
from safetensors.torch import load_file

from dlp_plugin import DLPModifier, WandaPruningModifier, precision
from dlp_plugin.checkpoints.loading import apply_recipe, load_model
from dlp_plugin.evaluation.perplexity import perplexity
from dlp_plugin.precision import is_native, narrow, wide_enough, widen, widest
from dlp_plugin.scoring.blocks import Block
from dlp_plugin.scoring.norms import ChannelNorms
from dlp_plugin.scoring.scores import block_score
from dlp_plugin.scoring.spectra import block_exponent
from dlp_plugin.search.judge import Judge
from dlp_plugin.search.masks import Masks
from dlp_plugin.search.slopes import Slopes

IDS = torch.arange(48).view(2, 24) * 5 % 256


@pytest.fixture
def without_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor that has float32 only."""
    monkeypatch.setattr(precision, "is_native", lambda dtype, _="cpu": dtype == torch.float32)


class TestWhatAProcessorHas:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
    def test_every_processor_has_these(self, dtype: torch.dtype) -> None:
        assert is_native(dtype)

    def test_accelerators_have_all(self) -> None:
        assert is_native(torch.bfloat16, "cuda")

    @pytest.mark.parametrize(
        ("library", "instructions", "expected"),
        [
            (True, {"avx512_bf16": True}, True),
            (True, {"amx_bf16": True}, True),
            (True, {"avx512_f": True}, False),  # AVX-512 alone: imitated
            (False, {"avx512_bf16": True}, False),  # kept from using it
            (False, {}, False),
        ],
    )
    def test_library_and_processor_must_have_bf16(
        self,
        monkeypatch: pytest.MonkeyPatch,
        library: bool,
        instructions: dict[str, bool],
        expected: bool,
    ) -> None:
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: library)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: instructions)
        monkeypatch.setattr("platform.machine", lambda: "x86_64")
        assert is_native(torch.bfloat16) is expected


def test_slopes_of_a_narrow_model_are_those_of_its_wide_twin(
    make_model: MakeModel, without_bf16: None
) -> None:
    """Blocks that are run again in the backward pass compute as they did before."""
    narrow = make_model(torch.bfloat16)
    wide = make_model()
    wide.load_state_dict(narrow.state_dict())
    found = []
    for model in (narrow, wide):
        linears = {n: m for n, m in model.named_modules() if n.endswith("_proj")}
        masks = Masks(linears, {n: torch.ones(m.in_features) for n, m in linears.items()})
        blocks = [Block(f"model.layers.{i}", {}) for i in range(3)]
        slopes = Slopes(model, blocks, masks, [{"input_ids": IDS}])
        found.append(slopes.at(dict.fromkeys(linears, 0.5), [0])[0])
    assert found[0] == pytest.approx(found[1], rel=1e-4, abs=1e-9)


class TestADeviceWithoutFloat64:
    def test_is_apple_s(self) -> None:
        assert widest(torch.device("mps")) == torch.float32
        assert widest(torch.device("cpu")) == widest(torch.device("cuda")) == torch.float64

    def test_sums_are_taken_in_what_it_has(
        self, make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Norms, scores by mean, losses and divergences: the same to float32's precision."""

        def found() -> list[float]:
            model = make_model()
            linears = {n: m for n, m in model.named_modules() if n.endswith("up_proj")}
            inputs = torch.randn(500, 64, generator=torch.Generator().manual_seed(0))
            norms = ChannelNorms()
            for name in linears:
                norms.add(name, inputs)
            of_linears = norms.of(linears)
            parts = {n: (linears[n].weight.detach(), of_linears[n]) for n in linears}
            judge = Judge(model, Masks(linears, of_linears), [{"input_ids": IDS}])
            sparsities = dict.fromkeys(linears, 0.5)
            judged = [judge.loss(sparsities), judge.divergence(sparsities)]
            return [block_score(parts, "mean"), block_exponent(weights_of(parts)), *judged]

        def weights_of(parts: dict) -> dict:
            return {name: weight for name, (weight, _) in parts.items()}

        wide = found()
        for module in ("scoring.scores", "scoring.norms", "scoring.spectra", "scoring.predictions"):
            monkeypatch.setattr(f"dlp_plugin.{module}.widest", lambda _: torch.float32)
        narrower = found()
        assert narrower == pytest.approx(wide, rel=1e-4, abs=1e-6)
        assert narrower != wide


class TestWidening:
    def test_there_and_back_changes_no_bit(self, make_model: MakeModel, without_bf16: None) -> None:
        model = make_model(torch.bfloat16)
        before = weights_of(model)
        stored = widen(model)
        assert {value.dtype for value in model.state_dict().values()} == {torch.float32}
        narrow(model, stored)
        assert_same(weights_of(model), before)

    def test_what_was_float32_stays_and_what_came_since_joins(self, without_bf16: None) -> None:
        model = torch.nn.Linear(2, 2).bfloat16()
        model.register_parameter("wide", torch.nn.Parameter(torch.tensor([1 / 3])))
        stored = widen(model)
        model.register_buffer("scale", torch.ones(1))
        narrow(model, stored)
        assert model.wide.item() == torch.tensor(1 / 3).item()
        assert (model.scale.dtype, model.weight.dtype) == (torch.bfloat16, torch.bfloat16)

    def test_tied_weights_stay_tied(self, make_model: MakeModel, without_bf16: None) -> None:
        model = make_model(torch.bfloat16, tie_word_embeddings=True)
        narrow(model, widen(model))
        assert model.lm_head.weight is model.model.embed_tokens.weight


class TestAModelOfSomebodyElse:
    """It keeps its dtype, and computes as its float32 twin, to the bit."""

    @torch.no_grad()
    def test_logits(self, make_model: MakeModel, without_bf16: None) -> None:
        model, twin = make_model(torch.bfloat16), make_model(torch.bfloat16).float()
        with wide_enough(model, "cpu"):
            logits = model(IDS).logits
        assert torch.equal(logits, twin(IDS).logits)
        assert model.dtype == torch.bfloat16
        assert not torch.equal(model(IDS).logits.float(), logits)

    def test_perplexity(self, make_model: MakeModel, without_bf16: None) -> None:
        narrow_, wide = make_model(torch.bfloat16), make_model(torch.bfloat16).float()
        assert perplexity(narrow_, list(IDS)) == perplexity(wide, list(IDS))

    def test_the_losses_that_a_search_judges_by(
        self, make_model: MakeModel, without_bf16: None
    ) -> None:
        losses = []
        for model in (make_model(torch.bfloat16), make_model(torch.bfloat16).float()):
            linears = {n: m for n, m in model.named_modules() if n.endswith("up_proj")}
            norms = {name: torch.ones(linear.in_features) for name, linear in linears.items()}
            judge = Judge(model, Masks(linears, norms), [{"input_ids": IDS}])
            sparsities = dict.fromkeys(linears, 0.5)
            losses.append((judge.loss(sparsities), judge.divergence(sparsities)))
        assert losses[0] == losses[1]

    def test_nothing_happens_where_the_dtype_is_native(self, make_model: MakeModel) -> None:
        model = make_model()
        with wide_enough(model, "cpu"), torch.no_grad():
            logits = model(IDS).logits
        assert torch.equal(logits, model(IDS).logits)


class TestFromDiskToDisk:
    @pytest.fixture
    def folder(self, make_model: MakeModel, tmp_path: Path) -> Path:
        make_model(torch.bfloat16).save_pretrained(tmp_path / "dense")
        word_tokenizer().save_pretrained(tmp_path / "dense")
        return tmp_path / "dense"

    def arguments(self) -> dict[str, object]:
        samples = random_samples()
        return {
            "dataset": samples,
            "tokenizer": word_tokenizer(),
            "num_calibration_samples": len(samples),
            "shuffle_calibration_samples": False,
        }

    def test_a_loaded_model_computes_in_float32(self, folder: Path, without_bf16: None) -> None:
        assert load_model(folder).dtype == torch.float32

    def test_what_is_saved_has_the_checkpoint_s_dtype(
        self, folder: Path, make_model: MakeModel, without_bf16: None
    ) -> None:
        """And its masks are those of the float32 twin: exact."""

        def modifiers() -> list:
            stage = WandaPruningModifier(sparsity=0.5, **EVERY)
            return [DLPModifier(), stage]

        output = folder.with_name("pruned")
        apply_recipe(folder, modifiers(), output, **self.arguments())
        saved = load_file(output / "model.safetensors")
        assert {value.dtype for value in saved.values()} == {torch.bfloat16}
        twin = prune(make_model(torch.bfloat16).float(), *modifiers())
        assert_same(saved, weights_of(twin.bfloat16()))
        assert (output / "recipe.yaml").is_file()
