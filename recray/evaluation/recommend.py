"""The recommend stage: final lists of users as Parquet.

    part-*.parquet    user (original key), item (original key), rank from 1, score
    _lists.json       ListsRecord, written last

A list predicts what comes after all known events of the user. Users without known events get the most popular items, with
score null:

    user   item    rank  score
    1007   A-33    1      4.81
    1007   B-02    2      4.77
    9999   A-12    1      null
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recray import digests, layout, log, storage
from recray.artifacts import Run
from recray.cluster.stage_task import on_cluster
from recray.config import Config
from recray.data.dataset import PreparedDataset
from recray.data.sources import base, files, tables
from recray.errors import DataError
from recray.evaluation.parallel import map_shards
from recray.ids import SPLITS
from recray.loading.collate import eval_queries
from recray.records import ListsRecord
from recray.retrieval.baselines.popularity import Popularity
from recray.retrieval.blend import check_blend
from recray.retrieval.recommenders import RunArtifacts, list_table, open_recommenders

_BATCH = 512
_BEGUN = "_begun.json"  # marks the folder, before anything else is in it


def recommend(config: Config, output: str, users: str | None = None, k: int = 10) -> ListsRecord:
    """Write lists of `k` items for every user of the dataset, or for those of a Parquet file, into the folder `output`.

    users: Parquet file or folder whose column `data.columns.user` holds the keys. Raises DataError if that column is missing
    or of another type than the dataset's users, StorageError if `output` holds anything but earlier lists.
    """
    return on_cluster("recommend", config.scaling, _recommend, config, output, users, k)


def _recommend(config: Config, output: str, users: str | None, k: int) -> ListsRecord:
    started = time.perf_counter()
    artifacts = RunArtifacts.of(Run(config))
    dataset = artifacts.dataset
    check_blend(config, dataset, SPLITS)
    wanted = None if users is None else _keys(users, config.data.columns.user, dataset)
    _clear(output)
    names = [file.rpartition("/")[2] for file in dataset.user_files]
    writer = _Writer(config, artifacts, output, wanted, k)
    known = sum(map_shards("recommend", partial(_write_parts, writer, names), config.scaling, len(names)))
    everybody = dataset.user_keys()["user"].combine_chunks() if wanted is None else wanted
    popular = _write_popular(dataset, output, everybody, known > 0, k)
    counts = {"users": known + popular, "users_with_popular_items": popular}
    lists = ListsRecord(
        parents=artifacts.inputs,
        config=config.model_dump(mode="json"),
        k=k,
        counts=counts,
        files=digests.of_files(output, [info.uri.rpartition("/")[2] for info in storage.list_files(output)]),
        seconds=time.perf_counter() - started,
    ).write(output)
    log.info(
        "recommend",
        f"{known:,} users with lists of their own, {popular:,} with popular items, {k} items each, "
        f"in {lists.seconds:.1f} s: {output}",
        event="result",
        values=counts,
    )
    return lists


def _clear(output: str) -> None:
    """Delete lists of an earlier call, complete or not. Raises StorageError if the folder holds anything else."""
    begun = storage.join(output, _BEGUN)
    if storage.exists(begun) or storage.exists(storage.join(output, ListsRecord.file_name())):
        layout.refuse_foreign(output, layout.LISTS)
        layout.clear(output, layout.LISTS)
    layout.refuse_foreign(output, layout.NOTHING)
    storage.write_json(begun, {"stage": "recommend"})


def _keys(uri: str, column: str, dataset: PreparedDataset) -> pa.Array:
    """The distinct user keys of a file or folder, of the same type as the dataset's users."""
    footers = tables.read_footers(files.find(uri, "recommend"))
    full = [footer for footer in footers if footer.rows]
    if not full:
        raise DataError(f"{uri} holds no users: no file there has rows; give one row per user, or leave out --users")
    for footer in full:
        if column not in footer.names:
            raise DataError(
                f"{footer.uri} has no column '{column}'; its columns are {', '.join(footer.names)}; "
                f"name it as data.columns.user does"
            )
    expected = dataset.user_keys()["user"].type
    kind = tables.key_type(full, column, expected)
    if kind != expected:
        shown = kind or full[0].schema.field(column).type
        raise DataError(f"{uri}: column '{column}' is {shown}, but users of the dataset are {expected}; convert it")
    keys = [
        base.ids(
            tables.read_columns(footer.uri, footer.hive, [column])[column], f"{footer.uri}: column '{column}'", kind
        )
        for footer in full
    ]
    return pc.unique(pa.chunked_array([chunk for one in keys for chunk in one.chunks]))


@dataclass(frozen=True)
class _Writer:
    """What a task needs to write lists."""

    config: Config
    artifacts: RunArtifacts
    output: str
    wanted: pa.Array | None  # keys of the users who get lists; all users without it
    k: int


def _write_parts(writer: _Writer, names: list[str], numbers: Iterable[int]) -> Iterator[int]:
    """Write the lists of these parts of the users; yields the number of users of each."""
    config, dataset = writer.config, writer.artifacts.dataset
    recommender = open_recommenders(writer.artifacts, config, SPLITS).final
    items = dataset.items()["item"].combine_chunks()
    for number in numbers:
        users = dataset.read_file(f"users/{names[number]}")
        if writer.wanted is not None:
            users = users.filter(pc.is_in(users["user"], value_set=writer.wanted))
        keys, user_ids = users["user"].combine_chunks(), users["user_id"].combine_chunks()
        written = []
        for table in dataset.latest(names[number], user_ids):
            for query in eval_queries(table, _BATCH, config.model.history_length, "next"):
                ids, scores = recommender.recommend(query, writer.k, config.evaluation.filter_seen)
                asked = pa.array(query.batch.user_B.numpy().astype(np.int32))
                written.append(list_table(keys.take(pc.index_in(asked, user_ids)), ids, scores, items))
        if written:
            storage.write_table(storage.join(writer.output, names[number]), pa.concat_tables(written))
        yield sum(len(pc.unique(table["user"])) for table in written)


def _write_popular(dataset: PreparedDataset, output: str, wanted: pa.Array, any_written: bool, k: int) -> int:
    """Write popular items for the users who have no list yet; returns how many they are."""
    left = wanted
    for info in storage.list_files(output) if any_written else ():
        have = storage.read_table(info.uri, ["user"])["user"].combine_chunks()
        left = left.filter(pc.invert(pc.is_in(left, value_set=have)))
    if len(left):
        best = Popularity(dataset.item_counts()).order[:k]
        lists = np.broadcast_to(best, (len(left), len(best)))
        items = dataset.items()["item"].combine_chunks()
        storage.write_table(storage.join(output, "part-popular.parquet"), list_table(left, lists, None, items))
    return len(left)
