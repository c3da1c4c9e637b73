"""Packing and unpacking of bit masks, 4-bit integers and 32-bit words; low bits come first."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

__all__ = [
    "eight_of_a_byte",
    "integers_of_words",
    "mask_of",
    "nibbles_of",
    "ones",
    "packed",
    "words_for",
    "words_of_integers",
]

# Multiplying a 64-bit word of eight bytes, each 0 or 1, by this moves byte j's bit to bit 56 + j.
_GATHER = sum(1 << (56 - 7 * j) for j in range(8))


def mask_of(present: Tensor) -> Tensor:
    """Pack a boolean matrix into one bit per entry.

    :param present: bool ``[rows, columns]``
    :return: uint8 ``[rows, ceil(columns / 8)]``; column j is bit ``j % 8`` of byte ``j // 8``
    """
    rows, columns = present.shape
    eights = pad(present, (0, -columns % 8)).flatten().view(torch.int64)
    return (eights * _GATHER >> 56 & 0xFF).to(torch.uint8).view(rows, -(-columns // 8))


def ones(mask: Tensor) -> Tensor:
    """Count the set bits of each row.

    :param mask: uint8 ``[rows, bytes]``
    :return: int64 ``[rows]``
    """
    pairs = mask - (mask >> 1 & 0x55)
    fours = (pairs & 0x33) + (pairs >> 2 & 0x33)
    return (fours + (fours >> 4) & 0xF).sum(1)


def eight_of_a_byte(device: torch.device) -> Tensor:
    """Make a lookup table from a byte of a mask to its eight bits.

    :param device: of the table
    :return: int64 ``[256]``; byte j of an entry is bit j of its index
    """
    byte, place = torch.arange(256, device=device)[:, None], torch.arange(8, device=device)
    return (byte >> place & 1).to(torch.uint8).view(torch.int64).flatten()


def nibbles_of(pairs: Tensor) -> Tensor:
    """Unpack bytes that hold two 4-bit integers each.

    :param pairs: uint8 ``[n]``, the first integer in the low four bits
    :return: uint8 ``[2 n]``
    """
    return torch.stack((pairs & 15, pairs >> 4), -1).flatten()


def packed(values: Tensor, bits: int) -> Tensor:
    """Pack integers into bytes: 8-bit ones stay as they are, two 4-bit ones share a byte.

    :param values: uint8 ``[n]``
    :param bits: 4 or 8
    :return: uint8 ``[n]`` for 8 bits, ``[ceil(n / 2)]`` for 4
    """
    if bits == 8:
        return values
    pairs = pad(values, (0, len(values) % 2)).view(-1, 2)
    return pairs[:, 0] | pairs[:, 1] << 4


def words_for(count: int, bits: int) -> int:
    """Return how many 32-bit words hold ``count`` integers of ``bits`` bits.

    :param count: number of integers
    :param bits: of each integer
    :return: number of words
    """
    return -(-count * bits // 32)


def integers_of_words(words: Tensor, bits: int, columns: int) -> Tensor:
    """Unpack the 32-bit words into which compressed-tensors packs unsigned integers.

    :param words: int32 ``[rows, ceil(columns * bits / 32)]``
    :param bits: 4 or 8
    :param columns: number of integers in a row
    :return: uint8 ``[rows, columns]``
    """
    # Little-endian, as in safetensors and on the supported processors.
    found = words.clone(memory_format=torch.contiguous_format).view(torch.uint8)
    if bits == 4:
        found = nibbles_of(found.flatten()).view(len(found), -1)
    return found[:, :columns]


def words_of_integers(integers: Tensor, bits: int) -> Tensor:
    """Pack integers into 32-bit words; the inverse of :func:`integers_of_words`.

    :param integers: uint8 ``[rows, columns]``
    :param bits: 4 or 8
    :return: int32 ``[rows, ceil(columns * bits / 32)]``; unused bits of a row's last word are zero
    """
    rows, columns = integers.shape
    words = words_for(columns, bits)
    filled = pad(integers, (0, words * 32 // bits - columns))
    return packed(filled.flatten(), bits).view(torch.int32).view(rows, words)
