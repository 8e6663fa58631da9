"""From the sorted events of one bucket to one row per user and split. numpy and Arrow only, no loop over users.

User 7 has events a b c (train), d (valid), e (test). Its rows hold every event up to the end of the split:

    train   item = [a, b, c]           num_targets = 3
    valid   item = [a, b, c, d]        num_targets = 1
    test    item = [a, b, c, d, e]     num_targets = 1
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recray.config import DataConfig
from recray.data.split import Boundaries, Draw, microseconds
from recray.ids import SPLITS
from recray.loading.jagged import offsets_from_lengths

# Counts of dropped duplicates: all; not chosen, where the one that is kept is; of the same label with a smaller weight.
DUPLICATES = ("duplicates_dropped", "duplicates_not_chosen", "duplicates_lighter")


def sort_users(
    table: pa.Table | None, config: DataConfig, has_time: bool, old: pa.Table | None = None
) -> tuple[pa.Table, dict[str, int]]:
    """`_sorted` of new events (None: no event) and of old ones, of which it is the result: only users that have new events
    are sorted again. Counts are those of the new events."""
    if old is None or table is None:
        assert table is not None or old is not None
        nothing = {"events_before_start": 0} | dict.fromkeys(DUPLICATES, 0)
        return (old, nothing) if table is None else _sorted(table, config, has_time)
    again = pc.is_in(old["user"], value_set=pc.unique(table["user"]))
    mixed = pa.concat_tables([old.filter(again).drop_columns(["code"]), table], promote_options="permissive")
    ordered, dropped = _sorted(mixed, config, has_time)
    both = pa.concat_tables([old.filter(pc.invert(again)), ordered], promote_options="permissive")
    return both.take(pa.array(np.argsort(_ranks(both["user"]), kind="stable"))), dropped


def _sorted(table: pa.Table, config: DataConfig, has_time: bool) -> tuple[pa.Table, dict[str, int]]:
    """Events by (user, split, time, order) without duplicates, and counts of what left.

    Adds the column `code`, int8: the split that the source names, else -1. Duplicates are events of the same (user, item,
    time); in a log without times of the same (user, item). The one with the greatest label is kept, then with the greatest
    weight, of the earliest split, and the first one.
    """
    early = 0
    if config.split.start is not None and has_time:
        late = pc.greater_equal(table["time"], microseconds(config.split.start))
        early = len(table)
        table = table.filter(late)
        early -= len(table)
    user_E = _ranks(table["user"])
    code_E = _given_codes(table, config)
    time_E, order_E = table["time"].to_numpy(), table["order"].to_numpy()
    sort = _argsort(user_E, code_E, time_E, order_E)
    keep_E = np.ones(len(sort), bool)
    dropped = {"events_before_start": early} | dict.fromkeys(DUPLICATES, 0)
    if config.drop_duplicates and len(table):
        item_E = table["item"].combine_chunks().dictionary_encode().indices.to_numpy()
        moment_E = time_E if has_time or config.columns.timestamp else np.zeros(len(sort), np.int64)
        strength = [table[name].to_numpy() for name in ("weight", "label") if name in table.column_names]
        around = _with_a_twin(user_E, moment_E)
        weaker = [-x[around] for x in strength]
        around = around[
            np.lexsort((order_E[around], code_E[around], *weaker, moment_E[around], item_E[around], user_E[around]))
        ]
        same = np.zeros(len(around), bool)
        same[1:] = True
        for column in (user_E, item_E, moment_E):
            same[1:] &= column[around[1:]] == column[around[:-1]]
        kept = np.maximum.accumulate(np.where(same, 0, np.arange(len(around))))  # place of the event that is kept
        keep_E[around[same]] = False
        dropped |= _kinds_of_duplicates(table, around[same], around[kept[same]])
    ordered = table.append_column("code", pa.array(code_E)).take(pa.array(sort[keep_E[sort]]))
    return ordered.drop_columns([c for c in ("split", "bucket") if c in ordered.column_names]), dropped


def _argsort(user_E: np.ndarray, code_E: np.ndarray, time_E: np.ndarray, order_E: np.ndarray) -> np.ndarray:
    """np.lexsort((order_E, time_E, code_E, user_E)), a third of the time where the first three fit in one integer."""
    first, last = (int(time_E.min()), int(time_E.max())) if len(time_E) else (0, 0)
    bits = [int(high).bit_length() for high in (user_E.max(initial=0), len(SPLITS), last - first)]
    if sum(bits) > 63:
        return np.lexsort((order_E, time_E, code_E, user_E))
    key_E = (((user_E << bits[1]) | (code_E.astype(np.int64) + 1)) << bits[2]) | (time_E - first)
    if (order_E[1:] > order_E[:-1]).all():
        return np.argsort(key_E, kind="stable")
    by_order = np.argsort(order_E, kind="stable")
    return np.asarray(by_order[np.argsort(key_E[by_order], kind="stable")])


def _with_a_twin(user_E: np.ndarray, moment_E: np.ndarray) -> np.ndarray:
    """Indices, in order, of the events that share user and moment with another one: only they can be duplicates."""
    first = int(moment_E.min())
    if int(user_E.max()).bit_length() + (int(moment_E.max()) - first).bit_length() > 63:
        return np.arange(len(user_E))
    key_E = user_E * (int(moment_E.max()) - first + 1) + (moment_E - first)
    ordered = np.sort(key_E)
    shared = ordered[1:][ordered[1:] == ordered[:-1]]
    if not len(shared):
        return np.zeros(0, np.int64)
    return np.flatnonzero(shared.take(np.searchsorted(shared, key_E), mode="clip") == key_E)


def _kinds_of_duplicates(table: pa.Table, gone: np.ndarray, kept: np.ndarray) -> dict[str, int]:
    """How many duplicates differ from the event that was kept, and in what. gone, kept: indices, one entry per duplicate."""
    weaker, lighter = (
        table[name].to_numpy()[gone] < table[name].to_numpy()[kept]
        if name in table.column_names
        else np.zeros(len(gone), bool)
        for name in ("label", "weight")
    )
    return dict(zip(DUPLICATES, map(int, (len(gone), weaker.sum(), (lighter & ~weaker).sum())), strict=True))


def _ranks(keys: pa.ChunkedArray) -> np.ndarray:
    """(E,) rank of each key among the distinct keys, by value."""
    encoded = keys.combine_chunks().dictionary_encode()
    order = pc.array_sort_indices(encoded.dictionary).to_numpy()
    rank_of = np.empty(len(order), np.int64)
    rank_of[order] = np.arange(len(order))
    return np.asarray(rank_of[encoded.indices.to_numpy()])


def _given_codes(table: pa.Table, config: DataConfig) -> np.ndarray:
    """(E,) int8: 0 train, 1 valid, 2 test as the source names them; -1 where the split is not given."""
    if config.split.kind != "given":
        return np.full(len(table), -1, np.int8)
    names = pa.array(SPLITS, pa.string())
    return np.asarray(pc.index_in(table["split"], value_set=names).to_numpy().astype(np.int8))


@dataclass(frozen=True)
class Bucket:
    """Sorted events of a bucket with their users and splits. E events, U users."""

    table: pa.Table
    user_E: np.ndarray  # 0..U-1, non-decreasing
    code_E: np.ndarray  # 0 train, 1 valid, 2 test, 3 none; non-decreasing inside a user
    keys: pa.Array  # (U,) keys of the users

    @staticmethod
    def of(table: pa.Table, boundaries: Boundaries | None, draw: Draw | None) -> Bucket:
        """table: from `sort_users`. Splits by time with `boundaries`, as given if events have a code, else leave-last."""
        encoded = table["user"].combine_chunks().dictionary_encode()
        user_E = encoded.indices.to_numpy().astype(np.int64)
        code_E = table["code"].to_numpy()
        if boundaries is not None:
            code_E = boundaries.codes(table["time"].to_numpy())
        elif not len(code_E) or code_E[0] < 0:
            code_E = _leave_last(user_E)
        elif draw is not None:
            code_E = np.where((code_E == 0) & draw.chosen(table["order"].to_numpy()), 1, code_E)
            sort = np.lexsort((np.arange(len(code_E)), code_E, user_E))
            table, code_E = table.take(pa.array(sort)), code_E[sort]
        return Bucket(table, user_E, np.asarray(code_E), encoded.dictionary)


@dataclass(frozen=True)
class Division:
    """How events are divided into splits, and which users are kept."""

    boundaries: Boundaries | None
    draw: Draw | None
    min_user_events: int = 0
    core: pa.Array | None = None  # keys of the items whose events count for `min_user_events`; None: all

    def bucket(self, table: pa.Table) -> Bucket:
        """table: from `sort_users`."""
        part = Bucket.of(table, self.boundaries, self.draw)
        if not self.min_user_events:
            return part
        counted_E = part.code_E == 0
        if self.core is not None:
            counted_E &= pc.is_in(part.table["item"], value_set=self.core).to_numpy(zero_copy_only=False)
        kept_U = np.bincount(part.user_E[counted_E], minlength=len(part.keys)) >= self.min_user_events
        keep_E = kept_U[part.user_E]
        number_U = np.cumsum(kept_U) - 1
        return Bucket(
            part.table.filter(pa.array(keep_E)),
            number_U[part.user_E[keep_E]],
            part.code_E[keep_E],
            part.keys.filter(pa.array(kept_U)),
        )


def _leave_last(user_E: np.ndarray) -> np.ndarray:
    """(E,) int8: a user's last event is test, the one before it valid; users with fewer than 3 events are all train."""
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

    def targets(self) -> np.ndarray:
        """Indices of the kept events that are targets."""
        from_end = np.repeat(self.offsets[1:], np.diff(self.offsets)) - np.arange(len(self.index))
        return np.asarray(self.index[from_end <= np.repeat(self.num_targets_R, np.diff(self.offsets))])

    def table(self, ids: pa.Array, lists: dict[str, pa.Array], users: dict[str, pa.Array]) -> pa.Table:
        """The rows as a shard stores them. ids, users: one entry per user; lists: one entry per kept event."""
        user, offsets, index = pa.array(self.user_R), pa.array(self.offsets.astype(np.int32)), pa.array(self.index)
        columns: dict[str, pa.Array] = {"user": ids.take(user)}
        columns |= {name: pa.ListArray.from_arrays(offsets, values.take(index)) for name, values in lists.items()}
        columns["num_targets"] = pa.array(self.num_targets_R.astype(np.int32))
        return pa.table(columns | {name: values.take(user) for name, values in users.items()})


def num_earlier(user_E: np.ndarray, positive_E: np.ndarray) -> np.ndarray:
    """(E,) positive events of the same user before each event."""
    before = offsets_from_lengths(positive_E)
    starts = np.flatnonzero(np.diff(user_E, prepend=-1))
    return np.asarray(before[:-1] - np.repeat(before[starts], np.diff(np.append(starts, len(user_E)))))


def repeated(user_E: np.ndarray, items: pa.ChunkedArray, positive_E: np.ndarray) -> np.ndarray:
    """(E,) bool: whether a user chose the item of an event before, too. items: keys; events in order."""
    item_E = items.combine_chunks().dictionary_encode().indices.to_numpy()
    pair_E = user_E * (int(item_E.max(initial=0)) + 1) + item_E
    chosen = np.flatnonzero(positive_E)
    _, first = np.unique(pair_E[chosen], return_index=True)
    again_E = positive_E.copy()
    again_E[chosen[first]] = False
    return again_E


def rows(user_E: np.ndarray, code_E: np.ndarray, split: str, positive_E: np.ndarray, min_history: int = 0) -> Rows:
    """The rows of a split: its targets, and before them every earlier positive event of the user.

    Targets are the split's events, positive or not, with at least `min_history` positive events of the user before them.
    """
    wanted = SPLITS.index(split)
    num_users = int(user_E[-1]) + 1 if len(user_E) else 0
    target_E = (code_E == wanted) & (num_earlier(user_E, positive_E) >= min_history)
    targets_U = np.bincount(user_E[target_E], minlength=num_users)
    in_row_E = (target_E | ((code_E <= wanted) & positive_E)) & (targets_U[user_E] > 0)
    index = np.flatnonzero(in_row_E)
    length_U = np.bincount(user_E[index], minlength=num_users)
    user_R = np.flatnonzero(targets_U)
    offsets = offsets_from_lengths(length_U[user_R])
    return Rows(user_R, index, offsets, targets_U[user_R])


def early_rows(user_E: np.ndarray, code_E: np.ndarray, split: str, positive_E: np.ndarray, min_history: int) -> Rows:
    """The positive events of a split that are no targets, since fewer than `min_history` come before them."""
    early_E = (code_E == SPLITS.index(split)) & positive_E & (num_earlier(user_E, positive_E) < min_history)
    user_R, number_R = np.unique(user_E[early_E], return_counts=True)
    return Rows(user_R, np.flatnonzero(early_E), offsets_from_lengths(number_R), number_R)
