"""The main command on a fresh copy of this tree, timed: python tests/benchmarks/main_command.py

Runs the README's job twice, installing included: as it is, and with the processor's instructions
held to AVX2, where models compute in float32. What it prints becomes the part ``main``.
"""

import argparse
import os
import re
import subprocess
import time
from pathlib import Path
from shutil import copytree, ignore_patterns, rmtree
from tempfile import TemporaryDirectory

from record import ROOT, add, here

README = (ROOT / "README.md").read_text()
IMITATED = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
# What the example prints -> what the README says
ROWS = {
    "dense": "dense",
    "uniform": "uniform",
    "DLP, alpha 0.15": "DLP, alpha 0.15 (the paper's)",
    "DLP, alpha auto, refined": "DLP, alpha auto, refined",
    "the same, loaded": "the same, saved and loaded with plain transformers",
    "the same + W4A16, loaded": "the same + W4A16 that keeps zeros, saved and loaded",
    "the best, loaded": "refined, ADMM, reconstructed, distilled, W4A16, loaded",
}
SIZES = {"refined": "pruned, in bf16", "refined + W4A16": "at 4 bits"}


def job() -> str:
    return re.search(r"```bash\n(python3 .*?)\n```", README).group(1)


def run(tree: Path, **environment: str) -> tuple[str, float]:
    """What the job prints in a tree, and its seconds."""
    for folder in (".venv", "pruned_model"):
        rmtree(tree / folder, ignore_errors=True)
    started = time.time()
    done = subprocess.run(
        ["bash", "-c", job()],
        cwd=tree,
        env={**os.environ, "COLUMNS": "120", **environment},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return done.stdout, time.time() - started


def cells(output: str, columns: int) -> dict[str, list[str]]:
    """Rows of the tables with so many columns, by their first cell."""
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in output.splitlines()]
    return {row[0]: row[1:] for row in rows if len(row) == columns}


def results(native: str, imitated: str, seconds: dict[str, float]) -> dict:
    """The part's figures, from what both runs printed."""
    found, wide, sizes = cells(native, 5), cells(imitated, 5), cells(native, 4)
    return {
        "rows": [
            {
                "name": name,
                "zeros": float(found[printed][0]),
                "perplexity": float(found[printed][1]),
                "float32": float(wide[printed][1]),
            }
            for printed, name in ROWS.items()
        ],
        "megabytes": {
            name: dict(zip(("written", "zstd", "packed"), map(float, sizes[row]), strict=True))
            for row, name in SIZES.items()
        },
        "came back": int(re.search(r"came back with 4 bits: (\d+)", native).group(1)),
        "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="file in results/ to add to")
    arguments = parser.parse_args()
    facts = here(job())
    with TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        copytree(ROOT, tree, ignore=ignore_patterns(".*", "*.egg-info", "pruned_model"))
        native, seconds = run(tree)
        imitated, with_avx2 = run(tree, **IMITATED)
    sets = ", ".join(facts["instruction_sets"])
    kind = f"{facts['cores']} cores of {facts['processor']} ({sets})"
    times = {kind: round(seconds), "the same with AVX2 imitated": round(with_avx2)}
    found = results(native, imitated, times)
    print(native, found, sep="\n")
    if arguments.json:
        add(arguments.json, {"main": {**facts, "results": found}})


if __name__ == "__main__":
    main()
