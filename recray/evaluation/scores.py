"""scores.parquet of a report: each user's share of its metrics, so that two reports can be compared user by user.

user              the original key
size              queries of the user, or weight of the impressions
<system>/<name>   sum of the metric over these; divided by the sum of sizes, it is the metric
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pyarrow as pa

from recray import storage
from recray.data.dataset import PreparedDataset
from recray.data.hashing import hash_keys
from recray.layout import SCORES

_USERS = 200_000  # kept, chosen by the hash of their keys: other reports keep the same ones


def write(
    folder: str, dataset: PreparedDataset, user_B: np.ndarray, size_B: np.ndarray, columns: Mapping[str, np.ndarray]
) -> None:
    """user_B: user ids; columns: (B,) values that count `size_B` times."""
    ids_U, place_B = np.unique(user_B, return_inverse=True)
    keys = dataset.user_keys()
    known = keys["user_id"].to_numpy()
    order = np.argsort(known)
    keys_U = keys["user"].take(pa.array(order[np.searchsorted(known[order], ids_U)])).combine_chunks()
    kept = np.arange(len(ids_U))
    if len(kept) > _USERS:
        kept = np.sort(np.argpartition(hash_keys(keys_U), _USERS)[:_USERS])
    sums = {name: np.bincount(place_B, value * size_B, len(ids_U))[kept] for name, value in columns.items()}
    size = np.bincount(place_B, size_B, len(ids_U))[kept]
    body = {"user": keys_U.take(pa.array(kept)), "size": size.astype(np.float32)}
    body |= {name: value.astype(np.float32) for name, value in sums.items()}
    storage.write_table(storage.join(folder, SCORES), pa.table(body))
