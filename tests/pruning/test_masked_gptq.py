"""GPTQ that keeps zeros, against the stock one and against a naive row-by-row twin."""

from pathlib import Path

import pytest
import torch
import yaml
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from helpers import (
    EVERY,
    Logged,
    MakeModel,
    assert_same,
    linears_of,
    prune,
    random_samples,
    recipe,
    recorded_inputs,
    weights_of,
    word_tokenizer,
    zeros,
    zeros_per_group,
)
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from safetensors.torch import load_file

import dlp_plugin
from dlp_plugin import DLPModifier, MaskedGPTQModifier
from dlp_plugin.checkpoints.inspect import inspect_checkpoint
from dlp_plugin.checkpoints.loading import apply_recipe


def scheme(bits: int = 4, group: int | None = 32, symmetric: bool = True) -> dict:
    weights = QuantizationArgs(
        num_bits=bits,
        symmetric=symmetric,
        strategy="channel" if group is None else "group",
        group_size=group,
    )
    return {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}


def quantizer(kind: type = MaskedGPTQModifier, config: dict | None = None, **fields: object):
    return kind(ignore=["lm_head"], config_groups=config or scheme(), **fields)


def masks_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {n: m.weight == 0 for n, m in linears_of(model).items() if n != "lm_head"}


def pruned_model(make_model: MakeModel, **stage: object) -> torch.nn.Module:
    kind = stage.pop("kind", WandaPruningModifier)
    return prune(make_model(), kind(**{"sparsity": 0.6, **EVERY, **stage}))


def lost(model: torch.nn.Module, masks: dict[str, torch.Tensor]) -> int:
    """Pruned weights that came back."""
    linears = linears_of(model)
    return sum(int((linears[name].weight[mask] != 0).sum()) for name, mask in masks.items())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("bits", "group", "actorder"),
    [
        *((bits, 64, order) for bits in (4, 8) for order in (None, "static", "weight")),
        *((4, 32, order) for order in (None, "static", "weight")),
        *((bits, None, order) for bits in (4, 8) for order in (None, "static")),
    ],
)
def test_no_zero_is_lost(
    make_model: MakeModel, bits: int, group: int | None, symmetric: bool, actorder: str | None
) -> None:
    """The host offers the ordering by weight for groups only."""
    model = pruned_model(make_model)
    masks = masks_of(model)
    for mask in masks.values():
        assert (mask.sum(1) == int(mask.shape[1] * 0.6)).all()
    prune(model, quantizer(config=scheme(bits, group, symmetric), actorder=actorder))
    assert lost(model, masks) == 0
    for name, linear in linears_of(model).items():
        if name != "lm_head":
            assert zeros(linear) < linear.weight.numel()
            assert len(linear.weight[0, :32].unique()) <= 2**bits


@pytest.mark.parametrize("kind", [WandaPruningModifier, SparseGPTModifier])
@pytest.mark.parametrize("structure", ["0:0", "2:4", "4:8"])
def test_whatever_pruned_and_how(make_model: MakeModel, kind: type, structure: str) -> None:
    model = pruned_model(make_model, kind=kind, mask_structure=structure, sparsity=0.5)
    masks = masks_of(model)
    prune(model, quantizer())
    assert lost(model, masks) == 0
    if structure != "0:0":
        n, m = map(int, structure.split(":"))
        for name, mask in masks.items():
            groups = (linears_of(model)[name].weight == 0).reshape(-1, m).sum(1)
            assert (groups >= n).all(), name
            assert zeros_per_group(mask == 0, m) == {n}, name


def test_the_stock_modifier_loses_what_this_one_keeps(make_model: MakeModel) -> None:
    """If this fails, the host keeps zeros again: say so in the README."""
    counts = {}
    for kind in (GPTQModifier, MaskedGPTQModifier):
        model = pruned_model(make_model)
        masks = masks_of(model)
        prune(model, quantizer(kind))
        counts[kind] = lost(model, masks)
    assert counts[GPTQModifier] > 0
    assert counts[MaskedGPTQModifier] == 0


@pytest.mark.parametrize("actorder", [None, "static", "weight"])
@pytest.mark.parametrize("batched", [None, 4])
def test_a_dense_model_gives_the_stock_result_to_the_bit(
    make_model: MakeModel, logged: Logged, actorder: str | None, batched: int | None
) -> None:
    states = []
    for kind in (GPTQModifier, MaskedGPTQModifier):
        model = make_model()
        fields = {"actorder": actorder, "batched_quantization": batched}
        prune(model, quantizer(kind, **fields))
        states.append(weights_of(model))
    assert_same(states[1], states[0])
    assert any("found no pruned weight" in message for message in logged("INFO"))


def naive(
    weight: torch.Tensor, factor: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, group: int
) -> torch.Tensor:
    """GPTQ under a mask, one row and one column at a time, in float64.

    :param weight: ``[rows, columns]``, pruned
    :param factor: upper Cholesky factor of the inverse Hessian
    :param scale: ``[rows, groups]`` of 4-bit numbers from -8 to 7
    :param zero: the number that stands for zero, ``[rows, groups]``
    """
    result = torch.zeros_like(weight)
    for row in range(len(weight)):
        left = weight[row].clone()
        for column in range(weight.shape[1]):
            step, point = scale[row, column // group], zero[row, column // group]
            value = ((left[column] / step + point).round().clamp(-8, 7) - point) * step
            if weight[row, column] == 0:
                value = torch.zeros(())
            result[row, column] = value
            error = (left[column] - value) / factor[column, column]
            left[column + 1 :] -= error * factor[column, column + 1 :]
    return result


def test_it_is_gptq_with_pruned_weights_quantized_to_zero(make_model: MakeModel) -> None:
    """The Linears that see the first block's inputs, which quantizing others does not change.

    Asymmetric, as symmetric scales put the largest weight of a group halfway between two numbers.
    """
    group = 8
    model = prune(
        make_model(hidden_size=32, intermediate_size=32, num_hidden_layers=1),
        WandaPruningModifier(sparsity=0.6, **EVERY),
    )
    names = [f"model.layers.0.self_attn.{name}_proj" for name in "qkv"]
    weights = {name: model.get_submodule(name).weight.detach().double() for name in names}
    with recorded_inputs(model) as inputs, torch.no_grad():
        for ids in random_samples()["input_ids"]:
            model(torch.tensor([ids]))
    # two blocks of columns: errors cross from one to the other
    config = scheme(group=group, symmetric=False)
    prune(model, quantizer(config=config, block_size=16, actorder=None))
    for name, weight in weights.items():
        linear, tokens = model.get_submodule(name), torch.cat(inputs[name])
        hessian = tokens.T @ tokens
        damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian))
        factor = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
        scale, zero = linear.weight_scale.detach().double(), linear.weight_zero_point.double()
        expected = naive(weight, factor, scale, zero, group)
        torch.testing.assert_close(linear.weight.double(), expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(linear.weight == 0, (weight == 0) | (expected == 0))


class TestWarnings:
    """Of a stock quantizer that brings zeros back, once, before anything is done."""

    def stage(self, kind: type = WandaPruningModifier) -> object:
        return kind(sparsity=0.6, **EVERY)

    def told(self, logged: Logged) -> int:
        said = "GPTQModifier does not keep pruned weights at zero: part of the sparsity will be"
        return sum(said in message for message in logged("WARNING"))

    @pytest.mark.parametrize(("kind", "times"), [(GPTQModifier, 1), (MaskedGPTQModifier, 0)])
    @pytest.mark.parametrize("recipe", ["fed", "fed, stock", "alone"])
    def test_behind_a_stage(
        self, make_model: MakeModel, logged: Logged, recipe: str, kind: type, times: int
    ) -> None:
        own = dlp_plugin.WandaPruningModifier
        stage = self.stage(WandaPruningModifier if "stock" in recipe else own)
        prune(make_model(), *([DLPModifier()] if "fed" in recipe else []), stage, quantizer(kind))
        assert self.told(logged) == times

    def test_before_a_stage(self, make_model: MakeModel, logged: Logged) -> None:
        later = dlp_plugin.WandaPruningModifier(sparsity=0.6, targets=["re:.*mlp$"])
        prune(make_model(), quantizer(GPTQModifier), later)
        assert self.told(logged) == 0

    @pytest.mark.parametrize("pruned", [True, False])
    def test_on_what_was_pruned_before(
        self, make_model: MakeModel, logged: Logged, pruned: bool
    ) -> None:
        model = pruned_model(make_model) if pruned else make_model()
        groups = {"group_0": scheme()["group_0"].model_copy(update={"targets": ["re:.*mlp.*"]})}
        prune(model, quantizer(config=groups), quantizer(GPTQModifier, config=scheme(bits=8)))
        assert self.told(logged) == pruned

    @pytest.mark.parametrize("pruned", [True, False])
    def test_by_the_terminal_where_nothing_of_ours_is_in_the_recipe(
        self, make_model: MakeModel, logged: Logged, pruned: bool, tmp_path: Path
    ) -> None:
        model = pruned_model(make_model) if pruned else make_model()
        model.save_pretrained(tmp_path)
        fields = {"scheme": "W8A8", "ignore": ["lm_head"]}
        recipe = {"quantization_stage": {"quantization_modifiers": {"GPTQModifier": fields}}}
        data = {"dataset": random_samples(), "tokenizer": word_tokenizer()}
        apply_recipe(tmp_path, yaml.safe_dump(recipe), **data)
        assert self.told(logged) == pruned


class TestHardCases:
    def quantize(self, model: torch.nn.Module, **fields: object) -> dict[str, torch.Tensor]:
        masks = masks_of(model)
        prune(model, quantizer(**fields))
        assert lost(model, masks) == 0
        for name, linear in linears_of(model).items():
            assert linear.weight.isfinite().all(), name
        return masks

    @pytest.mark.parametrize("symmetric", [True, False])
    def test_a_fully_pruned_row_and_matrix(self, make_model: MakeModel, symmetric: bool) -> None:
        model = pruned_model(make_model)
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight[3] = 0
            model.model.layers[1].mlp.up_proj.weight[:] = 0
        self.quantize(model, config=scheme(symmetric=symmetric))
        assert zeros(model.model.layers[1].mlp.up_proj) == 128 * 64

    @pytest.mark.parametrize("actorder", [None, "static", "weight"])
    def test_dead_input_channels(self, make_model: MakeModel, actorder: str | None) -> None:
        model = pruned_model(make_model)
        with torch.no_grad():
            model.model.layers[1].input_layernorm.weight[5:25] = 0
        self.quantize(model, actorder=actorder)

    def test_a_hessian_that_cannot_be_factorized(self, make_model: MakeModel) -> None:
        model = pruned_model(make_model)
        self.quantize(model, dampening_frac=-1.0)  # not positive definite: rounding only

    @pytest.mark.parametrize(
        ("group", "bypass"), [(128, False), (128, True), (48, False), (48, True)]
    )
    def test_groups_that_do_not_divide_a_row(
        self, make_model: MakeModel, group: int, bypass: bool
    ) -> None:
        """Before anything is pruned, and by name, even if told to bypass the host's check."""
        model = make_model()
        before = weights_of(model)
        stage = WandaPruningModifier(sparsity=0.5, **EVERY)
        message = (
            r"MaskedGPTQModifier's groups do not divide the columns of "
            rf"model\.layers\.0\.self_attn\.q_proj \(64 columns, groups of {group}\), .*: "
            "give it a scheme whose groups do, or add these to its ignore"
        )
        gptq = quantizer(config=scheme(group=group), bypass_divisibility_checks=bypass)
        with pytest.raises(ValueError, match=message) as error:
            prune(model, stage, gptq)
        assert ("down_proj" in str(error.value)) == bool(128 % group)  # it has 128 columns
        assert "lm_head" not in str(error.value)
        for name, linear in linears_of(model).items():
            assert torch.equal(linear.weight, before[f"{name}.weight"]), name
            assert not hasattr(linear, "quantization_scheme"), name

    @pytest.mark.parametrize("field", ["targets", "ignore"])
    def test_a_bad_regular_expression(self, make_model: MakeModel, field: str) -> None:
        model = pruned_model(make_model)
        gptq = MaskedGPTQModifier(**{"scheme": "W4A16", "ignore": ["lm_head"], field: ["re:["]})
        message = rf"MaskedGPTQModifier\.{field} holds 're:\[', which is no regular expression"
        with pytest.raises(ValueError, match=message):
            prune(model, gptq)

    def test_backends_switched_off(
        self, make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("dlp_plugin.pruning.masked_gptq.ENFORCE_EAGER", "1")
        with pytest.raises(ValueError, match="CT_ENFORCE_EAGER is set.*unset it"):
            prune(make_model(), quantizer())

    def test_a_host_that_brings_pruned_weights_back_is_noticed(
        self, make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fill(_: GPTQModifier, modules: list[torch.nn.Linear]) -> None:
            for module in modules:
                module.weight.data.fill_(1)

        model = pruned_model(make_model)
        monkeypatch.setattr(GPTQModifier, "compress_module_list", fill)
        with pytest.raises(RuntimeError, match="pruned weights of .* came back"):
            prune(model, quantizer(actorder="static"))


def test_one_recipe_from_scores_to_a_packed_checkpoint(
    make_model: MakeModel, tmp_path: Path
) -> None:
    weights = {"num_bits": 4, "strategy": "group", "group_size": 32}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    text = recipe(sparsity=0.6)
    text["pruning_stage"]["quantization_modifiers"] = {
        "MaskedGPTQModifier": {"ignore": ["re:.*lm_head"], "config_groups": groups}
    }
    stage = WandaPruningModifier(sparsity=0.6, **EVERY)
    masks = masks_of(prune(make_model(torch.bfloat16), DLPModifier(), stage))
    prune(make_model(torch.bfloat16), text, output_dir=str(tmp_path))
    assert "model.layers.0.mlp.up_proj.weight_packed" in load_file(tmp_path / "model.safetensors")
    found = inspect_checkpoint(tmp_path)
    for name, mask in masks.items():
        assert found.linears[name].zeros >= int(mask.sum()), name
