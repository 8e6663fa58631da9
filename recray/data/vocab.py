"""The item catalogue: which item has which id.

It is built from train events, so that it does not leak the future. Items that the validation events add come after them:
only a refit, which trains on both, knows them (recray.data.dataset). Items that were shown but never chosen are
included: if they were unknown, that alone would tell a ranker the label.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recray.config import FeatureConfig
from recray.data import append, features
from recray.data.dataset import PreparedDataset
from recray.errors import DataError
from recray.ids import NUM_RESERVED, UNKNOWN
from recray.records import Feature, feature_column

_MAX_ITEMS = 2**31 - 1 - NUM_RESERVED  # ids are int32


def catalogue(counts: pa.Table, min_count: int) -> tuple[pa.Table, pa.Table]:
    """The items of the train split, and those that the validation split adds, each in the order of their ids: most often
    chosen first, ties by key.

    counts: one row per item, with columns value (item key), n and n_valid (train and validation events), chosen and
    chosen_valid (positive ones). Returns columns item, count and count_valid (chosen events). An item is kept with
    `min_count` train events, and added with that many train and validation events.
    Raises DataError if no item has enough train events.
    """
    n, n_valid = counts["n"], counts["n_valid"]
    in_train = pc.greater_equal(n, min_count)
    known = counts.filter(in_train)
    if not len(known):
        seen = pc.sum(pc.greater(n, 0)).as_py()
        raise DataError(
            f"no item has {min_count} train events (the most frequent of {seen or 0:,} has {pc.max(n).as_py() or 0:,}): "
            f"lower data.min_item_events, or check data.split"
        )
    new = counts.filter(pc.and_not(pc.greater_equal(pc.add(n, n_valid), min_count), in_train))
    if len(known) + len(new) > _MAX_ITEMS:
        raise DataError(f"{len(known) + len(new):,} items are more than {_MAX_ITEMS:,}: raise data.min_item_events")
    both = new.append_column("both", pc.add(new["chosen"], new["chosen_valid"]))
    return _by_falling(known, "chosen"), _by_falling(both, "both")


def _by_falling(counts: pa.Table, column: str) -> pa.Table:
    ordered = counts.sort_by([(column, "descending"), ("value", "ascending")])
    columns = {"item": "value", "count": "chosen", "count_valid": "chosen_valid"}
    return pa.table({name: ordered[source].combine_chunks() for name, source in columns.items()})


def item_ids(keys: pa.ChunkedArray, known: pa.Array) -> np.ndarray:
    """(E,) int32 ids of item keys: NUM_RESERVED + position in `known`, UNKNOWN for keys that it does not contain."""
    found = pc.fill_null(pc.index_in(keys.combine_chunks(), value_set=known), UNKNOWN - NUM_RESERVED)
    return np.asarray(found.to_numpy(zero_copy_only=False).astype(np.int32) + NUM_RESERVED)


def item_table(
    items: pa.Table,
    num_items: int,
    side: pa.Table | None,
    kinds: dict[str, FeatureConfig],
    base: PreparedDataset | None = None,
) -> tuple[pa.Table, list[Feature]]:
    """The table items.parquet, row i being item id i, and its features, fitted on the items of the train split.

    items: both tables of `catalogue`; num_items: ids of the train split, the reserved ones included. side: columns item
    and item_<name>; items that are not in it get missing values. base: whose encodings are kept.
    """
    reserved = pa.nulls(NUM_RESERVED, items["item"].type)
    keys = pa.concat_arrays([reserved, items["item"].combine_chunks()])
    out = {"item": keys}
    for name in ("count", "count_valid"):
        out[name] = pa.array(np.concatenate([np.zeros(NUM_RESERVED, np.int64), items[name].to_numpy()]))
    fitted = []
    if side is not None:
        aligned = side.take(pc.index_in(keys, value_set=side["item"].combine_chunks()))
        for name, kind in kinds.items():
            column = aligned[feature_column("item", name)]
            parts = (column.slice(0, num_items), column.slice(num_items))
            feature = features.fit(name, "item", kind, *(features.count_values(part, kind) for part in parts))
            feature = append.kept_feature(feature, base)
            fitted.append(feature)
            out[feature.column] = features.encode(aligned[feature.column], feature)
    return pa.table(out), fitted
