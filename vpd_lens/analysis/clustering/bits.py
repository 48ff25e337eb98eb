"""Where things are active, as one bit per position: 64 positions in a word.

Bits are exact, eight times smaller than bytes, and counted 64 at a time.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Bool, Int32, UInt64

_WORD = 64
_BLOCK = 8  # words of all columns counted at once
_ROWS, _COLUMNS = 64 * _WORD, 1024  # of a product made at once

Bits = UInt64[np.ndarray, "words n"]


def packed(active: Bool[np.ndarray, "n_positions n"]) -> Bits:
    """As bits; the last word is filled up with zeros."""
    padded = np.pad(active, ((0, -len(active) % _WORD), (0, 0)))
    octets = np.packbits(np.ascontiguousarray(padded.T), axis=1, bitorder="little")
    return np.ascontiguousarray(octets.view("<u8").T)


def unpacked(bits: Bits, n_positions: int) -> Bool[np.ndarray, "n_positions n"]:
    """What `packed` made bits of."""
    octets = np.ascontiguousarray(bits.T).view(np.uint8)
    return np.unpackbits(octets, axis=1, count=n_positions, bitorder="little").view(bool).T


def counts_within(bits: Bits, chosen: UInt64[np.ndarray, " words"]) -> Int32[np.ndarray, " n"]:
    """At how many of some positions each column is active."""
    words, total = np.flatnonzero(chosen), np.zeros(bits.shape[1], np.int32)
    for start in range(0, len(words), _BLOCK):  # a block stays in the cache
        some = words[start : start + _BLOCK]  # few, if the positions are
        total += np.bitwise_count(bits[some] & chosen[some, None]).sum(0, dtype=np.int32)
    return total


def coactive(bits: Bits) -> Int32[np.ndarray, "n n"]:
    """At how many positions both of two columns are active.

    Products of whole numbers, exact as floats up to 16 million positions.
    """
    n = bits.shape[1]
    total = torch.zeros(n, n)
    words = _ROWS // _WORD
    for start in range(0, len(bits), words):
        rows = unpacked(bits[start : start + words], _ROWS)
        x = torch.from_numpy(rows).float()
        for first in range(0, n, _COLUMNS):  # the other half is the same
            block = total[first : first + _COLUMNS, first:]
            block.addmm_(x[:, first : first + _COLUMNS].T, x[:, first:])
    upper = total.triu_()
    return (upper + upper.triu(1).T).numpy().astype(np.int32)
