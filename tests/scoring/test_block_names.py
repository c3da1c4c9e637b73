"""A checkpoint tells its blocks by their names alone: they are those that the model has."""

from pathlib import Path

import pytest
from families import FAMILIES, make

from dlp_plugin import host
from dlp_plugin.checkpoints.inspect import inspect_checkpoint


@pytest.mark.parametrize("name", sorted(FAMILIES.keys() - {"albert"}))  # see below
def test_blocks_of_a_checkpoint_are_those_of_the_model(name: str, tmp_path: Path) -> None:
    """Up to what stands before ``layers.3``, which transformers renames on loading."""
    family = FAMILIES[name]
    model = make(family.config(), tmp_path, family.kind)
    model.save_pretrained(tmp_path)
    names = host.block_names(model, family.sequential_targets)
    numbered = [block for block in names if block.split(".")[-1].isdigit()]  # no embeddings
    found = sorted(map(ending, inspect_checkpoint(tmp_path).blocks))
    if not name.startswith("qwen2_5_vl"):  # whose vision tower is not calibrated
        assert found == sorted(map(ending, numbered))
    assert {ending(block) for block in numbered} <= set(found)


def test_albert_has_several_blocks_in_a_numbered_group(tmp_path: Path) -> None:
    family = FAMILIES["albert"]
    model = make(family.config(), tmp_path, family.kind)
    model.save_pretrained(tmp_path)
    (group,) = inspect_checkpoint(tmp_path).blocks
    names = host.block_names(model, family.sequential_targets)
    assert all(block.startswith(f"{group}.") for block in names)


def ending(block: str) -> str:
    return ".".join(block.split(".")[-2:])
