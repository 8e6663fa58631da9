"""The item catalogue: which item has which id. It is built from train events only, so that it does not leak the future.

Items that were shown but never chosen are included: if they were unknown, that alone would tell a ranker the label.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recray.config import FeatureConfig
from recray.data import features
from recray.errors import DataError
from recray.ids import NUM_RESERVED, UNKNOWN
from recray.records import Feature, feature_column

_MAX_ITEMS = 2**31 - 1 - NUM_RESERVED  # ids are int32


def catalogue(counts: pa.Table, min_count: int) -> pa.Table:
    """Items with their train counts, in the order of their ids: most often chosen first, ties by key.

    counts: columns value (item key), n (events) and chosen (positive ones), one row per item. Returns columns item and
    count (of chosen events); `min_count` applies to all events.
    Raises DataError if no item is frequent enough.
    """
    kept = counts.filter(pc.greater_equal(counts["n"], min_count))
    if not len(kept):
        most = pc.max(counts["n"]).as_py() or 0
        raise DataError(
            f"no item has {min_count} train events (the most frequent of {len(counts):,} has {most:,}): "
            f"lower data.min_item_events, or check data.split"
        )
    if len(kept) > _MAX_ITEMS:
        raise DataError(f"{len(kept):,} items are more than {_MAX_ITEMS:,}: raise data.min_item_events")
    kept = kept.sort_by([("chosen", "descending"), ("value", "ascending")])
    return pa.table({"item": kept["value"].combine_chunks(), "count": kept["chosen"].cast(pa.int64()).combine_chunks()})


def item_ids(keys: pa.ChunkedArray, known: pa.Array) -> np.ndarray:
    """(E,) int32 ids of item keys: NUM_RESERVED + position in `known`, UNKNOWN for keys that it does not contain."""
    found = pc.fill_null(pc.index_in(keys.combine_chunks(), value_set=known), UNKNOWN - NUM_RESERVED)
    return np.asarray(found.to_numpy(zero_copy_only=False).astype(np.int32) + NUM_RESERVED)


def item_table(
    items: pa.Table, side: pa.Table | None, kinds: dict[str, FeatureConfig]
) -> tuple[pa.Table, list[Feature]]:
    """The table items.parquet, row i being item id i, and its features, fitted on the catalogue's items.

    items: from `catalogue`. side: columns item and item_<name>; items that are not in it get missing values.
    """
    keys = pa.concat_arrays([pa.nulls(NUM_RESERVED, items["item"].type), items["item"].combine_chunks()])
    counts = np.concatenate([np.zeros(NUM_RESERVED, np.int64), items["count"].to_numpy()])
    out = {"item": keys, "count": pa.array(counts)}
    fitted = []
    if side is not None:
        aligned = side.take(pc.index_in(keys, value_set=side["item"].combine_chunks()))
        for name, kind in kinds.items():
            feature = features.fit(
                name, "item", kind, features.count_values(aligned[feature_column("item", name)], kind)
            )
            fitted.append(feature)
            out[feature.column] = features.encode(aligned[feature.column], feature)
    return pa.table(out), fitted
