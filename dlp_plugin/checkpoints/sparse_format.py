"""A pruned Linear in few bytes, bit for bit: what the living weights are, and where.

A weight ``[out, in]`` is stored as tensors, all in row-major order of the living (kept) ones, so
that rows or columns can be taken out by counting bits of the mask:

- ``weight_packed`` uint8 ``[out, ceil(in / 8)]``: bit ``j % 8``, the lowest first, of byte
  ``j // 8`` says whether column j is stored. Stored is every pattern of bits that is not +0.0;
- kind ``planes`` (bfloat16, at most 16 different exponents): ``weight_fractions`` uint8
  ``[kept]``, a sign bit and 7 of the mantissa; ``weight_exponents`` uint8 ``[ceil(kept / 2)]``,
  4-bit indices, the low one first, into ``weight_table`` uint8 ``[exponents]``, ascending;
- kind ``values`` (other floats, and other bfloat16): ``weight_values`` ``[kept]`` as they are;
- kind ``integers`` (a pack-quantized Linear): ``weight_integers`` uint8, unsigned as
  compressed-tensors packs them, ``[kept]`` of 8 bits or ``[ceil(kept / 2)]`` pairs of 4, the low
  one first; ``weight_scale`` and ``weight_zero_point`` as the source has them. The mask marks
  what differs from its zero point; where it saves nothing there is none, and all are stored.

A tensor ``NAME`` ``[experts, ...]`` is as many Linears, ``NAME.0`` and on, of which
``quantization_config`` tells under ``fused``.

``[[0, 1.5, 0], [-2, 0, 0]]`` in bfloat16 is the mask ``[[2], [1]]``, the fractions
``[0x40, 0x80]`` and the exponents ``[0x10]`` of the table
``[127, 128]``.

This module needs torch alone, as engines that load such files import it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from dlp_plugin.checkpoints.bits import (
    eight_of_a_byte,
    integers_of_words,
    mask_of,
    nibbles_of,
    ones,
    packed,
)
from dlp_plugin.checkpoints.stored import (
    FLOATS,
    PARTS,
    QUANT_METHOD,
    TABLE,
    VERSION,
    Stored,
    read_stored,
)

__all__ = [
    "PARTS",
    "QUANT_METHOD",
    "VERSION",
    "Stored",
    "broken",
    "checked",
    "decode",
    "decode_integers",
    "encode",
    "encode_anyway",
    "encode_integers",
    "planes_of",
    "read_stored",
    "size_of",
    "values_of",
]

_BITS_OF = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of a weight
_CHUNK = 1 << 19  # weights decoded at a time: what is in between stays in the caches


def encode(weight: Tensor) -> tuple[Stored, dict[str, Tensor]] | None:
    """A weight as it is stored, exactly; None where it would not shrink.

    :param weight: ``[out, in]``; of another dtype than the floats of 16 to 64 bits it is None
    :return: what to write to ``config.json``, and local names to tensors
    """
    if weight.dtype not in FLOATS.values():
        return None
    stored, parts = encode_anyway(weight)
    return (stored, parts) if size_of(parts) < weight.nbytes else None


def encode_anyway(weight: Tensor) -> tuple[Stored, dict[str, Tensor]]:
    """A weight as it is stored, exactly, smaller or not.

    :param weight: ``[out, in]``, of the floats of 16 to 64 bits
    :return: as :func:`encode` does
    """
    bits = weight.contiguous().view(_BITS_OF[weight.itemsize])
    present = bits != 0
    living = _marked(bits, present)
    mask = {"weight_packed": mask_of(present)}
    planes = planes_of(living) if weight.dtype == torch.bfloat16 else None
    kind, count = ("planes", len(planes["weight_table"])) if planes else ("values", 0)
    stored = Stored(kind, _shape_of(weight), weight.dtype, living.numel(), exponents=count)
    return stored, mask | (planes or {"weight_values": living.view(weight.dtype)})


def encode_integers(
    integers: Tensor, scale: Tensor, zero_point: Tensor | None, *, bits: int, group_size: int
) -> tuple[Stored, dict[str, Tensor]]:
    """A pack-quantized weight as it is stored, exactly; without a mask where it saves nothing.

    :param integers: uint8 ``[out, in]``, from 0 to ``2 ** bits - 1``
    :param scale: ``[out, groups]``
    :param zero_point: int32 ``[ceil(out * bits / 32), groups]`` as compressed-tensors packs them;
        None where they are all in the middle
    :param bits: 4 or 8
    :param group_size: columns that share a scale; -1 for one scale per row
    :return: what to write to ``config.json``, and local names to tensors
    """
    shape, symmetric = _shape_of(integers), zero_point is None
    stored = Stored(
        "integers", shape, scale.dtype, integers.numel(), bits, group_size, symmetric, masked=False
    )
    scales = {"weight_scale": scale}
    if zero_point is not None:
        scales["weight_zero_point"] = zero_point
    zero = _zero_points(stored, scales)
    present = (_grouped(integers, stored) != zero).reshape(shape)
    living = _marked(integers, present)
    sparse = {"weight_packed": mask_of(present), "weight_integers": packed(living, bits)}
    dense = {"weight_integers": packed(integers.flatten(), bits)}
    if size_of(sparse) >= size_of(dense):
        return stored, dense | scales
    return replace(stored, kept=living.numel(), masked=True), sparse | scales


def decode(
    stored: Stored, parts: Mapping[str, Tensor], dtype: torch.dtype | None = None, name: str = ""
) -> Tensor:
    """The weight ``[out, in]`` of a Linear, bit for bit what was encoded.

    Integers are dequantized in their scales' dtype, to the bits that compressed-tensors gives.

    :param parts: local names to tensors, all on one device
    :param dtype: what to convert to at the end; by default it is ``stored.dtype``
    :param name: the Linear's full name, for errors
    :raises ValueError: naming the Linear and the part, if a part is missing or has another shape
        or dtype than ``stored`` says, the mask marks another number of weights, an index is
        outside the table, or bits that are nobody's are not zero
    """
    with _cores() as cores:
        device = checked(stored, parts, name)
        weight = torch.empty(stored.shape, dtype=dtype or stored.dtype, device=device)
        if stored.kind == "integers":
            scale, zero = parts["weight_scale"].unsqueeze(-1), _zero_points(stored, parts)

            def write(rows: slice, bits: Tensor, present: Tensor | None) -> None:
                integers = _filled(stored, bits, present, zero[rows])
                shift = integers.to(scale.dtype) - zero[rows].to(scale.dtype)
                weight[rows] = (shift * scale[rows]).flatten(1)
        else:

            def write(rows: slice, bits: Tensor, present: Tensor | None) -> None:
                weight[rows] = bits.view(stored.dtype)

        _spread(stored, parts, name, write, cores)
    return weight


def decode_integers(stored: Stored, parts: Mapping[str, Tensor], name: str = "") -> Tensor:
    """The integers uint8 ``[out, in]`` of a Linear of kind ``integers``, as they were encoded.

    :raises ValueError: as :func:`decode` does
    """
    with _cores() as cores:
        device = checked(stored, parts, name)
        integers = torch.empty(stored.shape, dtype=torch.uint8, device=device)
        zero = _zero_points(stored, parts)

        def write(rows: slice, bits: Tensor, present: Tensor | None) -> None:
            integers[rows] = _filled(stored, bits, present, zero[rows]).flatten(1)

        _spread(stored, parts, name, write, cores)
    return integers


def values_of(stored: Stored, parts: Mapping[str, Tensor]) -> Tensor:
    """The floats that are stored, one after another, of kind ``values`` or ``planes``: ``[kept]``.

    :param parts: local names to tensors that :func:`checked` has looked at
    """
    if stored.kind == "values":
        return parts["weight_values"]
    values = torch.empty(stored.kept, dtype=torch.int16, device=parts["weight_fractions"].device)
    for first in range(0, stored.kept, _CHUNK):
        last = min(first + _CHUNK, stored.kept)
        values[first:last] = _take(stored, parts, first, last)
    return values.view(stored.dtype)


def checked(stored: Stored, parts: Mapping[str, Tensor], name: str) -> torch.device:
    """The device that the parts of a Linear are on, once they are what they should be.

    :param name: the Linear's full name, for errors
    :raises ValueError: as :func:`decode` does, but for the number of weights that are marked
    """
    dtypes = stored.part_dtypes()
    for part, shape in stored.part_shapes().items():
        found = parts.get(part)
        if found is None:
            raise broken(name, part, "is missing")
        if tuple(found.shape) != shape or found.dtype != dtypes[part]:
            said = f"{dtypes[part]} {list(shape)}"
            raise broken(name, part, f"is {found.dtype} {list(found.shape)} in place of {said}")
    filled = stored.shape[1] % 8
    if stored.masked and filled and (parts["weight_packed"][:, -1] >> filled).any():
        raise broken(name, "weight_packed", "marks columns that there are not")
    pairs = {"planes": "weight_exponents", "integers": "weight_integers"}.get(stored.kind)
    if pairs and stored.kept % 2 and stored.bits != 8 and parts[pairs][-1] >> 4:
        raise broken(name, pairs, "has a value after the last")
    if stored.kind == "planes" and stored.kept and stored.exponents < TABLE:
        both = parts["weight_exponents"]
        if max(int((both & 15).max()), int((both >> 4).max())) >= stored.exponents:
            said = f"points outside the {stored.exponents} entries of weight_table"
            raise broken(name, "weight_exponents", said)
    return next(iter(parts.values())).device


def broken(name: str, part: str, what: str) -> ValueError:
    """The error of a damaged tensor, with its full name and what to do."""
    full = f"{name}.{part}" if name else part
    return ValueError(f"{full} {what}: the file is damaged; fetch it or pack the checkpoint again")


def _spread(
    stored: Stored,
    parts: Mapping[str, Tensor],
    name: str,
    write: Callable[[slice, Tensor, Tensor | None], None],
    cores: int,
) -> None:
    """Give rows by rows the bits of the weights, zero where none is stored, and where one is."""
    rows, columns = stored.shape
    step = max(1, _CHUNK // max(1, columns))
    chunks = [slice(first, min(first + step, rows)) for first in range(0, rows, step)]
    if not stored.masked:

        def dense(chunk: slice) -> None:
            found = _take(stored, parts, chunk.start * columns, chunk.stop * columns)
            write(chunk, found.view(-1, columns), None)

        _run(dense, chunks if columns else [], parts["weight_scale"].device, cores)
        return
    mask = parts["weight_packed"]
    ends = [0, *ones(mask).cumsum(0).tolist()]
    if ends[-1] != stored.kept:
        said = f"marks another number of weights than the {stored.kept} that are stored"
        raise broken(name, "weight_packed", said)
    eights = eight_of_a_byte(mask.device)

    def sparse(chunk: slice) -> None:
        shape = chunk.stop - chunk.start, -1
        bits = eights.index_select(0, mask[chunk].flatten().int()).view(shape).view(torch.bool)
        present = bits[:, :columns].contiguous().flatten()
        places = present.cumsum(0, dtype=torch.int32)
        living = _take(stored, parts, ends[chunk.start], ends[chunk.stop])
        # Where nothing is stored the place is that of the last before, or the zero in front.
        found = torch.cat((living.new_zeros(1), living)).index_select(0, places) * present
        write(chunk, found.view(shape), present.view(shape))

    _run(sparse, chunks if columns else [], mask.device, cores)


@contextmanager
def _cores() -> Iterator[int]:
    """How many cores torch may use; meanwhile none of its operations uses more than one.

    It would divide one short operation after another among them, and wait for the last each time.
    """
    cores = torch.get_num_threads()
    torch.set_num_threads(1)  # of this thread, and of those that begin after this
    try:
        yield cores
    finally:
        torch.set_num_threads(cores)


def _run(
    work: Callable[[slice], None], chunks: list[slice], device: torch.device, cores: int
) -> None:
    """Do some work for every chunk; on a processor for as many at a time as there are cores."""
    cores = min(cores, len(chunks))
    if device.type != "cpu" or cores < 2:
        for chunk in chunks:
            work(chunk)
        return
    inference = torch.is_inference_mode_enabled()  # each thread has its own

    def alone(chunk: slice) -> None:
        with torch.inference_mode(inference):
            work(chunk)

    with ThreadPoolExecutor(cores) as pool:
        list(pool.map(alone, chunks))


def _filled(stored: Stored, bits: Tensor, present: Tensor | None, zero: Tensor) -> Tensor:
    """Integers ``[rows, groups, columns of a group]``, the zero point where none is stored."""
    integers = _grouped(bits, stored)
    if present is None:
        return integers
    return (integers ^ zero) * _grouped(present, stored) ^ zero


def _take(stored: Stored, parts: Mapping[str, Tensor], first: int, last: int) -> Tensor:
    """The bits of the weights of these places among those that are stored."""
    if stored.kind == "values":
        return parts["weight_values"].view(_BITS_OF[stored.dtype.itemsize])[first:last]
    if stored.kind == "planes":
        fractions = parts["weight_fractions"][first:last].to(torch.int16)
        table = torch.zeros(TABLE, dtype=torch.int16, device=fractions.device)
        table[: stored.exponents] = parts["weight_table"].to(torch.int16) << 7
        # A byte holds two indices: looked up together, as halves of a word.
        both = torch.arange(256, device=table.device)
        words = torch.stack((table[both & 15], table[both >> 4]), -1).view(torch.int32).flatten()
        indices = parts["weight_exponents"][first // 2 : (last + 1) // 2].int()
        exponents = words.index_select(0, indices).view(torch.int16)[first % 2 :][: last - first]
        return (fractions & 0x7F) | ((fractions & 0x80) << 8) | exponents
    if stored.bits == 8:
        return parts["weight_integers"][first:last]
    pairs = parts["weight_integers"][first // 2 : (last + 1) // 2]
    return nibbles_of(pairs)[first % 2 :][: last - first]


def _marked(matrix: Tensor, present: Tensor) -> Tensor:
    """What is marked of a matrix, row by row."""
    chunks = zip(matrix.flatten().split(_CHUNK), present.flatten().split(_CHUNK), strict=True)
    return torch.cat([one.index_select(0, marks.nonzero().flatten()) for one, marks in chunks])


def planes_of(bits: Tensor) -> dict[str, Tensor] | None:
    """Bfloat16 numbers, given as int16, in planes by their local names.

    :return: None where the table is too small
    """
    exponents = (bits >> 7 & 0xFF).int()
    table = exponents.bincount(minlength=256).nonzero().flatten()
    if len(table) > TABLE:
        return None
    places = torch.zeros(256, dtype=torch.uint8, device=bits.device)
    places[table] = torch.arange(len(table), dtype=torch.uint8, device=bits.device)
    return {
        "weight_fractions": (bits >> 8 & 0x80 | bits & 0x7F).to(torch.uint8),
        "weight_exponents": packed(places.index_select(0, exponents), 4),
        "weight_table": table.to(torch.uint8),
    }


def _zero_points(stored: Stored, parts: Mapping[str, Tensor]) -> Tensor:
    """The unsigned zero points of integers, uint8 ``[out, groups, 1]``."""
    scale = parts["weight_scale"]
    if stored.symmetric:
        middle = 1 << (stored.bits - 1)
        return torch.full((*scale.shape, 1), middle, dtype=torch.uint8, device=scale.device)
    words = parts["weight_zero_point"].T
    return integers_of_words(words, stored.bits, stored.shape[0]).T.unsqueeze(-1)


def _grouped(matrix: Tensor, stored: Stored) -> Tensor:
    """A matrix ``[rows, in]`` as ``[rows, groups, columns of a group]``."""
    return matrix.reshape(len(matrix), stored.groups, matrix.shape[1] // max(1, stored.groups))


def _shape_of(matrix: Tensor) -> tuple[int, int]:
    rows, columns = matrix.shape
    return rows, columns


def size_of(parts: Mapping[str, Tensor]) -> int:
    """Bytes of tensors."""
    return sum(part.nbytes for part in parts.values())
