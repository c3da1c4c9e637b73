"""``dlp-plugin pack`` and ``unpack``, as a user types them."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import CALIBRATION_TEXT, ROOT, SHIPPED, TEST_TEXT, command
from packed_checkpoints import assert_same_bits, prune_rows, tensors_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from dlp_plugin.checkpoints.inspect import zstd_bytes


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped model at 70 %."""
    folder = tmp_path_factory.mktemp("packing") / "pruned"
    model = AutoModelForCausalLM.from_pretrained(SHIPPED, dtype=torch.bfloat16)
    prune_rows(model).save_pretrained(folder)
    AutoTokenizer.from_pretrained(SHIPPED).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def packed(pruned: Path) -> tuple[Path, str]:
    folder = pruned.with_name("packed")
    return folder, " ".join(command("pack", pruned, folder).output.split())


def megabytes(size: int) -> str:
    return rf"{size / 1e6:.2f} MB"


def test_pack_tells_sizes(pruned: Path, packed: tuple[Path, str]) -> None:
    folder, output = packed
    before, after = ((f / "model.safetensors").stat().st_size for f in (pruned, folder))
    sizes = " │ ".join(megabytes(size) for size in (before, zstd_bytes(pruned), after))
    assert f"files │ {sizes}" in output
    (bits,) = re.findall(r"bits per weight of packed Linears │ 16\.00 │ │ (\d\.\d\d)", output)
    assert float(bits) < 0.29 * 16
    assert "84 Linears of blocks packed, 0 left dense" in output


def test_a_recipe_whose_result_is_packed_at_once(tmp_path: Path) -> None:
    recipe = ["--recipe", ROOT / "recipes" / "dlp_magnitude.yaml", "--data", CALIBRATION_TEXT]
    arguments = [*recipe, "--samples", "4", "--length", "32"]
    command("oneshot", SHIPPED, *arguments, "--output", tmp_path / "plain")
    output = command(
        "oneshot", SHIPPED, *arguments, "--output", tmp_path / "small", "--pack"
    ).output
    assert "dlp-sparse" in output
    command("unpack", tmp_path / "small", tmp_path / "again")
    assert_same_bits(tensors_of(tmp_path / "again"), tensors_of(tmp_path / "plain"))


def test_what_cannot_be_packed_is_saved_as_it_is(tmp_path: Path) -> None:
    """Nothing of a model that is pruned to 1 % shrinks; the work is not thrown away."""
    recipe = tmp_path / "recipe.yaml"
    text = (ROOT / "recipes" / "dlp_magnitude.yaml").read_text()
    recipe.write_text(text.replace("sparsity: 0.7", "sparsity: 0.01"))
    data = ["--data", CALIBRATION_TEXT, "--samples", "4", "--length", "32"]
    arguments = [SHIPPED, "--recipe", recipe, *data, "--output", tmp_path / "out", "--pack"]
    result = command("oneshot", *arguments)
    assert "out is saved without packing:" in result.output
    assert "Zeros in" in result.output
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
    assert {path.name for path in tmp_path.iterdir()} == {"recipe.yaml", "out"}


def test_a_run_that_is_killed_while_it_packs_leaves_nothing_that_the_next_does_not_clear(
    tmp_path: Path,
) -> None:
    recipe = ["--recipe", ROOT / "recipes" / "dlp_magnitude.yaml", "--data", CALIBRATION_TEXT]
    arguments = ["oneshot", SHIPPED, *recipe, "--samples", "4", "--length", "32", "--pack"]
    arguments = [*map(str, arguments), "--output", str(tmp_path / "small")]
    die = (
        "import os, signal, sys, dlp_plugin.checkpoints.packing as packing;"
        "packing.pack = lambda *_: os.kill(os.getpid(), signal.SIGKILL);"
        "from dlp_plugin.cli import app; app(sys.argv[1:])"
    )
    killed = subprocess.run([sys.executable, "-c", die, *arguments], capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    (left,) = (path for path in tmp_path.iterdir() if path.is_dir())
    assert (left / "saved" / "model.safetensors").is_file()
    command(*arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["small"]
    assert not any(path.is_dir() for path in (tmp_path / "small").iterdir())


def test_inspect_reads_it(pruned: Path, packed: tuple[Path, str]) -> None:
    output = " ".join(command("inspect", packed[0], "--against", pruned).output.split())
    size = (packed[0] / "model.safetensors").stat().st_size
    assert re.search(rf"dlp-sparse; {megabytes(size)} on disk", output)
    assert "lost: 0" in output
    (total,) = re.findall(r"all blocks.*?(0\.\d{4})", output)
    assert total in command("inspect", pruned).output


def test_ppl_reads_it(pruned: Path, packed: tuple[Path, str], tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEST_TEXT.read_text()[:20_000])
    figures = [
        re.search(
            r"perplexity\D*([\d.]+)",
            command("ppl", folder, "--data", text, "--length", "64").output,
        )
        for folder in (pruned, packed[0])
    ]
    dense, sparse = (float(figure[1]) for figure in figures)
    assert sparse == pytest.approx(dense, rel=1e-3)  # another order of sums, rounded to bfloat16


def test_unpack_gives_it_back(pruned: Path, packed: tuple[Path, str], tmp_path: Path) -> None:
    assert "written:" in command("unpack", packed[0], tmp_path / "unpacked").output
    assert_same_bits(tensors_of(tmp_path / "unpacked"), tensors_of(pruned))


def test_mistakes(pruned: Path, packed: tuple[Path, str], tmp_path: Path) -> None:
    output = command("pack", packed[0], tmp_path / "again", code=1).output
    assert "packed is packed already" in " ".join(output.split())
    output = command("unpack", pruned, tmp_path / "again", code=1).output
    assert "pruned is not packed; give a folder that" in " ".join(output.split())
    output = command("pack", pruned, packed[0], code=1).output
    assert "exists and is not an empty folder" in " ".join(output.split())
    assert not list(tmp_path.iterdir())
