"""What a large model costs, put together from what one block of it costs. Standard library only.

Seconds of a stage on one block are a part that grows with the tokens and one that does not. Where a
shape was not measured, both are scaled from the next smaller one: with the number of weights, and
the second part of those that solve for weights with the multiplications of that.
"""

from dataclasses import dataclass

from layout import Parts, table

# Hidden size, MLP, heads, key-value heads
SHAPES = {
    "1.1 B": (2048, 5632, 32, 4),
    "1 B": (2048, 8192, 32, 8),
    "8 B": (4096, 14336, 32, 8),
    "70 B": (8192, 28672, 64, 8),
}
# Blocks, vocabulary, whether the head is the embedding
MODELS = {
    "1.1 B": (22, 32000, False),
    "1 B": (16, 128256, True),
    "8 B": (32, 128256, False),
    "70 B": (80, 128256, False),
}
SHOWN = ("1 B", "8 B", "70 B")
LENGTH, LONG, TOKENS = 512, 2048, 128 * 2048  # of a sample measured, of one, of all to be told
PROCESS = 0.5e9  # bytes that a process holds which has imported everything
SOLVING = ("SparseGPT", "ADMM", "masked GPTQ")
NO_TOKENS = ("magnitude", "packing", "a step of refine")
# What the model goes through at each, and the activations of all tokens that are in memory
PASSES, STREAMS = {"scoring": 1, "magnitude": 0, "packing": 0}, {"ADMM, reconstructed": 4}
ROWS = (
    "scoring",
    "alpha: auto",
    "refine: 16",
    "magnitude",
    "Wanda",
    "SparseGPT",
    "ADMM",
    "ADMM, reconstructed",
    "masked GPTQ",
    "packing",
)
JUDGED, STEPS, MEASURED = 16_384, 16, 6  # tokens; a dense pass besides the five measurements


@dataclass(frozen=True)
class Cost:
    """Seconds, and bytes beyond process and model; ``scaled`` from another shape."""

    once: float
    per_token: float
    memory: float
    scaled: bool = False

    def seconds(self, tokens: float) -> float:
        return self.once + self.per_token * tokens


def weights(shape: str) -> int:
    return sum(out * columns for out, columns in linears(shape))


def linears(shape: str) -> list[tuple[int, int]]:
    hidden, mlp, heads, kv = SHAPES[shape]
    keys = hidden // heads * kv
    attention = [(hidden, hidden)] * 2 + [(keys, hidden)] * 2
    return [*attention, (mlp, hidden), (mlp, hidden), (hidden, mlp)]


def solving(shape: str) -> int:
    """Multiplications, but for a factor, of inverting Gram matrices and going over columns."""
    return sum(columns * columns * (out + columns) for out, columns in linears(shape))


class Costs:
    """Of every stage on one block of every shape."""

    def __init__(self, measured: dict[str, dict[str, dict[str, dict[str, float]]]]) -> None:
        self._measured = measured

    def of(self, stage: str, shape: str) -> Cost:
        if stage == "reconstruction":
            with_it, without = (self.of(s, shape) for s in ("Wanda, reconstructed", "Wanda"))
            once, per_token = with_it.once - without.once, with_it.per_token - without.per_token
            return Cost(max(once, 0), max(per_token, 0), with_it.memory, with_it.scaled)
        found = self._measured.get(shape, {}).get(stage)
        if not found:
            return self.scaled(stage, shape)
        points = [(int(samples) * LENGTH, one) for samples, one in found.items()]
        (tokens, first), *more = points
        memory = max(one["peak megabytes"] for _, one in points) * 2**20
        if stage in NO_TOKENS:
            return Cost(first["seconds"], 0.0, memory)
        if more:
            per_token = (more[0][1]["seconds"] - first["seconds"]) / (more[0][0] - tokens)
        elif stage == "ADMM":
            per_token = self.of("SparseGPT", shape).per_token
        else:
            per_token = self.scaled(stage, shape).per_token
        return Cost(max(first["seconds"] - per_token * tokens, 0), max(per_token, 0), memory)

    def scaled(self, stage: str, shape: str) -> Cost:
        """What is to be expected by the next smaller shape."""
        smaller = list(SHAPES)[list(SHAPES).index(shape) - 1]
        cost = self.of(stage, smaller)
        size = weights(shape) / weights(smaller)
        once = solving(shape) / solving(smaller) if stage in SOLVING else size
        return Cost(cost.once * once, cost.per_token * size, cost.memory * size, True)

    def row(self, stage: str, shape: str, tokens: float) -> Cost:
        """A stage as a user knows it, its seconds for so many tokens in ``once``."""
        if stage == "ADMM, reconstructed":
            parts = [(1.0, tokens, self.of(each, shape)) for each in ("ADMM", "reconstruction")]
        elif stage == "alpha: auto":
            parts = [(7.0, min(tokens / 4, JUDGED), self.of("judging", shape))]
        elif stage == "refine: 16":
            parts = [(STEPS, 0, self.of("a step of refine", shape))]
            parts += [(MEASURED, min(tokens / 4, JUDGED), self.of("judging", shape))]
        else:
            parts = [(1.0, tokens, self.of(stage, shape))]
        return Cost(
            sum(times * cost.seconds(those) for times, those, cost in parts),
            0.0,
            max(cost.memory for *_, cost in parts),
            any(cost.scaled for *_, cost in parts),
        )

    def model(self, stage: str, shape: str, tokens: float, length: int) -> Cost:
        """Of a whole model: all blocks, and the head as so many more weights to go through."""
        blocks, vocabulary, tied = MODELS[shape]
        hidden = SHAPES[shape][0]
        block = self.row(stage, shape, tokens)
        head = vocabulary * hidden
        judgements = {"alpha: auto": 7, "refine: 16": MEASURED}
        if stage in judgements:
            passed = judgements[stage] * min(tokens / 4, JUDGED)
        else:
            passed = PASSES.get(stage, 2) * tokens
        seconds = blocks * block.once
        seconds += head / weights(shape) * self.of("scoring", shape).per_token * passed
        if stage == "refine: 16":
            seconds += STEPS * self._step_of_head(vocabulary, hidden)
        held = 2 * (blocks * weights(shape) + (1 if tied else 2) * head)
        held += STREAMS.get(stage, 1) * 2 * hidden * tokens * (stage not in NO_TOKENS)
        logits = 2 * length * vocabulary if passed else 0
        return Cost(seconds, 0.0, PROCESS + held + max(block.memory, logits), block.scaled)

    def _step_of_head(self, vocabulary: int, hidden: int) -> float:
        """Seconds that a step takes for the vocabulary, from two sizes of it."""
        found = self._measured["vocabulary"]["a step of refine"]
        (small, first), (large, second) = ((int(n), one["seconds"]) for n, one in found.items())
        return (second - first) / (large - small) * vocabulary * hidden / SHAPES["1 B"][0]


def large_model(parts: Parts) -> dict[str, str]:
    costs, whole = Costs(parts.results("costs: blocks")), parts.results("costs: end to end")
    per_block = []
    for stage in ("judging", "a step of refine", "reconstruction", *ROWS):
        if stage in ("alpha: auto", "refine: 16", "ADMM, reconstructed"):
            continue
        cells = [costs.of(stage, shape) for shape in SHOWN]
        per_block.append([stage, *(_block_cell(each) for each in cells)])
    models = [
        [stage, *(_model_cell(costs.model(stage, shape, TOKENS, LONG)) for shape in SHOWN)]
        for stage in ROWS
    ]
    checks = []
    for pruner, found in whole.items():
        both = [costs.model(each, "1.1 B", 8 * LENGTH, LENGTH) for each in ("scoring", pruner)]
        seconds, memory = sum(each.once for each in both), max(each.memory for each in both)
        taken, peak = found["seconds"], found["peak megabytes"] * 2**20
        row = [f"DLP + {pruner}", f"{seconds:.0f} s", f"{taken:.0f} s", f"{seconds / taken:.2f}"]
        checks.append(
            [*row, f"{memory / 1e9:.1f} GB", f"{peak / 1e9:.1f} GB", f"{memory / peak:.2f}"]
        )
    columns = ["", "predicted", "took", "ratio", "predicted", "held", "ratio"]
    (samples, one), *_ = parts.results("costs: blocks")["8 B"]["SparseGPT"].items()
    scaled = costs.scaled("SparseGPT", "8 B").seconds(int(samples) * LENGTH)
    return {
        "large scaled": f"{scaled:.0f}",
        "large measured": f"{one['seconds']:.0f}",
        "large per block": table(["", *SHOWN], per_block),
        "large models": table(["", *SHOWN], models),
        "large check": table(columns, checks),
        "experts table": _experts(parts),
    }


def _experts(parts: Parts) -> str:
    """What a stage costs on blocks of more and more experts."""
    rows = []
    for stage, found in parts.results("experts").items():
        cells = [
            f"{one['seconds']:.2f} s, {1000 * one['seconds'] / int(count):.1f} ms, "
            f"{one['peak megabytes']:.0f} MB"
            for count, one in found.items()
        ]
        rows.append([stage, *cells])
    return table(["", *(f"{count} experts" for count in found)], rows)


def _block_cell(cost: Cost) -> str:
    about = "~ " if cost.scaled else ""
    grows = f" + {1000 * cost.per_token:.2f} s" if cost.per_token else ""
    return f"{about}{cost.once:.1f} s{grows}, {cost.memory / 1e9:.1f} GB"


def _model_cell(cost: Cost) -> str:
    about = "~ " if cost.scaled else ""
    minutes = cost.once / 60
    told = f"{minutes / 60:.1f} h" if minutes >= 90 else f"{minutes:.0f} min"
    return f"{about}{told}, {cost.memory / 1e9:.0f} GB"
