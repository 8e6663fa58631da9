"""Prepare a log that has grown from the last dataset of the run (data.append), whose sorted events are in its folder events/.

The log has grown if the files of that dataset are the first ones of it, unchanged. Then only the files behind them are read:
each bucket's new events are sorted into its old ones, and the steps after it run on all events, as boundaries of splits move.
Ids and encodings are those of the last dataset as far as this one has the same items and values; what is new comes after
them. Apart from the order of ids the dataset is that of a preparation of the whole log.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recray import log, storage
from recray.artifacts import DATASET, Artifact, Run, artifacts_of, identity_of
from recray.config import DataConfig
from recray.data.dataset import ITEMS, PreparedDataset
from recray.data.sources.base import Source
from recray.errors import ConfigError
from recray.ids import NUM_RESERVED
from recray.records import DatasetRecord, Feature, InputFile

EVENTS = "events"  # folder of the sorted buckets that a dataset keeps
_LARGEST = 4  # times data.shard_events that a bucket may hold
_DRIFT = 0.5  # of the fitted standard deviation, by which a mean may move without a word


def check(config: DataConfig) -> None:
    """Raises ConfigError where data.append cannot be used."""
    if config.append and config.split.kind == "given":
        raise ConfigError(
            "data.append = true does not go with data.split.kind = 'given': use 'temporal' or 'leave_last'"
        )


def inputs_of(run: Run, source: Source) -> tuple[list[str], PreparedDataset | None]:
    """Ids of what the dataset of this log is made from, and the dataset that it extends, if there is one to extend."""
    fresh = [source.fingerprint]
    if not run.config.data.append:
        return fresh, None
    artifact = run.artifact(DATASET, fresh)
    found = [
        one
        for one in artifacts_of(artifact.uri.rpartition("/")[0], DATASET)
        if one.complete()
        and one.keys == artifact.keys
        and one.identity == identity_of(one.keys, one.inputs, DATASET.version)
    ]
    if same := [one for one in found if one.inputs[0] == source.fingerprint]:
        return same[0].inputs, None  # up to date
    last = max(found, key=lambda one: (len(one.record.log_files), one.record.created), default=None)
    if last is None:
        return fresh, None
    if why := _unfit(run.config.data, source, last):
        log.warning("prepare", f"all files are read, and items and users get new ids: {why}", event="not_appended")
        return fresh, None
    return [*fresh, last.record.id], PreparedDataset.at(last)


def _unfit(config: DataConfig, source: Source, last: Artifact[DatasetRecord]) -> str:
    """Why a log cannot be prepared from a dataset; empty if it can."""
    record = last.record
    if source.since is None:
        return f"the source {config.source!r} cannot read new events only"
    for old, new in zip(record.log_files, [*source.files, *[None] * len(record.log_files)], strict=False):
        if new is None or _state(old) != _state(new):
            return f"{old.uri} has changed, is gone, or comes behind a new file"
    if source.num_events > _LARGEST * config.shard_events * record.buckets:
        return f"the log has outgrown its {record.buckets} shards (data.shard_events = {config.shard_events:,})"
    name = next(name for name in record.files if name.startswith(f"{EVENTS}/"))
    schema, _ = storage.read_schema(storage.join(last.uri, name))
    for column, kind in (source.types or {}).items():
        stored = schema.field(column).type if column in schema.names else kind
        if stored != kind and column not in ("label", "weight"):  # which are float32 whatever numbers they were
            return f"column {column!r} was {stored} and is {kind}"
    return ""


def _state(file: InputFile) -> tuple[str, int, str]:
    return file.uri, file.bytes, file.state


def file_of(folder: str, bucket: int) -> str:
    """The file of a bucket in events/ or users/, relative to the dataset."""
    return f"{folder}/{'bucket' if folder == EVENTS else 'part'}-{bucket:05d}.parquet"


def bucket_of(base: PreparedDataset | None, folder: str, bucket: int) -> pa.Table | None:
    """What the base has of a bucket in events/ or users/."""
    file = file_of(folder, bucket)
    return None if base is None or file not in base.record.files else base.read_file(file)


def old_user_ids(base: PreparedDataset | None, bucket: int, keys: pa.Array) -> np.ndarray:
    """(U,) int64 ids that the base gives these users of a bucket; -1 for users that it does not have."""
    users = bucket_of(base, "users", bucket)
    if users is None:
        return np.full(len(keys), -1, np.int64)
    place = pc.index_in(keys, value_set=users["user"].combine_chunks())
    ids = users["user_id"].combine_chunks().take(place)
    return np.asarray(pc.fill_null(ids, -1).to_numpy(zero_copy_only=False).astype(np.int64))


def kept_items(base: PreparedDataset | None, known: pa.Array) -> pa.Array | None:
    """Keys of items in the order of the ids that they keep; None if one that was known is not among `known` any more."""
    if base is None:
        return None
    keys = base.read_file(ITEMS)["item"].combine_chunks().slice(NUM_RESERVED)
    before = keys.slice(0, base.record.num_items - NUM_RESERVED)
    if not pc.all(pc.is_in(before, value_set=known)).as_py():
        log.warning("prepare", "items have left the train split: items get new ids", event="new_ids")
        return None
    return keys


def in_kept_order(table: pa.Table, kept: pa.Array | None) -> pa.Table:
    """Rows with an `item` among `kept` first, in its order; then the others as they are."""
    if kept is None:
        return table
    place = pc.fill_null(pc.index_in(table["item"].combine_chunks(), value_set=kept), len(kept))
    return table.take(pc.array_sort_indices(place))  # stable


def kept_feature(fitted: Feature, base: PreparedDataset | None) -> Feature:
    """The feature as the base encodes it, with the values that are new after those that it has."""
    olds: Sequence[Feature] = () if base is None else base.record.features
    old = next((one for one in olds if one.column == fitted.column), None)
    if old is None or _how(old) != _how(fitted):
        return fitted
    if old.vocabulary is None or fitted.vocabulary is None:
        _report_drift(old, fitted)
        return old.model_copy(update={"collisions": fitted.collisions})
    size = old.cardinality - NUM_RESERVED
    known = dict.fromkeys(old.vocabulary[:size])
    in_train = set(fitted.vocabulary[: fitted.cardinality - NUM_RESERVED])
    known |= dict.fromkeys(value for value in (*old.vocabulary[size:], *fitted.vocabulary) if value in in_train)
    new = [value for value in dict.fromkeys((*old.vocabulary[size:], *fitted.vocabulary)) if value not in known]
    new = [value for value in new if value in set(fitted.vocabulary)]
    return fitted.model_copy(
        update={
            "cardinality": NUM_RESERVED + len(known),
            "new_values": len(new),
            "vocabulary": [*known, *new],
        }
    )


def _how(feature: Feature) -> Mapping[str, object]:
    """The kind of encoding."""
    return {
        "kind": feature.kind,
        "hashed": feature.hash_buckets,
        "log": feature.log,
        "quantiles": feature.edges is not None,
        "type": type(next(iter(feature.vocabulary or []), None)) if feature.vocabulary else None,
    }


def _report_drift(old: Feature, fitted: Feature) -> None:
    moved = abs(fitted.mean - old.mean) / old.std if old.kind == "numeric" else 0.0
    if moved > _DRIFT or not 0.5 < fitted.std / old.std < 2:
        log.warning(
            "prepare",
            f"{old.role} feature {old.name!r} has drifted: mean {old.mean:.4g} -> {fitted.mean:.4g}, standard deviation "
            f"{old.std:.4g} -> {fitted.std:.4g}; it is scaled as before. Prepare under another run.name to fit it anew",
            event="drift",
            values={"feature": old.column, "mean": [old.mean, fitted.mean], "std": [old.std, fitted.std]},
        )
