"""The item-item baseline: items that users of the same items chose. It has no parameters to train.

If Ann had {a, b} and Bob had {b, c}, a new user with {b} is recommended a and c: weight flows from b to the users who
had it, divided by how many items each of them had, and from there to their items.

Shape legend: B queries, N items, U users, E (user, item) pairs.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from recray.config.baselines import BaselineOptions as Options
from recray.data.dataset import PreparedDataset
from recray.data.split import before
from recray.errors import NotApplicableError
from recray.ids import FIRST_ITEM
from recray.loading.collate import EvalQuery
from recray.retrieval.events import iter_events, num_events
from recray.retrieval.exact import best_of

MAX_EVENTS = 50_000_000  # each query reads all events
# Exponent of an item's count on the side of the user's own items; the other side has the rest. NDCG@20 on gowalla's
# validation split is 0.113 with 0.75, and 0.110 with 0.5.
_FROM = 0.75
_ENTRIES = 1 << 25  # of a dense matrix at a time (128 MB)


class ItemKNN:
    """Normalised item-item similarities (the linear part of GF-CF, Shen et al., CIKM 2021, with other exponents).

    With R (U, N) the user-item matrix of the events of `splits`, a user with items x scores

        x D_i^-3/4 R' D_u^-1 R D_i^-1/4

    which lies between a random walk (exponents 1 and 0), which favours popular items, and GF-CF (1/2 and 1/2). Only
    products with the sparse R are computed, never the item-item matrix.
    """

    def __init__(self, dataset: PreparedDataset, splits: Sequence[str]) -> None:
        n, pairs = dataset.record.num_items, [torch.empty(0, dtype=torch.int64)]
        for user, item, _ in iter_events(dataset, splits):
            kept = item >= FIRST_ITEM
            pairs.append(torch.unique(torch.from_numpy((user * n + item)[kept])))
        user_E, item_E = (found := torch.unique(torch.cat(pairs))) // n, found % n
        shape = (dataset.record.num_users, n)
        count_N = torch.bincount(item_E, minlength=n).clamp(min=1).float()
        self._from_N, self._to_N = count_N**-_FROM, count_N ** (_FROM - 1)
        self._by_user = _sparse(user_E, item_E, 1 / torch.bincount(user_E)[user_E].float(), shape)
        self._by_item = _sparse(item_E, user_E, torch.ones(len(item_E)), shape[::-1])

    def blocks(self, query: EvalQuery) -> Iterator[tuple[slice, Tensor]]:
        """Some queries at a time: which rows, and their scores (B, N); 0 for items without a common user."""
        at_once = max(1, _ENTRIES // max(self._by_user.shape))
        for low in range(0, query.batch.num_rows, at_once):
            seen = query.seen.rows(low, low + at_once)
            had_NB = torch.zeros(len(self._from_N), len(seen.offsets) - 1)
            had_NB[seen.values, seen.row_index()] = self._from_N[seen.values]
            scores_BN = (self._by_item @ (self._by_user @ had_NB)).T.contiguous().mul_(self._to_N)
            yield slice(low, low + at_once), scores_BN

    def recommend(self, query: EvalQuery, k: int, exclude_seen: bool) -> tuple[np.ndarray, np.ndarray]:
        found = [
            best_of(mask_excluded(scores_BN, query, rows, exclude_seen), k) for rows, scores_BN in self.blocks(query)
        ]
        return torch.cat([ids for ids, _ in found]).numpy(), torch.cat([scores for _, scores in found]).numpy()


def mask_excluded(scores_BN: Tensor, query: EvalQuery, rows: slice, exclude_seen: bool) -> Tensor:
    """Set the scores of reserved ids, and of seen items, to -inf in place. scores_BN: of these rows of the query."""
    scores_BN[:, :FIRST_ITEM] = -torch.inf
    if exclude_seen:
        seen = query.seen.rows(rows.start, rows.stop)
        scores_BN[seen.row_index(), seen.values] = -torch.inf
    return scores_BN


def build(options: Options, dataset: PreparedDataset, split: str) -> ItemKNN:
    """By all events before the split. Raises NotApplicableError for more than MAX_EVENTS."""
    events = num_events(dataset, before(split))
    if events > MAX_EVENTS:
        raise NotApplicableError(
            f"each of its queries reads all {events:,} events before the split, which are more than {MAX_EVENTS:,}"
        )
    return ItemKNN(dataset, before(split))


def _sparse(row_E: Tensor, column_E: Tensor, value_E: Tensor, shape: tuple[int, ...]) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns once per process that sparse CSR tensors are in beta
        return torch.sparse_coo_tensor(torch.stack([row_E, column_E]), value_E, shape).to_sparse_csr()
