"""A pruned checkpoint dense and sparse, side by side: seconds, memory, tokens per second.

Each is measured in a process of its own, so that neither holds the other's memory, and they take
turns, so that what else the machine does meets both.
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
    """What was measured of a model in memory.

    :param load: seconds to load it
    :param weights: bytes of its parameters and buffers
    :param peak: bytes that the process held at most until it was loaded, less what it held
        before; None where the system does not tell
    :param prefill: tokens of a prompt read per second
    :param decode: texts at a time to tokens written per second, all texts together
    """

    load: float
    weights: int
    peak: int | None
    prefill: float
    decode: dict[int, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The same as JSON holds it."""
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
    """Measure a pruned checkpoint on the CPU, as a dense model and as it is stored.

    :param folder: a packed checkpoint, or one that can be packed, which is done in a temporary
        folder
    :param prompt: tokens of the prompt that is read
    :param tokens: how many are written
    :param batches: texts that are written at a time
    :param threads: of torch; None for its default
    :param rounds: how often each is loaded and measured, in turn; medians are told
    :return: ``dense`` and ``sparse``
    :raises ValueError: if it cannot be packed, or is no causal language model
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
    """Size of the processor's last cache; None where the system does not tell.

    Weights that lie in it are read about as fast dense as sparse.
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
            f"the process that measured {folder} ended with {worker.exitcode}: it may have taken "
            "more memory than there is"
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
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # what is measured is the processor
    logger.remove()
    disable_progress_bar()  # type: ignore[no-untyped-call]
    from dlp_plugin.checkpoints.loading import load_dense, load_stored  # silent from here on

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
