"""One bucket of users: sorted events, then one row per user and split. numpy and Arrow only.

A bucket holds all events of its users. Nothing here loops over users.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import pyarrow as pa

from recray.config import DataConfig
from recray.data.split import Boundaries

SPLITS = ("train", "valid", "test")
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


def hash_keys(keys: pa.ChunkedArray) -> np.ndarray:
    """uint64 hash of integer or string keys: the same on every machine and run (splitmix64; pandas' keyed hash)."""
    if pa.types.is_integer(keys.type):
        x = keys.to_numpy().astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * _MIX[0]
        x = (x ^ (x >> np.uint64(27))) * _MIX[1]
        return np.asarray(x ^ (x >> np.uint64(31)))
    return np.asarray(pd.util.hash_array(keys.to_numpy(zero_copy_only=False).astype(object)))


def sort_users(table: pa.Table, config: DataConfig, seed: int, has_time: bool) -> tuple[pa.Table, dict[str, int]]:
    """Events by (user, split, time, order) without duplicates and users below the minimum.

    Adds column `code`, int8: the split of the event where the source names it, else -1.
    """
    user_codes = (
        pa.array(table["user"]).combine_chunks()
        if isinstance(table["user"], pa.Array)
        else table["user"].combine_chunks()
    )
    ranked = user_codes.dictionary_encode()
    by_key = np.argsort(np.argsort(ranked.dictionary.to_numpy(zero_copy_only=False), kind="stable"), kind="stable")
    user_E = by_key[ranked.indices.to_numpy()]
    code_E = _given_codes(table, config, seed)
    time_E, order_E = table["time"].to_numpy(), table["order"].to_numpy()
    sort = np.lexsort((order_E, time_E, code_E, user_E))
    dropped = {"duplicates_dropped": 0, "users_dropped_min_count": 0, "events_dropped_min_count": 0}
    keep_E = np.ones(len(sort), bool)
    if config.drop_duplicates:
        item_E = table["item"].combine_chunks().dictionary_encode().indices.to_numpy()
        moment_E = time_E if has_time or config.columns.timestamp else np.zeros(len(sort), np.int64)
        around = np.lexsort((order_E, moment_E, item_E, code_E, user_E))
        same = np.ones(max(len(sort) - 1, 0), bool)
        for column in (user_E, item_E, moment_E):
            same &= column[around[1:]] == column[around[:-1]]
        keep_E[around[1:][same]] = False
        dropped["duplicates_dropped"] = int(same.sum())
    events_U = np.bincount(user_E[keep_E], minlength=len(by_key))
    few_U = (events_U < config.min_user_events) & (events_U > 0)
    keep_E &= ~few_U[user_E]
    dropped["users_dropped_min_count"] = int(few_U.sum())
    dropped["events_dropped_min_count"] = int(events_U[few_U].sum())
    chosen = sort[keep_E[sort]]
    ordered = table.append_column("code", pa.array(code_E)).take(pa.array(chosen))
    return ordered.drop_columns([c for c in ("split", "bucket") if c in ordered.column_names]), dropped


def _given_codes(table: pa.Table, config: DataConfig, seed: int) -> np.ndarray:
    if config.split.kind != "given" or "split" not in table.column_names:
        return np.full(len(table), -1, np.int8)
    names = table["split"].to_numpy(zero_copy_only=False)
    code_E = np.select([names == name for name in SPLITS], [0, 1, 2], default=3).astype(np.int8)
    share = config.split.valid
    if not config.split.valid_path and not (code_E == 1).any() and isinstance(share, float):
        # A draw that depends on the event alone, not on how events are spread over tasks.
        order = table["order"].to_numpy().astype(np.uint64) ^ (np.uint64(seed) << np.uint64(1))
        drawn = hash_keys(pa.chunked_array([pa.array(order.astype(np.int64))])).astype(np.float64) / 2.0**64
        code_E[(code_E == 0) & (drawn < share)] = 1
    return code_E


@dataclass(frozen=True)
class Bucket:
    """Sorted events of a bucket with their users and splits. E events, U users."""

    table: pa.Table
    user_E: np.ndarray  # 0..U-1, non-decreasing
    code_E: np.ndarray  # 0 train, 1 valid, 2 test, 3 none; non-decreasing inside a user

    @staticmethod
    def of(table: pa.Table, config: DataConfig, boundaries: Boundaries | None) -> Bucket:
        encoded = table["user"].combine_chunks().dictionary_encode()
        user_E = encoded.indices.to_numpy().astype(np.int64)
        if config.split.kind == "given":
            code_E = table["code"].to_numpy()
        elif boundaries is not None:
            code_E = boundaries.codes(table["time"].to_numpy())
        else:
            code_E = _leave_last(user_E)
        return Bucket(table, user_E, np.asarray(code_E))

    def keys(self) -> pa.Array:
        """The users' keys in order of their number."""
        return self.table["user"].combine_chunks().dictionary_encode().dictionary


def _leave_last(user_E: np.ndarray) -> np.ndarray:
    """The last event of a user is test, the one before it valid; users with fewer than 3 events are train."""
    events_U = np.bincount(user_E)
    from_end_E = np.cumsum(events_U)[user_E] - 1 - np.arange(len(user_E))
    code_E = np.where(from_end_E == 0, 2, np.where(from_end_E == 1, 1, 0))
    return np.where(events_U[user_E] < 3, 0, code_E).astype(np.int8)


@dataclass(frozen=True)
class Rows:
    """Rows of one split: row r is events start_R[r] : start_R[r] + length_R[r] of the kept events."""

    user_R: np.ndarray
    index: np.ndarray  # kept events of all rows, one after the other
    offsets: np.ndarray  # (R + 1,)
    num_targets_R: np.ndarray


def rows(user_E: np.ndarray, code_E: np.ndarray, split: str) -> Rows:
    """The rows of a split. Context of a target: every earlier event of the user, of this split or one before it."""
    wanted = SPLITS.index(split)
    num_users = int(user_E[-1]) + 1 if len(user_E) else 0
    targets_U = np.bincount(user_E[code_E == wanted], minlength=num_users)
    in_row_E = (code_E <= wanted) & (targets_U[user_E] > 0)
    index = np.flatnonzero(in_row_E)
    length_U = np.bincount(user_E[index], minlength=num_users)
    user_R = np.flatnonzero(targets_U)
    offsets = np.concatenate([[0], np.cumsum(length_U[user_R])]).astype(np.int64)
    return Rows(user_R, index, offsets, targets_U[user_R])
