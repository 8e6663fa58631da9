"""Raw events to a prepared dataset, by Ray Data and Ray tasks; no process holds the whole log.

Layout of <run>/dataset/<identity>:

    dataset.json             DatasetRecord, written last
    items.parquet            row i is item id i: `item` (key), `count` and `count_valid` (train and validation events),
                             item_<f>: encoded features
    users/part-*.parquet     `user_id`, `user` (key)
    train/ valid/ test/      part-*.parquet, one row per user:
        user         int32
        item         list<int32>   oldest first; 1 = unknown item, from `num_items` on: known to a refit only
        time         list<int64>   microseconds, or positions
        num_targets  int32         the last num_targets entries are targets, the ones before are history
        label        list<float32>     1 chosen, 0 shown and not chosen (or drawn: data.negatives); history is all chosen
        weight       list<float32>     where the log has them
        user_<f>     encoded user feature
        context_<f>  list of encoded context features, parallel to item
    early-train/ ...         with data.min_history: user, item, time, num_targets of events that are in no row as targets
    events/bucket-*.parquet  with data.append: the sorted events, from which a log that grows is prepared (recray.data.append)

Steps: (1) partition events into buckets by a hash of the user, and sort each bucket
(dropping duplicates), (2) find the time boundaries from a histogram, (3) count train
events, which gives the users that are kept and the catalogue (items with too few train
events are dropped; in valid and test they are the unknown item), and validation events,
whose new items come after those of train, for a refit (recray.data.dataset), (4) write shards.
Each step is one pass over the buckets. The number of buckets follows from the number
of events, never from the machine, so the same log and seed give the same bytes on any
number of CPUs. Only sums, merged counts and file names reach the driver.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recray import digests, layout, locks, log, progress, registry, storage
from recray.artifacts import DATASET, Artifact, Run
from recray.cluster import runtime
from recray.cluster.errors import unwrapped
from recray.config import Config, DataConfig
from recray.data import append, buckets, features, kinds, negatives, partition, remarks, split, user_rows, vocab
from recray.data.buckets import Buckets
from recray.data.dataset import ITEMS, PreparedDataset
from recray.data.sources.base import Source
from recray.digests import FileDigest
from recray.errors import ConfigError, DataError
from recray.ids import NUM_RESERVED, SPLITS
from recray.records import DatasetRecord, Feature, Shard, feature_column

# A log this small is not shuffled: each bucket's task takes its events from all blocks (shared memory, no copy).
# A shuffle starts more processes, seconds each, before the first row moves.
_SCANNED_EVENTS = 8_388_608
_PARTITION_BUCKETS = 16  # buckets in one partition of the shuffle, at most


def prepare(config: Config) -> DatasetRecord:
    """Prepare the log of `config.data`; a dataset of the same log, [data] and run.seed is returned as it is.

    Raises ConfigError, DataError or StorageError where the log cannot be read as configured.
    """
    started = time.perf_counter()
    run = Run(config)
    if config.run.dataset and storage.exists(storage.join(config.run.dataset, DatasetRecord.file_name())):
        return run.dataset().record
    append.check(config.data)
    module = registry.load("source", config.data.source, config.run.plugins)
    if hasattr(module, "check"):  # before Ray is started, so that a wrong column is an error at once
        module.check(config.data)
    runtime.start(config.scaling)
    with unwrapped(), contextlib.ExitStack() as stack:
        source: Source = module.read(config.data, config.run.seed)
        inputs, base = append.inputs_of(run, source)
        artifact = run.artifact(DATASET, inputs)
        stack.enter_context(locks.exclusive(artifact.uri))
        if not run.begin(artifact):
            return artifact.record
        artifact.clear()  # what a process that was killed has left
        artifact.mark()
        work = _Work(config.data, config.run.seed, source, artifact, base)
        stack.enter_context(progress.task("prepare", f"{source.num_events:,} events"))
        try:
            record = work.run(started)
        except BaseException:
            run.discard(artifact)  # nothing half-written stays
            raise
    if not config.data.append:
        layout.clear(work.sorted_uri, layout.SORTED)
    run.publish(artifact)
    counts = record.counts
    remarks.say(config.data, counts)
    events = ", ".join(f"{counts[f'events_{name}']:,} {name}" for name in SPLITS)
    _say(
        f"{events} events, {record.num_items - NUM_RESERVED:,} items, "
        f"{record.num_users - NUM_RESERVED:,} users in {record.seconds:.1f} s"
    )
    return record


def _add(total: dict[str, int], parts: Iterable[dict[str, int]]) -> None:
    for part in parts:
        for key, value in part.items():
            total[key] = total.get(key, 0) + value


def _say(text: str) -> None:
    log.info("prepare", text)


@dataclass(frozen=True)
class _Work:
    config: DataConfig
    seed: int
    source: Source
    artifact: Artifact[DatasetRecord]
    base: PreparedDataset | None  # that this one extends

    @property
    def sorted_uri(self) -> str:
        return storage.join(self.artifact.uri, append.EVENTS if self.config.append else "_sorted")

    def run(self, started: float) -> DatasetRecord:
        """All four steps. What they write is final, except for the sorted buckets."""
        import ray

        columns = None if self.source.types is None else kinds.choose(self.config, self.source, self.source.types)
        stats = self._sort()
        counts = self._counts(stats)
        kept = counts["events_kept"]
        full = [s for s in stats if s["events_kept"]]
        first, last = min(s["first"] for s in full), max(s["last"] for s in full)
        if columns is None:
            schema, _ = storage.read_schema(partition.sorted_file(self.sorted_uri, full[0]["bucket"]))
            columns = kinds.choose(self.config, self.source, {field.name: field.type for field in schema})
        sorted_ = Buckets(self.sorted_uri, [s["bucket"] for s in stats])
        boundaries, ties = (
            self._boundaries(sorted_, first, last) if self.config.split.kind == "temporal" else (None, "")
        )
        draw = split.draw(self.config.split, counts.pop("given_valid"), self.seed)
        division = ray.put(self._division(sorted_, boundaries, draw))
        sample, returned = self._sample(kept), 3 + 2 * len(columns.context)
        outputs = sorted_.each(partition.count, division, columns.context, sample, self.base, num_returns=returned)
        sizes = buckets.get([out[0] for out in outputs], "count items")
        self._check(counts, sizes, split.Range(first, last, boundaries, self.source.has_time, ties))
        known, new = self._catalogue(buckets.merge([out[1] for out in outputs]), counts)
        items, num_items = pa.concat_tables([known, new]), NUM_RESERVED + len(known)
        fitted = self._fit(items, num_items, columns, [out[3:] for out in outputs])
        sampler = self._sampler(known, sample.share, [out[2] for out in outputs])
        keys, least = items["item"].combine_chunks(), self.config.min_history
        encoders = partition.Encoders(
            keys, num_items, fitted["context"], fitted["user"], columns.users, sampler, least, self.seed
        )
        new_users = [size["users_new"] for size in sizes]
        first_user = NUM_RESERVED if self.base is None else self.base.record.num_users
        offsets = first_user + np.cumsum([0, *new_users])
        shards, early, files = self._write(sorted_, offsets[:-1].tolist(), counts, division, encoders)
        for name in SPLITS:
            if not shards[name]:
                raise DataError(
                    f"no event of the {name} split has {self.config.min_history} earlier ones of its user: "
                    f"lower data.min_history ({self.config.min_history}), or check data.split"
                )
        schema, _ = storage.read_schema(storage.join(self.artifact.uri, shards["train"][0].file))
        return DatasetRecord(
            **self.artifact.lineage,
            config={"data": self.config.model_dump(mode="json"), "seed": self.seed},
            fingerprint=self.source.fingerprint,
            inputs=list(self.source.inputs),
            log_files=list(self.source.files) if self.config.append else [],
            buckets=self._num_buckets if self.config.append else 0,
            num_items=num_items,
            new_items=len(new),
            num_users=int(offsets[-1]),
            counts=counts,
            features=[feature for role in ("user", "context", "item") for feature in fitted[role].values()],
            columns={field.name: str(field.type) for field in schema},
            shards=shards,
            early=early,
            files=files | digests.of_files(self.artifact.uri, [ITEMS]),
            seed=self.seed,
            split={"kind": self.config.split.kind, "first": first, "last": last}
            | (vars(boundaries) if boundaries else {}),
            has_time=self.source.has_time,
            seconds=time.perf_counter() - started,
        ).write(self.artifact.uri)

    def _counts(self, stats: list[dict[str, int]]) -> dict[str, int]:
        """Events that were read, dropped and kept, those of the base included. Raises DataError if none is kept."""
        counts = {key: sum(s[key] for s in stats) for key in stats[0] if key not in ("bucket", "first", "last")}
        read = f"{counts['events_read']:,} {'events' if self.base is None else 'new events'} read"
        if self.base is not None:
            before = ("events_read", "events_before_start", *user_rows.DUPLICATES)
            _add(counts, [{key: self.base.record.counts[key] for key in before}])
        if not counts["events_kept"]:
            raise DataError(
                f"all {counts['events_read']:,} events are before data.split.start = {self.config.split.start}: "
                f"choose an earlier one"
            )
        _say(f"{read}, {counts['events_kept']:,} sorted into {len(stats)} buckets of users")
        return counts

    def _catalogue(self, item_counts: pa.Table, counts: dict[str, int]) -> tuple[pa.Table, pa.Table]:
        """The items of the train split, and those that the validation split adds; how many of train have too few events is
        added to `counts`."""
        known, new = vocab.catalogue(item_counts, self.config.min_item_events)
        kept = append.kept_items(self.base, known["item"].combine_chunks())
        known, new = append.in_kept_order(known, kept), append.in_kept_order(new, kept)
        counts["items_dropped_min_count"] = int((item_counts["n"].to_numpy() > 0).sum()) - len(known)
        # Negatives are drawn from the train split's items: an added one would be an event's own item only, never a drawn
        # one, which tells the label.
        return known, new if self.config.negatives is None else new.slice(0, 0)

    def _fit(
        self, items: pa.Table, num_items: int, columns: kinds.FeatureColumns, outputs: list[tuple[Any, ...]]
    ) -> dict[str, dict[str, Feature]]:
        """Fit all features, by role, and write items.parquet.

        outputs: of each bucket, references to the counts of context features.
        """
        context = {
            name: features.fit(
                name,
                "context",
                kind,
                *(buckets.merge([output[2 * i + split] for output in outputs]) for split in (0, 1)),
            )
            for i, (name, kind) in enumerate(columns.context.items())
        }
        context = {name: append.kept_feature(feature, self.base) for name, feature in context.items()}
        user: dict[str, Feature] = {}
        if columns.users is not None:
            for name, kind in columns.user.items():
                values = columns.users[feature_column("user", name)]
                fitted = features.fit(name, "user", kind, features.count_values(values, kind))
                user[name] = append.kept_feature(fitted, self.base)
        table, item = vocab.item_table(items, num_items, columns.items, columns.item, self.base)
        storage.write_table(storage.join(self.artifact.uri, ITEMS), table)
        _say(f"{len(items):,} items counted")
        for feature in (*context.values(), *user.values(), *item):
            if feature.hash_buckets:
                _say(
                    f"{feature.role} feature '{feature.name}' is hashed to {feature.hash_buckets:,} ids; "
                    f"about {feature.collisions:.1%} of its values share one with another"
                )
        return {"context": context, "user": user, "item": {feature.name: feature for feature in item}}

    def _sample(self, num_events: int) -> negatives.Sample:
        """The events that negatives are drawn from. Raises ConfigError if they cannot be drawn as configured."""
        wanted, share = self.config.negatives, min(1.0, negatives.MAX_SAMPLE / num_events)
        if wanted is None:
            return negatives.Sample()
        if self.config.columns.label:
            raise ConfigError(
                f"data.negatives draws items for logs without labels, and data.columns.label = '{self.config.columns.label}' "
                f"has them: leave out one of the two"
            )
        if wanted.draw == "targets":
            return negatives.Sample(share, by_split=True, min_history=self.config.min_history)
        if wanted.draw != "recent":
            return negatives.Sample()
        if not self.source.has_time:
            raise ConfigError(
                "data.negatives.draw = 'recent' needs times, and this log has positions only: use 'targets' or 'popularity'"
            )
        return negatives.Sample(share, min_history=self.config.min_history)

    def _sampler(self, items: pa.Table, share: float, samples: list[Any]) -> negatives.Sampler | None:
        import ray

        if self.config.negatives is None:
            return None
        if not share:
            return negatives.Sampler(self.config.negatives, items["count"].to_numpy())
        drawn = pa.concat_tables(ray.get(samples)).sort_by([("place", "ascending"), ("item", "ascending")])
        # With unknown items, which validation and test positives have, too.
        ids = vocab.item_ids(drawn["item"], items["item"].combine_chunks())
        place = drawn["place"].to_numpy()
        return negatives.Sampler(self.config.negatives, items["count"].to_numpy(), place, ids, share)

    def _write(
        self,
        sorted_: Buckets,
        offsets: list[int],
        counts: dict[str, int],
        division: Any,
        encoders: partition.Encoders,
    ) -> tuple[dict[str, list[Shard]], dict[str, list[str]], dict[str, FileDigest]]:
        """Step 4: by split the shards of all buckets, and the files of early events; all files. Adds to `counts` what was
        written.

        offsets: id of the first new user of each bucket. division: reference to a user_rows.Division.
        """
        import ray

        calls = sorted_.each(
            partition.write, division, ray.put(encoders), self.artifact.uri, self.base, offsets=offsets
        )
        parts = buckets.get(calls, "write shards")
        _add(counts, [part["counts"] for part in parts])
        shards = {name: [Shard(**p["shards"][name]) for p in parts if name in p["shards"]] for name in SPLITS}
        early = {name: [p["early"][name] for p in parts if name in p["early"]] for name in SPLITS}
        files = {name: digest for part in parts for name, digest in part["files"].items()}
        return shards, {name: found for name, found in early.items() if found}, files

    @property
    def _num_buckets(self) -> int:
        fresh = max(1, math.ceil(self.source.num_events / self.config.shard_events))
        return fresh if self.base is None else self.base.record.buckets

    def _sort(self) -> list[dict[str, int]]:
        """Step 1: one sorted Parquet file per bucket; returns one entry of statistics each, in order of buckets."""
        import ray

        num_buckets, base = self._num_buckets, self.base
        sorting = partition.Sorting(self.config, self.source.has_time, self.sorted_uri, base)
        events, num_events = self.source.events, self.source.num_events
        if base is not None and self.source.since is not None:
            events, num_events = self.source.since(len(base.record.log_files))
        # What each bucket's task takes its events from: all blocks, in the memory that processes of a node share.
        scanned = num_buckets == 1 or num_events <= _SCANNED_EVENTS
        if num_buckets > 1 and events is not None:
            events = events.map_batches(
                partition.by_bucket if scanned else partition.add_bucket,
                batch_format="pyarrow",
                batch_size=None,
                zero_copy_batch=True,
                fn_kwargs={"num_buckets": num_buckets},
            )
        task = ray.remote(partition.sort_blocks)
        if scanned:
            refs = [] if events is None else events.to_arrow_refs()
            stats = buckets.get(
                [task.remote(sorting, number if num_buckets > 1 else None, *refs) for number in range(num_buckets)],
                "sort events",
            )
        else:
            partitions = max(min(num_buckets, 200), num_buckets // _PARTITION_BUCKETS)
            grouped = events.groupby("bucket", num_partitions=partitions)
            result = grouped.map_groups(partition.sort_group, batch_format="pyarrow", fn_kwargs={"sorting": sorting})
            rows = progress.track(result.iter_rows(), "prepare", "sort events", num_buckets)
            stats = [{k: int(v) for k, v in row.items()} for row in rows]
            if base is not None:  # buckets without new events
                left = sorted({*range(num_buckets)} - {s["bucket"] for s in stats})
                stats += buckets.get([task.remote(sorting, number) for number in left], "sort events")
        stats = sorted((s for s in stats if "bucket" in s), key=lambda s: s["bucket"])
        if not stats:
            raise DataError("the log holds no events: check data.path and data.source")
        return stats

    def _check(self, counts: dict[str, int], sizes: list[dict[str, int]], found: split.Range) -> None:
        """Add the users that are kept and dropped to `counts`. Raises DataError if they leave nothing to train on or to test."""
        total: dict[str, int] = {}
        _add(total, sizes)
        for name in ("users_kept", "users_dropped_min_count", "events_dropped_min_count"):
            counts[name] = total.pop(name)
        if not counts["users_kept"]:
            items = f" or data.min_item_events ({self.config.min_item_events})" if self.config.k_core else ""
            raise DataError(
                f"no events are left of {counts['events_read']:,}: lower data.min_user_events "
                f"({self.config.min_user_events}), which counts train events{items}"
            )
        split.check(total, found, self.config.columns.label, self.config.columns.weight)

    def _division(
        self, sorted_: Buckets, boundaries: split.Boundaries | None, draw: split.Draw | None
    ) -> user_rows.Division:
        """Splits, and which users are kept: with data.k_core those of the largest set of users and items that have enough
        train events among each other."""
        import ray

        division = user_rows.Division(boundaries, draw, self.config.min_user_events)
        while self.config.k_core:
            counts = buckets.merge(sorted_.each(partition.core, ray.put(division)))
            items = counts.filter(pc.greater_equal(counts["n"], self.config.min_item_events))["value"].combine_chunks()
            if division.core is not None and len(items) == len(division.core):
                break
            division = dataclasses.replace(division, core=items)
        return division

    def _boundaries(self, sorted_: Buckets, first: int, last: int) -> tuple[split.Boundaries, str]:
        """Step 2: find the split times from a histogram of all event times; and a word on ties."""
        bins = buckets.merge(sorted_.each(partition.histogram, first, last))
        edges = partition.edges(first, last)
        counts = np.zeros(len(edges) - 1, np.int64)
        counts[bins["value"].to_numpy()] = bins["n"].to_numpy()
        boundaries = split.temporal(self.config.split, edges, counts, self.source.has_time)
        return boundaries, split.ties(counts)
