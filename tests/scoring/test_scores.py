"""Block scores: streamed norms, and a median that is exact to the bit."""

import math
import subprocess
import sys

import pytest
import torch
from helpers import DTYPES, Parts, random_parts
from hypothesis import given, settings
from hypothesis import strategies as st

from dlp_plugin.scoring import norms as channel_norms
from dlp_plugin.scoring import scores
from dlp_plugin.scoring.norms import ChannelNorms
from dlp_plugin.scoring.scores import block_score


def naive(parts: Parts) -> torch.Tensor:
    """Every score of the block at once, in float32."""
    return torch.cat([(w.abs().float() * n).flatten() for w, n in parts.values()])


@pytest.fixture(params=["looked through", "bracketed"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to the median, on inputs small enough to check."""
    if request.param == "bracketed":
        monkeypatch.setattr(scores, "WHOLE", 64)
        monkeypatch.setattr(scores, "SAMPLE", 64)
        monkeypatch.setattr(scores, "MARGIN", 6)
        monkeypatch.setattr(scores, "CHUNK", 256)
    return request.param


def test_worked_example() -> None:
    # scores 1*2, 2*1, 3*2, 4*1 = 2, 2, 6, 4: sorted 2 2 4 6, lower middle 2, mean 3.5
    parts = {"l": (torch.tensor([[1.0, -2.0], [-3.0, 4.0]]), torch.tensor([2.0, 1.0]))}
    assert block_score(parts, "median") == 2
    assert block_score(parts, "mean") == 3.5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shapes", [[(33, 17)], [(64, 64), (7, 64), (64, 129)], [(1, 1001)]])
def test_median_equals_torch_to_the_bit(path: str, dtype: torch.dtype, shapes: list) -> None:
    parts = random_parts(shapes, dtype)
    assert block_score(parts) == naive(parts).median().item()


@pytest.mark.parametrize("dtype", DTYPES)
def test_mean_equals_the_mean_of_all_scores(dtype: torch.dtype) -> None:
    parts = random_parts([(64, 64), (7, 64), (300, 129)], dtype)
    expected = naive(parts).double().mean().item()
    assert block_score(parts, "mean") == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_median_of_a_large_block(seed: int) -> None:
    """By a bracket, in the sizes that are really used."""
    parts = random_parts([(1400, 1024), (1024, 1400)], torch.bfloat16, seed)
    assert sum(w.numel() for w, _ in parts.values()) > scores.WHOLE
    assert block_score(parts) == naive(parts).median().item()


finite = st.floats(-1e4, 1e4, width=32)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 24),
    columns=st.integers(1, 24),
    values=st.lists(st.one_of(st.just(0.0), finite, st.just(1e-42)), min_size=1, max_size=9),
    norms=st.lists(st.one_of(st.just(0.0), st.floats(0, 1e3, width=32)), min_size=1, max_size=5),
    dtype=st.sampled_from(DTYPES),
)
def test_median_with_ties_zeros_and_denormals(
    rows: int, columns: int, values: list[float], norms: list[float], dtype: torch.dtype
) -> None:
    """Few distinct values make most scores equal, which a bracket must survive."""
    repeat = torch.arange(rows * columns) * 7 % len(values)
    weight = torch.tensor(values)[repeat].reshape(rows, columns).to(dtype)
    channel = torch.tensor(norms)[torch.arange(columns) % len(norms)]
    parts = {"l": (weight, channel), "m": (weight.flip(0), channel)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scores, "WHOLE", 32)
        patch.setattr(scores, "SAMPLE", 32)
        patch.setattr(scores, "MARGIN", 3)
        patch.setattr(scores, "CHUNK", 64)
        assert block_score(parts) == naive(parts).median().item()


@pytest.mark.parametrize("zeros", [0.3, 0.5, 0.7, 1.0])
def test_median_of_pruned_weights(path: str, zeros: float) -> None:
    parts = random_parts([(64, 64), (64, 96)], torch.bfloat16)
    for weight, _ in parts.values():
        weight[torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < zeros] = 0
    assert block_score(parts) == naive(parts).median().item()


def test_a_transposed_weight_is_read_as_it_lies(path: str) -> None:
    parts = random_parts([(48, 80)], torch.float32)
    weight, _ = parts["linear0"]
    turned = {"linear0": (weight.T.contiguous().T, parts["linear0"][1])}
    assert block_score(turned) == block_score(parts)


def test_a_llama_2_7b_block_needs_less_than_100_mb() -> None:
    """In a process of its own, whose peak memory nothing else has raised."""
    code = r"""
import pathlib, re, torch
from dlp_plugin.scoring.scores import block_score
shapes = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]
parts = {f"l{i}": (torch.empty(s, dtype=torch.bfloat16).normal_(), torch.rand(s[1]))
         for i, s in enumerate(shapes)}
def peak():
    status = pathlib.Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status).group(1))
pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
before = peak()
block_score(parts)
print((peak() - before) / 1024)
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE)
    assert 0 < float(done.stdout.split()[-1]) < 100  # the host logs to the same stream


@pytest.mark.parametrize("statistic", ["median", "mean"])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_weight_that_is_not_finite_is_named(statistic: str, value: float) -> None:
    parts = random_parts([(8, 8), (8, 8)], torch.bfloat16)
    parts["linear1"][0][3, 4] = value
    with pytest.raises(ValueError, match="weight of linear1 holds infinite or undefined"):
        block_score(parts, statistic)


def test_a_quantized_weight_is_refused() -> None:
    parts = {"l": (torch.zeros(4, 4, dtype=torch.int8), torch.ones(4))}
    with pytest.raises(ValueError, match=r"weight of l is torch.int8.*dequantized"):
        block_score(parts)


def norm_of(norms: ChannelNorms, name: str = "l", width: int = 2) -> torch.Tensor | None:
    return norms.of({name: torch.nn.Linear(width, 1)})[name]


class TestChannelNorms:
    def test_norm_over_all_tokens_of_all_batches(self) -> None:
        norms = ChannelNorms()
        norms.add("l", torch.tensor([[[3.0, 0.0], [0.0, 0.0]]]))  # [1, 2 tokens, 2]
        norms.add("l", torch.tensor([[4.0, 2.0]]))  # [1 token, 2]
        assert norm_of(norms).tolist() == [5.0, 2.0]
        assert norm_of(norms, "other") is None
        norms.add("l", torch.tensor([[12.0, 0.0]]))  # a block that is applied twice
        assert norm_of(norms).tolist() == [13.0, 2.0]

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_equals_float64(self, dtype: torch.dtype) -> None:
        inputs = torch.randn(3, 501, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
        norms = ChannelNorms()
        norms.add("l", inputs)
        expected = inputs.double().flatten(0, 1).norm(dim=0)
        torch.testing.assert_close(norm_of(norms).double(), expected, rtol=2e-7, atol=0)

    def test_linears_that_share_an_input_share_the_work(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        calls = []
        once = channel_norms.channel_squares
        monkeypatch.setattr(channel_norms, "channel_squares", lambda x: calls.append(1) or once(x))
        norms, inputs = ChannelNorms(), torch.ones(2, 4)
        norms.add("q", inputs)
        norms.add("k", inputs)
        assert len(calls) == 1
        inputs *= 2  # the same tensor, but other numbers
        norms.add("gate", inputs)
        assert len(calls) == 2
        norms.add("q", inputs)
        assert norm_of(norms, "gate").tolist() == pytest.approx([math.sqrt(8)] * 4)
        assert norm_of(norms, "q").tolist() == pytest.approx([math.sqrt(10)] * 4)
        assert norm_of(norms, "k").tolist() == pytest.approx([math.sqrt(2)] * 4)

    def test_a_batch_without_tokens_is_not_seen(self) -> None:
        norms = ChannelNorms()
        norms.add("expert", torch.empty(0, 4))
        assert norm_of(norms, "expert") is None

    @pytest.mark.parametrize("value", [math.inf, math.nan])
    def test_an_activation_that_is_not_finite_is_named(self, value: float) -> None:
        norms = ChannelNorms()
        norms.add("model.layers.0.q_proj", torch.tensor([[1.0, value]]))
        with pytest.raises(ValueError, match=r"inputs of model.layers.0.q_proj hold infinite"):
            norm_of(norms, "model.layers.0.q_proj")
