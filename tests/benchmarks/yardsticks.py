"""A real model by the field's yardsticks: what page.md says of it. Standard library only.

On its own it draws frontier.png from results/yardsticks.json: python tests/benchmarks/yardsticks.py
"""

from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

from cells import method_name, pruner_name
from layout import Parts, bullets, number, percent, span, table

CHANCE = {"arc_easy": 0.25, "piqa": 0.5, "lambada": 0.0}
TASKS = {"arc_easy": "ARC easy", "piqa": "PIQA", "lambada": "LAMBADA"}
# Four that stay near chance on a model of this size
WEAK = {
    "arc_challenge": "ARC challenge",
    "openbookqa": "OpenbookQA",
    "winogrande": "WinoGrande",
    "boolq": "BoolQ",
}
MAIN = "yardsticks"


def kept(accuracy: dict[str, float], dense: dict[str, float]) -> float:
    """What a model has above chance of what the dense one has, of the mean of the tasks."""
    chance = mean(CHANCE.values())
    return (mean(accuracy[t] for t in CHANCE) - chance) / (mean(dense[t] for t in CHANCE) - chance)


def named(cell: dict[str, Any]) -> str:
    bits = f", {cell['bits']} bits" if cell["bits"] < 16 else ""
    return f"{pruner_name(cell['pruner'])}, {method_name(cell['method'])}{bits}"


def yardsticks(parts: Parts) -> dict[str, str]:
    found = parts.results(MAIN)
    dense, accuracy = found["dense"], found["accuracy"]
    columns = ["perplexity", "to dense", *TASKS.values(), "kept", "MB"]

    def figures(one: dict[str, Any]) -> list[str]:
        return [
            number(one["perplexity"]),
            f"{one['perplexity'] / dense:.2f}",
            *(f"{one['accuracy'][task]:.3f}" for task in TASKS),
            percent(kept(one["accuracy"], accuracy)),
            f"{one['bytes'] / 1e6:.0f}",
        ]

    tables = []
    for target in sorted({cell["target"] for cell in found["cells"]}):
        cells = [cell for cell in found["cells"] if cell["target"] == target]
        cells.sort(key=lambda cell: -cell["perplexity"])
        rows = [[named(cell), *figures(cell)] for cell in cells]
        tables.append(table([percent(target), *columns], rows))
    plain = [[name, *figures(one)] for name, one in _plain(found)]
    weak = [*_plain(found), *((f"{percent(c['target'])}, {named(c)}", c) for c in found["cells"])]
    weak_rows = [
        [name, *(f"{one['accuracy'][task]:.3f}" for task in WEAK)]
        for name, one in weak
        if WEAK.keys() <= one["accuracy"].keys()
    ]
    return {
        "yardsticks dense": table(["", *columns], plain),
        "yardsticks tables": "\n\n".join(tables),
        "yardsticks weak": table(["", *WEAK.values()], weak_rows),
        "yardsticks remarks": bullets([*_asked(found), *_dlp(found)]),
    }


KINDS = ("sparse", "dense")
ROWS = (
    ("0.6", "wanda", "uniform", 16),
    ("0.6", "wanda", "dlp:0.15", 16),
    ("0.6", "wanda", "dlp:0.15 refined 16", 16),
    ("0.6", "admm-reconstructed-distilled", "dlp:0.15 refined 16", 16),
    ("0.6", "admm-reconstructed", "dlp:0.15 refined 16", 4),
    ("0.5", "admm-reconstructed", "dlp:0.15 refined 16", 4),
)
"""What the README shows: at 60 % from the plain way to the best, at 50 % the rival of 3 bits."""


def gain_table(parts: Parts) -> str:
    """The README's tables: a real model's quality and bytes, and a larger one's speed."""
    found = parts.results(MAIN)
    dense, accuracy = found["dense"], found["accuracy"]
    cells = {(c["target"], c["pruner"], c["method"], c["bits"]): c for c in found["cells"]}

    def row(name: str, one: dict[str, Any]) -> list[str]:
        share = percent(kept(one["accuracy"], accuracy))
        values = number(one["perplexity"]), f"{one['perplexity'] / dense:.2f}", share
        return [name, *values, f"{one['bytes'] / 1e6:.0f}"]

    dense_one, *few = [row(name, one) for name, one in _plain(found)]
    pruned = [row(f"{percent(key[0])}, {named(cells[key])}", cells[key]) for key in ROWS]
    columns = ["SmolLM2-135M", "perplexity", "to dense", "accuracy kept", "MB on disk"]
    quality = table(columns, [dense_one, *few, *pruned])
    return f"{quality}\n\n{_speeds(parts)}"


def _speeds(parts: Parts) -> str:
    """Memory of weights and tokens per second on a CPU, packed and dense side by side."""
    run = parts.results("inference: transformers, avx512, 2 threads")
    served = parts.results("inference: vllm, avx512, 2 threads")
    rows = []
    for name, found in run.items():
        megabytes = found["sparse MB"], found["sparse MB"] / found["weights"]
        rates = [of[f"{kind} tokens/s"] for of in (found, served[name]) for kind in KINDS]
        values = [*(f"{size:,.0f}" for size in megabytes), *(f"{rate:.1f}" for rate in rates)]
        rows.append([name.replace("%", " % pruned"), *values])
    columns = ["MB, packed", "MB, bf16", "tokens/s, packed", "tokens/s, bf16"]
    vllm = ["vLLM, packed", "vLLM, not packed"]
    return table(["Llama, 1.1 billion", *columns, *vllm], rows)


def _plain(found: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The models that are not pruned, by name: of 16 bits, and of ever fewer."""
    rows = []
    for bits in sorted(found["plain"], key=int, reverse=True):
        rows.append(("dense" if bits == "16" else f"dense, {bits} bits", found["plain"][bits]))
        if distilled := found.get("distilled", {}).get(bits):
            rows.append((f"dense, {bits} bits, distilled", distilled))
    return rows


def _asked(found: dict[str, Any]) -> Iterator[str]:
    """What the best pipeline keeps at every sparsity."""
    for target in sorted({cell["target"] for cell in found["cells"]}):
        cells = [c for c in found["cells"] if c["target"] == target and c["bits"] == 16]
        best = min(cells, key=lambda cell: cell["perplexity"])
        yield (
            f"At {percent(target)} the least perplexity is that of {named(best)}: "
            f"{best['perplexity'] / found['dense']:.2f} times dense; it keeps "
            f"{percent(kept(best['accuracy'], found['accuracy']))} of what dense has above chance."
        )


def _dlp(found: dict[str, Any]) -> Iterator[str]:
    """Where DLP's plan beats the uniform one."""
    values = {(c["pruner"], c["target"], c["method"]): c for c in found["cells"] if c["bits"] == 16}
    for name in ("dlp:0.15", "owl:0.08", "dlp:0.15 refined 16"):
        ratios = [
            cell["perplexity"] / values[pruner, target, "uniform"]["perplexity"]
            for (pruner, target, method), cell in values.items()
            if method == name and (pruner, target, "uniform") in values
        ]
        if ratios:
            yield (
                f"{method_name(name)} is better than uniform in {sum(r < 1 for r in ratios)} of "
                f"{len(ratios)} pairs; {span(ratios)} of its perplexity."
            )


def calibration(parts: Parts) -> dict[str, str]:
    """How much text, and which: samples and their length, seeds, and what `refine` is given."""
    tokens, seeds = (parts.results(f"calibration: {part}") for part in ("tokens", "seeds"))
    pruners = list(dict.fromkeys(pruner for found in tokens.values() for pruner in found))
    rows = []
    for name, found in sorted(tokens.items(), key=lambda one: _size(one[0])):
        values = (found[p]["uniform"] if p in found else None for p in pruners)
        shown = ("" if value is None else number(value) for value in values)
        rows.append([name, f"{_size(name)[0]:,}", *shown])
    columns = ["samples", "tokens", *map(pruner_name, pruners)]
    first = next(iter(seeds.values()))
    seed_rows = []
    for pruner, methods in first.items():
        for method in methods:
            if method != "dense" and all(method in found[pruner] for found in seeds.values()):
                values = [found[pruner][method] for found in seeds.values()]
                uniform = [found[pruner]["uniform"] for found in seeds.values()]
                ratios = [value / one for value, one in zip(values, uniform, strict=True)]
                name = f"{pruner_name(pruner)}, {method_name(method)}"
                share = "" if method == "uniform" else span(ratios)
                seed_rows.append([name, *map(number, values), share])
    refining = parts.results("refining")
    refined = [["perplexity", *(number(one["perplexity"]) for one in refining.values())]]
    return {
        "refining table": table(["", *refining], refined),
        "calibration tokens": table(columns, rows),
        "calibration seeds": table(
            ["", *(seed if " " in seed else f"seed {seed}" for seed in seeds), "to uniform"],
            seed_rows,
        ),
    }


def _size(name: str) -> tuple[int, int]:
    """Tokens in all, and of a sample, of what is named ``samples x length``."""
    samples, length = map(int, name.split(" x "))
    return samples * length, length


def draw(found: dict[str, Any], path: Path) -> None:
    """Perplexity over megabytes: a line for every way to prune, its points the sparsities."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    lines: dict[str, list[tuple[float, float]]] = {}
    for cell in sorted(found["cells"], key=lambda cell: cell["target"]):
        lines.setdefault(named(cell), []).append((cell["bytes"] / 1e6, cell["perplexity"]))
    for name, points in lines.items():
        if len(points) > 1:
            axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=name)
    for name, one in _plain(found):
        point = one["bytes"] / 1e6, one["perplexity"]
        axes.plot(*point, "k*", markersize=10)
        axes.annotate(name, point, xytext=(6, -12), textcoords="offset points")
    axes.margins(x=0.1)
    axes.set(xlabel="megabytes on disk", ylabel="perplexity, WikiText-2", yscale="log")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    from record import RESULTS

    draw(Parts(RESULTS).results(MAIN), RESULTS.parent / "frontier.png")
