"""GPTQ that keeps zeros, against the stock one and against a naive row-by-row twin."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from conftest import linears_of, random_samples, run, zeros
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from loguru import logger
from safetensors.torch import load_file

from dlp_plugin import DLPModifier, MaskedGPTQModifier
from dlp_plugin.checkpoints.inspect import inspect_checkpoint

MakeModel = Callable[..., torch.nn.Module]


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
    model = make_model()
    kind = stage.pop("kind", WandaPruningModifier)
    fields = {"sparsity": 0.6, "targets": ["Linear"], "ignore": ["re:.*lm_head"], **stage}
    run(model, [kind(**fields)], random_samples())
    return model


def lost(model: torch.nn.Module, masks: dict[str, torch.Tensor]) -> int:
    """Pruned weights that came back."""
    linears = linears_of(model)
    return sum(int((linears[name].weight[mask] != 0).sum()) for name, mask in masks.items())


@pytest.mark.parametrize("actorder", [None, "static", "weight"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "group"), [(4, 32), (4, 64), (8, 64), (4, None), (8, None)])
def test_no_zero_is_lost(
    make_model: MakeModel, bits: int, group: int | None, symmetric: bool, actorder: str | None
) -> None:
    if actorder == "weight" and group is None:
        actorder = "static"  # the host offers the ordering for groups only
    model = pruned_model(make_model)
    masks = masks_of(model)
    assert sum(int(mask.sum()) for mask in masks.values()) > 0
    run(
        model,
        [quantizer(config=scheme(bits, group, symmetric), actorder=actorder)],
        random_samples(),
    )
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
    run(model, [quantizer()], random_samples())
    assert lost(model, masks) == 0
    if structure != "0:0":
        n, m = map(int, structure.split(":"))
        for name, mask in masks.items():
            groups = (linears_of(model)[name].weight == 0).reshape(-1, m).sum(1)
            assert (groups >= n).all(), name
            assert mask.any()


def test_the_stock_modifier_loses_what_this_one_keeps(make_model: MakeModel) -> None:
    """If this fails, the host keeps zeros again: say so in the README."""
    counts = {}
    for kind in (GPTQModifier, MaskedGPTQModifier):
        model = pruned_model(make_model)
        masks = masks_of(model)
        run(model, [quantizer(kind)], random_samples())
        counts[kind] = lost(model, masks)
    assert counts[GPTQModifier] > 0
    assert counts[MaskedGPTQModifier] == 0


@pytest.mark.parametrize("actorder", [None, "static", "weight"])
@pytest.mark.parametrize("batched", [None, 4])
def test_a_dense_model_gives_the_stock_result_to_the_bit(
    make_model: MakeModel, actorder: str | None, batched: int | None
) -> None:
    messages: list[str] = []
    sink = logger.add(messages.append, level="INFO")
    states = []
    for kind in (GPTQModifier, MaskedGPTQModifier):
        model = make_model()
        fields = {"actorder": actorder, "batched_quantization": batched}
        run(model, [quantizer(kind, **fields)], random_samples())
        states.append(model.state_dict())
    logger.remove(sink)
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert any("found no pruned weight" in message for message in messages)


def naive(
    weight: torch.Tensor, factor: torch.Tensor, scale: torch.Tensor, group: int
) -> torch.Tensor:
    """GPTQ under a mask, one row and one column at a time, in float64.

    :param weight: ``[rows, columns]``, pruned
    :param factor: upper Cholesky factor of the inverse Hessian
    :param scale: ``[rows, groups]`` of symmetric 4-bit
    """
    result = torch.zeros_like(weight)
    for row in range(len(weight)):
        left = weight[row].clone()
        for column in range(weight.shape[1]):
            step = scale[row, column // group]
            value = (left[column] / step).round().clamp(-8, 7) * step
            if weight[row, column] == 0:
                value = torch.zeros(())
            result[row, column] = value
            error = (left[column] - value) / factor[column, column]
            left[column + 1 :] -= error * factor[column, column + 1 :]
    return result


def test_it_is_gptq_with_pruned_weights_quantized_to_zero() -> None:
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight

    from dlp_plugin.pruning.masked_gptq import _masking

    generator = torch.Generator().manual_seed(0)
    rows, columns, group = 6, 32, 8
    weight = torch.randn(rows, columns, generator=generator)
    weight[torch.rand(rows, columns, generator=generator) < 0.6] = 0
    inputs = torch.randn(200, columns, generator=generator)
    hessian = inputs.T @ inputs / 200
    scale = weight.reshape(rows, -1, group).abs().amax(-1).clamp(min=0.1) / 7.5
    args = QuantizationArgs(num_bits=4, symmetric=True, strategy="group", group_size=group)

    damped = hessian.double() + 0.01 * hessian.double().diagonal().mean() * torch.eye(columns)
    factor = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    expected = naive(weight.double(), factor, scale.double(), group)
    with _masking(weight[None] != 0):
        found, _, fallback = quantize_weight(
            weight[None].clone(),
            hessian[None].clone(),
            scale[None],
            torch.zeros_like(scale, dtype=torch.int8)[None],
            None,
            args,
            blocksize=16,  # two blocks of columns: errors cross from one to the other
        )
    assert not fallback.any()
    torch.testing.assert_close(found[0].double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(found[0] == 0, (weight == 0) | (expected == 0))


@pytest.mark.parametrize(("kind", "warned"), [(GPTQModifier, True), (MaskedGPTQModifier, False)])
def test_a_recipe_about_to_lose_sparsity_is_warned_of(
    make_model: MakeModel, kind: type, warned: bool
) -> None:
    messages: list[str] = []
    sink = logger.add(messages.append, level="WARNING")
    stage = WandaPruningModifier(sparsity=0.6, targets=["Linear"], ignore=["re:.*lm_head"])
    run(make_model(), [DLPModifier(), stage, quantizer(kind)], random_samples())
    logger.remove(sink)
    told = any("GPTQModifier does not keep pruned weights" in message for message in messages)
    assert told == warned


class TestHardCases:
    def quantize(self, model: torch.nn.Module, **fields: object) -> dict[str, torch.Tensor]:
        masks = masks_of(model)
        run(model, [quantizer(**fields)], random_samples())
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

    def test_a_group_size_that_does_not_divide_is_the_hosts_error(
        self, make_model: MakeModel
    ) -> None:
        model = pruned_model(make_model)
        with pytest.raises(ValueError, match="48"):
            run(model, [quantizer(config=scheme(group=48))], random_samples())

    @pytest.mark.parametrize(("group", "bypass"), [(128, False), (128, True), (48, True)])
    def test_groups_that_do_not_divide_a_row(
        self, make_model: MakeModel, group: int, bypass: bool
    ) -> None:
        """Before anything is pruned, and by name, even if told to bypass the host's check."""
        model = make_model()
        before = [linear.weight.clone() for linear in linears_of(model).values()]
        stage = WandaPruningModifier(sparsity=0.5, targets=["Linear"], ignore=["re:.*lm_head"])
        message = (
            r"MaskedGPTQModifier's groups do not divide the columns of "
            rf"model\.layers\.0\.self_attn\.q_proj \(64 columns, groups of {group}\), .*: "
            "give it a scheme whose groups do, or add these to its ignore"
        )
        gptq = quantizer(config=scheme(group=group), bypass_divisibility_checks=bypass)
        with pytest.raises(ValueError, match=message) as error:
            run(model, [stage, gptq], random_samples())
        assert ("down_proj" in str(error.value)) == bool(128 % group)  # it has 128 columns
        assert "lm_head" not in str(error.value)
        for linear, weight in zip(linears_of(model).values(), before, strict=True):
            assert torch.equal(linear.weight, weight)

    @pytest.mark.parametrize("field", ["targets", "ignore"])
    def test_a_bad_regular_expression(self, make_model: MakeModel, field: str) -> None:
        model = pruned_model(make_model)
        gptq = MaskedGPTQModifier(**{"scheme": "W4A16", "ignore": ["lm_head"], field: ["re:["]})
        message = rf"MaskedGPTQModifier\.{field} holds 're:\[', which is no regular expression"
        with pytest.raises(ValueError, match=message):
            run(model, [gptq], random_samples())

    def test_backends_switched_off(
        self, make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("dlp_plugin.pruning.masked_gptq.ENFORCE_EAGER", "1")
        with pytest.raises(ValueError, match="CT_ENFORCE_EAGER is set.*unset it"):
            run(make_model(), [quantizer()], random_samples())

    def test_a_host_that_orders_otherwise_is_noticed(
        self, make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = pruned_model(make_model)
        monkeypatch.setattr(
            MaskedGPTQModifier, "_in_quantization_order", lambda _, batch, alive: alive
        )
        with pytest.raises(RuntimeError, match="pruned weights of .* came back"):
            run(model, [quantizer(actorder="static")], random_samples())


def test_one_recipe_from_scores_to_a_packed_checkpoint(
    make_model: MakeModel, tmp_path: Path
) -> None:
    text = yaml.safe_dump(
        {
            "prune_stage": {
                "pruning_modifiers": {
                    "DLPModifier": {},
                    "WandaPruningModifier": {
                        "sparsity": 0.6,
                        "targets": ["Linear"],
                        "ignore": ["re:.*lm_head"],
                    },
                },
                "quantization_modifiers": {
                    "MaskedGPTQModifier": {
                        "ignore": ["re:.*lm_head"],
                        "config_groups": {
                            "group_0": {
                                "targets": ["Linear"],
                                "weights": {"num_bits": 4, "strategy": "group", "group_size": 32},
                            }
                        },
                    }
                },
            }
        }
    )
    pruned = make_model(torch.bfloat16)
    run(
        pruned,
        [DLPModifier(), WandaPruningModifier(sparsity=0.6, targets=["Linear"])],
        random_samples(),
    )
    masks = masks_of(pruned)
    run(make_model(torch.bfloat16), text, random_samples(), output_dir=str(tmp_path))
    assert "model.layers.0.mlp.up_proj.weight_packed" in load_file(tmp_path / "model.safetensors")
    found = inspect_checkpoint(tmp_path)
    for name, mask in masks.items():
        assert found.linears[name].zeros >= int(mask.sum()), name
