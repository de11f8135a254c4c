"""A shuffle of [0, n) that is computed, not stored: index in, index out, memory O(1)."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from megascale.arrays import Integers

_UInt64Array = NDArray[np.uint64]

_NUM_ROUNDS = 8
_TABLE_SIZE = 4096


class Permutation:
    """A pseudo-random bijection of [0, size), keyed by (seed, name, epoch).

    A Feistel network permutes the smallest power of two >= size; an index that lands outside
    [0, size) is sent through again until it lands inside ("cycle walking"; Black and Rogaway,
    "Ciphers with Arbitrary Finite Domains", 2002), fewer than twice on average. Such a network
    is a poor shuffle of few elements, so up to 4096 of them are ordered by a keyed hash instead.
    The result is the same on every machine and with every NumPy.
    """

    def __init__(self, size: int, seed: int, name: str, epoch: int) -> None:
        if not 0 <= size < 2**62:
            raise ValueError(f"size = {size} must be from 0 to 2**62 - 1")
        self.size = size
        self._keys = _round_keys(seed, name, epoch)
        self._table = self._sorted_by_hash() if size <= _TABLE_SIZE else None

    def __call__(self, indices: Integers) -> Integers:
        """Images of `indices`, int64 of any shape, each in [0, size); IndexError outside."""
        indices = np.asarray(indices, dtype=np.int64)
        if indices.size and not 0 <= int(indices.min()) <= int(indices.max()) < self.size:
            raise IndexError(f"indices must be from 0 to {self.size - 1}")
        if self._table is not None:
            return self._table[indices]
        values = self._feistel(indices.astype(np.uint64).ravel())
        outside = np.flatnonzero(values >= self.size)
        while outside.size:
            walked = self._feistel(values[outside])
            values[outside] = walked
            outside = outside[walked >= self.size]
        return values.astype(np.int64).reshape(indices.shape)

    def _feistel(self, values: _UInt64Array) -> _UInt64Array:
        bits = (self.size - 1).bit_length()
        low_bits = np.uint64(bits // 2)
        low_mask = np.uint64((1 << (bits // 2)) - 1)
        high_mask = np.uint64((1 << (bits - bits // 2)) - 1)
        high, low = values >> low_bits, values & low_mask
        for even_key, odd_key in self._keys.reshape(-1, 2):
            high ^= mix(low + even_key) & high_mask
            low ^= mix(high + odd_key) & low_mask
        return (high << low_bits) | low

    def _sorted_by_hash(self) -> Integers:
        hashes = mix(np.arange(self.size, dtype=np.uint64) + self._keys[0])
        return np.argsort(mix(hashes ^ self._keys[1]), kind="stable").astype(np.int64)


def _round_keys(seed: int, name: str, epoch: int) -> _UInt64Array:
    text = f"{seed}/{epoch}/{name}".encode()
    digest = hashlib.blake2b(text, digest_size=8 * _NUM_ROUNDS).digest()
    return np.frombuffer(digest, dtype="<u8").astype(np.uint64)


def mix(values: _UInt64Array) -> _UInt64Array:
    """SplitMix64's finalizer (Steele, Lea and Flood, 2014): every input bit reaches all bits."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
