"""Blocks and the Linears in them."""

import torch
from torch.nn import Linear, Module, ModuleList

from dlp_plugin.scoring.blocks import Block, find_blocks, group_by_block, outer_block


class Inner(Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = Linear(4, 8)


class Layer(Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = Linear(4, 4)
        self.inner = Inner()


class Model(Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = ModuleList(Layer() for _ in range(11))
        self.head = Linear(4, 16)


def test_blocks_are_found_in_the_models_order() -> None:
    assert find_blocks(Model(), ["Layer"]) == [f"layers.{i}" for i in range(11)]
    assert find_blocks(Model(), r"re:layers\.[24]$") == ["layers.2", "layers.4"]


def test_where_targets_nest_the_outermost_is_the_block() -> None:
    assert find_blocks(Model(), ["Inner", "Layer"]) == [f"layers.{i}" for i in range(11)]


def test_a_name_is_a_path_and_not_a_prefix() -> None:
    assert outer_block("layers.10.q", ["layers.1"]) is None
    assert outer_block("layers.1.q", ["layers.1"]) == "layers.1"
    assert outer_block("layers.1", ["layers.1"]) == "layers.1"


def test_linears_are_grouped_and_strays_are_named() -> None:
    model = Model()
    linears = {n: m for n, m in model.named_modules() if isinstance(m, Linear)}
    blocks, outside = group_by_block(linears, ["layers.0", "layers.10", "layers.12"])
    assert [block.name for block in blocks] == ["layers.0", "layers.10"]
    assert list(blocks[1].linears) == ["layers.10.q", "layers.10.inner.up"]
    assert blocks[1].weights == 4 * 4 + 4 * 8
    assert blocks[1].without({"layers.10.q"}).weights == 4 * 8
    assert "head" in outside
    assert "layers.1.q" in outside


def test_a_block_holds_no_copy_of_the_weights() -> None:
    linear = Linear(2, 2)
    block = Block("b", {"l": linear})
    assert block.linears["l"].weight is linear.weight
    assert isinstance(linear.weight, torch.nn.Parameter)
