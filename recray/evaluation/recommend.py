"""The recommend stage: final lists of users, what the index finds in the order of the ranker, as Parquet.

    part-*.parquet    user (original key), item (original key), rank from 1, score
    _lists.json       ListsRecord, written last

A list is what comes next after everything that is known of the user. A user of whom
nothing is known gets the most popular items, with score null.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from recray import log, storage
from recray.artifacts import Run
from recray.config import Config
from recray.data.dataset import PreparedDataset
from recray.data.sources import base
from recray.errors import DataError
from recray.evaluation.parallel import map_shards
from recray.ids import FIRST_ITEM, SPLITS
from recray.loading.collate import eval_queries
from recray.records import ListsRecord
from recray.retrieval import embed
from recray.retrieval.blend import check_blend, open_blend
from recray.retrieval.faiss_index import ItemIndex
from recray.retrieval.ranker import open_ranker, ranker_parents
from recray.retrieval.recommenders import ExactSearch, IndexSearch, Reranked, Scorer
from recray.training import checkpoint

_BATCH = 512


def recommend(config: Config, output: str, users: str | None = None, k: int = 10) -> ListsRecord:
    """Lists of `k` items for every user of the dataset, or for those of a Parquet file, into the folder `output`.

    users: Parquet file or folder whose column `data.columns.user` holds the keys. Raises DataError when it has none.
    """
    started = time.perf_counter()
    run = Run(config)
    dataset, record = PreparedDataset.of(run), run.checkpoint().record
    check_blend(config, dataset, SPLITS)
    found = run.index()
    index = found.record if found is not None else None
    wanted = None if users is None else _keys(users, config.data.columns.user, dataset)
    _clear(output)
    names = [info.uri.rpartition("/")[2] for info in storage.list_files(storage.join(dataset.uri, "users"))]
    work = partial(_recommend_parts, config, output, names, wanted, k)
    parts = map_shards("recommend", work, config, len(names))
    known = sum(parts)
    everybody = dataset.user_keys()["user"].combine_chunks() if wanted is None else wanted
    popular = _write_popular(dataset, output, everybody, known > 0, k)
    counts = {"users": known + popular, "users_with_popular_items": popular}
    lists = ListsRecord(
        parents=[record.id, dataset.record.id, *([index.id] if index else []), *ranker_parents(config)],
        config=config.model_dump(mode="json"),
        k=k,
        counts=counts,
        files=sorted(info.uri.rpartition("/")[2] for info in storage.list_files(output)),
        seconds=time.perf_counter() - started,
    ).write(output)
    log.info(
        "recommend",
        f"{known:,} users with a list of their own, {popular:,} with popular items, {k} items each, "
        f"in {lists.seconds:.1f} s: {output}",
        event="result",
        values=counts,
    )
    return lists


def _clear(output: str) -> None:
    """Make room for the lists. Raises DataError where the folder holds anything but lists of an earlier call."""
    if not storage.exists(output):
        return
    if not storage.exists(storage.join(output, ListsRecord.file_name())):
        raise DataError(
            f"{output} is there and holds no lists of recray: give --output a folder that does not exist yet"
        )
    storage.delete_folder(output)


def _keys(uri: str, column: str, dataset: PreparedDataset) -> pa.Array:
    """The distinct keys of a file, of the type that the dataset's users have."""
    tables = [storage.read_table(info.uri) for info in storage.list_files(uri)]
    table = pa.concat_tables(tables)
    if column not in table.column_names:
        raise DataError(
            f"{uri} has no column '{column}'; columns there: {', '.join(table.column_names)}; "
            f"name it as data.columns.user does"
        )
    keys = base.ids(table[column], f"{uri}: column '{column}'")
    kind = dataset.user_keys()["user"].type
    if keys.type != kind:
        raise DataError(f"{uri}: column '{column}' is {keys.type}, but users of the dataset are {kind}; convert it")
    return pc.unique(keys)


def _recommend_parts(
    config: Config, output: str, names: list[str], wanted: pa.Array | None, k: int, numbers: Iterable[int]
) -> Iterator[int]:
    """Write the lists of these parts of users; how many users each has."""
    run = Run(config)
    dataset = PreparedDataset.of(run)
    system = _system(run, dataset)
    items = dataset.items()["item"].combine_chunks()
    for number in numbers:
        users = storage.read_table(storage.join(dataset.uri, "users", names[number]))
        if wanted is not None:
            users = users.filter(pc.is_in(users["user"], value_set=wanted))
        written = []
        for table in _latest(dataset, names[number], users["user_id"].combine_chunks()):
            for question in eval_queries(table, _BATCH, config.model.history_length, "next"):
                ids, scores = system.scored(question, k, config.evaluation.filter_seen)
                asked = pa.array(question.batch.user_B.numpy().astype(np.int32))
                keys = users["user"].combine_chunks().take(pc.index_in(asked, users["user_id"].combine_chunks()))
                written.append(_table(keys, ids, scores, items))
        if written:
            storage.write_table(storage.join(output, names[number]), pa.concat_tables(written))
        yield sum(len(pc.unique(table["user"])) for table in written)


def _system(run: Run, dataset: PreparedDataset) -> Scorer:
    """The index where there is one, else exact search; with the item filter and the ranker behind it where there are any."""
    config, model_uri, index = run.config, run.checkpoint().uri, run.index()
    model, _ = checkpoint.load_model(model_uri)
    vectors_ND = None
    if index is None or config.retrieval.filter_weight:
        vectors_ND = torch.from_numpy(embed.item_vectors(model_uri, dataset.record.num_items, False))
    found: Scorer
    if index is not None:
        found = IndexSearch(model, ItemIndex.open(index.uri))
    else:
        assert vectors_ND is not None
        found = ExactSearch(model, vectors_ND)
    if vectors_ND is not None:
        found = open_blend(config, dataset, SPLITS, found, model, vectors_ND) or found
    ranker = open_ranker(config, dataset)
    return found if ranker is None else Reranked(found, *ranker)


def _latest(dataset: PreparedDataset, name: str, user_ids: pa.Array) -> Iterator[pa.Table]:
    """Rows of these users from the last split that has them: it holds all of their events."""
    left = user_ids
    there = {split: {shard.file for shard in dataset.record.shards[split]} for split in SPLITS}
    for split in reversed(SPLITS):
        if f"{split}/{name}" not in there[split]:
            continue
        table = storage.read_table(dataset.file_uri(f"{split}/{name}"))
        table = table.filter(pc.is_in(table["user"], value_set=left))
        left = left.filter(pc.invert(pc.is_in(left, value_set=table["user"].combine_chunks())))
        if len(table):
            yield table


def _table(users: pa.Array, ids_BK: np.ndarray, scores_BK: np.ndarray | None, items: pa.Array) -> pa.Table:
    """One row per place that is filled."""
    row, place = np.nonzero(ids_BK >= FIRST_ITEM)
    scores = np.zeros(len(row), np.float32) if scores_BK is None else scores_BK[row, place].astype(np.float32)
    return pa.table(
        {
            "user": users.take(pa.array(row)),
            "item": items.take(pa.array(ids_BK[row, place])),
            "rank": pa.array((place + 1).astype(np.int32)),
            "score": pa.array(scores, mask=np.full(len(row), scores_BK is None)),
        }
    )


def _write_popular(dataset: PreparedDataset, output: str, wanted: pa.Array, any_written: bool, k: int) -> int:
    """Lists of those who have none yet."""
    left = wanted
    for info in storage.list_files(output) if any_written else ():
        have = storage.read_table(info.uri, ["user"])["user"].combine_chunks()
        left = left.filter(pc.invert(pc.is_in(left, value_set=have)))
    if len(left):
        best = np.argsort(-dataset.item_counts()[FIRST_ITEM:], kind="stable")[:k] + FIRST_ITEM
        lists = np.broadcast_to(best, (len(left), len(best)))
        items = dataset.items()["item"].combine_chunks()
        storage.write_table(storage.join(output, "part-popular.parquet"), _table(left, lists, None, items))
    return len(left)
