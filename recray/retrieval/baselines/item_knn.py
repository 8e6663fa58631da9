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

from recray.config.baselines import ItemKNNOptions as Options
from recray.data.dataset import PreparedDataset
from recray.data.split import before
from recray.errors import NotApplicableError
from recray.ids import FIRST_ITEM
from recray.loading.collate import EvalQuery
from recray.loading.jagged import offsets_from_lengths, range_index
from recray.retrieval.events import iter_events, num_events
from recray.retrieval.exact import best_of

MAX_EVENTS = 50_000_000  # all pairs of items that a user had are counted
# Exponent of an item's count on the side of the user's own items; the other side has the rest. NDCG@20 on gowalla's
# validation split is 0.113 with 0.75, and 0.110 with 0.5.
_FROM = 0.75
_ALL_UP_TO, _KEPT = 20_000, 1_000  # items whose similarities are all kept (3.2 GB at most), and neighbours kept of more
_ENTRIES = 1 << 21  # scores of queries at a time (8 MB): few, since they are added to in no order
_PRODUCTS = 1 << 23  # pairs of items counted at a time


class ItemKNN:
    """Normalised item-item similarities (the linear part of GF-CF, Shen et al., CIKM 2021, with other exponents).

    With R (U, N) the user-item matrix of the events of `splits`, a user with items x scores

        x D_i^-3/4 R' D_u^-1 R D_i^-1/4

    which lies between a random walk (exponents 1 and 0), which favours popular items, and GF-CF (1/2 and 1/2). Of each
    row of the item-item matrix R' D_u^-1 R D_i^-1/4 the largest `neighbours` entries are kept, and those equal to the
    last of them. On gowalla, amazon-beauty and ml-1m 1,000 change NDCG@20 and recall@20 by at most 0.2 %.
    """

    def __init__(self, dataset: PreparedDataset, splits: Sequence[str], neighbours: int | None = None) -> None:
        """neighbours: kept of each item; 0: all; None: by the number of items."""
        if neighbours is None:
            neighbours = 0 if dataset.record.num_items <= _ALL_UP_TO else _KEPT
        n, pairs = dataset.record.num_items, [torch.empty(0, dtype=torch.int64)]
        for user, item, _ in iter_events(dataset, splits):
            kept = item >= FIRST_ITEM
            pairs.append(torch.unique(torch.from_numpy((user * n + item)[kept])))
        found = torch.unique(torch.cat(pairs)).numpy()
        user_E, item_E = found // n, found % n
        count_N = np.maximum(np.bincount(item_E, minlength=n), 1)
        self._from_N = (count_N**-_FROM).astype(np.float32)
        to_N = (count_N ** (_FROM - 1)).astype(np.float32)
        size_U = np.maximum(np.bincount(user_E, minlength=dataset.record.num_users), 1)
        # What flows from an item in all, neighbours that are not kept included.
        flow_U = np.bincount(user_E, to_N[item_E], minlength=len(size_U)) / size_U
        self._sum_N = np.bincount(item_E, flow_U[user_E], minlength=n)
        self._offsets, self._item, self._value = _neighbours(user_E, item_E, size_U, to_N, neighbours)

    def blocks(self, query: EvalQuery) -> Iterator[tuple[slice, Tensor]]:
        """Some queries at a time: which rows, and their scores (B, N); 0 for items that are no neighbours."""
        n = len(self._from_N)
        at_once = max(1, _ENTRIES // n)
        for low in range(0, query.batch.num_rows, at_once):
            row_H, item_H = _distinct(query, low, low + at_once, n)
            length_H = self._offsets[item_H + 1] - self._offsets[item_H]
            index, _ = range_index(self._offsets[item_H], length_H)
            rows = min(at_once, query.batch.num_rows - low)
            cell = np.repeat(row_H * n, length_H) + self._item[index]
            value = np.repeat(self._from_N[item_H], length_H) * self._value[index]
            scores = torch.zeros(rows * n).index_add_(0, torch.from_numpy(cell), torch.from_numpy(value))
            yield slice(low, low + rows), scores.view(rows, n)

    def sums(self, query: EvalQuery) -> Tensor:
        """(B,) sums of the scores of each query, those of items that are no neighbours included."""
        row_H, item_H = _distinct(query, 0, query.batch.num_rows, len(self._from_N))
        flow_H = self._from_N[item_H] * self._sum_N[item_H]
        return torch.from_numpy(np.bincount(row_H, flow_H, minlength=query.batch.num_rows).astype(np.float32))

    def recommend(self, query: EvalQuery, k: int, exclude_seen: bool) -> tuple[np.ndarray, np.ndarray]:
        found = [
            best_of(mask_excluded(scores_BN, query, rows, exclude_seen), k) for rows, scores_BN in self.blocks(query)
        ]
        return torch.cat([ids for ids, _ in found]).numpy(), torch.cat([scores for _, scores in found]).numpy()


def _distinct(query: EvalQuery, low: int, high: int, num_items: int) -> tuple[np.ndarray, np.ndarray]:
    """(row, item) of every distinct item that queries low to high had; rows are counted from low."""
    seen = query.seen.rows(low, high)
    key = np.unique(seen.row_index().numpy() * num_items + seen.values.numpy())
    return key // num_items, key % num_items


def _neighbours(
    user_E: np.ndarray, item_E: np.ndarray, size_U: np.ndarray, to_N: np.ndarray, most: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The largest entries of each row of R' D_u^-1 R D_i^-1/4: offsets (N + 1,), columns, values. Pairs are in order of user."""
    shape = (len(size_U), len(to_N))
    by_user = _csr(user_E, item_E, to_N[item_E], shape)
    order = np.argsort(item_E, kind="stable")
    owner_E = user_E[order]
    offset_N, product_E = _offsets(item_E, len(to_N)), offsets_from_lengths(size_U[owner_E])
    lengths, items, values = [np.zeros(0, np.int64)], [np.zeros(0, np.int32)], [np.zeros(0, np.float32)]
    low = 0
    while low < len(to_N):
        wanted = product_E[offset_N[low]] + _PRODUCTS
        high = max(low + 1, int(np.searchsorted(product_E[offset_N], wanted, side="right")) - 1)
        part = slice(offset_N[low], offset_N[high])
        row_E = np.repeat(np.arange(high - low), np.diff(offset_N[low : high + 1]))
        weights = (1 / size_U[owner_E[part]]).astype(np.float32)
        length, item, value = _largest(
            *_product(_csr(row_E, owner_E[part], weights, (high - low, shape[0])), by_user), most
        )
        lengths.append(length)
        items.append(item)
        values.append(value)
        low = high
    return offsets_from_lengths(np.concatenate(lengths)), np.concatenate(items), np.concatenate(values)


def _product(left: Tensor, right: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Offsets, columns and values of the product of two sparse matrices."""
    if torch.backends.mkl.is_available():
        found = left @ right
    else:  # several times slower
        found = torch.sparse.mm(left.to_sparse_coo(), right.to_sparse_coo()).to_sparse_csr()
    return found.crow_indices().numpy(), found.col_indices().numpy(), found.values().numpy()


def _largest(
    offsets: np.ndarray, column: np.ndarray, value: np.ndarray, most: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(R,) numbers of entries, columns and values of what is kept of each row."""
    keep = np.ones(len(value), bool)
    for row in np.flatnonzero(np.diff(offsets) > most) if most else ():
        part = slice(offsets[row], offsets[row + 1])
        keep[part] = value[part] >= np.partition(value[part], -most)[-most]
    return np.diff(offsets_from_lengths(keep)[offsets]), column[keep].astype(np.int32), value[keep]


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
            f"it counts all pairs of items of a user among {events:,} events before the split, which are more than "
            f"{MAX_EVENTS:,}"
        )
    return ItemKNN(dataset, before(split), options.neighbours)


def _csr(row_E: np.ndarray, column_E: np.ndarray, value_E: np.ndarray, shape: tuple[int, int]) -> Tensor:
    """A sparse matrix from entries in order of rows."""
    # With 32-bit indices, which MKL takes as they are.
    offsets = torch.from_numpy(_offsets(row_E, shape[0]).astype(np.int32))
    column, value = torch.from_numpy(column_E.astype(np.int32)), torch.from_numpy(value_E)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns once per process that sparse CSR tensors are in beta
        return torch.sparse_csr_tensor(offsets, column, value, size=shape)


def _offsets(row_E: np.ndarray, rows: int) -> np.ndarray:
    return offsets_from_lengths(np.bincount(row_E, minlength=rows))
