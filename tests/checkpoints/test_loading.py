"""Models from disk: all of it, or an error in one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import MakeModel, word_tokenizer
from safetensors.torch import load_file, save_file

from dlp_plugin.checkpoints.loading import load_model, load_tokenizer


@pytest.fixture
def folder(make_model: MakeModel, tmp_path: Path) -> Path:
    make_model().save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def renamed(folder: Path, old: str, new: str | None) -> None:
    weights = load_file(folder / "model.safetensors")
    value = weights.pop(old)
    if new is not None:
        weights[new] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_model_that_lacks_a_weight(folder: Path) -> None:
    renamed(folder, "model.layers.1.mlp.up_proj.weight", None)
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj\.weight is missing"):
        load_model(folder)


def test_a_model_with_a_weight_that_it_does_not_know(folder: Path, make_model: MakeModel) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.experts.0.up_proj.weight"] = weights["model.norm.weight"].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"experts\.0\.up_proj\.weight is unexpected"):
        load_model(folder)


def test_a_file_that_was_not_written_to_its_end(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"safetensors is damaged or incomplete"):
        load_model(folder)


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_a_path_that_does_not_exist_is_not_asked_for_on_the_hub(
    load: Callable, tmp_path: Path
) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere does not exist: give the folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"\./nowhere does not exist"):
        load("./nowhere")


def test_a_file_in_place_of_a_folder(folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json is a file, not a folder"):
        load_model(folder / "config.json")


def test_a_name_that_the_hub_does_not_give(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_name: str, **_arguments: object) -> None:
        raise OSError("404 not found\nA page of advice")

    monkeypatch.setattr("dlp_plugin.checkpoints.sources.AutoTokenizer.from_pretrained", refuse)
    message = (
        r"no/model is not a local folder, and the hub does not provide it \(404 not found\): check"
    )
    with pytest.raises(OSError, match=message) as told:
        load_tokenizer("no/model")
    assert "\n" not in str(told.value)


def test_a_configuration_that_is_garbage(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    with pytest.raises(
        ValueError, match=r"holds no model that can be loaded \(.*JSON.*again"
    ) as told:
        load_model(folder)
    assert "\n" not in str(told.value)


def test_a_folder_without_a_tokenizer(folder: Path) -> None:
    for file in folder.glob("token*"):
        file.unlink()
    message = r"model holds no tokenizer that can be loaded \(.*\): copy the tokenizer's files"
    with pytest.raises(ValueError, match=message) as told:
        load_tokenizer(folder)
    assert "\n" not in str(told.value)
