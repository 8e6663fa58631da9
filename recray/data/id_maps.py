"""From the ids of one prepared dataset to those of another one, by the keys and values that they stand for.

A log that grows has other ids every night: they are in the order of counts. Each function returns a table: entry i is the
id in `own` of id i in `asked`, the reserved ids included.
"""

from __future__ import annotations

import itertools

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recray.data import features
from recray.data.dataset import PreparedDataset
from recray.errors import LineageError
from recray.ids import FIRST_ITEM, NUM_RESERVED, PAD, UNKNOWN
from recray.records import Feature


def items(asked: PreparedDataset, own: PreparedDataset, otherwise: int = UNKNOWN) -> np.ndarray:
    """(N,) int64 ids of items; `otherwise` for items that `own` does not know. Raises LineageError as `users`."""
    keys, known = (one.items()["item"].combine_chunks().slice(FIRST_ITEM) for one in (asked, own))
    return _table(keys, known, otherwise)


def users(asked: PreparedDataset, own: PreparedDataset, otherwise: int = PAD) -> np.ndarray:
    """(U,) int64 ids of users.

    Raises LineageError if keys of one dataset are text and of the other numbers.
    """
    keys, known = (one.user_keys().sort_by("user_id")["user"].combine_chunks() for one in (asked, own))
    return _table(keys, known, otherwise)


def categories(asked: Feature, own: Feature) -> np.ndarray:
    """(V,) int64 ids of the values of a feature that has ids in both datasets.

    A hashed value can be read back by the same hash only, and a number between quantiles counts as the middle of them.
    """
    size = asked.cardinality + asked.new_values
    if asked.hash_buckets:
        same = np.arange(size)
        return same if own.hash_buckets == asked.hash_buckets else np.where(same == PAD, PAD, UNKNOWN)
    if asked.edges is not None:
        edges = asked.edges or [0.0]
        middle = [edges[0] - 1, *((a + b) / 2 for a, b in itertools.pairwise(edges)), edges[-1]]
        values = pa.array(middle[: size - NUM_RESERVED], pa.float64())
    else:
        values = pa.array((asked.vocabulary or [])[: size - NUM_RESERVED])
    one = own.model_copy(update={"kind": "categorical"}) if own.kind == "list" else own
    ids = features.encode(pa.chunked_array([values]), one).to_numpy(zero_copy_only=False).astype(np.int64)
    ids = np.where(ids < own.cardinality, ids, UNKNOWN)
    return np.concatenate([[PAD, UNKNOWN], ids, np.full(size - NUM_RESERVED - len(ids), UNKNOWN)])


def _table(keys: pa.Array, known: pa.Array, otherwise: int) -> np.ndarray:
    if keys.type != known.type:
        raise LineageError(
            f"keys of the two datasets are {keys.type} and {known.type}: the log has changed its types, so that ids of "
            f"one cannot be found in the other"
        )
    found = pc.fill_null(pc.index_in(keys, value_set=known), otherwise - NUM_RESERVED).to_numpy(zero_copy_only=False)
    return np.concatenate([np.arange(NUM_RESERVED), found.astype(np.int64) + NUM_RESERVED])
