"""A trained run in Python: raw keys and columns in, raw keys out.

    model = recray.load("runs/news")                            # a run, or a checkpoint's folder; local or any URI
    model.recommend(users=[1007, 9999], k=10)                   # lists of known users; of unknown ones popular items
    model.recommend(history=[["A-33", "B-02"]], k=10)           # of anyone, from what they chose; nothing is trained
    model.similar_items("A-33")
    ranker = recray.load("runs/news-din")
    ranker.score([{"user_id": 1007, "article_id": "A-33", "device": "phone"}])

Vocabularies, scaling and item ids are applied as in training. Models only read after they were loaded, so that threads
may share one. Lists for all users of a dataset: `recray.recommend`.

Shape legend: B rows or queries, N items, K places, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from recray import storage
from recray.artifacts import CHECKPOINT, INDEX, REPORT, Artifact, Run, current_of, in_use
from recray.config import Config
from recray.data import features
from recray.data.dataset import PreparedDataset
from recray.errors import DataError
from recray.ids import FIRST_ITEM, PAD, SPLITS, UNKNOWN
from recray.loading.batch import Batch
from recray.loading.collate import EvalQuery, feature_tensor
from recray.loading.examples import UserRows
from recray.loading.jagged import Column, Jagged
from recray.models import Ranker
from recray.records import CheckpointRecord, Feature
from recray.retrieval.baselines.popularity import Popularity
from recray.retrieval.recommenders import RunArtifacts, list_table, open_recommenders
from recray.served import Served, served_of
from recray.training import checkpoint

_QUERIES, _ROWS = 512, 8192  # asked, and scored, at a time

Keys: TypeAlias = "Sequence[Any] | pa.Array | pa.ChunkedArray | np.ndarray"


def load(uri: str, current: bool = False) -> LoadedRetriever | LoadedRanker:
    """The model of a run, ready to be asked.

    uri: the folder of a run, or that of a checkpoint. Of a run what it serves is loaded (`recray promote`), and the
    checkpoint and index in use if nothing was promoted. The prepared dataset that the checkpoint was trained on must still
    be there: it has the keys and the histories.
    current: load what is in use, whatever is served.

    Raises LineageError if there is no complete checkpoint, or if its dataset has been deleted.
    """
    folder = uri.rstrip("/")
    pointer = None if current else served_of(folder)
    source = in_use(folder if pointer is None else storage.join(folder, "checkpoint", pointer.checkpoint), CHECKPOINT)
    config = config_of(source, pointer)
    artifacts = RunArtifacts.of_checkpoint(Run(config), source)
    return LoadedRanker(artifacts) if config.model.family == "ranker" else LoadedRetriever(artifacts, config)


def config_of(source: Artifact[CheckpointRecord], pointer: Served | None = None) -> Config:
    """The configuration of a checkpoint whose run may have been moved since. How it retrieves is what was promoted, or
    what its index in use was built with, and its last report evaluated, if they are of this checkpoint."""
    run, record = source.uri.rpartition("/")[0].rpartition("/")[0], source.record
    body, named = dict(record.config), current_of(run)
    for stage in (INDEX, REPORT) if pointer is None else ():
        folder = storage.join(run, stage.name, named.get(stage.name, "none"))
        if storage.exists(storage.join(folder, stage.record.file_name())):
            found = stage.record.read(folder)
            if record.id in found.parents:
                body |= {"retrieval": found.config["retrieval"], "evaluation": found.config["evaluation"]}
    if pointer is not None:
        body |= {"retrieval": pointer.retrieval, "evaluation": pointer.evaluation}
    output, _, name = run.rpartition("/")
    body["run"] = {**body["run"], "output": output or "/", "name": name}
    return Config.model_validate(body)


@dataclass(frozen=True)
class _Rows:
    """Rows for a model, encoded. Features are known by their columns: "user_age", "context_device"."""

    user: pa.Array  # int32 ids
    history: pa.ListArray  # list<int32>: all items that the user has chosen, oldest first
    columns: dict[str, pa.Array]

    def __len__(self) -> int:
        return len(self.user)

    def take(self, index: np.ndarray) -> _Rows:
        at = pa.array(index)
        return _Rows(self.user.take(at), self.history.take(at), {n: c.take(at) for n, c in self.columns.items()})

    def slice(self, start: int, length: int) -> _Rows:
        columns = {name: column.slice(start, length) for name, column in self.columns.items()}
        return _Rows(self.user.slice(start, length), self.history.slice(start, length), columns)

    @staticmethod
    def concat(parts: Sequence[_Rows]) -> _Rows:
        columns = {name: pa.concat_arrays([part.columns[name] for part in parts]) for name in parts[0].columns}
        return _Rows(
            pa.concat_arrays([part.user for part in parts]), pa.concat_arrays([part.history for part in parts]), columns
        )


class _Inputs:
    """Raw keys and values to what a model reads, by the prepared dataset that it was trained on."""

    def __init__(self, dataset: PreparedDataset, history_length: int) -> None:
        self._dataset, self._history_length = dataset, history_length
        self.items: pa.Array = dataset.items()["item"].combine_chunks()
        self.features = {f.column: f for f in dataset.record.features if f.role != "item"}

    @cached_property
    def _users(self) -> tuple[list[str], pa.Array, np.ndarray, pa.Array]:
        """Files of users, and of each user the key, the number of its file, and the id."""
        files = [file.rpartition("/")[2] for file in self._dataset.user_files]
        tables = [self._dataset.read_file(f"users/{file}") for file in files]
        both = pa.concat_tables(tables)
        file = np.repeat(np.arange(len(files)), [len(table) for table in tables])
        return files, both["user"].combine_chunks(), file, both["user_id"].combine_chunks()

    def item_ids(self, keys: Keys) -> np.ndarray:
        """(B,) int64 ids; UNKNOWN for an item that the model does not know. Raises DataError for keys of another type."""
        found = pc.index_in(_typed(keys, self.items.type, "item"), value_set=self.items.slice(FIRST_ITEM))
        return np.asarray(pc.add(pc.fill_null(found, UNKNOWN - FIRST_ITEM), FIRST_ITEM).to_numpy().astype(np.int64))

    def known_items(self, keys: Keys) -> np.ndarray:
        """As `item_ids`. Raises DataError if the model does not know one of them."""
        ids = self.item_ids(keys)
        if (ids == UNKNOWN).any():
            unknown = [key for key, one in zip(_list(keys), ids, strict=True) if one == UNKNOWN]
            raise DataError(
                f"the model does not know {len(unknown)} of {len(ids)} items, such as {unknown[0]!r}: only items of the "
                f"training events have vectors"
            )
        return ids

    def of_users(self, keys: Keys) -> tuple[_Rows, np.ndarray]:
        """What is known of these users after all events of the dataset, and (B,) which of them are known.

        Unknown users have no vector of their own, no history, and missing features.
        """
        files, known, file_U, ids_U = self._users
        at = pc.index_in(_typed(keys, known.type, "user"), value_set=known)
        is_known = at.is_valid().to_numpy(zero_copy_only=False)
        place = at.fill_null(0).to_numpy()
        wanted = np.unique(place[is_known])
        parts = [self.of_strangers(1)]
        for number in np.unique(file_U[wanted]):
            ids = ids_U.take(pa.array(wanted[file_U[wanted] == number]))
            parts += [self._of_table(table) for table in self._dataset.latest(files[number], ids)]
        rows = _Rows.concat(parts)  # row 0 stands for unknown users, and for known ones whose events were all dropped
        index = pc.index_in(ids_U.take(pa.array(place)).cast(pa.int32()), value_set=rows.user.slice(1))
        index = pc.add(pc.fill_null(index, -1), 1).to_numpy()
        index = np.where(is_known, index, 0)
        return rows.take(index), index > 0

    def of_strangers(self, number: int) -> _Rows:
        """Rows of users of whom nothing is known."""
        columns = {name: self._encoded(feature, [None] * number) for name, feature in self.features.items()}
        histories = pa.array([[]] * number, pa.list_(pa.int32()))
        # PAD, whose vector is 0: that of UNKNOWN was drawn, and never trained where all training users have ids.
        return _Rows(pa.array(np.full(number, PAD, np.int32)), histories, columns)

    def with_history(self, rows: _Rows, histories: Sequence[Keys]) -> _Rows:
        """The rows with these lists of item keys, oldest first, as histories."""
        lengths = [len(one) for one in histories]
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        flat = [key for one in histories for key in _list(one)]
        ids = self.item_ids(flat).astype(np.int32) if flat else np.empty(0, np.int32)
        return replace(rows, history=pa.ListArray.from_arrays(pa.array(offsets), pa.array(ids)))

    def with_values(self, rows: _Rows, values: Mapping[str, Any], role: str) -> _Rows:
        """The rows with these raw values of features: name -> one per row, or one for all. Raises DataError."""
        columns = dict(rows.columns)
        for name, value in values.items():
            feature = self.features.get(f"{role}_{name}")
            if feature is None:
                known = sorted(f.name for f in self.features.values() if f.role == role)
                raise DataError(f"the model has no {role} feature {name!r}; it has: {', '.join(known) or 'none'}")
            many = isinstance(value, (list, tuple, np.ndarray, pa.Array, pa.ChunkedArray))
            listed = _list(value) if many else [value] * len(rows)
            if len(listed) != len(rows):
                raise DataError(f"{role} feature {name!r} has {len(listed)} values for {len(rows)} rows")
            columns[feature.column] = self._encoded(feature, listed)
        return replace(rows, columns=columns)

    def batch(self, rows: _Rows) -> tuple[Batch, Jagged]:
        """Rows as tensors, with the end of their histories; and all that they have chosen."""
        seen = feature_tensor(Column.of(pa.chunked_array([rows.history])))
        assert isinstance(seen, Jagged)
        found = {n: feature_tensor(Column.of(pa.chunked_array([column]))) for n, column in rows.columns.items()}
        by_role = {
            role: {self.features[n].name: one for n, one in found.items() if self.features[n].role == role}
            for role in ("user", "context")
        }
        user = torch.from_numpy(rows.user.to_numpy().astype(np.int64))
        history = seen.last(self._history_length)
        return Batch(user_B=user, history=history, user_features=by_role["user"], context=by_role["context"]), seen

    def _of_table(self, table: pa.Table) -> _Rows:
        """One row for each user of a shard's table. Context features are those of the last event that was chosen."""
        rows = UserRows(table)
        item = pa.array(rows.item.astype(np.int32))
        counts = np.diff(rows.offsets)
        columns: dict[str, pa.Array] = {}
        for name, feature in self.features.items():
            if feature.role == "user":
                columns[name] = table[name].combine_chunks()
                continue
            missing = self._encoded(feature, [None])
            values = pa.concat_arrays([_arrow(rows.context[feature.name]).cast(missing.type), missing])
            columns[name] = values.take(pa.array(np.where(counts > 0, rows.offsets[1:] - 1, len(values) - 1)))
        history = pa.ListArray.from_arrays(pa.array(rows.offsets.astype(np.int32)), item)
        return _Rows(pa.array(rows.user.astype(np.int32)), history, columns)

    def _encoded(self, feature: Feature, values: list[Any]) -> pa.Array:
        """Raw values as in training; missing where a value is None. Raises DataError for values of another type."""
        try:
            column = pa.array(values, None if any(one is not None for one in values) else _raw_type(feature))
            encoded = features.encode(pa.chunked_array([column]), feature)
        except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError) as error:
            example = next(one for one in values if one is not None)
            raise DataError(
                f"{feature.role} feature {feature.name!r} has values of type {_raw_type(feature)}, and {example!r} is none"
            ) from error
        return self._dataset.known(pa.table({feature.column: encoded}))[feature.column].combine_chunks()


class LoadedRetriever:
    """A retrieval model with what its run recommends with: index, blend and ranker, as configured."""

    def __init__(self, artifacts: RunArtifacts, config: Config) -> None:
        self.config = config
        found = open_recommenders(artifacts, config, SPLITS, always_exact=True)
        assert found.exact is not None
        self._final, self._exact = found.final, found.exact
        self._inputs = _Inputs(artifacts.dataset, config.model.history_length)
        self._popular = Popularity(artifacts.dataset.item_counts()).order

    def recommend(
        self,
        users: Keys | None = None,
        history: Sequence[Keys] | None = None,
        context: Mapping[str, Any] | None = None,
        user_features: Mapping[str, Any] | None = None,
        k: int = 10,
        exclude_seen: bool | None = None,
    ) -> pa.Table:
        """The best k items of each user: columns user, item, rank (from 1) and score, in the order of the users.

        users: keys of users. What they have chosen is read from the dataset. Users without events there, and users of
            `history` with an empty one, get the most popular items with score null.
        history: instead of `users`, item keys of each person, oldest first; `user` is then the number of the list.
            Items that the model does not know count as unknown ones, as in training.
        context, user_features: raw values by feature name, one for all or one for each. Without them the last event's
            context and the dataset's user features are taken, or "missing" where there are none.
        exclude_seen: leave out what the user has chosen before; without it as `evaluation.filter_seen` says.

        Scores order the items of one user; they cannot be compared between users. Raises DataError.
        """
        if (users is None) == (history is None):
            raise DataError("recommend needs either users=[...] or history=[[...], ...]")
        if k < 1:
            raise DataError(f"k = {k}: at least one item is needed")
        if users is not None:
            keys = _list(users)
            rows, known_B = self._inputs.of_users(users)
        else:
            assert history is not None
            keys = list(range(len(history)))
            rows = self._inputs.with_history(self._inputs.of_strangers(len(history)), history)
            known_B = np.ones(len(rows), bool)
        rows = self._inputs.with_values(rows, context or {}, "context")
        rows = self._inputs.with_values(rows, user_features or {}, "user")
        known_B = known_B & (pc.list_value_length(rows.history).to_numpy() > 0)
        exclude = self.config.evaluation.filter_seen if exclude_seen is None else exclude_seen
        return self._lists(keys, rows, known_B, k, exclude)

    def _lists(self, keys: list[Any], rows: _Rows, known_B: np.ndarray, k: int, exclude: bool) -> pa.Table:
        ids_BK = np.full((len(rows), k), PAD, np.int64)
        scores_BK = np.zeros((len(rows), k), np.float32)
        ids_BK[~known_B, : len(self._popular[:k])] = self._popular[:k]
        for at in range(0, len(rows), _QUERIES):
            index = at + np.flatnonzero(known_B[at : at + _QUERIES])
            if not len(index):
                continue
            batch, seen = self._inputs.batch(rows.take(index))
            nothing = Jagged(torch.zeros(0, dtype=torch.int64), torch.zeros(len(index) + 1, dtype=torch.int64))
            query = EvalQuery(batch, seen, nothing, torch.zeros(len(index), dtype=torch.int64))
            ids_BK[index], scores_BK[index] = self._final.recommend(query, k, exclude)
        users = pa.array(keys)
        return list_table(users, ids_BK, scores_BK, self._inputs.items, unscored_B=~known_B)

    @cached_property
    def _norms_N(self) -> torch.Tensor:
        norms_N: torch.Tensor = torch.linalg.vector_norm(self._exact.vectors_ND, dim=1)
        return norms_N.clamp(min=1e-12)

    def item_vectors(self, items: Keys) -> np.ndarray:
        """(B, D) float32 vectors of items. Their product with a query's vector is its score. Raises DataError for unknown ones."""
        return self._exact.vectors_ND[torch.from_numpy(self._inputs.known_items(items))].numpy()

    def similar_items(self, item: Any, k: int = 10) -> pa.Table:
        """The k items whose vectors have the greatest cosine with that of `item`: columns item, rank (from 1), score."""
        (own,) = self._inputs.known_items([item])
        vectors_ND, norms_N = self._exact.vectors_ND, self._norms_N
        cosine_N = (vectors_ND @ vectors_ND[int(own)]) / (norms_N * norms_N[int(own)])
        cosine_N[:FIRST_ITEM] = -torch.inf
        cosine_N[int(own)] = -torch.inf
        score, ids = cosine_N.topk(min(k, len(cosine_N) - FIRST_ITEM - 1))
        table = list_table(pa.array([item]), ids[None].numpy(), score[None].numpy(), self._inputs.items)
        return table.drop_columns(["user"])


class LoadedRanker:
    """A click ranker."""

    def __init__(self, artifacts: RunArtifacts) -> None:
        model, record = checkpoint.load_model(artifacts.checkpoint.uri)
        assert isinstance(model, Ranker)
        self.config = Config.model_validate(record.config)
        self._model, self._inputs = model, _Inputs(artifacts.dataset, self.config.model.history_length)

    @torch.inference_mode()
    def score(self, rows: Sequence[Mapping[str, Any]] | pa.Table | Any) -> np.ndarray:
        """(B,) float32 probabilities of a click, one per row.

        rows: a pyarrow table, a pandas frame or a list of dicts, with the columns that `data.columns` names as user and
        item, and raw context features by their names; missing ones count as missing. What a user has chosen and user
        features are read from the dataset; columns `history` (lists of item keys, oldest first) and of user features
        replace them. Unknown users and items are scored as such.

        Of a model that was trained on drawn negatives the values order items and are no probabilities of a click in
        the product. Raises DataError.
        """
        table = _as_table(rows)
        names = self.config.data.columns
        for column in (names.user, names.item):
            if column not in table.column_names:
                raise DataError(f"rows have no column {column!r}; they have: {', '.join(table.column_names) or 'none'}")
        if not len(table):
            return np.empty(0, np.float32)
        known, _ = self._inputs.of_users(table[names.user])
        if "history" in table.column_names:
            known = self._inputs.with_history(known, [one or [] for one in table["history"].to_pylist()])
        for role in ("user", "context"):
            given = {f.name for f in self._inputs.features.values() if f.role == role} & set(table.column_names)
            known = self._inputs.with_values(known, {name: table[name] for name in sorted(given)}, role)
        target = torch.from_numpy(self._inputs.item_ids(table[names.item]))
        found = []
        for at in range(0, len(table), _ROWS):
            batch, _ = self._inputs.batch(known.slice(at, _ROWS))
            found.append(self._model.logits(replace(batch, target_Q=target[at : at + _ROWS])).float().sigmoid())
        return torch.cat(found).numpy()


def _as_table(rows: Any) -> pa.Table:
    if isinstance(rows, pa.Table):
        return rows
    if isinstance(rows, Sequence) and all(isinstance(row, Mapping) for row in rows):
        names = list(dict.fromkeys(name for row in rows for name in row))
        return pa.table({name: pa.array([row.get(name) for row in rows]) for name in names})
    if hasattr(rows, "columns"):
        return pa.Table.from_pandas(rows, preserve_index=False)
    raise DataError(f"rows are {type(rows).__name__}: give a pyarrow table, a pandas frame or a list of dicts")


def _list(keys: Any) -> list[Any]:
    """Keys as Python values."""
    if isinstance(keys, (pa.Array, pa.ChunkedArray)):
        values: list[Any] = keys.to_pylist()
        return values
    return list(keys.tolist()) if isinstance(keys, np.ndarray) else list(keys)


def _typed(keys: Keys, kind: pa.DataType, role: str) -> pa.Array:
    """Keys of the dataset's type. Raises DataError if they are of another one, or null."""
    if isinstance(keys, str):
        raise DataError(f"{role} keys are the text {keys!r}: give a list of keys")
    try:
        found = keys.combine_chunks() if isinstance(keys, pa.ChunkedArray) else pa.array(_list(keys))
        found = found.cast(kind) if pa.types.is_integer(found.type) == pa.types.is_integer(kind) else None
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError):
        found = None
    if found is None and len(keys):
        raise DataError(f"{role} keys of the dataset are {kind}, and {_list(keys)[0]!r} is not: convert them")
    found = pa.array([], kind) if found is None else found
    if found.null_count:
        raise DataError(f"{found.null_count} of {len(found)} {role} keys are null")
    return found


def _raw_type(feature: Feature) -> pa.DataType:
    """The type of a feature's raw values."""
    if feature.kind == "numeric" or feature.edges is not None:
        return pa.float64()
    kind = pa.int64() if feature.vocabulary and isinstance(feature.vocabulary[0], int) else pa.string()
    return pa.list_(kind) if feature.kind == "list" else kind


def _arrow(column: Column) -> pa.Array:
    if column.offsets is None:
        return pa.array(column.values)
    return pa.ListArray.from_arrays(pa.array(column.offsets.astype(np.int32)), pa.array(column.values))
