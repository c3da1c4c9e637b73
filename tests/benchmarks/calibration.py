"""How much text to calibrate on, and how far its choice moves a figure: python
tests/benchmarks/calibration.py MODEL --data FILE --test FILE --folder FOLDER [--only PART]

- ``tokens``: numbers and lengths of samples, for every pruner;
- ``seeds``: other samples of the same text, for the methods that are compared.

All at 60 %. Every comparison is ``dlp-plugin compare``'s, in a folder of its own, and goes on
where it stopped.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from record import RESULTS, add, here

TARGET = "0.6"
PRUNERS = ("wanda", "sparsegpt", "admm", "admm-reconstructed")
# Samples and their length, to what is pruned by them
TOKENS = {
    (32, 512): ("wanda", "admm", "admm-reconstructed"),
    (64, 512): PRUNERS,
    (128, 512): ("wanda", "admm"),
    (512, 512): ("wanda",),
    (128, 256): ("wanda", "admm"),
}
SEEDS = {
    "wanda": "uniform,dlp:0.15",
    "sparsegpt": "uniform,dlp:0.15",
    "admm": "uniform,dlp-refined",
}
Found = dict[str, Any]


def compared(given: argparse.Namespace, name: str, pruner: str, options: list[str]) -> Found:
    """What ``compare`` finds in a folder of that name: method -> perplexity, and that of dense."""
    folder = given.folder / name
    command = [sys.executable, "-m", "dlp_plugin", "compare", given.model]
    command += ["--data", given.data, "--test", given.test, "--output", str(folder)]
    command += ["--test-length", "2048", "--windows", "16", "--sparsities", TARGET]
    command += ["--pruners", pruner, *options]
    subprocess.run(command, check=True)
    found = json.loads((folder / "results.json").read_text())
    wanted = (pruner, TARGET, 16)
    cells = [c for c in found["cells"] if (c["pruner"], c["target"], c["bits"]) == wanted]
    return {cell["method"]: cell["perplexity"] for cell in cells} | {"dense": found["dense"]}


def tokens(given: argparse.Namespace) -> Found:
    """Samples x length -> pruner -> method -> perplexity."""
    return {
        f"{samples} x {length}": {
            pruner: compared(
                given,
                f"{samples}x{length}-{pruner}",
                pruner,
                ["--samples", str(samples), "--length", str(length), "--methods", "uniform"],
            )
            for pruner in pruners
        }
        for (samples, length), pruners in TOKENS.items()
    }


def seeds(given: argparse.Namespace) -> Found:
    """Seed -> pruner -> method -> perplexity, on 64 samples of 512 tokens."""
    return {
        seed or "evenly spread": {
            pruner: compared(
                given,
                f"seed{seed}-{pruner}",
                pruner,
                ["--samples", "64", "--length", "512", "--methods", methods]
                + (["--seed", seed] if seed else []),
            )
            for pruner, methods in SEEDS.items()
        }
        for seed in ("", "1", "2")
    }


PARTS = {"tokens": tokens, "seeds": seeds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a hub id or a folder")
    for text in ("data", "test"):
        parser.add_argument(f"--{text}", required=True, help="a text file")
    parser.add_argument("--folder", type=Path, required=True, help="of the comparisons")
    parser.add_argument("--json", type=Path, default=RESULTS / "calibration.json")
    parser.add_argument("--only", choices=PARTS, help="one part")
    given = parser.parse_args()
    names = " ".join(Path(each).name for each in (given.data, "--test", given.test))
    for part in [given.only] if given.only else PARTS:
        command = f"python tests/benchmarks/calibration.py {Path(given.model).name} --data {names}"
        facts = here(f"{command} --folder calibration --only {part}", threads=1)
        add(given.json, {f"calibration: {part}": {**facts, "results": PARTS[part](given)}})


if __name__ == "__main__":
    main()
