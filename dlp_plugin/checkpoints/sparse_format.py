"""The sparse format: a pruned Linear as a bit mask and its kept weights, without loss.

A weight ``[out, in]`` is stored as several tensors. They hold the kept weights in row-major
order, so that rows or columns can be taken out by counting mask bits:

- ``weight_packed`` uint8 ``[out, ceil(in / 8)]``, the mask: bit ``j % 8`` (0 is the lowest) of
  byte ``j // 8`` says whether column j is kept. Every weight whose bits are not +0.0 is kept;
- kind ``planes`` (bfloat16 with at most 16 different exponents): ``weight_fractions`` uint8
  ``[kept]`` holds the sign bit and 7 mantissa bits; ``weight_exponents`` uint8
  ``[ceil(kept / 2)]`` holds pairs of 4-bit indices, the first in the low bits, into
  ``weight_table`` uint8 ``[exponents]``, which is in ascending order;
- kind ``values`` (all other floats): ``weight_values`` ``[kept]`` holds the weights unchanged;
- kind ``integers`` (a pack-quantized Linear): ``weight_integers`` uint8 holds unsigned integers as
  compressed-tensors packs them, ``[kept]`` for 8 bits, or ``[ceil(kept / 2)]`` pairs for 4 bits,
  the first in the low bits; ``weight_scale`` and ``weight_zero_point`` are the source's. The mask
  marks integers that differ from their zero point. If a mask would not make the Linear smaller,
  there is none, and all integers are stored.

A fused tensor ``NAME`` ``[experts, ...]`` is stored as the Linears ``NAME.0``, ``NAME.1`` and so
on; ``quantization_config`` lists it under ``fused``.

Example: ``[[0, 1.5, 0], [-2, 0, 0]]`` in bfloat16 has the mask ``[[2], [1]]``, the fractions
``[0x40, 0x80]``, the exponents ``[0x10]`` and the table ``[127, 128]``.

Engines import this module, so it imports nothing but torch.
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

_BITS_OF = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # bytes of a weight to integer dtype
_CHUNK = 1 << 19  # weights decoded at a time, so that intermediate results fit in the caches


def encode(weight: Tensor) -> tuple[Stored, dict[str, Tensor]] | None:
    """Encode a weight without loss, if that makes it smaller.

    :param weight: ``[out, in]``
    :return: how the weight is stored and its tensors by local names; None if it would not become
        smaller, or is not a float of 16, 32 or 64 bits
    """
    if weight.dtype not in FLOATS.values():
        return None
    stored, parts = encode_anyway(weight)
    return (stored, parts) if size_of(parts) < weight.nbytes else None


def encode_anyway(weight: Tensor) -> tuple[Stored, dict[str, Tensor]]:
    """Encode a weight without loss, whether or not that makes it smaller.

    :param weight: ``[out, in]``, floats of 16, 32 or 64 bits
    :return: how the weight is stored, and its tensors by local names
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
    """Encode a pack-quantized weight without loss; it gets a mask only if that makes it smaller.

    :param integers: uint8 ``[out, in]``, from 0 to ``2 ** bits - 1``
    :param scale: ``[out, groups]``
    :param zero_point: int32 ``[ceil(out * bits / 32), groups]`` as compressed-tensors packs them;
        None for symmetric weights, whose zero point is ``2 ** (bits - 1)``
    :param bits: 4 or 8
    :param group_size: columns that share a scale; -1 for one scale per row
    :return: how the weight is stored, and its tensors by local names
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
    """Decode a packed Linear to exactly the weight that was encoded.

    Integers are dequantized in the dtype of their scales, to the same bits as compressed-tensors.

    :param stored: how the Linear is stored
    :param parts: local names to tensors, all on one device
    :param dtype: of the result; ``stored.dtype`` by default
    :param name: the Linear's full name, for errors
    :return: ``[out, in]``
    :raises ValueError: naming the Linear and the part, if a part is missing or has another shape
        or dtype than ``stored`` says, the mask does not mark ``stored.kept`` weights, an index is
        outside the table, or a padding bit is not zero
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
    """Decode the integers of a Linear of kind ``integers``, without dequantizing them.

    :param stored: how the Linear is stored
    :param parts: local names to tensors, all on one device
    :param name: the Linear's full name, for errors
    :return: uint8 ``[out, in]``
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
    """Decode the kept weights of a Linear of kind ``values`` or ``planes``.

    :param stored: how the Linear is stored
    :param parts: local names to tensors that have passed :func:`checked`
    :return: ``[kept]`` of ``stored.dtype``, in row-major order
    """
    if stored.kind == "values":
        return parts["weight_values"]
    values = torch.empty(stored.kept, dtype=torch.int16, device=parts["weight_fractions"].device)
    for first in range(0, stored.kept, _CHUNK):
        last = min(first + _CHUNK, stored.kept)
        values[first:last] = _take(stored, parts, first, last)
    return values.view(stored.dtype)


def checked(stored: Stored, parts: Mapping[str, Tensor], name: str) -> torch.device:
    """Check the parts of a packed Linear, except that the mask marks ``stored.kept`` weights.

    :param stored: how the Linear is stored
    :param parts: local names to tensors, all on one device
    :param name: the Linear's full name, for errors
    :return: the device of the parts
    :raises ValueError: as :func:`decode` does
    """
    dtypes = stored.part_dtypes()
    for part, shape in stored.part_shapes().items():
        found = parts.get(part)
        if found is None:
            raise broken(name, part, "is missing")
        if tuple(found.shape) != shape or found.dtype != dtypes[part]:
            said = f"{dtypes[part]} {list(shape)}"
            raise broken(name, part, f"is {found.dtype} {list(found.shape)} instead of {said}")
    filled = stored.shape[1] % 8
    if stored.masked and filled and (parts["weight_packed"][:, -1] >> filled).any():
        raise broken(name, "weight_packed", "marks columns after the last")
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
    """Make the error for a damaged tensor.

    :param name: the Linear's full name; may be empty
    :param part: local name of the tensor
    :param what: what is wrong, as a verb phrase
    :return: the error, to raise
    """
    full = f"{name}.{part}" if name else part
    return ValueError(f"{full} {what}: the file is damaged; fetch it or pack the checkpoint again")


def _spread(
    stored: Stored,
    parts: Mapping[str, Tensor],
    name: str,
    write: Callable[[slice, Tensor, Tensor | None], None],
    cores: int,
) -> None:
    """Decode chunks of rows; ``write`` gets rows, their bits, and which are kept (None: all)."""
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
        said = f"marks {ends[-1]} weights, but {stored.kept} are stored"
        raise broken(name, "weight_packed", said)
    eights = eight_of_a_byte(mask.device)

    def sparse(chunk: slice) -> None:
        shape = chunk.stop - chunk.start, -1
        bits = eights.index_select(0, mask[chunk].flatten().int()).view(shape).view(torch.bool)
        present = bits[:, :columns].contiguous().flatten()
        places = present.cumsum(0, dtype=torch.int32)
        living = _take(stored, parts, ends[chunk.start], ends[chunk.stop])
        # A weight that is not kept takes the kept one before it, and `* present` makes it zero.
        found = torch.cat((living.new_zeros(1), living)).index_select(0, places) * present
        write(chunk, found.view(shape), present.view(shape))

    _run(sparse, chunks if columns else [], mask.device, cores)


@contextmanager
def _cores() -> Iterator[int]:
    """Yield torch's number of threads; limit it to one, because operations here are short."""
    cores = torch.get_num_threads()
    torch.set_num_threads(1)  # for this thread, and for threads that start later
    try:
        yield cores
    finally:
        torch.set_num_threads(cores)


def _run(
    work: Callable[[slice], None], chunks: list[slice], device: torch.device, cores: int
) -> None:
    """Call ``work`` for every chunk; on a CPU in up to ``cores`` threads."""
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
    """Return integers ``[rows, groups, columns]``, with the zero point where none is kept."""
    integers = _grouped(bits, stored)
    if present is None:
        return integers
    return (integers ^ zero) * _grouped(present, stored) ^ zero


def _take(stored: Stored, parts: Mapping[str, Tensor], first: int, last: int) -> Tensor:
    """Return the bits of kept weights ``first`` to ``last``, counted in the order of storage."""
    if stored.kind == "values":
        return parts["weight_values"].view(_BITS_OF[stored.dtype.itemsize])[first:last]
    if stored.kind == "planes":
        fractions = parts["weight_fractions"][first:last].to(torch.int16)
        table = torch.zeros(TABLE, dtype=torch.int16, device=fractions.device)
        table[: stored.exponents] = parts["weight_table"].to(torch.int16) << 7
        # One look-up decodes both indices of a byte, as the halves of a 32-bit word.
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
    """Return the entries of a matrix where ``present`` is true, in row-major order."""
    chunks = zip(matrix.flatten().split(_CHUNK), present.flatten().split(_CHUNK), strict=True)
    return torch.cat([one.index_select(0, marks.nonzero().flatten()) for one, marks in chunks])


def planes_of(bits: Tensor) -> dict[str, Tensor] | None:
    """Split bfloat16 numbers into the tensors of kind ``planes``.

    :param bits: int16 ``[n]``, the bits of the numbers
    :return: local names to tensors; None if there are more than 16 different exponents
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
    """Return the unsigned zero points of integers, uint8 ``[out, groups, 1]``."""
    scale = parts["weight_scale"]
    if stored.symmetric:
        middle = 1 << (stored.bits - 1)
        return torch.full((*scale.shape, 1), middle, dtype=torch.uint8, device=scale.device)
    words = parts["weight_zero_point"].T
    return integers_of_words(words, stored.bits, stored.shape[0]).T.unsqueeze(-1)


def _grouped(matrix: Tensor, stored: Stored) -> Tensor:
    """View a matrix ``[rows, in]`` as ``[rows, groups, columns of a group]``."""
    return matrix.reshape(len(matrix), stored.groups, matrix.shape[1] // max(1, stored.groups))


def _shape_of(matrix: Tensor) -> tuple[int, int]:
    rows, columns = matrix.shape
    return rows, columns


def size_of(parts: Mapping[str, Tensor]) -> int:
    """Sum the sizes of tensors.

    :param parts: names to tensors
    :return: bytes
    """
    return sum(part.nbytes for part in parts.values())
