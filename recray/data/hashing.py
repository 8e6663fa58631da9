"""Hashes that are the same on every machine and in every run (Python's own are not)."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pyarrow as pa

_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


def mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser (Steele, Lea and Flood 2014) of uint64 numbers."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * _MIX[0]
    x = (x ^ (x >> np.uint64(27))) * _MIX[1]
    return np.asarray(x ^ (x >> np.uint64(31)))


def hash_keys(keys: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """uint64 hash of integers or strings (splitmix64; pandas' keyed hash). A null hashes to 0."""
    if pa.types.is_integer(keys.type):
        return mix(keys.fill_null(0).to_numpy().astype(np.int64).view(np.uint64))
    return np.asarray(pd.util.hash_array(keys.to_numpy(zero_copy_only=False).astype(object)))
