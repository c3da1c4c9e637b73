"""Which weights of a Linear go, against ranking all of them by sorting."""

import pytest
import torch
from helpers import random_weight

from dlp_plugin.planning.structure import UNSTRUCTURED, MaskStructure
from dlp_plugin.search import masks as module
from dlp_plugin.search.masks import Masks

ROWS, COLUMNS = 24, 40


def made(dtype: torch.dtype, by_magnitude: bool) -> tuple[Masks, torch.Tensor, torch.Tensor]:
    """Masks of a Linear ``l``, its weight, and what is ranked by."""
    linear = torch.nn.Linear(COLUMNS, ROWS, bias=False, dtype=dtype)
    linear.weight.data = weight = random_weight(ROWS, COLUMNS, dtype)
    norms = torch.rand(COLUMNS, generator=torch.Generator().manual_seed(1)) + 0.1
    scores = weight.abs().float() * (1 if by_magnitude else norms)
    return Masks({"l": linear}, {"l": norms}, ["l"] if by_magnitude else []), weight, scores


@pytest.fixture(params=[1 << 16, 3 * COLUMNS], ids=["at once", "in portions"])
def portions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CACHED", request.param)


@pytest.mark.usefixtures("portions")
@pytest.mark.parametrize("by_magnitude", [False, True])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.7, 1.0])
def test_as_many_go_as_the_smallest_are(
    sparsity: float, threads: int, by_magnitude: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit what sorting gives, in any dtype of the product, on any number of threads."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for dtype in (torch.float32, torch.bfloat16):
        masks, weight, scores = made(dtype, by_magnitude)
        count = masks.count("l", sparsity, UNSTRUCTURED)
        together = scores.view(1, -1) if by_magnitude else scores
        kept = torch.ones_like(together, dtype=torch.bool)
        if count:
            kept = together > together.sort(dim=1).values[:, count - 1 : count]
        expected = weight * kept.view(weight.shape)
        for wide in (dtype, torch.float32):
            found = masks.masked("l", count, UNSTRUCTURED, weight, wide)
            assert found.dtype == wide
            assert torch.equal(found, expected.to(wide))


@pytest.mark.usefixtures("portions")
@pytest.mark.parametrize("number", [0, 3, 8])
def test_of_groups_so_many_go(number: int) -> None:
    masks, weight, scores = made(torch.bfloat16, by_magnitude=False)
    structure = MaskStructure(4, 8)
    places = scores.unflatten(1, (-1, 8)).argsort(dim=2, stable=True).argsort(dim=2)
    found = masks.masked("l", number, structure, weight, torch.bfloat16)
    assert torch.equal(found, weight * (places >= number).view(weight.shape))


@pytest.mark.parametrize("by_magnitude", [False, True])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("sparsity", [0.0, 0.05, 0.7, 0.98, 1.0])
def test_near_are_those_on_either_side_of_the_threshold(
    sparsity: float, threads: int, by_magnitude: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 40 columns 10 % on either side; at an end what there is of them."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    masks, weight, scores = made(torch.float32, by_magnitude)
    count = masks.count("l", sparsity, UNSTRUCTURED)
    rows = slice(None, None, 2)
    together = scores[rows].reshape(1, -1) if by_magnitude else scores[rows]
    of_these = count * together.numel() // weight.numel() if by_magnitude else count
    width = together.shape[1] // 10
    ranks = together.argsort(dim=1, stable=True).argsort(dim=1)
    expected = (ranks >= of_these - width) & (ranks < of_these + width)
    found = masks.near("l", count, UNSTRUCTURED, rows, weight[rows], 0.1)
    assert torch.equal(found, expected.view(weight[rows].shape))
