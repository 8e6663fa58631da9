"""Raw events to a prepared dataset, by Ray Data and Ray tasks; no process holds the log.

Layout of <run>/dataset:

    dataset.json             DatasetRecord, written last
    items.parquet            row i is item id i: `item` (key), `count` (train events), encoded features
    users/part-*.parquet     `user_id`, `user` (key)
    train/ valid/ test/      part-*.parquet, one row per user:
        user         int32
        item         list<int32>   oldest first; 1 = unknown item
        time         list<int64>   microseconds, or positions
        num_targets  int32         the last num_targets entries are targets, the ones before are context
        label, weight  list<float32>      where the log has them
        user_<f>     encoded user feature
        context_<f>  list of encoded context features, parallel to item

Steps: (1) events go to hash buckets of users and are sorted there, (2) time
boundaries, (3) counts of train events give the item vocabulary, (4) shards. The
number of buckets follows from the number of events, never from the machine, so
the same input and seed give the same bytes on any number of CPUs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recray import registry, runtime, storage
from recray.config import Config, DataConfig, FeatureConfig
from recray.data import features, history, split
from recray.data.history import SPLITS
from recray.data.sources.base import Source
from recray.errors import DataError
from recray.records import DatasetRecord, Feature, Shard

_TIME_BINS = 1_000_000
_MERGE = 32  # tables of counts merged by one task


def prepare(config: Config) -> DatasetRecord:
    """Prepare `config.data` into <run>/dataset; a dataset already there for the same input is returned as it is."""
    started = time.perf_counter()
    runtime.start(config.scaling)
    uri = storage.join(config.run_uri, "dataset")
    source: Source = registry.load("source", config.data.source).read(config.data, config.run.seed)
    wanted = {"data": config.data.model_dump(mode="json"), "seed": config.run.seed}
    if storage.exists(storage.join(uri, "dataset.json")):
        record = DatasetRecord.read(uri)
        if record.config == wanted and record.fingerprint == source.fingerprint:
            print(f"prepare: {uri} is there for this input and configuration ({record.id}); reused", flush=True)
            return record
    storage.delete_folder(uri)
    work = _Work(config.data, config.run.seed, source, uri, storage.join(uri, "_sorted"))
    record = work.run(wanted, started)
    storage.delete_folder(work.sorted_uri)
    counts = record.counts
    print(
        f"prepare: {counts['events_train']:,} train, {counts['events_valid']:,} valid, {counts['events_test']:,} test events, "
        f"{record.num_items - 2:,} items, {record.num_users - 2:,} users in {record.seconds:.1f} s",
        flush=True,
    )
    return record


@dataclass(frozen=True)
class _Encoders:
    """What every task needs to write rows."""

    item_keys: pa.Array  # key of item id 2, 3, ...
    context: dict[str, Feature]
    user: dict[str, Feature]
    user_table: pa.Table | None


@dataclass(frozen=True)
class _Work:
    config: DataConfig
    seed: int
    source: Source
    uri: str
    sorted_uri: str

    def run(self, wanted: dict[str, Any], started: float) -> DatasetRecord:
        import ray

        buckets = max(1, math.ceil(self.source.num_events / self.config.shard_events))
        stats = self._sort(buckets)
        counts = {key: sum(s[key] for s in stats) for key in stats[0] if key not in ("bucket", "first", "last")}
        if not counts["events_kept"]:
            raise DataError(
                f"no events are left of {counts['events_read']}: lower data.min_user_events ({self.config.min_user_events})"
            )
        first, last = (
            min(s["first"] for s in stats if s["events_kept"]),
            max(s["last"] for s in stats if s["events_kept"]),
        )
        boundaries = self._boundaries(stats, first, last) if self.config.split.kind == "temporal" else None
        parts = self._each(_count_bucket, stats, self.config, boundaries)
        item_counts = _merge_counts([p["items"] for p in parts])
        kept = item_counts.filter(pc.greater_equal(item_counts["n"], self.config.min_item_events))
        if not len(kept):
            raise DataError(
                f"no item has {self.config.min_item_events} train events: lower data.min_item_events or check data.split"
            )
        context = {
            name: features.fit(name, "context", kind, [p["context"][name] for p in parts])
            for name, kind in self.config.context_features.items()
        }
        user_features = self._user_features()
        item_features = self._write_items(kept)
        encoders = ray.put(_Encoders(kept["item"].combine_chunks(), context, user_features, self.source.users))
        offsets = 2 + np.cumsum([0, *(s["users_kept"] for s in stats)])
        written = self._each(
            _write_bucket, stats, self.config, boundaries, encoders, self.uri, offsets=offsets.tolist()
        )
        shards: dict[str, list[Shard]] = {name: [] for name in SPLITS}
        for part in written:
            for name, shard in part["shards"].items():
                shards[name].append(Shard(**shard))
            for key, value in part["counts"].items():
                counts[key] = counts.get(key, 0) + value
        counts["items_dropped_min_count"] = len(item_counts) - len(kept)
        split.check(counts, first, last, boundaries, self.source.has_time)
        return DatasetRecord(
            config=wanted,
            fingerprint=self.source.fingerprint,
            num_items=len(kept) + 2,
            num_users=int(offsets[-1]),
            counts=counts,
            features=[*user_features.values(), *context.values(), *item_features],
            shards=shards,
            seed=self.seed,
            split={
                "kind": self.config.split.kind,
                "first": first,
                "last": last,
                **(vars(boundaries) if boundaries else {}),
            },
            has_time=self.source.has_time,
            seconds=time.perf_counter() - started,
        ).write(self.uri)

    def _sort(self, buckets: int) -> list[dict[str, Any]]:
        """Step 1: one sorted Parquet file per bucket; returns one entry of statistics each."""
        import ray

        sort = {"config": self.config, "seed": self.seed, "has_time": self.source.has_time, "folder": self.sorted_uri}
        if buckets == 1:  # a small log pays no shuffle
            refs = self.source.events.to_arrow_refs()
            return [ray.get(ray.remote(_sort_whole).remote(sort, *refs))]
        keyed = self.source.events.map_batches(
            _add_bucket, batch_format="pyarrow", batch_size=None, zero_copy_batch=True, fn_kwargs={"buckets": buckets}
        )
        sorted_stats = keyed.groupby("bucket", num_partitions=min(buckets, 200)).map_groups(
            _sort_group, batch_format="pyarrow", fn_kwargs={"sort": sort}
        )
        rows = sorted_stats.take_all()
        return sorted(({k: int(v) for k, v in row.items()} for row in rows), key=lambda s: s["bucket"])

    def _each(
        self,
        function: Callable[..., dict[str, Any]],
        stats: list[dict[str, Any]],
        *args: Any,
        offsets: list[int] | None = None,
    ) -> list[dict[str, Any]]:
        """`function` on every bucket, as Ray tasks; results in order of buckets."""
        import ray

        task = ray.remote(function)
        calls = []
        for index, entry in enumerate(stats):
            extra = () if offsets is None else (offsets[index],)
            calls.append(task.remote(_sorted_file(self.sorted_uri, entry["bucket"]), entry["bucket"], *args, *extra))
        try:
            return list(ray.get(calls))
        except ray.exceptions.RayTaskError as error:
            raise error.cause if isinstance(error.cause, Exception) else error from None

    def _boundaries(self, stats: list[dict[str, Any]], first: int, last: int) -> split.Boundaries:
        """Step 2: from a histogram of all times in _TIME_BINS bins."""
        edges = np.unique(np.linspace(first, last + 1, _TIME_BINS + 1).astype(np.int64))
        parts = self._each(_histogram_bucket, stats, first, last)
        bins = np.sum([p["counts"] for p in parts], axis=0)
        return split.temporal(self.config.split, edges, bins)

    def _user_features(self) -> dict[str, Feature]:
        table = self.source.users
        if table is None:
            return {}
        kinds = features.infer_kinds(table, "user", self.config.user_features, "the user table")
        return {n: features.fit(n, "user", kind, [features.count_values(table[n], kind)]) for n, kind in kinds.items()}

    def _write_items(self, kept: pa.Table) -> list[Feature]:
        """items.parquet; returns the fitted item features."""
        no_key = pa.nulls(2, kept["item"].type)
        out = {
            "item": pa.concat_arrays([no_key, kept["item"].combine_chunks()]),
            "count": pa.array(np.concatenate([[0, 0], kept["n"].to_numpy()]).astype(np.int64)),
        }
        fitted: list[Feature] = []
        table = self.source.items
        if table is not None:
            if table["item"].type != kept["item"].type:
                raise DataError(
                    f"item ids are {kept['item'].type} in the log but {table['item'].type} in the item table: make them alike"
                )
            kinds = features.infer_kinds(table, "item", self.config.item_features, "the item table")
            aligned = table.take(pc.index_in(out["item"], value_set=table["item"].combine_chunks()))
            for name, kind in kinds.items():
                feature = features.fit(name, "item", kind, [features.count_values(aligned[name], kind)])
                fitted.append(feature)
                out[name] = features.encode(aligned[name], feature)
        storage.write_table(storage.join(self.uri, "items.parquet"), pa.table(out))
        return fitted


def _sorted_file(folder: str, bucket: int) -> str:
    return storage.join(folder, f"bucket-{bucket:05d}.parquet")


def _add_bucket(table: pa.Table, buckets: int) -> pa.Table:
    bucket = history.hash_keys(table["user"]) % np.uint64(buckets)
    return table.append_column("bucket", pa.array(bucket.astype(np.int64)))


def _sort_whole(sort: dict[str, Any], *tables: pa.Table) -> dict[str, Any]:
    return _sort(pa.concat_tables(tables, promote_options="permissive"), 0, **sort)


def _sort_group(table: pa.Table, sort: dict[str, Any]) -> pa.Table:
    return pa.Table.from_pylist([_sort(table, int(table["bucket"][0].as_py()), **sort)])


def _sort(table: pa.Table, bucket: int, config: DataConfig, seed: int, has_time: bool, folder: str) -> dict[str, Any]:
    ordered, dropped = history.sort_users(table, config, seed, has_time)
    storage.write_table(_sorted_file(folder, bucket), ordered)
    times = ordered["time"]
    return {
        "bucket": bucket,
        "events_read": len(table),
        "events_kept": len(ordered),
        "users_kept": len(pc.unique(ordered["user"])),
        "first": pc.min(times).as_py() or 0,
        "last": pc.max(times).as_py() or 0,
        **dropped,
    }


def _histogram_bucket(file: str, bucket: int, first: int, last: int) -> dict[str, Any]:
    times = storage.read_table(file, ["time"])["time"].to_numpy()
    edges = np.unique(np.linspace(first, last + 1, _TIME_BINS + 1).astype(np.int64))
    return {"counts": np.bincount(np.searchsorted(edges, times, side="right") - 1, minlength=len(edges) - 1)}


def _count_bucket(file: str, bucket: int, config: DataConfig, boundaries: split.Boundaries | None) -> dict[str, Any]:
    """Step 3: train counts of items and of context features."""
    part = history.Bucket.of(storage.read_table(file), config, boundaries)
    train = part.table.filter(pa.array(part.code_E == 0))
    counts = pc.value_counts(train["item"])
    missing = [name for name in config.context_features if name not in train.column_names]
    if missing:
        raise DataError(
            f"context feature '{missing[0]}' is not read: name it in data.columns.context ({config.columns.context})"
        )
    return {
        "items": pa.table({"item": counts.field("values"), "n": counts.field("counts")}),
        "context": {n: features.count_values(train[n], kind) for n, kind in config.context_features.items()},
    }


def _merge_counts(parts: Iterable[pa.Table]) -> pa.Table:
    """(item, n), most frequent first, ties by key."""
    import ray

    def merge(*tables: pa.Table) -> pa.Table:
        summed = pa.concat_tables(tables).group_by("item").aggregate([("n", "sum")])
        return summed.rename_columns({"n_sum": "n"}).select(["item", "n"])

    level = list(parts)
    while len(level) > _MERGE:
        task = ray.remote(merge)
        level = ray.get([task.remote(*level[i : i + _MERGE]) for i in range(0, len(level), _MERGE)])
    return merge(*level).sort_by([("n", "descending"), ("item", "ascending")])


def _write_bucket(
    file: str,
    bucket: int,
    config: DataConfig,
    boundaries: split.Boundaries | None,
    encoders: _Encoders,
    uri: str,
    first_user: int,
) -> dict[str, Any]:
    """Step 4: this bucket's shard of every split."""
    part = history.Bucket.of(storage.read_table(file), config, boundaries)
    found = pc.fill_null(pc.index_in(part.table["item"].combine_chunks(), value_set=encoders.item_keys), -1)
    item_E = found.to_numpy(zero_copy_only=False).astype(np.int32) + 2
    keep_E = (part.code_E < 3) & ~((item_E == 1) & (part.code_E == 0))
    counts = {
        "events_after_end": int((part.code_E >= 3).sum()),
        "train_events_dropped_rare_item": int(((item_E == 1) & (part.code_E == 0)).sum()),
    }
    table = part.table.filter(pa.array(keep_E))
    user_E, code_E, item_E = part.user_E[keep_E], part.code_E[keep_E], item_E[keep_E]
    keys = part.keys()
    name = f"part-{bucket:05d}.parquet"
    ids = pa.array(np.arange(first_user, first_user + len(keys), dtype=np.int32))
    storage.write_table(storage.join(uri, "users", name), pa.table({"user_id": ids, "user": keys}))
    lists = {"item": item_E, "time": table["time"].to_numpy()}
    lists |= {c: table[c].to_numpy() for c in ("label", "weight") if c in table.column_names}
    encoded = {f"context_{n}": features.encode(table[n], f) for n, f in encoders.context.items()}
    shards = {}
    for split_name in SPLITS:
        rows = history.rows(user_E, code_E, split_name)
        offsets = pa.array(rows.offsets.astype(np.int32))
        columns: dict[str, Any] = {"user": pa.array((rows.user_R + first_user).astype(np.int32))}
        for column, values in lists.items():
            columns[column] = pa.ListArray.from_arrays(offsets, pa.array(values[rows.index]))
        for column, array in encoded.items():
            columns[column] = pa.ListArray.from_arrays(offsets, array.take(pa.array(rows.index)))
        columns["num_targets"] = pa.array(rows.num_targets_R.astype(np.int32))
        columns |= _user_columns(keys, rows.user_R, encoders)
        out = pa.table(columns)
        events = int(rows.num_targets_R.sum())
        counts[f"events_{split_name}"] = events
        counts[f"users_{split_name}"] = len(out)
        if split_name != "train":
            counts[f"unknown_targets_{split_name}"] = int(((code_E == SPLITS.index(split_name)) & (item_E == 1)).sum())
        if not len(out):
            continue
        lone = int((rows.num_targets_R == np.diff(rows.offsets)).sum())  # rows whose first target has nothing before it
        per_group = max(1, 65_536 * len(out) // max(len(rows.index), 1))
        storage.write_table(storage.join(uri, split_name, name), out, row_group_rows=per_group)
        shards[split_name] = {
            "file": f"{split_name}/{name}",
            "rows": len(out),
            "events": events,
            "sequence_events": events - lone,
        }
    return {"shards": shards, "counts": counts}


def _user_columns(keys: pa.Array, user_R: np.ndarray, encoders: _Encoders) -> dict[str, pa.Array]:
    if encoders.user_table is None:
        return {}
    table = encoders.user_table
    if table["user"].type != keys.type:
        raise DataError(
            f"user ids are {keys.type} in the log but {table['user'].type} in the user table: make them alike"
        )
    aligned = table.take(pc.index_in(keys.take(pa.array(user_R)), value_set=table["user"].combine_chunks()))
    return {f"user_{name}": features.encode(aligned[name], f) for name, f in encoders.user.items()}


__all__ = ["FeatureConfig", "prepare"]
