"""A model that runs as it is packed does what any model does, but train or give its weights."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from packed_checkpoints import assert_same_bits, tensors_of
from peft import LoraConfig, PeftModel, get_peft_model
from sparse_models import (
    IDS,
    REMEDY,
    UP,
    dense,
    load,
    logits,
    needs_kernels,
    packed_llama,
    sparse_of,
    without_gpu,
)
from transformers import PreTrainedModel, Trainer, TrainingArguments

from dlp_plugin import pack, precision
from dlp_plugin.checkpoints.loading import load_dense, load_model, load_to_prune
from dlp_plugin.evaluation.finite import check_finite
from dlp_plugin.evaluation.perplexity import perplexity
from dlp_plugin.recovery import hold_masks, mask_updates, sparse_merge

pytestmark = needs_kernels
LORA = {"r": 4, "target_modules": "all-linear", "lora_dropout": 0.0}


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed_llama(tmp_path_factory.mktemp("models"))


@pytest.fixture
def model(packed: Path) -> PreTrainedModel:
    return load(packed, dtype=torch.float32)


class TestGeneration:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    def test_greedy_text(self, packed: Path, dtype: torch.dtype) -> None:
        """That of the dense model, up to where its two best are as good as equal."""
        model, expected = load(packed, dtype=dtype), dense(packed, dtype=dtype)
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(2, 256, (6, 9), generator=generator)
        mask = torch.ones_like(ids)
        for row in range(6):
            mask[row, :row] = 0  # padded on the left
        arguments = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
        texts = [each.generate(ids * mask, **arguments) for each in (model, expected)]
        for row, (found, wanted) in enumerate(zip(*texts, strict=True)):
            if not torch.equal(found, wanted):
                place = int((found != wanted).nonzero()[0])
                with torch.no_grad():
                    known = wanted[None, row:place]
                    best = expected(known).logits[0, -1].float().topk(2).values
                assert best[0] - best[1] < 0.01

    def test_compiled(self, model: PreTrainedModel) -> None:
        """Without a break in the graph."""
        for each in (model, copy.deepcopy(model)):
            compiled = torch.compile(each, backend="aot_eager", fullgraph=True)
            torch.testing.assert_close(logits(compiled), logits(each), rtol=1e-5, atol=1e-5)


class TestCopies:
    @pytest.mark.parametrize(
        "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))]
    )
    def test_they_compute_and_are_saved_alike(
        self, packed: Path, copied: Callable, tmp_path: Path
    ) -> None:
        model = copied(load(packed))
        assert torch.equal(logits(model), logits(load(packed)))
        model.save_pretrained(tmp_path / "again")
        assert_same_bits(tensors_of(tmp_path / "again"), tensors_of(packed))

    def test_weights_are_in_them_once(self, model: PreTrainedModel) -> None:
        assert len(pickle.dumps(model)) < 1.5 * model.get_memory_footprint()

    def test_state(self, packed: Path, model: PreTrainedModel) -> None:
        """What a packed file may hold, in the model's own memory; what is loaded is copied."""
        state = load(packed).state_dict()
        assert f"{UP}.weight_packed" in state
        assert sum(one.nbytes for one in state.values()) < model.get_memory_footprint()
        other = copy.deepcopy(model)
        for linear in sparse_of(other).values():
            linear.values.zero_()
        assert other.load_state_dict(state).missing_keys == []
        assert torch.equal(logits(other), logits(model))
        assert_same_bits(
            sparse_of(other)[UP].state_dict(), sparse_of(load(packed))[UP].state_dict()
        )

    @pytest.mark.parametrize(
        ("harm", "message"),
        [
            (lambda s: s.pop(f"{UP}.weight_values"), rf"{UP}\.weight_values is missing"),
            (lambda s: s[f"{UP}.weight_packed"][0].fill_(255), rf"{UP}\.weight_packed marks"),
            (
                lambda s: [s.pop(key) for key in list(s) if f"{UP}.weight" in key],
                rf'Missing key\(s\) in state_dict: "{UP}\.weight_packed"',
            ),
            (lambda s: s.update({f"{UP}.weight": torch.zeros(2)}), r"Unexpected key\(s\)"),
        ],
    )
    def test_a_damaged_state(self, model: PreTrainedModel, harm: Callable, message: str) -> None:
        before, state = logits(model), copy.deepcopy(model.state_dict())
        harm(state)
        with pytest.raises(RuntimeError, match=message):
            model.load_state_dict(state)
        assert torch.equal(logits(model), before)

    def test_another_device(self, model: PreTrainedModel) -> None:
        message = rf"cannot move to meta; modules .*: load the model again .* elsewhere, {REMEDY}"
        with pytest.raises(ValueError, match=message):
            model.to("meta")


class TestTheWeight:
    def test_what_it_tells(self, model: PreTrainedModel) -> None:
        weight = sparse_of(model)[UP].weight
        assert (weight.shape, weight.dtype) == ((100, 64), torch.bfloat16)
        assert (weight.device.type, weight.requires_grad) == ("cpu", False)

    @pytest.mark.parametrize(
        "wish",
        [
            lambda weight: weight + 1,
            lambda weight: weight.data,
            lambda weight: weight.mul_(2),
            lambda weight: weight.requires_grad_(),
            lambda weight: torch.nn.functional.linear(torch.zeros(64), weight),
            lambda weight: torch.cat([weight]),
        ],
    )
    def test_what_it_does_not(self, model: PreTrainedModel, wish: Callable) -> None:
        with pytest.raises(ValueError, match=rf"is packed: .*{REMEDY}"):
            wish(sparse_of(model)[UP].weight)

    def test_it_is_not_replaced(self, model: PreTrainedModel) -> None:
        with pytest.raises(KeyError, match="already exists"):
            sparse_of(model)[UP].weight = torch.nn.Parameter(torch.zeros(100, 64))


class TestTraining:
    def test_gradients_of_inputs(self, model: PreTrainedModel, packed: Path) -> None:
        gradients = []
        for each in (model, dense(packed, dtype=torch.float32)):
            inputs = each.get_input_embeddings()(IDS).detach().requires_grad_()
            each(inputs_embeds=inputs).logits.square().sum().backward()
            gradients.append(inputs.grad / inputs.grad.norm())
        torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)

    def test_the_weights_are_frozen(self, model: PreTrainedModel, tmp_path: Path) -> None:
        model.requires_grad_(True)
        assert f"{UP}.weight" not in dict(model.named_parameters())
        with pytest.raises(ValueError, match="Please attach trainable adapters"):
            Trainer(model, TrainingArguments(str(tmp_path), use_cpu=True, report_to="none"))

    def test_lora(self, packed: Path, tmp_path: Path) -> None:
        """Trains as on the dense model, into which the adapter is merged."""
        losses = []
        for load_base in (load, dense):
            torch.manual_seed(0)
            adapted = get_peft_model(load_base(packed, dtype=torch.float32), LoraConfig(**LORA))
            optimizer = torch.optim.AdamW(adapted.parameters(), 1e-2)
            losses.append([])
            for _ in range(4):
                loss = adapted(IDS, labels=IDS).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses[-1].append(loss.item())
            if load_base is load:
                assert len(sparse_of(adapted)) == 21
                adapted.save_pretrained(tmp_path / "adapter")
                trained = logits(adapted)
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)
        assert losses[0][-1] < losses[0][0] - 0.1
        again = PeftModel.from_pretrained(dense(packed, dtype=torch.float32), tmp_path / "adapter")
        torch.testing.assert_close(logits(again.merge_and_unload()), trained, rtol=1e-3, atol=1e-3)

    @pytest.mark.parametrize(
        "wish",
        [
            lambda model: get_peft_model(model, LoraConfig(**LORA, use_dora=True)),
            lambda model: get_peft_model(model, LoraConfig(**LORA)).merge_and_unload(),
            lambda model: mask_updates(get_peft_model(model, LoraConfig(**LORA))),
            lambda model: sparse_merge(get_peft_model(model, LoraConfig(**LORA))),
            lambda model: hold_masks(model, torch.optim.SGD(model.parameters(), 1)),
        ],
    )
    def test_what_needs_the_weights(self, model: PreTrainedModel, wish: Callable) -> None:
        with pytest.raises(ValueError, match=rf"packed: .*{REMEDY}"):
            wish(model)


class TestThisPackage:
    @without_gpu
    def test_what_is_measured_runs_packed(self, packed: Path) -> None:
        windows = list(torch.arange(64).reshape(4, 16))
        model = load_model(packed)
        assert len(sparse_of(model)) == 21
        assert perplexity(model, windows) == pytest.approx(
            perplexity(load_model(packed.with_name("source")), windows), rel=1e-2
        )

    @pytest.mark.parametrize("read", [load_dense, lambda folder: load_to_prune(folder)[0]])
    def test_what_is_changed_is_dense(self, packed: Path, read: Callable) -> None:
        found, expected = (read(packed.with_name(name)) for name in ("packed", "source"))
        assert_same_bits(found.state_dict(), expected.state_dict())

    @without_gpu
    def test_without_bfloat16(self, packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Activations are float32, and what is stored stays."""
        monkeypatch.setattr(precision, "is_native", lambda dtype, _="cpu": dtype != torch.bfloat16)
        model = load_model(packed)
        assert logits(model).dtype == torch.float32
        torch.testing.assert_close(logits(model), logits(dense(packed).float()))
        assert sparse_of(model)[UP].spec.dtype == torch.bfloat16

    def test_a_weight_that_is_no_number(self, tmp_path: Path, packed: Path) -> None:
        broken = dense(packed)
        broken.get_submodule(UP).weight.data[3, 5] = math.nan
        broken.save_pretrained(tmp_path / "source")
        pack(tmp_path / "source", tmp_path / "packed")
        with pytest.raises(ValueError, match=rf"{UP}\.weight holds NaN or infinity"):
            check_finite(math.nan, "perplexity", load(tmp_path / "packed"))

    def test_packed_again(self, model: PreTrainedModel, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"packed already; its save_pretrained\(\) writes it"):
            pack(model, tmp_path / "again")
        assert not list(tmp_path.iterdir())
