"""What config.json says of packed Linears: read back as it was, or told what is wrong."""

from __future__ import annotations

import pytest
import torch

from dlp_plugin.checkpoints.stored import QUANT_METHOD, VERSION, Stored, read_stored

PLANES = {
    "kind": "planes",
    "shape": [4, 6],
    "dtype": "bfloat16",
    "kept": 7,
    "exponents": 3,
}
INTEGERS = {
    "kind": "integers",
    "shape": [4, 6],
    "dtype": "float16",
    "kept": 7,
    "bits": 4,
    "group_size": 3,
    "symmetric": False,
    "masked": True,
}


def test_what_is_said() -> None:
    config = {
        "quant_method": QUANT_METHOD,
        "version": VERSION,
        "linears": {"a": PLANES, "b": INTEGERS},
        "source": None,
    }
    found = read_stored(config, "config.json")
    assert found["a"] == Stored("planes", (4, 6), torch.bfloat16, 7, exponents=3)
    assert found["b"] == Stored("integers", (4, 6), torch.float16, 7, 4, 3, False)
    assert {name: one.to_config() for name, one in found.items()} == config["linears"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_method": "gptq"}, r"^folder is not packed: its quant_method is gptq, not dlp"),
        (
            {"version": 3},
            r"^folder has version 3 of dlp-sparse, but this .*update dlp_plugin",
        ),
        ({"version": "1"}, r"^folder has a damaged quantization_config \(version 1\)"),
        ({"version": 0}, r"^folder has a damaged quantization_config \(version 0\)"),
        ({"linears": []}, r"^folder has a damaged quantization_config"),
        ({"linears": {"a": 3}}, r"^a of folder has a damaged entry .*TypeError"),
    ],
)
def test_the_whole(change: dict, message: str) -> None:
    config = {"quant_method": QUANT_METHOD, "version": VERSION, "linears": {}}
    assert read_stored(config, "folder") == {}
    with pytest.raises(ValueError, match=message):
        read_stored(config | change, "folder")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "other"}, "KeyError: 'other'"),
        ({"dtype": "int8"}, "KeyError: 'int8'"),
        ({"shape": [4]}, "ValueError: not enough"),
        ({"shape": None}, "TypeError"),
        ({"shape": [4, -6]}, "invalid entry"),
        ({"shape": [4.0, 6]}, "invalid entry"),
        ({"kept": 25}, "invalid entry"),
        ({"kept": -1}, "invalid entry"),
        ({"kept": True}, "invalid entry"),
        ({"exponents": 17}, "invalid entry"),
        ({"dtype": "float16"}, "invalid entry"),
    ],
)
def test_an_entry_of_planes(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=rf"^up of x has an? .*{message}.*pack the checkpoint"):
        Stored.from_config("up of x", PLANES | change)


@pytest.mark.parametrize(
    "change",
    [
        {"bits": 3},
        {"group_size": 4},
        {"group_size": 0},
        {"group_size": -2},
        {"masked": False},  # then all 24 are kept
        {"masked": 1},
        {"symmetric": None},
    ],
)
def test_an_entry_of_integers(change: dict) -> None:
    with pytest.raises(ValueError, match=r"^up has an invalid entry"):
        Stored.from_config("up", INTEGERS | change)
    incomplete = {key: INTEGERS[key] for key in INTEGERS if key not in change}
    with pytest.raises(ValueError, match=r"^up has a damaged entry .*KeyError"):
        Stored.from_config("up", incomplete)
