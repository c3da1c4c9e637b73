"""Compares methods, sparsities and pruners on one model, in one run that can be resumed.

Calibration runs once for all methods: they score blocks on the same activation norms. A method
with ``auto`` or ``-refined`` selects on held-out samples and scores on the others. A method of
fixed strength scores on all samples. So every plan equals the plan that a recipe with the method's
modifier makes. Pruners prune on all samples. There is one difference to recipes: experts that
received no token are left out by all methods, even by those that use weights only.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from compressed_tensors.offload import remove_dispatch
from compressed_tensors.utils import match_named_modules
from llmcompressor.utils.dev import get_main_device

from dlp_plugin.checkpoints.files import bytes_on_disk, shards
from dlp_plugin.checkpoints.loading import (
    apply_recipe,
    check_prunable,
    load_config,
    load_dense,
    load_to_prune,
)
from dlp_plugin.checkpoints.placing import let_go, placed
from dlp_plugin.comparison.memory import peak, reset_peak
from dlp_plugin.comparison.names import (
    DISTILLING,
    EVERY,
    FEWEST,
    Contender,
    Scope,
    Way,
    bits_named,
    contender_named,
    plan_name,
    pruner_named,
    target_named,
    target_of,
)
from dlp_plugin.comparison.planning import PlanningModifier
from dlp_plugin.comparison.results import Cell, Comparison, Plain, quantizing, recipe_of
from dlp_plugin.comparison.storing import group_size_of, smaller
from dlp_plugin.comparison.yardstick import Yardstick
from dlp_plugin.evaluation.causal import check_causal
from dlp_plugin.evaluation.finite import check_finite
from dlp_plugin.files import check_writable, reserved
from dlp_plugin.planning.plan import Plan, package_versions
from dlp_plugin.precision import is_native
from dlp_plugin.scoring.blocks import outer_block
from dlp_plugin.scoring.routers import unnamed_routers
from dlp_plugin.search.progress import digest

__all__ = ["compare"]


def compare(
    model: str,
    calibration: Mapping[str, Any],
    yardstick: Yardstick,
    folder: str | Path,
    *,
    methods: Sequence[str],
    sparsities: Sequence[float | str],
    pruners: Sequence[str] = ("wanda",),
    bits: Sequence[int | str] = (16,),
    sizes: bool = False,
    refine: int = 16,
    evolve: int = 40,
    scope: Scope = EVERY,
    report: Callable[[Cell], Any] = lambda _: None,
) -> Comparison:
    """Prune a model by every method, at every sparsity, with every pruner, and measure it.

    ``results.json`` in ``folder`` is written after every plan and cell. Plans and cells in it are
    not made again, and an interrupted search continues.

    :param model: a causal language model: a local folder, or an id on the hub
    :param calibration: arguments of ``oneshot()`` for calibration, with a ``dataset`` of token ids
    :param yardstick: what to measure
    :param folder: to write ``results.json`` to
    :param methods: as :func:`~dlp_plugin.comparison.names.contender_named` takes them
    :param sparsities: targets as :func:`~dlp_plugin.comparison.names.target_named` takes them
    :param pruners: as :func:`~dlp_plugin.comparison.names.pruner_named` takes them
    :param bits: as :func:`~dlp_plugin.comparison.names.bits_named` takes them; below 16, pruned
        models are quantized by GPTQ that keeps the zeros, and the dense model is measured too;
        below 4, only the dense model is measured
    :param sizes: record bytes on disk also at 16 bits; models are then saved, and measured as
        saved
    :param refine: steps of the gradient search, for the methods that are refined
    :param evolve: generations of the evolution, for the methods that are evolved
    :param scope: which modules are pruned, and which are neither pruned nor quantized
    :param report: called with every cell that is measured in this run
    :return: the requested results, including those of earlier runs
    :raises ValueError: if an argument is invalid, the folder holds results of another model or
        other data, or the dense model's perplexity is not finite
    :raises BlockingIOError: if another comparison is writing to the folder
    """
    asked = [contender_named(text, refine, evolve) for text in methods]
    contenders = {contender.name: contender for contender in asked}
    targets = _targets(sparsities)
    widths = list(dict.fromkeys(bits_named(each) for each in bits))
    ways = {pruner_named(pruner).way for pruner in pruners}
    distills = any("distill" in pruner_named(pruner).fields for pruner in pruners)
    path = Path(folder) / "results.json"
    check_prunable(model)
    tasks = yardstick.names()
    subject = _subject(model, calibration, yardstick.windows)
    group_size = group_size_of(model, scope.ignore) if min(widths) < 16 else None
    bench = _Bench(model, calibration, yardstick, tasks, sizes or widths != [16])
    path.parent.mkdir(parents=True, exist_ok=True)
    with reserved(path):
        check_writable(path)
        found = _taken_up(path, subject, scope, yardstick)
        found.group_size = group_size or found.group_size
        unknown = not math.isfinite(found.dense or math.nan)
        missing = [task for task in tasks if task not in found.accuracy]
        if unknown or missing:
            dense = placed(load_to_prune(model)[0])
            if unknown:
                check_causal(dense, "compare measures perplexity")
                value = yardstick.perplexity(dense)
                found.dense = check_finite(value, f"the perplexity of {model}", dense)
                found.save(path)
            found.accuracy |= yardstick.accuracy(dense, calibration["tokenizer"], missing)
            let_go(dense)
            found.save(path)
        wanted = {
            (plan_name(contender.name, way), target): (contender, target, way)
            for contender, target, every in product(contenders.values(), targets, sorted(ways))
            for way in [contender.way(every, target)]
        }
        bench.plan(found, wanted, path)
        for width in widths:
            if bench.sizes and bench.lacks(found.plain.get(width)):
                found.plain[width] = bench.plain(found, width)
                found.save(path)
            if width < 16 and distills and bench.lacks(found.distilled.get(width)):
                found.distilled[width] = bench.plain(found, width, DISTILLING)
                found.save(path)
            if width < FEWEST:
                continue
            for pruner, target, method in product(dict.fromkeys(pruners), targets, contenders):
                before = found.cell(method, target, pruner, width)
                if bench.lacks(before):
                    cell = bench.cell(found, method, target, pruner, width)
                    found.cells = [*(each for each in found.cells if each is not before), cell]
                    found.save(path)
                    report(cell)
    return found.only(contenders, targets, dict.fromkeys(pruners), widths)


@dataclass(frozen=True)
class _Bench:
    """Makes pruned models and measures them.

    :param model: a local folder, or an id on the hub
    :param calibration: arguments of ``oneshot()`` for calibration
    :param yardstick: what to measure
    :param tasks: names of the tasks to measure accuracy on
    :param sizes: whether to measure bytes too; models are then saved, and measured as saved
    """

    model: str
    calibration: Mapping[str, Any]
    yardstick: Yardstick
    tasks: Sequence[str]
    sizes: bool

    def lacks(self, measured: Cell | Plain | None) -> bool:
        """Whether an earlier run did not measure everything that this run needs."""
        if measured is None or (self.sizes and measured.bytes is None):
            return True
        return not set(self.tasks) <= set(measured.accuracy)

    def plan(
        self,
        found: Comparison,
        wanted: Mapping[tuple[str, str], tuple[Contender, str, Way]],
        path: Path,
    ) -> None:
        """Make the missing plans, and save each as soon as it is made.

        :param wanted: a plan's name and target to the contender, target and way
        :param path: of ``results.json``
        """

        def keep(method: str, target: str, plan: Plan, seconds: float) -> None:
            found.plans.setdefault(method, {})[target] = plan
            found.decided.setdefault(method, {})[target] = seconds
            found.cells = [  # drop cells that were measured with an older plan of this name
                cell
                for cell in found.cells
                if (found.plan_name(cell.method, cell.target, cell.pruner), cell.target)
                != (method, target)
            ]
            found.save(path)

        missing = [
            each
            for (name, target), each in wanted.items()
            if target not in found.plans.get(name, {})
        ]
        if missing:
            planning = PlanningModifier(missing, keep, path.with_name("search.json"), found.scope)
            let_go(apply_recipe(self.model, planning, **self.calibration))

    def cell(self, found: Comparison, method: str, target: str, pruner: str, bits: int) -> Cell:
        plan = found.plan(method, target, pruner)
        recipe = recipe_of(plan, pruner, bits, found.group_size, found.scope)
        reset_peak()
        started = time.perf_counter()
        if self.sizes:
            measured, size = self._stored(recipe, plan, found.scope)
        else:
            pruned = apply_recipe(self.model, recipe, **self.calibration)
            measured, size = self._measured(pruned, plan, found.scope), None
        return Cell(
            method=method,
            target=target,
            pruner=pruner,
            **measured,
            seconds=time.perf_counter() - started,
            bits=bits,
            bytes=size,
            memory=peak(),
        )

    def plain(self, found: Comparison, bits: int, distill: int = 0) -> Plain:
        """Measure the dense model; below 16 bits it may be distilled."""
        if bits < 16:
            recipe = quantizing(bits, found.group_size, found.scope, distill)
            measured, size = self._stored(recipe)
            del measured["achieved"]
            return Plain(**measured, bytes=size)
        with TemporaryDirectory() as folder:
            load_dense(self.model).save_pretrained(folder)
            size = bytes_on_disk(Path(folder))
        return Plain(perplexity=found.dense or math.nan, bytes=size, accuracy=found.accuracy)

    def _stored(
        self, recipe: str, plan: Plan | None = None, scope: Scope = EVERY
    ) -> tuple[dict[str, Any], int]:
        """Apply a recipe, save the model and measure it from disk; return results and bytes."""
        with TemporaryDirectory() as folder:
            saved = Path(folder) / "saved"
            let_go(apply_recipe(self.model, recipe, output=saved, **self.calibration))
            kept = smaller(saved)
            stored, _ = load_to_prune(kept)
            return self._measured(stored, plan, scope), bytes_on_disk(kept)

    def _measured(
        self, model: Any, plan: Plan | None = None, scope: Scope = EVERY
    ) -> dict[str, Any]:
        """Measure perplexity, accuracy and achieved sparsity; this frees the model."""
        plain: Any = remove_dispatch(model)  # after oneshot(), weights move to the GPU at every use
        achieved = _achieved(plain, plan, scope)  # must come first: placed() may offload weights
        model = placed(plain)
        value = self.yardstick.perplexity(model)
        tasks = self.tasks if math.isfinite(value) else ()  # else the scores would not be finite
        accuracy = self.yardstick.accuracy(model, self.calibration["tokenizer"], tasks)
        accuracy |= dict.fromkeys(set(self.tasks) - set(tasks), math.nan)
        let_go(model)
        return {"perplexity": value, "achieved": achieved, "accuracy": accuracy}


def _targets(sparsities: Iterable[float | str]) -> list[str]:
    """Return the names of the targets without duplicates, lowest sparsity first."""

    def rank(target: str) -> tuple[float, str]:
        sparsity, structure = target_of(target)
        return sparsity, str(structure)

    return sorted({target_named(one) for one in sparsities}, key=rank)


def _achieved(model: Any, plan: Plan | None, scope: Scope) -> float:
    """Return the sparsity of the Linears that a plan prunes."""
    blocks = [] if plan is None else [block.name for block in plan.blocks]
    dense = {*unnamed_routers(model, scope.targets), *([] if plan is None else plan.unseen)}
    pruned = [
        module.weight
        for name, module in match_named_modules(model, scope.targets, scope.ignore)
        if isinstance(module, torch.nn.Linear) and outer_block(name, blocks) and name not in dense
    ]
    zeros = sum(int((weight == 0).sum()) for weight in pruned)
    return zeros / max(sum(weight.numel() for weight in pruned), 1)


def _subject(
    model: str, calibration: Mapping[str, Any], windows: Sequence[torch.Tensor]
) -> dict[str, str]:
    """Describe what results depend on besides method, target and pruner."""
    config = load_config(model)
    folder = Path(model)
    safe = any(folder.glob("*.safetensors"))
    files = shards(folder) if safe else sorted(folder.glob("*.bin"))
    weights = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    others = {k: repr(v) for k, v in calibration.items() if k not in ("tokenizer", "dataset")}
    device = get_main_device()
    native = config.dtype is None or is_native(config.dtype, device)
    return {
        "model": model,
        "weights": digest([config.to_json_string(), getattr(config, "_commit_hash", ""), weights]),
        "calibration data": digest([calibration["dataset"].to_dict(), others]),
        "test data": digest([window.tolist() for window in windows]),
        "device": _named(device) + ("" if native else ", in float32"),
        **package_versions(),
    }


def _named(device: torch.device) -> str:
    """Return a device's name; results of different kinds of devices must not be mixed."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _taken_up(
    path: Path, subject: dict[str, str], scope: Scope, yardstick: Yardstick
) -> Comparison:
    """Read the results of an earlier run on the same subject, or start new ones."""
    if not path.exists():
        return Comparison(subject=subject, scope=scope, questions=yardstick.questions)
    try:
        found = Comparison.model_validate_json(path.read_text())
    except ValueError:
        raise ValueError(
            f"{path} does not hold a comparison of this version; name another folder"
        ) from None
    differing = [key for key in subject if found.subject.get(key) != subject[key]]
    differing += ["targets and ignore"] if found.scope != scope else []
    if yardstick.tasks:
        if found.accuracy and found.questions != yardstick.questions:
            differing.append("questions per task")
        found.questions = yardstick.questions
    if differing:
        raise ValueError(
            f"{path.parent} holds a comparison that differs in: {', '.join(differing)}; name "
            f"another folder, or delete {path} to measure everything again"
        )
    return found
