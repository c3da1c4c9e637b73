"""What a GPU computes is what a CPU does; where there is none, nothing is tested here."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from compressed_tensors.offload.cache import CPUCache
from datasets import Dataset
from helpers import (
    SHIPPED,
    TEST_TEXT,
    MakeModel,
    assert_same,
    prune,
    random_weight,
    recipe,
    run,
    weights_of,
)
from sparse_models import REMEDY, dense, load, packed_llama
from transformers import AutoModelForCausalLM, AutoTokenizer

from dlp_plugin import last_plans
from dlp_plugin.checkpoints import placing
from dlp_plugin.checkpoints.loading import load_model
from dlp_plugin.checkpoints.placing import let_go, placed
from dlp_plugin.evaluation.perplexity import perplexity
from dlp_plugin.evaluation.text import read_tokens, token_windows
from dlp_plugin.planning.structure import UNSTRUCTURED
from dlp_plugin.pruning.least_squares import LeastSquares
from dlp_plugin.pruning.smallest import smallest
from dlp_plugin.scoring.norms import channel_squares

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@pytest.fixture(scope="module")
def windows() -> list[torch.Tensor]:
    tokens = read_tokens(TEST_TEXT, AutoTokenizer.from_pretrained(SHIPPED))
    return token_windows(tokens, 256)[:24]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_smallest_are_the_same(dtype: torch.dtype) -> None:
    weight = random_weight(512, 1024, dtype)
    weight[:100] = weight[100:200]  # equal ones
    for count in (1, 1000, 300_001, weight.numel()):
        assert torch.equal(smallest(weight.cuda(), count).cpu(), smallest(weight, count))
    weight[3, 5] = torch.nan
    with pytest.raises(ValueError, match="the matrix holds infinite"):
        smallest(weight.cuda(), 10)


def test_norms_are_the_same() -> None:
    inputs = torch.randn(3, 333, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    torch.testing.assert_close(channel_squares(inputs.cuda()).cpu(), channel_squares(inputs))


def test_admm_finds_the_same_weights() -> None:
    inputs = torch.randn(2048, 512, generator=torch.Generator().manual_seed(0))
    inputs += inputs.roll(1, 1)
    gram, dense = inputs.T @ inputs, random_weight(256, 512, torch.float32)
    found, expected = (
        LeastSquares(gram.to(device), 0.01).pruned(dense.to(device), 0.6, UNSTRUCTURED).cpu()
        for device in ("cuda", "cpu")
    )
    assert ((found == 0) != (expected == 0)).float().mean() < 1e-3
    assert (found == 0).sum() == (expected == 0).sum()


@pytest.mark.parametrize(
    "stages",
    [
        recipe({"alpha": "auto"}),
        recipe({"refine": 8}),
        recipe({"refine": 2, "search": "evolution"}),
        recipe({"refine": 8}, "SparseGPTModifier", polish=True),
        recipe({}, "SparseGPTModifier", offload_hessians=True),
        recipe({}, "ADMMPruningModifier", reconstruct=2),
        recipe({}, "WandaPruningModifier", distill=2),
        recipe({}, "OneShotMagnitudeModifier"),
        "recipes/dlp_wanda_w4a16.yaml",
    ],
    ids=[
        "auto",
        "refined",
        "evolved",
        "polished",
        "offloaded",
        "ADMM",
        "distilled",
        "magnitude",
        "4 bits",
    ],
)
def test_recipes_do_on_a_gpu_what_they_do_on_a_cpu(
    stages: object,
    calibration: Dataset,
    windows: list[torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values, plans = [], []
    for visible in (True, False):
        if not visible:
            monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
        model = AutoModelForCausalLM.from_pretrained(SHIPPED, dtype="auto")
        tokenizer = AutoTokenizer.from_pretrained(SHIPPED)
        pruned = run(model, stages, calibration, tokenizer=tokenizer)
        values.append(perplexity(pruned.float(), windows[:8]))
        plans.append(last_plans()[0])
    gpu, cpu = plans
    assert values[0] == pytest.approx(values[1], rel=0.04)
    apart = [abs(a.sparsity - b.sparsity) for a, b in zip(gpu.blocks, cpu.blocks, strict=True)]
    assert max(apart) < 0.05  # a search may turn another way at a small difference


@pytest.mark.parametrize("length", [64, 600])
def test_a_plan_refined_twice_is_the_same(make_model: MakeModel, length: int) -> None:
    found = []
    for _ in range(2):
        model = make_model(torch.bfloat16, attn_implementation="sdpa")
        ids = torch.randint(1, 255, (8, length), generator=torch.Generator().manual_seed(0))
        data = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": [[1] * length] * 8})
        found.append(weights_of(run(model, recipe({"refine": 6}), data)))
    assert_same(*found)


def test_packed_models_are_dense_there(tmp_path: Path) -> None:
    packed = packed_llama(tmp_path)
    expected = dense(packed).cuda()
    for model in (load(packed, device_map="cuda"), load(packed, device_map="auto")):
        assert {each.device.type for each in model.parameters()} == {"cuda"}
        assert_same(model.state_dict(), expected.state_dict())
    assert_same(load_model(packed).state_dict(), expected.state_dict())
    with pytest.raises(ValueError, match=rf"cannot move to cuda:0, where .*again.*, {REMEDY}"):
        load(packed).cuda()


def test_weights_stay_on_the_gpu_while_a_plan_is_made(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[torch.Tensor] = []
    onload = CPUCache.onload

    def counted(self: CPUCache, offloaded: torch.Tensor) -> torch.Tensor:
        fetched.append(offloaded)
        return onload(self, offloaded)

    counts = []
    for steps in (2, 12):
        fetched.clear()
        with monkeypatch.context() as patched:
            patched.setattr(CPUCache, "onload", counted)
            prune(make_model(), recipe({"refine": steps}))
        counts.append(len(fetched))
    assert counts[0] == counts[1]


def test_a_model_that_has_no_room_is_spread(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over the GPU and the CPU's memory, and predicts what it does on the GPU."""
    windows = list(torch.arange(96).view(3, 32))
    expected = perplexity(placed(make_model()), windows)
    monkeypatch.setattr(placing, "get_max_memory", lambda: {0: 300_000, "cpu": 1 << 30})
    model = placed(make_model())
    assert {weight.device.type for weight in model.parameters()} == {"cuda", "meta"}
    assert perplexity(model, windows) == pytest.approx(expected, rel=1e-5)
    let_go(model)
    assert {weight.device.type for weight in model.parameters()} == {"meta"}
