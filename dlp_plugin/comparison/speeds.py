"""Measures a pruned checkpoint as a dense and as a packed model: load time, memory and speed.

Each measurement runs in its own process, so that memory is measured from a clean start. The two
models take turns, so that other load on the machine affects both.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from loguru import logger
from transformers.utils.logging import disable_progress_bar

from dlp_plugin.checkpoints.files import read_config
from dlp_plugin.checkpoints.packing import pack
from dlp_plugin.checkpoints.stored import QUANT_METHOD
from dlp_plugin.checkpoints.trust import trusting_remote_code, trusts_remote_code
from dlp_plugin.comparison.memory import peak, reset_peak
from dlp_plugin.evaluation.causal import check_causal
from dlp_plugin.evaluation.speed import prefill_and_decode, weight_bytes
from dlp_plugin.precision import widen

__all__ = ["Speed", "cache_bytes", "speeds"]

_L3 = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")


@dataclass(frozen=True)
class Speed:
    """Load time, memory and speed of a model.

    :param load: seconds to load the model
    :param weights: bytes of its parameters and buffers
    :param peak: peak memory of the process while it loaded the model, in bytes, minus the
        memory that it held before; None if the system does not report it
    :param prefill: tokens per second of prefill
    :param decode: batch size to tokens per second of decoding, summed over the batch
    """

    load: float
    weights: int
    peak: int | None
    prefill: float
    decode: dict[int, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the values as plain JSON types."""
        return asdict(self)


def speeds(
    folder: str | Path,
    *,
    prompt: int = 512,
    tokens: int = 32,
    batches: Sequence[int] = (1,),
    threads: int | None = None,
    rounds: int = 2,
) -> dict[str, Speed]:
    """Measure a pruned checkpoint on the CPU, as a dense and as a packed model.

    :param folder: a packed checkpoint, or one that can be packed; the latter is packed into a
        temporary folder
    :param prompt: number of tokens of the prompt for prefill
    :param tokens: number of decoding steps
    :param batches: batch sizes to measure decoding with
    :param threads: number of torch's threads; None for torch's default
    :param rounds: how often each model is loaded and measured
    :return: ``dense`` and ``sparse`` to the medians over the rounds
    :raises ValueError: if the checkpoint cannot be packed, or is not a causal language model
    :raises RuntimeError: if a measuring process ends without a result
    """
    with TemporaryDirectory() as place:
        packed = Path(folder)
        method = ((read_config(packed) or {}).get("quantization_config") or {}).get("quant_method")
        if method != QUANT_METHOD:
            packed = Path(place) / "packed"
            pack(folder, packed)
        settings = (prompt, tokens, tuple(batches), threads, trusts_remote_code())
        found: dict[str, list[Speed]] = {"dense": [], "sparse": []}
        for _ in range(rounds):
            for way, measured in found.items():
                measured.append(_in_a_process(str(packed), way == "dense", settings))
    return {way: _median(measured) for way, measured in found.items()}


def cache_bytes() -> int | None:
    """Return the size of the processor's L3 cache.

    If the weights fit in it, a sparse model is hardly faster than the dense one.

    :return: bytes; None if the system does not report it
    """
    found = re.fullmatch(r"(\d+)K\s*", _L3.read_text()) if _L3.exists() else None
    return int(found[1]) * 1024 if found else None


def _in_a_process(folder: str, dense: bool, settings: tuple[Any, ...]) -> Speed:
    context = multiprocessing.get_context("spawn")
    receiving, sending = context.Pipe(duplex=False)
    worker = context.Process(target=_measure, args=(sending, folder, dense, *settings))
    worker.start()
    sending.close()
    try:
        found: Speed | Exception = receiving.recv()
    except EOFError:
        worker.join()
        raise RuntimeError(
            f"the process that measured {folder} ended with exit code {worker.exitcode}: there may "
            "not have been enough memory"
        ) from None
    finally:
        worker.join()
    if isinstance(found, Exception):
        raise found
    return found


def _measure(
    sending: Connection,
    folder: str,
    dense: bool,
    prompt: int,
    tokens: int,
    batches: tuple[int, ...],
    threads: int | None,
    trusted: bool,
) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # measure the CPU only
    logger.remove()
    disable_progress_bar()  # type: ignore[no-untyped-call]
    from dlp_plugin.checkpoints.loading import load_dense, load_stored  # after logging is off

    if threads is not None:
        torch.set_num_threads(threads)
    try:
        with trusting_remote_code(trusted):
            reset_peak()
            before = peak()
            started = time.perf_counter()
            model = (load_dense if dense else load_stored)(folder)
            widen(model)
            load, most = time.perf_counter() - started, peak()
        check_causal(model, "speed measures tokens per second")
        read, written = prefill_and_decode(model, prompt, tokens, batches)
        held = None if before is None or most is None else most - before
        sending.send(Speed(load, weight_bytes(model), held, read, written))
    except (OSError, ValueError) as error:
        sending.send(error)


def _median(measured: list[Speed]) -> Speed:
    peaks = [each.peak for each in measured if each.peak is not None]
    return Speed(
        statistics.median(each.load for each in measured),
        measured[0].weights,
        max(peaks, default=None),
        statistics.median(each.prefill for each in measured),
        {
            batch: statistics.median(each.decode[batch] for each in measured)
            for batch in measured[0].decode
        },
    )
