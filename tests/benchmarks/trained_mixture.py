"""A trained mixture of experts: plans for each expert, and whole experts removed.

    python tests/benchmarks/trained_mixture.py MODEL --data FILE --test FILE --folder FOLDER

MODEL is a mixture that ``examples/train_small_model.py --experts 8`` trained. REAP, a modifier of
llm-compressor, removes 25 and 50 % of the experts. What remains is measured as it is, and pruned to
50 %. Beside it stand plans that give each expert its own sparsity. Every comparison is one of
``dlp-plugin compare``, in its own folder, and an interrupted one continues.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from record import RESULTS, add, here, slimmed

SAMPLES, LENGTH = "64", "256"
REMOVED = "0.25", "0.5"
METHODS = "uniform,dlp:0.15,dlp-refined"
REFINED = "uniform,dlp-refined"
# Methods, sparsities, pruners
WHOLE = (
    (METHODS, "0.5,0.6,0.7", "wanda,sparsegpt,admm"),
    (REFINED, "0.3,0.4,0.75,0.8", "admm"),  # files about as large as REAP's
    (REFINED, "0.5,0.6,0.7", "admm-reconstructed"),
)
FURTHER = ((REFINED, "0.5", "admm"),)
RECIPE = "pruning_stage:\n  pruning_modifiers:\n    REAPPruningModifier: {{sparsity: {}}}\n"


def terminal(*words: object) -> None:
    subprocess.run([sys.executable, "-m", "dlp_plugin", *map(str, words)], check=True)


def compared(
    model: Path, given: argparse.Namespace, name: str, grids: Sequence[tuple[str, str, str]]
) -> dict[str, Any]:
    """What ``dlp-plugin compare`` finds of a model, over several grids in one folder."""
    folder = given.folder / name
    words = ["--data", given.data, "--test", given.test, "--output", folder, "--sizes"]
    words += ["--samples", SAMPLES, "--length", LENGTH, "--test-length", LENGTH]
    for methods, sparsities, pruners in grids:
        grid = ["--methods", methods, "--sparsities", sparsities, "--pruners", pruners]
        terminal("compare", model, *words, *grid)
    return json.loads((folder / "results.json").read_text())


def without_experts(given: argparse.Namespace, share: str) -> Path:
    """The model without that share of its experts, made unless its folder is there."""
    folder = given.folder / f"reap-{share}"
    if not folder.exists():
        recipe = given.folder / f"reap-{share}.yaml"
        recipe.write_text(RECIPE.format(share))
        words = ["--recipe", recipe, "--data", given.data, "--output", folder]
        terminal("oneshot", given.model, *words, "--samples", SAMPLES, "--length", LENGTH)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="a folder")
    for text in ("data", "test"):
        parser.add_argument(f"--{text}", required=True, help="a text file")
    parser.add_argument("--folder", type=Path, required=True, help="of the comparisons")
    parser.add_argument("--json", type=Path, default=RESULTS / "trained_mixture.json")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for share in REMOVED:
        smaller = without_experts(given, share)
        found[f"reap {share}"] = compared(smaller, given, f"after-reap-{share}", FURTHER)
    found["whole"] = compared(given.model, given, "whole", WHOLE)
    results = {name: slimmed(one) for name, one in found.items()}
    texts = " ".join(Path(each).name for each in (given.data, "--test", given.test))
    command = f"python tests/benchmarks/trained_mixture.py {given.model.name} --data {texts}"
    facts = here(f"{command} --folder mixtures", threads=1)
    add(given.json, {"trained mixture": {**facts, "results": results}})


if __name__ == "__main__":
    main()
