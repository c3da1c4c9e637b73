"""What the page says in the places that page.md leaves open. Standard library only."""

from collections.abc import Sequence
from typing import Any

from cells import PRUNERS, Cells, pruner_name
from large import large_model
from layout import Parts, bullets, number, percent, span, table
from yardsticks import calibration, yardsticks

# What run.py calls them -> what the page does
WAYS = {
    "median": "`statistic: median`",
    "mean": "`statistic: mean`",
    "read once": "reading the weights once",
    "sorting": "sorting each matrix",
    "OneShotMagnitudeModifier": "`OneShotMagnitudeModifier`",
}
UNMASKED = {"LoRA, masked": "LoRA", "DoRA, masked": "DoRA", "all, held": "all weights"}


def main_table(parts: Parts) -> str:
    """The main command's table and what stands below it, as the README has them too."""
    found = parts.results("main")
    dense = found["rows"][0]["perplexity"]
    rows = [
        [
            row["name"],
            f"{100 * row['zeros']:.1f} %",
            number(row["perplexity"]),
            f"{row['perplexity'] / dense:.2f}",
        ]
        for row in found["rows"]
    ]
    columns = ["70 %, mostly Wanda, 128 samples of 256", "zeros", "perplexity", "to dense"]
    sizes = [
        f"{name} {size['written']:.2f} MB ({size['zstd']:.2f} under zstd, {size['packed']:.2f} by "
        "`dlp-plugin pack`)"
        for name, size in found["megabytes"].items()
    ]
    times = [f"{seconds} s on {kind}" for kind, seconds in found["seconds"].items()]
    below = [
        f"Pruned weights that came back with 4 bits: {found['came back']}.",
        f"Sizes: {'; '.join(sizes)}.",
        f"Time, installing included: {'; '.join(times)}.",
    ]
    return f"{table(columns, rows)}\n\n{bullets(below)}\n"


def main_command(parts: Parts) -> dict[str, str]:
    rows = [
        [row["name"], number(row["perplexity"]), number(row["float32"]) if row["float32"] else ""]
        for row in parts.results("main")["rows"]
    ]
    speed = parts.results("bfloat16")["GFLOP/s"]
    return {
        "main table": main_table(parts).strip(),
        "main float32": table(["perplexity", "bfloat16", "float32"], rows),
        "bfloat16": f"{speed['bfloat16']}",
        "float32": f"{speed['float32']}",
    }


def comparisons(parts: Parts) -> dict[str, str]:
    names = ("methods", "real model", "second model", "patterns")
    found = {name: Cells(parts.results(name)) for name in names}
    values = {}
    for name, cells in found.items():
        remarks = cells.remarks()
        if name == "patterns":
            mixed, free = cells.values, found["methods"].values
            (refined,) = (method for method in cells.refined if " refined " in method)
            pairs = [
                f"{PRUNERS[pruner]} {number(mixed[pruner, '8:16', refined])} against "
                f"{number(free[pruner, '0.5', 'uniform'])}"
                for pruner in dict.fromkeys(pruner for pruner, _ in cells.columns)
            ]
            remarks.append(
                "A refined mix of 8:16 against uniform unstructured pruning to 50 %: "
                f"{', '.join(pairs)}."
            )
        values[f"{name} dense"] = number(cells.dense)
        values[f"{name} tables"] = cells.tables()
        values[f"{name} remarks"] = bullets(remarks)
    values["real model times"] = found["real model"].times()
    judged = ("uniform", "uniform refined 16")
    values["real model pruners"] = found["real model"].by_pruner(judged)
    pruners = Cells(parts.results("pruners"))
    values["pruners table"] = pruners.by_pruner(judged)
    values["pruners dense"] = number(pruners.dense)
    ratio = pruners.values["admm", "0.7", "uniform"] / pruners.values["sparsegpt", "0.7", "uniform"]
    values["pruners admm"] = f"{ratio:.2f}"
    minutes = parts.results("comparison, time")["minutes"]
    return values | {"comparison minutes": f"{minutes}"}


def search(parts: Parts) -> dict[str, str]:
    first, blind = parts.results("search, first"), parts.results("search, blind")
    rows = [
        [
            start,
            f"{path[0]['divergence']:.3f}",
            f"{path[-1]['divergence']:.3f}",
            f"{path[-1]['evaluations']}",
            f"{path[-1]['tokens']:,}",
            f"{first['ends'][start]:.3f}" if start in first["ends"] else "",
        ]
        for start, path in parts.results("search").items()
    ]
    seeds = [
        [f"{place}", f"{generations}", f"{before:.3f}", f"{after:.3f}"]
        for place, (generations, before, after) in enumerate(parts.results("search, sifting"), 1)
    ]
    columns = ["", "start", "end", "models measured", "tokens", "before"]
    return {
        "search table": table(columns, rows),
        "search first start": f"{first['start']}",
        "search first end": f"{first['ends']['evolution from DLP, alpha auto']}",
        "search first perplexity": f"{first['perplexity before']}",
        "search last perplexity": f"{first['perplexity']}",
        "search seconds": f"{first['seconds']}",
        "search blind": f"{blind['divergence after 24 generations']}",
        "search passes": f"{blind['drawn passes it after']}",
        "search seeds": table(["seed", "generations", "same portion", "another portion"], seeds),
        "searched at table": _searched_at(parts.results("searched at")),
    }


def _searched_at(results: list[dict[str, Any]]) -> str:
    """A row per model, pruner and target, the best of it in bold."""
    shown = {searched for row in results for searched in row["perplexity"]}
    columns = sorted(shown, reverse=True)  # uniform first
    rows = []
    for row in results:
        found = {searched: number(value) for searched, value in row["perplexity"].items()}
        best = number(min(row["perplexity"].values()))
        cells = [found.get(column, "") for column in columns]
        cells = [f"**{cell}**" if cell == best else cell for cell in cells]
        target = percent(row["target"])
        rows.append([row["model"], pruner_name(row["pruner"]), target, *cells])
    names = [c if c == "uniform" else f"at {percent(c)}" for c in columns]
    return table(["", "pruner", "target", *names], rows)


def sparse_files(parts: Parts) -> dict[str, str]:
    values = {}
    for part in ("sizes", "a real model", "decoding", "loading"):
        results = parts.results(f"sparse files: {part}")
        names = list(next(iter(results.values())))
        rows = [[row, *(f"{found[n]:.2f}" for n in names)] for row, found in results.items()]
        values[f"sparse {part}"] = table(["", *names], rows)
    return values


INFERENCE = (
    "linear, avx512, one thread",
    "linear, avx2, one thread",
    "transformers, avx512, 2 threads",
    "transformers, avx2, 2 threads",
    "real, avx512, 2 threads",
    "vllm, avx512, 2 threads",
)


def inference(parts: Parts) -> dict[str, str]:
    values = {}
    for part in INFERENCE:
        results = parts.results(f"inference: {part}")
        names = list(dict.fromkeys(name for found in results.values() for name in found if name))
        rows = [
            [row, *(f"{found[n]:.4g}" if n in found else "" for n in names)]
            for row, found in results.items()
            if set(found) & set(names)
        ]
        columns = (name.replace("bound by bytes", "at equal GB/s") for name in names)
        values[f"inference {part}"] = table(["", *columns], rows)
    return values


def gradient(parts: Parts) -> dict[str, str]:
    rows = [
        [name, f"{found['divergence']:.3f}", f"{found['tokens']:,}"]
        for name, found in parts.results("tuning").items()
    ]
    steps = [
        [
            name,
            f"{found['Linears']}",
            f"{found['million weights']:.1f}",
            f"{found['seconds']:.2f}",
            f"{found['peak megabytes']:.0f} MB",
        ]
        for name, found in parts.results("steps").items()
    ]
    columns = ["", "Linears", "million weights in them", "seconds", "peak memory beyond the model"]
    return {
        "tuning table": table(["", "divergence", "tokens"], rows),
        "steps table": table(columns, steps),
        **_one_linear(parts, "one Linear", 0),
        **_one_linear(parts, "one Linear on a GPU", 1),
    }


def _one_linear(parts: Parts, part: str, digits: int) -> dict[str, str]:
    """What each way takes, and ADMM, which polishes too, to SparseGPT."""
    found = parts.results(part)
    linears = [
        [name, f"{each['seconds']:.{digits + 1}f}", f"{each['peak megabytes']:.0f} MB"]
        for name, each in found.items()
    ]
    longer, larger = [], []
    for kind in dict.fromkeys(name.rpartition(", ")[0] for name in found):
        host = found[f"{kind}, SparseGPT"]
        ways = ("ADMM",) if f"{kind}, ADMM" in found else ("ADMM alone", "polish")
        admm = [found[f"{kind}, {way}"] for way in ways]
        longer.append(sum(each["seconds"] for each in admm) / host["seconds"])
        larger.append(max(each["peak megabytes"] for each in admm) / host["peak megabytes"])
    return {
        f"{part} seconds": span(longer, digits),
        f"{part} memory": span(larger, 1),
        f"{part} table": table(["", "seconds", "peak memory"], linears),
    }


def four_bits(parts: Parts) -> dict[str, str]:
    kinds = ["pruned", "stock", "stock, masked again", "masked"]
    lost = [
        [
            f"{row['pruner']}, {row['structure']}",
            *(
                f"{100 * min(row[ordering]):.1f} to {100 * max(row[ordering]):.1f} %"
                for ordering in ("none", "ordered")
            ),
            f"{100 * row['masked']:g} %",
        ]
        for row in _ranges(parts.results("4 bits: zeros"))
    ]
    dense, *rows = parts.results("4 bits: perplexity")
    perplexities = [
        [
            f"{pruner_name(row['pruner'])}, {percent(row['sparsity'])}",
            *(number(row[kind]) for kind in kinds),
            *(f"{100 * row[f'{kind}, came back']:.2g} %" for kind in ("stock", "masked")),
        ]
        for row in rows
    ]
    ratios: dict[float, list[float]] = {}
    for row in rows:
        ratios.setdefault(row["sparsity"], []).append(row["masked"] / row["stock, masked again"])
    back = ["came back, stock", "came back, masked"]
    cost = parts.results("4 bits: cost")
    ratio = cost.get("masked to stock") or {
        key: cost["masked"][key] / cost["stock"][key] for key in cost["stock"]
    }
    columns = ["came back", "stock, no ordering", "stock, `static` or `weight`", "masked, any"]
    return {
        "4 bits zeros": table(columns, lost),
        "autoround": f"{100 * parts.results('autoround')['zeros lost']:g}",
        "4 bits dense": number(dense["pruned"]),
        "4 bits perplexity": table(["", *kinds, *back], perplexities),
        "4 bits apart": "; ".join(f"{span(v, 3)} at {percent(s)}" for s, v in ratios.items()),
        "4 bits seconds": f"{ratio['seconds']:.2f}",
        "4 bits memory": f"{ratio['peak_megabytes']:.2f}",
    }


def _ranges(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Shares that came back over schemes and orderings, by pruner and structure."""
    if "scheme" not in rows[0]:
        return rows
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["pruner"], row["structure"]), []).append(row)
    return [
        {
            "pruner": pruner,
            "structure": structure,
            "none": [row["stock"] for row in group if row["ordering"] == "none"],
            "ordered": [row["stock"] for row in group if row["ordering"] != "none"],
            "masked": max(row["masked"] for row in group),
        }
        for (pruner, structure), group in groups.items()
    ]


def recovery(parts: Parts) -> dict[str, str]:
    rows = []
    for row in parts.results("recovery"):
        lost = "" if row["lost"] is None else f"{row['lost']:,}"
        rows.append([row["name"], number(row["perplexity"]), lost])
    return {"recovery table": table(["", "perplexity", "pruned weights lost"], rows)}


def recovery_by_pruner(parts: Parts) -> dict[str, str]:
    rows = []
    for name, found in parts.results("recovery by pruner").items():
        pruner, _, sparsity = name.partition(", ")
        values = map(number, found.values())
        rows.append([f"{pruner_name(pruner)}, {sparsity.replace('%', ' %')}", *values])
    first = next(iter(parts.results("recovery by pruner").values()))
    return {"recovery by pruner table": table(["", *first], rows)}


def costs(parts: Parts) -> dict[str, str]:
    values = {
        f"{part} table": _ways(parts.results(part), base)
        for part, base in {"statistic": "naive", "magnitude": "sorting"}.items()
    }
    values |= _stages(parts)

    found = parts.results("samples")
    rows = [
        [f"{kind} difference", *(f"{one[kind]:.4f}" for one in found.values())]
        for kind in ("largest", "mean")
    ]
    values["samples table"] = table(["samples of 256 tokens", *found], rows)

    steps = {name: one["seconds"] for name, one in parts.results("training").items()}
    to_base = [
        f"{value / steps[UNMASKED[name]]:.2f}" if name in UNMASKED else "1"
        for name, value in steps.items()
    ]
    rows = [["seconds", *(f"{value:.2f}" for value in steps.values())], ["to its base", *to_base]]
    values["training table"] = table(["", *steps], rows)
    return values | _growth(parts)


def _stages(parts: Parts) -> dict[str, str]:
    """Seconds of epochs."""
    rows = []
    for name, found in parts.results("stages").items():
        bare, dlp = found["bare forward pass"], found["DLP"]
        row = [name, f"{_seconds(bare)} s", f"{_seconds(dlp)} s", f"{dlp / bare:.2f}"]
        if "Wanda" in found:
            row.append(f"{dlp / found['Wanda']:.2f}")
            row += [f"{_seconds(found[pruner])} s" for pruner in ("Wanda", "SparseGPT")]
        rows.append(row + [""] * (7 - len(row)))
    columns = ["samples x tokens", "bare", "DLP", "to bare", "to Wanda", "Wanda", "SparseGPT"]
    repairing = {name: one["seconds"] for name, one in parts.results("stages that repair").items()}
    repairs = [
        [name, f"{_seconds(taken)} s", f"{taken / repairing['SparseGPT']:.1f}"]
        for name, taken in repairing.items()
    ]
    return {
        "stages table": table(columns, rows),
        "stages that repair table": table(["", "epoch", "to SparseGPT"], repairs),
    }


def _growth(parts: Parts) -> dict[str, str]:
    results, large = parts.results("growth"), parts.results("growth, large blocks")
    first = next(iter(results.values()))["seconds"]
    rows = [
        [
            name,
            _seconds(found["seconds"]),
            f"{found['seconds'] / first:.2f}",
            *(f"{found[key]:.0f} MB" for key in ("model megabytes", "peak megabytes")),
        ]
        for name, found in results.items()
    ]
    return {
        "growth table": table(["", "seconds", "to the start", "model", "peak memory"], rows),
        "growth block": f"{large['block']}",
        "growth two": f"{large['2 blocks']}",
        "growth eight": f"{large['8 blocks']}",
        "growth weights": f"{large['weights of 8']}",
    }


def _ways(found: dict[str, dict[str, float]], base: str) -> str:
    rows = []
    for way, one in found.items():
        ratio = one["seconds"] / found[base]["seconds"]
        to_base = "1" if way == base else f"{ratio:.3f}" if ratio < 0.01 else f"{ratio:.2f}"
        row = [WAYS.get(way, way), _seconds(one["seconds"]), to_base]
        rows.append([*row, f"{one['peak megabytes']:.0f} MB"])
    return table(["way", "seconds", f"to {base}", "peak memory beyond the weights"], rows)


def _seconds(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}"


ALL: Sequence = (
    main_command,
    yardsticks,
    calibration,
    comparisons,
    sparse_files,
    inference,
    search,
    gradient,
    four_bits,
    recovery,
    recovery_by_pruner,
    costs,
    large_model,
)
