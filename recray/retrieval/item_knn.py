"""What users of the same items chose: a linear filter that is not trained, a baseline and half of a blend.

Shape legend: B queries, N items, U users.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from recray.data.dataset import PreparedDataset
from recray.ids import FIRST_ITEM
from recray.loading.batch import Jagged
from recray.loading.collate import EvalQuery
from recray.retrieval.exact import best_of

MAX_EVENTS = 50_000_000  # every query is a pass over all events
# Of an item's count, on the side of the user's own items; the other side has the rest. NDCG@20 of the filter alone on
# gowalla's validation split is 0.113 so, and 0.110 with halves.
_FROM = 0.75
_ENTRIES = 1 << 25  # of a dense matrix alive at a time (128 MB)


class ItemKNN:
    """Normalised item-item linear filter (the linear part of GF-CF, Shen et al., CIKM 2021, with other powers).

    With R the user-item matrix of the events of `splits`, a user with items x scores
    x D_i^-3/4 R' D_u^-1 R D_i^-1/4: between a random walk (powers 1 and 0), which favours what is popular, and
    GF-CF's halves. The products are sparse: no item-item matrix is made.
    """

    def __init__(self, dataset: PreparedDataset, splits: Sequence[str]) -> None:
        n, pairs = dataset.record.num_items, [torch.empty(0, dtype=torch.int64)]
        for table in (table for split in splits for table in dataset.iter_tables(split)):
            lengths = torch.from_numpy(pc.list_value_length(table["item"].combine_chunks()).to_numpy().astype(np.int64))
            item = torch.from_numpy(table["item"].combine_chunks().flatten().to_numpy().astype(np.int64))
            user = torch.repeat_interleave(torch.from_numpy(table["user"].to_numpy().astype(np.int64)), lengths)
            kept = torch.from_numpy(new_events(table)) & (item >= FIRST_ITEM)
            pairs.append(torch.unique((user * n + item)[kept]))
        user_E, item_E = (found := torch.unique(torch.cat(pairs))) // n, found % n
        shape = (dataset.record.num_users, n)
        count_N = torch.bincount(item_E, minlength=n).clamp(min=1).float()
        self._from_N, self._to_N = count_N**-_FROM, count_N ** (_FROM - 1)
        self._by_user = _sparse(user_E, item_E, 1 / torch.bincount(user_E)[user_E].float(), shape)
        self._by_item = _sparse(item_E, user_E, torch.ones(len(item_E)), shape[::-1])

    def blocks(self, question: EvalQuery) -> Iterator[tuple[slice, Tensor]]:
        """Some queries at a time: which, and (B, N) scores; 0 for what no user of the same items had."""
        at_once = max(1, _ENTRIES // max(self._by_user.shape))
        for low in range(0, question.batch.num_rows, at_once):
            seen = _rows(question.seen, low, low + at_once)
            row = torch.repeat_interleave(torch.arange(len(seen.offsets) - 1), seen.lengths())
            had_NB = torch.zeros(len(self._from_N), len(seen.offsets) - 1)
            had_NB[seen.values, row] = self._from_N[seen.values]
            scores_BN = (self._by_item @ (self._by_user @ had_NB)).T.contiguous().mul_(self._to_N)
            yield slice(low, low + at_once), scores_BN

    def __call__(self, question: EvalQuery, k: int, filter_seen: bool) -> np.ndarray:
        found = [
            best_of(allowed(scores_BN, question, rows, filter_seen), k)[0] for rows, scores_BN in self.blocks(question)
        ]
        return torch.cat(found).numpy()


def num_events(dataset: PreparedDataset, splits: Sequence[str]) -> int:
    """What a filter over these splits passes over for every query."""
    return sum(dataset.record.counts[f"events_{split}"] for split in splits)


def allowed(scores_BN: Tensor, question: EvalQuery, rows: slice, filter_seen: bool) -> Tensor:
    """Scores of these queries, -inf for what may not be recommended; in place."""
    scores_BN[:, :FIRST_ITEM] = -torch.inf
    if filter_seen:
        seen = _rows(question.seen, rows.start, rows.stop)
        row = torch.repeat_interleave(torch.arange(len(scores_BN)), seen.lengths())
        scores_BN[row, seen.values] = -torch.inf
    return scores_BN


def new_events(table: pa.Table) -> np.ndarray:
    """(E,) bool: entries of a table's lists that are positive targets. Rows of later splits begin with earlier events."""
    lengths = pc.list_value_length(table["item"].combine_chunks()).to_numpy()
    from_end = np.repeat(np.cumsum(lengths), lengths) - np.arange(lengths.sum())
    new = from_end <= np.repeat(table["num_targets"].to_numpy(), lengths)
    if "label" in table.column_names:
        new &= table["label"].combine_chunks().flatten().to_numpy() > 0
    return np.asarray(new)


def _rows(lists: Jagged, begin: int, end: int) -> Jagged:
    part = lists.offsets[begin : end + 1]
    return Jagged(lists.values[part[0] : part[-1]], part - part[0])


def _sparse(row_E: Tensor, column_E: Tensor, value_E: Tensor, shape: tuple[int, ...]) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls its sparse matrices beta, once a process
        return torch.sparse_coo_tensor(torch.stack([row_E, column_E]), value_E, shape).to_sparse_csr()
