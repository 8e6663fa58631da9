"""Lists of the items that pass a filter.

Shape legend: B queries, N items, P items that pass (after the reserved ids), D width, K places.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from recray.ids import FIRST_ITEM, PAD
from recray.loading.collate import EvalQuery
from recray.loading.jagged import Jagged
from recray.models import Retriever
from recray.retrieval import Recommender
from recray.retrieval.blend import Blended
from recray.retrieval.exact import ExactSearch, query_vectors, top_k
from recray.retrieval.recency import WithRecency
from recray.retrieval.recommenders import Reranked


def restricted(final: Recommender, exact: ExactSearch, keep_N: np.ndarray) -> Recommender:
    """What `final` would recommend if there were only the items of `keep_N`. Their search is exact: an index finds too few of
    them where they are rare."""
    if isinstance(final, Reranked):
        return replace(final, search=restricted(final.search, exact, keep_N))
    if isinstance(final, (Blended, WithRecency)):
        return Kept(replace(final, search=restricted(final.search, exact, keep_N)), keep_N)
    return AllowedSearch.of(exact, keep_N)


@dataclass(frozen=True)
class AllowedSearch:
    """Exact search among some items."""

    model: Retriever
    ids_P: Tensor  # increasing, the reserved ids first
    place_N: Tensor  # of each item id in ids_P; -1 for other items
    vectors_PD: Tensor

    @staticmethod
    def of(exact: ExactSearch, keep_N: np.ndarray) -> AllowedSearch:
        keep = torch.from_numpy(keep_N).clone()
        keep[:FIRST_ITEM] = True
        ids_P = keep.nonzero()[:, 0]
        place_N = torch.full((len(keep_N),), -1).index_copy_(0, ids_P, torch.arange(len(ids_P)))
        return AllowedSearch(exact.model, ids_P, place_N, exact.vectors_ND[ids_P])

    def recommend(self, query: EvalQuery, k: int, exclude_seen: bool) -> tuple[np.ndarray, np.ndarray]:
        exclude = None
        if exclude_seen:
            place_T = self.place_N[query.seen.values]
            here = place_T >= 0
            counts = torch.zeros(query.batch.num_rows, dtype=torch.int64)
            exclude = Jagged.from_lengths(
                place_T[here], counts.index_add_(0, query.seen.row_index()[here], here[here].long())
            )
        found, scores = top_k(query_vectors(self.model, query), self.vectors_PD, k, exclude)
        return self.ids_P[found].numpy(), scores.numpy()


@dataclass(frozen=True)
class Kept:
    """Without the items that do not pass, which a baseline or recent counts have added."""

    recommender: Blended | WithRecency
    keep_N: np.ndarray

    def recommend(self, query: EvalQuery, k: int, exclude_seen: bool) -> tuple[np.ndarray, np.ndarray]:
        ids, scores = self.recommender.recommend(query, 4 * max(k, self.recommender.candidates), exclude_seen)
        order = np.argsort(~self.keep_N[ids], axis=1, kind="stable")[:, :k]
        ids, scores = np.take_along_axis(ids, order, 1), np.take_along_axis(scores, order, 1)
        return np.where(self.keep_N[ids], ids, PAD), scores
