"""Random numbers that depend on (seed, epoch, sample) alone."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from hvd_lars.data.source import Indices

Matrix = np.ndarray[tuple[int, int], np.dtype[np.float64]]

_U64 = np.uint64


def seed_of(*numbers: int) -> int:
    """Derive a 64-bit seed from ``numbers``: no generator state to save or to drift."""
    text = " ".join(map(str, numbers))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _mix(x: Any) -> Any:
    """Apply the output function of SplitMix64 (Steele, Lea, Flood 2014) to an array of uint64."""
    x = (x ^ (x >> _U64(30))) * _U64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> _U64(27))) * _U64(0x94D049BB133111EB)
    return x ^ (x >> _U64(31))


def uniforms(seed: int, epoch: int, indices: Indices, count: int) -> Matrix:
    """Return (len(indices), count) numbers in [0, 1), one row per sample.

    A sample gets the same row on another rank, in another batch or after a resume.
    """
    increment = _U64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):
        key = _mix(np.array([seed], dtype=np.uint64) + increment)
        key = _mix(key + increment * _U64(epoch + 1))
        row = _mix(key + increment * (indices.astype(np.uint64) + _U64(1)))
        columns = increment * np.arange(1, count + 1, dtype=np.uint64)
        bits = _mix(row[:, None] + columns[None, :])
    draws: Matrix = (bits >> _U64(11)).astype(np.float64) * 2.0**-53
    return draws
