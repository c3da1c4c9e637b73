"""Where a figure was measured, and the files that keep figures.

A file in ``results/`` holds parts, each with its figures and what they hold for; ``page.py``
makes README.md of them. What ``dlp-plugin compare`` wrote becomes a part by

    python tests/benchmarks/record.py methods FOLDER/results.json --commit COMMIT \
        --command 'dlp-plugin compare ...'

Several folders of one model and the same data become one comparison.
"""

import argparse
import datetime
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers", "llmcompressor", "compressed-tensors", "peft")
# Instructions that decide how fast a model's products are, as the page names them
INSTRUCTIONS = {"avx2": "AVX2", "avx512f": "AVX-512", "avx512_bf16": "bf16", "amx_bf16": "AMX"}


def here(command: str | None = None, threads: int | None = None) -> dict[str, Any]:
    """What a measurement that is made now holds for.

    :param command: by default that of this process
    """
    import torch

    device = {"device": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {
        "command": command or " ".join(["python", shlex.join(_without_json(sys.argv))]),
        "processor": processor(),
        "instruction_sets": instruction_sets(),
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": threads or torch.get_num_threads(),
        **device,
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
        "versions": versions(),
    }


def _without_json(arguments: list[str]) -> list[str]:
    """A command line without the file that the results go to, its paths from the root."""
    kept = [str(Path(arguments[0]).resolve().relative_to(ROOT)), *arguments[1:]]
    if "--json" in kept:
        place = kept.index("--json")
        kept[place : place + 2] = []
    return kept


def processor() -> str:
    """The processor's name, or its kind where Linux does not tell it."""
    return _cpuinfo("model name") or platform.machine()


def instruction_sets() -> list[str]:
    found = _cpuinfo("flags").split()
    return [name for flag, name in INSTRUCTIONS.items() if flag in found]


def _cpuinfo(field: str) -> str:
    """What Linux says of the first core."""
    file = Path("/proc/cpuinfo")
    found = re.search(rf"^{field}\s*: (.*)", file.read_text(), re.M) if file.exists() else None
    return found.group(1) if found else ""


def commit() -> str | None:
    """The commit that is measured, with a mark where the package was changed since."""
    try:
        name = _git("rev-parse", "--short=7", "HEAD")
        return name + (" and changes" if _git("status", "--porcelain", "dlp_plugin") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def add(path: Path, parts: dict[str, dict[str, Any]]) -> None:
    """Write parts to a file, in the place of those of the same name in it and beside it."""
    known = json.loads(path.read_text()) if path.exists() else {}
    beside = path.parent.glob("*.json") if path.resolve().parent == RESULTS.resolve() else ()
    for other in beside:
        kept = json.loads(other.read_text())
        if other.resolve() != path.resolve() and kept.keys() & parts.keys():
            left = {name: part for name, part in kept.items() if name not in parts}
            other.write_text(json.dumps(left, indent=1) + "\n")
    path.write_text(json.dumps(known | parts, indent=1) + "\n")


def slimmed(comparison: dict[str, Any]) -> dict[str, Any]:
    """What ``dlp-plugin compare`` wrote; of its plans strengths, paths of search and times."""
    strengths = {
        method: {target: plan.get("strength", plan.get("alpha")) for target, plan in plans.items()}
        for method, plans in comparison["plans"].items()
    }
    searches = {
        method: {
            target: [[step["tokens"], step["divergence"]] for step in plan["search"]]
            for target, plan in plans.items()
        }
        for method, plans in comparison["plans"].items()
        if any(plan["search"] for plan in plans.values())
    }
    measured = ("subject", "dense", "accuracy", "questions", "plain", "distilled", "cells")
    kept = {key: comparison[key] for key in measured if key in comparison}
    decided = comparison.get("decided", {})
    return kept | {"strengths": strengths, "searches": searches, "decided": decided}


def merged(comparisons: list[dict[str, Any]]) -> dict[str, Any]:
    """Comparisons of one model and the same data as one; of what stands twice the first counts.

    :raises ValueError: if they differ in either, or in the dense model's perplexity
    """
    found, *others = comparisons
    for other in others:
        for key in ("subject", "dense", "questions"):
            if other[key] != found[key]:
                raise ValueError(f"comparisons of different {key}: {found[key]}, {other[key]}")
        have = {_place(cell) for cell in found["cells"]}
        found["cells"] += [cell for cell in other["cells"] if _place(cell) not in have]
        for key in ("plain", "distilled", "accuracy"):
            found[key] = other.get(key, {}) | found.get(key, {})
        for key in ("plans", "decided"):
            for method, targets in other[key].items():
                found[key][method] = targets | found[key].get(method, {})
    return found


def _place(cell: dict[str, Any]) -> tuple[Any, ...]:
    return cell["method"], cell["target"], cell["pruner"], cell["bits"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", help="name of the part, and of the file that keeps it")
    parser.add_argument(
        "comparisons", type=Path, nargs="+", help="results.json of dlp-plugin compare"
    )
    parser.add_argument("--model", help="what the model is called in its place")
    parser.add_argument("--command", required=True, help="that made it")
    parser.add_argument("--commit", help="that was measured; by default this one")
    parser.add_argument("--threads", type=int, default=1, help="that it ran on")
    arguments = parser.parse_args()
    found = here(arguments.command, arguments.threads)
    found["commit"] = arguments.commit or found["commit"]
    comparison = merged([json.loads(file.read_text()) for file in arguments.comparisons])
    comparison["subject"]["model"] = arguments.model or comparison["subject"]["model"]
    found["results"] = slimmed(comparison)
    add(RESULTS / f"{arguments.part.replace(' ', '_')}.json", {arguments.part: found})


if __name__ == "__main__":
    main()
