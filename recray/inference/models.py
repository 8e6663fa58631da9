"""What `recray.load` returns: models that take raw keys and columns, and return raw keys.

Models only read after they were loaded, so that threads may share one.

Shape legend: B rows or queries, N items, K places, D width.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from recray.config import Config
from recray.errors import DataError
from recray.ids import FIRST_ITEM, PAD
from recray.inference.catalog import Caps, Catalog, Filters
from recray.inference.filtered import restricted
from recray.inference.rows import Inputs, Keys, Rows, as_list, as_table
from recray.loading.batch import Batch
from recray.loading.collate import EvalQuery
from recray.loading.jagged import Jagged
from recray.models import Ranker
from recray.retrieval import Recommender
from recray.retrieval.baselines.popularity import Popularity
from recray.retrieval.exact import ExactSearch, query_vectors
from recray.retrieval.recommenders import list_table

_QUERIES, _ROWS = 512, 8192  # asked, and scored, at a time


@dataclass(frozen=True)
class Lists:
    """Lists of B people; PAD where a place is not filled."""

    ids_BK: np.ndarray
    scores_BK: np.ndarray
    scored_B: np.ndarray  # False: popular items, without scores


class LoadedRetriever:
    """A retrieval model with what its run recommends with: index, blend and ranker, as configured."""

    def __init__(
        self,
        identity: str,
        config: Config,
        inputs: Inputs,
        final: Recommender,
        exact: ExactSearch,
        counts_N: np.ndarray,
        ranker: LoadedRanker | None = None,
        catalog: Catalog | None = None,
    ) -> None:
        """identity: of the checkpoint. final: what makes the lists. counts_N: training events of each item. ranker: what
        orders the lists, if the run names one. catalog: raw values of items, for titles and filters."""
        self.catalog = catalog or Catalog.empty(len(counts_N))
        self.identity, self.config, self.inputs, self.ranker = identity, config, inputs, ranker
        self._final, self._exact = final, exact
        self._popular = Popularity(counts_N).order
        self._filters: dict[str, tuple[Recommender, np.ndarray]] = {}

    def recommend(
        self,
        users: Keys | None = None,
        history: Sequence[Keys] | None = None,
        context: Mapping[str, Any] | None = None,
        user_features: Mapping[str, Any] | None = None,
        k: int = 10,
        exclude_seen: bool | None = None,
        exclude: Sequence[Keys] | None = None,
        filters: Filters | None = None,
        caps: Caps | None = None,
    ) -> pa.Table:
        """The best k items of each user: columns user, item, rank (from 1) and score, in the order of the users; and title, if
        the item table has titles.

        users: keys of users. What they have chosen is read from the dataset. Users without events there, and users of
            `history` with an empty one, get the most popular items with score null.
        history: instead of `users`, item keys of each person, oldest first; `user` is then the number of the list.
            Items that the model does not know count as unknown ones, as in training.
        context, user_features: raw values by feature name, one for all or one for each. Without them the last event's
            context and the dataset's user features are taken, or "missing" where there are none.
        exclude_seen: leave out what the user has chosen before; without it as `evaluation.filter_seen` says.
        exclude: item keys that each list must not hold, one list of keys for each user.
        filters: what all items must be, by the names of declared item features: raw values of which one must hold, or the
            least and the greatest number: {"category": ["shoes"], "price": {"max": 50}}.
        caps: by the name of an item feature, how many items of one value a list may hold: {"brand": 2}. The list is chosen
            from the best `retrieval.k`, or ten times k if that is more, and may be shorter than k.

        Scores order the items of one user; they cannot be compared between users. Raises DataError.
        """
        keys, found = self.answer(users, history, context, user_features, k, exclude_seen, exclude, filters, caps)
        unscored_B = ~found.scored_B
        table = list_table(pa.array(keys), found.ids_BK, found.scores_BK, self.inputs.items, unscored_B=unscored_B)
        return self._titled(table, found.ids_BK)

    def answer(
        self,
        users: Keys | None,
        history: Sequence[Keys] | None,
        context: Mapping[str, Any] | None,
        user_features: Mapping[str, Any] | None,
        k: int,
        exclude_seen: bool | None,
        exclude: Sequence[Keys] | None,
        filters: Filters | None = None,
        caps: Caps | None = None,
    ) -> tuple[list[Any], Lists]:
        """`recommend` as arrays of item ids; and the keys of the users, or the numbers of the histories."""
        if k < 1:
            raise DataError(f"k = {k}: at least one item is needed")
        keys, rows = self._people(users, history, context, user_features)
        known_B = pc.list_value_length(rows.history).to_numpy() > 0
        seen = self.config.evaluation.filter_seen if exclude_seen is None else exclude_seen
        excluded = [self.inputs.item_ids(one) if len(one) else np.empty(0, np.int64) for one in exclude or ()]
        if excluded and len(excluded) != len(rows):
            raise DataError(f"exclude has {len(excluded)} lists for {len(rows)} users")
        wanted = max(10 * k, self.config.retrieval.k) if caps else k
        more = max(map(len, excluded), default=0)
        ids_BK, scores_BK = self._lists(rows, known_B, wanted + more, seen, filters)
        if excluded:
            ids_BK, scores_BK = _without(excluded, ids_BK, scores_BK, wanted)
        if caps:
            ids_BK, scores_BK = self.catalog.capped(caps, ids_BK, scores_BK, k)
        return keys, Lists(ids_BK, scores_BK, known_B)

    def _titled(self, table: pa.Table, ids: np.ndarray) -> pa.Table:
        """The lists with a column title, if the item table has titles."""
        if self.catalog.title is None:
            return table
        return table.append_column("title", pa.array(self.catalog.titles(ids[ids >= FIRST_ITEM]), pa.string()))

    def _people(
        self,
        users: Keys | None,
        history: Sequence[Keys] | None,
        context: Mapping[str, Any] | None,
        user_features: Mapping[str, Any] | None,
    ) -> tuple[list[Any], Rows]:
        if (users is None) == (history is None):
            raise DataError("recommend needs either users=[...] or history=[[...], ...]")
        if users is not None:
            keys, (rows, _) = as_list(users), self.inputs.of_users(users)
        else:
            assert history is not None
            keys = list(range(len(history)))
            rows = self.inputs.with_history(self.inputs.of_strangers(len(history)), history)
        rows = self.inputs.with_values(rows, context or {}, "context")
        return keys, self.inputs.with_values(rows, user_features or {}, "user")

    def explain(
        self,
        user: Any = None,
        history: Keys | None = None,
        context: Mapping[str, Any] | None = None,
        user_features: Mapping[str, Any] | None = None,
        k: int = 10,
    ) -> pa.Table:
        """What carried the list of one user, or of a history: columns kind ("history", "user", "context"), name, effect.

        effect: by how much the retrieval scores of the list's items are lower on average without it: without that item in
        the history, with that feature missing, or without the user's own vector (kind "user", name null). Most helpful
        first; a negative effect speaks against the list. Effects do not add up where inputs work together.

        Raises DataError for someone without a history, whose list is that of popular items.
        """
        _, one = self._people(
            None if user is None else [user], None if history is None else [history], context, user_features
        )
        items = one.history.values.to_numpy()[-self.config.model.history_length :]
        if not len(items):
            raise DataError("there is nothing to explain: someone without a history gets popular items")
        nobody = self.inputs.of_strangers(1)
        histories = [one.history[0].as_py(), *(np.delete(items, at).tolist() for at in range(len(items)))]
        parts = [replace(one, history=pa.array([row], one.history.type)) for row in histories]
        parts += [replace(one, user=nobody.user)]
        parts += [replace(one, columns={**one.columns, name: nobody.columns[name]}) for name in one.columns]
        batch, seen = self.inputs.batch(Rows.concat(parts))
        query = _query(batch, seen)
        ids, _ = self._lists(one, np.ones(1, bool), k, self.config.evaluation.filter_seen)
        found = torch.from_numpy(ids[0][ids[0] >= FIRST_ITEM])
        score_P = (query_vectors(self._exact.model, query) @ self._exact.vectors_ND[found].T).mean(1)
        columns = [self.inputs.features[name] for name in one.columns]
        names = [str(key) for key in self.inputs.items.take(pa.array(items)).to_pylist()]
        kinds = ["history"] * len(items) + ["user"] + [feature.role for feature in columns]
        table = pa.table(
            {
                "kind": kinds,
                "name": pa.array([*names, None, *(feature.name for feature in columns)], pa.string()),
                "effect": (score_P[0] - score_P[1:]).numpy(),
            }
        )
        return table.sort_by([("effect", "descending")])

    def _lists(
        self, rows: Rows, known_B: np.ndarray, k: int, exclude: bool, filters: Filters | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """(B, k) ids and scores; popular items where `known_B` is False."""
        final, popular = self._filtered(filters) if filters else (self._final, self._popular)
        ids_BK = np.full((len(rows), k), PAD, np.int64)
        scores_BK = np.zeros((len(rows), k), np.float32)
        ids_BK[~known_B, : len(popular[:k])] = popular[:k]
        for at in range(0, len(rows), _QUERIES):
            index = at + np.flatnonzero(known_B[at : at + _QUERIES])
            if not len(index):
                continue
            batch, seen = self.inputs.batch(rows if len(index) == len(rows) else rows.take(index))
            ids_BK[index], scores_BK[index] = final.recommend(_query(batch, seen), k, exclude)
        return ids_BK, scores_BK

    def _filtered(self, filters: Filters) -> tuple[Recommender, np.ndarray]:
        """What makes lists of the items that pass, and those items by popularity. The last filters are kept: as many as
        have no more items together than there are."""
        key = json.dumps(filters, sort_keys=True, default=str)
        found = self._filters.get(key)
        if found is None:
            keep_N = self.catalog.allowed(filters)
            found = restricted(self._final, self._exact, keep_N), self._popular[keep_N[self._popular]]
            kept = {**self._filters, key: found}
            while len(kept) > 1 and sum(len(popular) for _, popular in kept.values()) > len(self._popular):
                del kept[next(iter(kept))]
            self._filters = kept
        return found

    @cached_property
    def _norms_N(self) -> torch.Tensor:
        norms_N: torch.Tensor = torch.linalg.vector_norm(self._exact.vectors_ND, dim=1)
        return norms_N.clamp(min=1e-12)

    def item_vectors(self, items: Keys) -> np.ndarray:
        """(B, D) float32 vectors of items. Their product with a query's vector is its score. Raises DataError for unknown ones."""
        return self._exact.vectors_ND[torch.from_numpy(self.inputs.known_items(items))].numpy()

    def similar_items(self, item: Any, k: int = 10) -> pa.Table:
        """The k items whose vectors have the greatest cosine with that of `item`: columns item, rank (from 1), score; and title,
        if the item table has titles."""
        (own,) = self.inputs.known_items([item])
        vectors_ND, norms_N = self._exact.vectors_ND, self._norms_N
        cosine_N = (vectors_ND @ vectors_ND[int(own)]) / (norms_N * norms_N[int(own)])
        cosine_N[:FIRST_ITEM] = -torch.inf
        cosine_N[int(own)] = -torch.inf
        score, ids = cosine_N.topk(min(k, len(cosine_N) - FIRST_ITEM - 1))
        table = list_table(pa.array([item]), ids[None].numpy(), score[None].numpy(), self.inputs.items)
        return self._titled(table.drop_columns(["user"]), ids.numpy())


class LoadedRanker:
    """A click ranker."""

    def __init__(self, identity: str, config: Config, inputs: Inputs, model: Ranker) -> None:
        self.identity, self.config, self.inputs, self._model = identity, config, inputs, model

    @torch.inference_mode()
    def score(self, rows: Sequence[Mapping[str, Any]] | pa.Table | Any) -> np.ndarray:
        """(B,) float32 probabilities of a click, one per row.

        rows: a pyarrow table, a pandas frame or a list of dicts, with the columns that `data.columns` names as user and
        item, and raw context features by their names; missing ones count as missing. What a user has chosen and user
        features are read from the dataset; columns `history` (lists of item keys, oldest first) and of user features
        replace them. Unknown users and items are scored as such; with a column `history` that of users may be missing.

        Of a model that was trained on drawn negatives the values order items and are no probabilities of a click in
        the product. Raises DataError.
        """
        table = as_table(rows)
        names = self.config.data.columns
        given = set(table.column_names)
        for column in {names.user, names.item} - ({names.user} if "history" in given else set()):
            if column not in given:
                raise DataError(f"rows have no column {column!r}; they have: {', '.join(table.column_names) or 'none'}")
        if not len(table):
            return np.empty(0, np.float32)
        users = names.user in given
        known = self.inputs.of_users(table[names.user])[0] if users else self.inputs.of_strangers(len(table))
        if "history" in given:
            known = self.inputs.with_history(known, [one or [] for one in table["history"].to_pylist()])
        for role in ("user", "context"):
            raw = {f.name for f in self.inputs.features.values() if f.role == role} & given
            known = self.inputs.with_values(known, {name: table[name] for name in sorted(raw)}, role)
        target = torch.from_numpy(self.inputs.item_ids(table[names.item]))
        found = []
        for at in range(0, len(table), _ROWS):
            batch, _ = self.inputs.batch(known.slice(at, _ROWS))
            found.append(self._model.logits(replace(batch, target_Q=target[at : at + _ROWS])).float().sigmoid())
        return torch.cat(found).numpy()


def _query(batch: Batch, seen: Jagged) -> EvalQuery:
    """Without targets and times."""
    zeros = torch.zeros(batch.num_rows + 1, dtype=torch.int64)
    return EvalQuery(batch, seen, Jagged(zeros[:0], zeros), zeros[1:])


def _without(
    excluded: Sequence[np.ndarray], ids_BK: np.ndarray, scores_BK: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """The first k of each row that are not excluded from it."""
    dropped = np.stack([np.isin(row, gone) for row, gone in zip(ids_BK, excluded, strict=True)])
    order = np.argsort(dropped, axis=1, kind="stable")[:, :k]
    kept = ~np.take_along_axis(dropped, order, 1)
    return np.where(kept, np.take_along_axis(ids_BK, order, 1), PAD), np.take_along_axis(scores_BK, order, 1)
