"""The work of one prepare task on one bucket of users: sort its events, count them, write its shards. No Ray here.

A bucket holds all events of the users whose key hashes to its number, so that no step needs events of another bucket.
Between the steps a bucket is a Parquet file of sorted events (`sorted_file`):

    add_bucket -> sort -> [bucket-00003.parquet] -> histogram, count -> write -> train/part-00003.parquet, ...
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recray import digests, storage
from recray.config import DataConfig, FeatureConfig
from recray.data import append, features, negatives, user_rows, vocab
from recray.data.dataset import PreparedDataset
from recray.data.hashing import hash_keys
from recray.errors import DataError
from recray.ids import SPLITS, UNKNOWN
from recray.records import Feature, feature_column

_TIME_BINS = 1_000_000
_GROUP_EVENTS = 65_536  # events per row group of a shard, about


@dataclass(frozen=True)
class Sorting:
    """What every task needs to sort a bucket."""

    config: DataConfig
    has_time: bool
    folder: str  # of the sorted buckets
    base: PreparedDataset | None  # to whose events these are added


@dataclass(frozen=True)
class Encoders:
    """What every task needs to write rows."""

    item_keys: pa.Array  # key of item id FIRST_ITEM, FIRST_ITEM + 1, ...
    num_items: int  # ids of the train split's catalogue; larger ones are for a refit only
    context: dict[str, Feature]
    user: dict[str, Feature]
    user_table: pa.Table | None
    sampler: negatives.Sampler | None
    min_history: int
    seed: int


def sorted_file(folder: str, bucket: int) -> str:
    return storage.join(folder, f"bucket-{bucket:05d}.parquet")


def add_bucket(table: pa.Table, num_buckets: int) -> pa.Table:
    """Add the column `bucket`: a hash of the user's key, the same on every machine."""
    bucket = hash_keys(table["user"]) % np.uint64(num_buckets)
    return table.append_column("bucket", pa.array(bucket.astype(np.int64)))


def by_bucket(table: pa.Table, num_buckets: int) -> pa.Table:
    """`add_bucket`, with the events of each bucket next to each other."""
    table = add_bucket(table, num_buckets)
    return table.take(pa.array(np.argsort(table["bucket"].to_numpy(), kind="stable")))


def sort_blocks(sorting: Sorting, bucket: int | None, *blocks: pa.Table) -> dict[str, int]:
    """Sort one bucket, whose events are parts of all blocks of the log, which `by_bucket` made. Without `bucket` all events
    are one bucket."""
    if bucket is not None:
        blocks = tuple(block for block in blocks if len(block))
        places = [np.searchsorted(block["bucket"].to_numpy(), [bucket, bucket + 1]) for block in blocks]
        blocks = tuple(block.slice(low, high - low) for block, (low, high) in zip(blocks, places, strict=True))
    return _sort([block for block in blocks if len(block)], bucket or 0, sorting)


def sort_group(table: pa.Table, sorting: Sorting) -> pa.Table:
    """Sort one bucket that a shuffle has gathered; one row of statistics."""
    return pa.Table.from_pylist([_sort([table], int(table["bucket"][0].as_py()), sorting)])


def _sort(blocks: Sequence[pa.Table], bucket: int, sorting: Sorting) -> dict[str, int]:
    """Write the bucket's sorted events; return what the driver needs to know of them, nothing of an empty bucket."""
    old = append.bucket_of(sorting.base, append.EVENTS, bucket)
    if not blocks and old is None:
        return {}
    table = pa.concat_tables(blocks, promote_options="permissive") if blocks else None
    if sorting.config.split.kind == "given" and table is not None and "split" not in table.column_names:
        raise DataError(
            "data.split.kind = 'given', but nothing names the splits: set data.columns.split, "
            "or data.split.train_path and data.split.test_path"
        )
    ordered, dropped = user_rows.sort_users(table, sorting.config, sorting.has_time, old)
    # Compressing what is read twice and deleted takes longer than writing it.
    kept = sorting.config.append
    storage.write_table(sorted_file(sorting.folder, bucket), ordered, compression="zstd" if kept else "none")
    times = ordered["time"]
    return {
        "bucket": bucket,
        "events_read": 0 if table is None else len(table),
        "events_kept": len(ordered),
        "given_valid": int((ordered["code"].to_numpy() == SPLITS.index("valid")).sum()),
        "first": pc.min(times).as_py() or 0,
        "last": pc.max(times).as_py() or 0,
        **dropped,
    }


def edges(first: int, last: int) -> np.ndarray:
    """Edges of at most _TIME_BINS bins between the first and the last time."""
    # np.unique would hash, and evenly spaced integers collide: minutes instead of milliseconds.
    even = np.linspace(first, last + 1, _TIME_BINS + 1).astype(np.int64)
    # Positions may be above 2 ** 53 and so no exact floats: the outer edges would leave out events.
    even[0], even[-1] = first, last + 1
    even = np.clip(even, first, last + 1)
    return np.asarray(even[np.concatenate([[True], even[1:] != even[:-1]])])


def histogram(file: str, bucket: int, first: int, last: int) -> pa.Table:
    """How many events of a bucket fall into each bin of `edges`."""
    times = storage.read_table(file, ["time"])["time"].to_numpy()
    found = edges(first, last)
    # Edges are about evenly spaced: a bin is where arithmetic says, or next to it.
    width = max((last + 1 - first) / (len(found) - 1), 1.0)
    bins = np.clip(((times - first) / width).astype(np.int64), 0, len(found) - 2)
    bins -= times < found[bins]
    bins += times >= found[bins + 1]
    if ((times < found[bins]) | (times >= found[bins + 1])).any():  # positions beyond what floats tell apart
        bins = np.searchsorted(found, times, side="right") - 1
    counts = np.bincount(bins)
    filled = np.flatnonzero(counts)
    return pa.table({"value": filled, "n": counts[filled]})


def core(file: str, bucket: int, division: user_rows.Division) -> pa.Table:
    """Train events of each item, of the users that are kept."""
    part = division.bucket(storage.read_table(file))
    return features.value_counts(part.table["item"].filter(pa.array(part.code_E == 0)))


def count(
    file: str,
    bucket: int,
    division: user_rows.Division,
    context: dict[str, FeatureConfig],
    sample: negatives.Sample,
    base: PreparedDataset | None,
) -> tuple[Any, ...]:
    """Step 3: (counts of users and of events per split, counts of items, a sample of positive events, then of each context
    feature the values of train events and those of validation events)."""
    table = storage.read_table(file)
    part = division.bucket(table)
    positive_E = _positive(part.table)
    users = len(pc.unique(table["user"]))
    sizes = {
        "users_kept": len(part.keys),
        "users_new": int((append.old_user_ids(base, bucket, part.keys) < 0).sum()),
        "users_dropped_min_count": users - len(part.keys),
        "events_dropped_min_count": len(table) - len(part.table),
    }
    weightless_E = np.zeros(len(part.table), bool)
    if "weight" in part.table.column_names:
        weightless_E = positive_E & (part.table["weight"].to_numpy() == 0)
    for code, name in enumerate(SPLITS):
        sizes[f"events_{name}"] = int(((part.code_E == code) & positive_E).sum())
        sizes[f"shown_{name}"] = int((part.code_E == code).sum())
        sizes[f"weightless_{name}"] = int((weightless_E & (part.code_E == code)).sum())
    train_E, valid_E = part.code_E == 0, part.code_E == 1
    flags = {"n": train_E, "chosen": train_E & positive_E, "n_valid": valid_E, "chosen_valid": valid_E & positive_E}
    numbers = {name: flag_E.astype(np.int64) for name, flag_E in flags.items()}
    items = pa.table({"value": part.table["item"], **numbers}).filter(pa.array(train_E | valid_E))
    drawn_E = positive_E & negatives.sampled(part.table["order"].to_numpy(), sample.share)
    drawn_E &= user_rows.num_earlier(part.user_E, positive_E) >= sample.min_history
    place_E = part.code_E.astype(np.int64) if sample.by_split else part.table["time"].to_numpy()
    drawn = pa.table({"place": place_E, "item": part.table["item"]}).filter(pa.array(drawn_E))
    known = [part.table.filter(pa.array(kept_E)) for kept_E in (train_E, valid_E)]
    columns = [(feature_column("context", name), kind) for name, kind in context.items()]
    values = [features.count_values(table[column], kind) for column, kind in columns for table in known]
    return sizes, features.merge(items), drawn, *values


def write(
    file: str,
    bucket: int,
    division: user_rows.Division,
    encoders: Encoders,
    uri: str,
    base: PreparedDataset | None,
    first_user: int,
) -> dict[str, Any]:
    """Step 4: write this bucket's shard of every split, and its users. first_user: id of its first user that the base does
    not have."""
    part = division.bucket(storage.read_table(file))
    item_E = vocab.item_ids(part.table["item"], encoders.item_keys)
    rare_E = ((item_E == UNKNOWN) | (item_E >= encoders.num_items)) & (part.code_E == 0)
    counts = {
        "events_after_end": int((part.code_E >= len(SPLITS)).sum()),
        "train_events_dropped_rare_item": int(rare_E.sum()),
    }
    keep_E = (part.code_E < len(SPLITS)) & ~rare_E
    table = part.table.filter(pa.array(keep_E))
    user_E, code_E, item_E = part.user_E[keep_E], part.code_E[keep_E], item_E[keep_E]
    positive_E = _positive(table)
    if encoders.sampler is not None:
        table, user_E, code_E, item_E, missed = _with_negatives(table, user_E, code_E, item_E, bucket, encoders)
        counts["negatives_not_found"] = missed
        positive_E = _positive(table)
    repeated_E = user_rows.repeated(user_E, table["item"], positive_E)
    lists = {"item": pa.array(item_E), "time": table["time"].combine_chunks()}
    lists |= {name: table[name].combine_chunks() for name in ("label", "weight") if name in table.column_names}
    lists |= {f.column: features.encode(table[f.column], f) for f in encoders.context.values()}
    user_columns = _user_columns(part.keys, encoders)
    name = f"part-{bucket:05d}.parquet"
    id_U = append.old_user_ids(base, bucket, part.keys)
    id_U[id_U < 0] = first_user + np.arange((id_U < 0).sum())
    ids = pa.array(id_U.astype(np.int32))
    storage.write_table(storage.join(uri, "users", name), pa.table({"user_id": ids, "user": part.keys}))
    shards = {}
    for code, split_name in enumerate(SPLITS):
        rows = user_rows.rows(user_E, code_E, split_name, positive_E, encoders.min_history)
        target_E = rows.targets()
        events, impressions = int(positive_E[target_E].sum()), len(target_E)
        counts |= {f"events_{split_name}": events, f"users_{split_name}": len(rows.user_R)}
        counts[f"repeats_{split_name}"] = int(repeated_E[target_E].sum())
        if code:
            unknown_E = (item_E == UNKNOWN) | (item_E >= encoders.num_items)
            counts[f"unknown_targets_{split_name}"] = int((positive_E & unknown_E)[target_E].sum())
        if "label" in table.column_names:
            counts[f"negatives_{split_name}"] = impressions - events
        if not impressions:
            continue
        shard_file = f"{split_name}/{name}"
        out = rows.table(ids, lists, user_columns)
        per_group = max(1, _GROUP_EVENTS * len(out) // len(rows.index))
        storage.write_table(storage.join(uri, shard_file), out, row_group_rows=per_group)
        shards[split_name] = {"file": shard_file, "rows": len(out), "events": events, "impressions": impressions}
    early = {}
    for split_name in SPLITS if encoders.min_history else ():
        rows = user_rows.early_rows(user_E, code_E, split_name, positive_E, encoders.min_history)
        if len(rows.index):
            early[split_name] = f"early-{split_name}/{name}"
            storage.write_table(
                storage.join(uri, early[split_name]), rows.table(ids, {key: lists[key] for key in ("item", "time")}, {})
            )
    written = [f"users/{name}", *(f"{split}/{name}" for split in shards), *early.values()]
    if file == sorted_file(storage.join(uri, append.EVENTS), bucket):  # they stay
        written.append(append.file_of(append.EVENTS, bucket))
    return {"shards": shards, "early": early, "counts": counts, "files": digests.of_files(uri, written)}


def _with_negatives(
    table: pa.Table, user_E: np.ndarray, code_E: np.ndarray, item_E: np.ndarray, bucket: int, encoders: Encoders
) -> tuple[pa.Table, np.ndarray, np.ndarray, np.ndarray, int]:
    """The events with negatives, each placed just before its positive; last, how many negatives could not be drawn."""
    assert encoders.sampler is not None
    wanted_E = user_rows.num_earlier(user_E, np.ones(len(user_E), bool)) >= encoders.min_history
    time_E, seed = table["time"].to_numpy(), [encoders.seed, 4, bucket]
    source_M, item_M = negatives.draw(encoders.sampler, user_E, code_E, item_E, time_E, wanted_E, seed)
    source = np.concatenate([source_M, np.arange(len(user_E))])
    order = np.argsort(source, kind="stable")
    source = source[order]
    label = np.concatenate([np.zeros(len(source_M)), np.ones(len(user_E))])[order].astype(np.float32)
    item_E = np.concatenate([item_M, item_E])[order].astype(np.int32)
    table = table.take(pa.array(source)).append_column("label", pa.array(label))
    missed = int(wanted_E.sum()) * encoders.sampler.config.per_positive - len(source_M)
    return table, user_E[source], code_E[source], item_E, missed


def _positive(table: pa.Table) -> np.ndarray:
    """(E,) bool: whether the item was chosen; False for impressions with label 0."""
    if "label" not in table.column_names:
        return np.ones(len(table), bool)
    return np.asarray(table["label"].to_numpy() > 0)


def _user_columns(keys: pa.Array, encoders: Encoders) -> dict[str, pa.Array]:
    """Encoded user features, one entry per user; missing values for users that are not in the table."""
    if encoders.user_table is None:
        return {}
    table = encoders.user_table
    aligned = table.take(pc.index_in(keys, value_set=table["user"].combine_chunks()))
    return {f.column: features.encode(aligned[f.column], f) for f in encoders.user.values()}
