"""The recommend stage: final lists of users as Parquet.

    part-*.parquet    user (original key), item (original key), rank from 1, score
    _lists.json       ListsRecord, written last

A list predicts what comes after all known events of the user. Users without known events get the most popular items, with
score null:

    user   item    rank  score
    1007   A-33    1      4.81
    1007   B-02    2      4.77
    9999   A-12    1      null

A call that was killed is continued by the same call: users are written part by part, and parts that are there stay.
"""

from __future__ import annotations

import hashlib
import json
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
from recray.inference.catalog import Catalog
from recray.loading.collate import eval_queries
from recray.records import ListsRecord
from recray.retrieval.baselines.popularity import Popularity
from recray.retrieval.blend import check_blend
from recray.retrieval.recommenders import RunArtifacts, list_table, open_recommenders

_BATCH = 512
_POPULAR = "part-popular.parquet"
_BEGUN = "_begun.json"  # marks the folder, before anything else is in it


def recommend(
    config: Config, output: str, users: str | None = None, k: int = 10, titles: bool = False, own_names: bool = False
) -> ListsRecord:
    """Write lists of `k` items for every user of the dataset, or for those of a Parquet file, into the folder `output`.

    users: Parquet file or folder whose column `data.columns.user` holds the keys. titles: add a column title, from the item
    table. own_names: call the columns user and item as `data.columns` does.

    Raises DataError if the column of `users` is missing or of another type than the dataset's users, or if there are no
    titles; StorageError if `output` holds anything but earlier lists.
    """
    return on_cluster("recommend", config.scaling, _recommend, config, output, users, k, titles, own_names)


def _recommend(config: Config, output: str, users: str | None, k: int, titles: bool, own_names: bool) -> ListsRecord:
    started = time.perf_counter()
    artifacts = RunArtifacts.of(Run(config))
    dataset = artifacts.dataset
    check_blend(config, dataset, SPLITS)
    wanted = None if users is None else _keys(users, config.data.columns.user, dataset)
    names = [file.rpartition("/")[2] for file in dataset.user_files]
    writer = _Writer(config, artifacts, output, wanted, k, titles, own_names)
    writer.titles()  # before anything is written
    _begin(output, writer.identity(users))
    known = sum(map_shards("recommend", partial(_write_parts, writer, names), config.scaling, len(names)))
    everybody = dataset.user_keys()["user"].combine_chunks() if wanted is None else wanted
    popular = _write_popular(writer, everybody, known > 0)
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


def _begin(output: str, identity: str) -> None:
    """Delete lists of an earlier call, complete or not, unless it was to write the same lists and did not finish. Raises
    StorageError if the folder holds anything else."""
    begun, record = storage.join(output, _BEGUN), storage.join(output, ListsRecord.file_name())
    was_begun, complete = storage.exists(begun), storage.exists(record)
    layout.refuse_foreign(output, layout.LISTS if was_begun or complete else layout.NOTHING)
    if was_begun and not complete and storage.read_json(begun).get("identity") == identity:
        layout.clear_half_written(output, layout.LISTS)
        storage.delete_file(storage.join(output, _POPULAR))  # of the users who had no list yet
        there = [info.uri for info in storage.list_files(output)]
        log.info("recommend", f"resuming: {len(there)} parts are there", event="resumed", values={"parts": len(there)})
        return
    layout.clear(output, layout.LISTS)
    storage.write_json(begun, {"stage": "recommend", "identity": identity})


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
    with_titles: bool
    own_names: bool

    def identity(self, users: str | None) -> str:
        """Equal for calls that write the same lists."""
        sections = self.config.model_dump(mode="json", include={"retrieval", "evaluation", "data"})
        keys = (
            ""
            if self.wanted is None
            else hashlib.sha256(",".join(map(str, self.wanted.to_pylist())).encode()).hexdigest()
        )
        parts = [self.artifacts.inputs, sections, users, keys, self.k, self.with_titles, self.own_names]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def titles(self) -> pa.Array | None:
        """(N,) by item id. Raises DataError if they are asked for and there are none."""
        if not self.with_titles:
            return None
        items = self.artifacts.dataset.items()["item"].combine_chunks()
        catalog = Catalog.read(self.config, [], items)
        if catalog.title is None:
            raise DataError("--titles: the item table (data.items) has no column of titles; name it in report.title")
        return catalog.table[catalog.title].combine_chunks()

    def write(self, name: str, lists: pa.Table, items: pa.Array, titles: pa.Array | None) -> None:
        """items: (N,) keys by id."""
        if titles is not None:
            place = pc.index_in(lists["item"], value_set=items)
            lists = lists.append_column("title", titles.take(place))
        meaning = "orders the items of one user; of different users they cannot be compared; null: a popular item"
        lists = lists.rename_columns([self.column(column) for column in lists.column_names])
        storage.write_table(
            storage.join(self.output, name), lists.replace_schema_metadata({"score": f"{self._score()}: {meaning}"})
        )

    def column(self, name: str) -> str:
        """What a column of the lists is called."""
        own = {"user": self.config.data.columns.user, "item": self.config.data.columns.item} if self.own_names else {}
        return own.get(name, name)

    def _score(self) -> str:
        retrieval = self.config.retrieval
        if retrieval.ranker is not None:
            return "logit of the ranker"
        if retrieval.recency.enabled:
            return "logarithm of the share of recent counts and the model's score"
        return (
            "blend of the model's score and the item-item baseline"
            if retrieval.item_knn_weight
            else "the model's score"
        )


def _write_parts(writer: _Writer, names: list[str], numbers: Iterable[int]) -> Iterator[int]:
    """Write the lists of these parts of the users; yields the number of users of each."""
    config, dataset = writer.config, writer.artifacts.dataset
    recommender = open_recommenders(writer.artifacts, config, SPLITS).final
    items = dataset.items()["item"].combine_chunks()
    titles = writer.titles()
    for number in numbers:
        done = storage.join(writer.output, names[number])
        if storage.exists(done):
            yield len(pc.unique(storage.read_table(done, [writer.column("user")]).column(0)))
            continue
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
            writer.write(names[number], pa.concat_tables(written), items, titles)
        yield sum(len(pc.unique(table["user"])) for table in written)


def _write_popular(writer: _Writer, wanted: pa.Array, any_written: bool) -> int:
    """Write popular items for the users who have no list yet; returns how many they are."""
    left, dataset = wanted, writer.artifacts.dataset
    for info in storage.list_files(writer.output) if any_written else ():
        have = storage.read_table(info.uri, [writer.column("user")]).column(0).combine_chunks()
        left = left.filter(pc.invert(pc.is_in(left, value_set=have)))
    if len(left):
        best = Popularity(dataset.item_counts()).order[: writer.k]
        lists = np.broadcast_to(best, (len(left), len(best)))
        items = dataset.items()["item"].combine_chunks()
        writer.write(_POPULAR, list_table(left, lists, None, items), items, writer.titles())
    return len(left)
