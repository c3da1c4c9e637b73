"""What zeros gain in an engine: python tests/benchmarks/inference.py --only linear

- ``linear``: one product of one row with a matrix of 4096 x 4096, in as many copies as exceed the
  caches, beside torch's products and the bound that the bytes set;
- ``transformers``: a random Llama of 1.1 billion parameters, dense and sparse in turn;
- ``real``: SmolLM2, that the sparse model says what the dense one says;
- ``vllm``: the random Llama in vLLM, in the environment that the tests make.

Instructions are held to AVX2 by ``--isa avx2``, for torch and for the kernels; all of it wants an
idle machine.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from common import LLAMA, ROOT, TEST_TEXT
from loguru import logger
from record import add, here
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from dlp_plugin.checkpoints.files import bytes_on_disk

SPARSITIES = (0.5, 0.6, 0.7, 0.8)
SIZE = 4096
COPIES = 16  # of a matrix, 0.5 GB in bfloat16
ROUNDS = 7
HELD = {  # to AVX2: torch's own kernels, oneDNN's, ours
    "avx512": {},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "DLP_KERNELS": "avx2"},
}

Figures = dict[str, dict[str, float]]


def pruned(weight: torch.Tensor, sparsity: float) -> torch.Tensor:
    """The same without the smallest weights of a normal distribution."""
    normal = torch.distributions.Normal(0.0, weight.float().std().item())
    threshold = normal.icdf(torch.tensor(0.5 + sparsity / 2)).item()
    return weight.masked_fill(weight.abs() < threshold, 0)


def seconds_per_product(products: list[Callable[[], object]]) -> float:
    """Of one of several products that run in turn, so that each finds its weights in memory."""
    times = []
    for _ in range(ROUNDS + 1):
        started = time.perf_counter()
        for product in products:
            product()
        times.append((time.perf_counter() - started) / len(products))
    return statistics.median(times[1:])


def linear(rows: int = 1) -> Figures:
    """Microseconds of a product, and times as fast as the better of torch's dense ones."""
    from dlp_plugin.checkpoints.sparse_format import encode, encode_integers
    from dlp_plugin.kernels.layout import layout_of
    from dlp_plugin.kernels.products import linear as product

    torch.manual_seed(0)
    x = torch.randn(rows, SIZE)
    base = torch.randn(SIZE, SIZE) * 0.02
    found: Figures = {}
    read = seconds_per_product(
        [each.sum for each in [torch.ones(SIZE * SIZE // 2) for _ in range(COPIES)]]
    )
    found["read bandwidth, GB/s"] = {"": 2 * SIZE * SIZE / read / 1e9}
    dense = {}
    for dtype in (torch.bfloat16, torch.float32):
        copies = [base.to(dtype).clone() for _ in range(COPIES)]
        inputs = x.to(dtype)
        name = f"torch {str(dtype).removeprefix('torch.')}"
        dense[name] = seconds_per_product(
            [lambda w=w: torch.nn.functional.linear(inputs, w) for w in copies]
        )
        found[f"{name}, dense"] = {"us": dense[name] * 1e6}
        del copies
    bf16, best = dense["torch bfloat16"], min(dense.values())
    for sparsity in SPARSITIES:
        weight = pruned(base, sparsity).bfloat16()
        stored, parts = encode(weight)
        kinds = {stored.kind: (stored, parts)}
        half = weight.half()
        kinds["values"] = encode(half)
        middle = 8
        integers = (weight.float() * middle / 0.08).round().clamp(-middle, middle - 1) + middle
        scale = torch.full((SIZE, SIZE // 128), 0.01).bfloat16()
        kinds["4 bits"] = encode_integers(
            integers.to(torch.uint8), scale, None, bits=4, group_size=128
        )
        for kind, (one, tensors) in kinds.items():
            layouts = [
                layout_of(one, {k: t.clone() for k, t in tensors.items()}, "benchmark")
                for _ in range(COPIES)
            ]
            inputs = x.to(torch.float16 if one.dtype == torch.float16 else torch.bfloat16)
            spent = seconds_per_product([lambda w=w: product(inputs, w) for w in layouts])
            size = sum(tensor.nbytes for tensor in layouts[0].tensors.values())
            found[f"{kind}, {sparsity:.0%}"] = {
                "us": spent * 1e6,
                "to torch bf16": bf16 / spent,
                "to the better": best / spent,
                "bound by bytes": 2 * SIZE * SIZE / size,
                "of bf16's bytes": size / (2 * SIZE * SIZE),
                "GB/s": size / spent / 1e9,
            }
            del layouts
    return found


def random_llama(folder: Path, sparsity: float, bits: int = 16) -> Path:
    """A packed checkpoint of 1.1 billion random weights, made once."""
    from dlp_plugin.checkpoints.packing import pack

    target = folder / f"llama-{sparsity:.0%}-{bits}"
    if target.exists():
        return target
    source = folder / f"llama-{bits}-source"
    torch.manual_seed(0)
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**LLAMA))
    model = model.to_empty(device="cpu").bfloat16()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.data.fill_(1)
            continue
        parameter.data.normal_(0, 0.02)
        if "layers" in name:
            parameter.data = pruned(parameter.data, sparsity)
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    model.config.save_pretrained(folder / "origin")
    model.config.name_or_path = model.name_or_path = str(folder / "origin")
    if bits == 4:
        from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
        from llmcompressor import oneshot
        from llmcompressor.modifiers.quantization import QuantizationModifier

        args = QuantizationArgs(num_bits=4, strategy="group", group_size=128)
        scheme = QuantizationScheme(targets=["Linear"], weights=args)
        modifier = QuantizationModifier(ignore=["lm_head"], config_groups={"group_0": scheme})
        tokenizer = AutoTokenizer.from_pretrained(ROOT / "examples" / "small_model")
        oneshot(model=model, recipe=modifier, tokenizer=tokenizer)
    model.save_pretrained(source)
    del model
    pack(source, target)
    if bits == 16:
        for file in source.iterdir():
            file.unlink()
        source.rmdir()
    else:
        source.rename(folder / f"llama-{sparsity:.0%}-{bits}-dense")
    return target


Models = list[tuple[int, float]]


def in_transformers(folder: Path, models: Models, batches: list[int], threads: int) -> Figures:
    """Every model beside the dense one, measured in turn by ``dlp-plugin speed``."""
    from dlp_plugin.comparison.speeds import speeds

    found: Figures = {}
    for bits, sparsity in models:
        packed = random_llama(folder, sparsity, bits)
        both = speeds(packed, prompt=512, tokens=12, batches=batches, threads=threads, rounds=2)
        dense, sparse = both["dense"], both["sparse"]
        found[f"{bits} bits, {sparsity:.0%}"] = {
            "load": dense.load / sparse.load,
            "weights": sparse.weights / dense.weights,
            "peak": (sparse.peak or 0) / (dense.peak or 1),
            "prompt": sparse.prefill / dense.prefill,
            **{f"batch {n}": sparse.decode[n] / rate for n, rate in dense.decode.items()},
            "dense tokens/s": dense.decode[batches[0]],
            "sparse tokens/s": sparse.decode[batches[0]],
            "sparse MB": sparse.weights / 1e6,
        }
    return found


def real(model: Path) -> Figures:
    """Perplexity and greedy text of a pruned real model in float32, sparse beside dense."""
    from dlp_plugin import WandaPruningModifier
    from dlp_plugin.checkpoints.loading import (
        apply_recipe,
        load_dense,
        load_stored,
        load_tokenizer,
    )
    from dlp_plugin.checkpoints.packing import pack
    from dlp_plugin.evaluation.perplexity import perplexity
    from dlp_plugin.evaluation.text import (
        beginning,
        calibrate_on,
        calibration_set,
        read_tokens,
        token_windows,
    )

    tokenizer = load_tokenizer(model)
    tokens = read_tokens(TEST_TEXT, tokenizer)
    windows = token_windows(tokens[: 32 * 256], 256, beginning(tokenizer))
    found: Figures = {}
    with tempfile.TemporaryDirectory() as place:
        for sparsity in (0.5,):
            source, packed = Path(place) / "source", Path(place) / f"{sparsity}"
            stage = WandaPruningModifier(
                sparsity=sparsity, targets=["Linear"], ignore=["re:.*lm_head"]
            )
            calibration = calibrate_on(calibration_set(tokens[64 * 256 :], 256, 16), tokenizer)
            apply_recipe(model, stage, source, **calibration)
            pack(source, packed)
            dense, sparse = (load(packed).to(torch.float32) for load in (load_dense, load_stored))
            values = [perplexity(each, windows) for each in (dense, sparse)]
            same, gaps = greedy(dense, sparse, windows[:20])
            found[f"{sparsity:.0%}"] = {
                "dense perplexity": values[0],
                "sparse perplexity": values[1],
                "relative difference": abs(values[1] / values[0] - 1),
                "same texts of 20": same,
                "largest gap where they part": max(gaps, default=0.0),
            }
    return found


@torch.no_grad()
def greedy(dense: torch.nn.Module, sparse: torch.nn.Module, windows: list[torch.Tensor]):
    """How many continuations are the same, and by how much the dense model's two best differ in
    logits where one is not."""
    same, gaps = 0, []
    for window in windows:
        prompt = window[None, :32]
        texts = [
            each.generate(prompt, max_new_tokens=32, do_sample=False)[0] for each in (dense, sparse)
        ]
        if torch.equal(*texts):
            same += 1
            continue
        part = int((texts[0] != texts[1]).nonzero()[0])
        best = dense(texts[0][None, :part]).logits[0, -1].float().topk(2).values
        gaps.append(float(best[0] - best[1]))
    return same, gaps


def in_vllm(folder: Path, models: Models, batches: list[int], threads: int) -> Figures:
    """Tokens per second that vLLM writes, dense and sparse, each in a process of its own."""
    sys.path.append(str(ROOT / "tests" / "engines"))
    import environments

    python = environments.vllm_python()
    found: Figures = {}
    for bits, sparsity in models:
        packed = random_llama(folder, sparsity, bits)
        plain = folder / f"llama-{sparsity:.0%}-4-dense"
        dense = {"DLP_KERNELS": "off"} if bits == 16 else {}
        one = vllm_rates(python, packed if bits == 16 else plain, batches, threads, dense)
        other = vllm_rates(python, packed, batches, threads, {})
        found[f"{bits} bits, {sparsity:.0%}"] = {
            **{f"batch {n}": other[f"{n}"] / one[f"{n}"] for n in batches},
            "memory": other["memory"] / one["memory"],
            "bytes of the Linears": linears(packed) / linears(plain if bits == 4 else None),
            "dense tokens/s": one[f"{batches[0]}"],
            "sparse tokens/s": other[f"{batches[0]}"],
        }
    return found


def linears(folder: Path | None) -> int:
    """Bytes of the blocks' Linears on disk; without a folder as bfloat16 has them."""
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**LLAMA))
    whole = 2 * sum(each.numel() for each in model.parameters())
    pruned = 2 * sum(e.numel() for n, e in model.named_parameters() if "layers" in n and e.ndim > 1)
    return pruned if folder is None else bytes_on_disk(folder) - (whole - pruned)


def vllm_rates(
    python: Path, folder: Path, batches: list[int], threads: int, more: dict[str, str]
) -> dict[str, float]:
    """What ``vllm_rates.py`` prints."""
    line = [str(python), str(Path(__file__).with_name("vllm_rates.py")), str(folder)]
    line += map(str, batches)
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}",
        **more,
    }
    done = subprocess.run(line, check=True, capture_output=True, text=True, env=environment)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def show(title: str, results: Figures) -> Table:
    """One row per result, one column per quantity."""
    columns = dict.fromkeys(name for row in results.values() for name in row)
    table = Table("", *columns, title=title)
    for row, found in results.items():
        cells = (f"{found[name]:.4g}" if name in found else "" for name in columns)
        table.add_row(row, *cells)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="file to add the results to")
    parser.add_argument("--only", choices=["linear", "transformers", "real", "vllm"], required=True)
    parser.add_argument("--isa", choices=HELD, default="avx512")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--batches", default="1,16")
    parser.add_argument("--models", default="16:0.5,16:0.7,4:0.7", help="bits and sparsity of each")
    parser.add_argument("--folder", type=Path, help="where random models are kept")
    parser.add_argument("--model", type=Path, help="the real one, as examples/real_model.py saves")
    arguments = parser.parse_args()
    batches = [int(each) for each in arguments.batches.split(",")]
    pairs = (each.split(":") for each in arguments.models.split(","))
    models = [(int(bits), float(sparsity)) for bits, sparsity in pairs]
    held = HELD[arguments.isa]
    if any(os.environ.get(name) != value for name, value in held.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **held})
    logger.remove()
    torch.set_num_threads(arguments.threads)
    folder = arguments.folder or Path(tempfile.gettempdir()) / "dlp_plugin_inference"
    folder.mkdir(parents=True, exist_ok=True)
    facts = here(threads=arguments.threads)
    results = {
        "linear": linear,
        "transformers": lambda: in_transformers(folder, models, batches, arguments.threads),
        "real": lambda: real(arguments.model),
        "vllm": lambda: in_vllm(folder, models, batches, arguments.threads),
    }[arguments.only]()
    Console(width=150).print(show(f"{arguments.only}, {arguments.isa}", results))
    if arguments.json:
        threads = "one thread" if arguments.threads == 1 else f"{arguments.threads} threads"
        name = f"inference: {arguments.only}, {arguments.isa}, {threads}"
        add(arguments.json, {name: {**facts, "results": results}})


if __name__ == "__main__":
    main()
