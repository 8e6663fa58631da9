"""Baselines without training: what any model must beat. They rank as recray.retrieval.systems do.

Shape legend: B queries, N items, U users, K places.
"""

from __future__ import annotations

import warnings

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from recray.batches import Question
from recray.data.prepared import PreparedDataset
from recray.models.batch import FIRST_ID, Jagged
from recray.models.scoring import best_of

MAX_FILTER_EVENTS = 50_000_000  # every query of the item filter is a pass over all train events
_ENTRIES = 1 << 25  # of a dense matrix alive at a time (128 MB)


class Popularity:
    """One order of the items for everybody."""

    def __init__(self, counts_N: np.ndarray) -> None:
        """counts_N: how often each item id was chosen; ties stand in order of id."""
        self._order = FIRST_ID + np.argsort(-counts_N[FIRST_ID:], kind="stable")

    def __call__(self, question: Question, k: int, filter_seen: bool) -> np.ndarray:
        seen = question.seen if filter_seen else Jagged(question.seen.values[:0], question.seen.offsets * 0)
        wanted = min(len(self._order), k + int(seen.lengths().max()))
        row_E = np.repeat(np.arange(question.batch.num_rows), seen.lengths().numpy())
        head = self._order[:wanted]
        # Places of seen items in the head of the order are struck out.
        place_of = np.full(len(self._order) + FIRST_ID, wanted)
        place_of[head] = np.arange(wanted)
        place_E = place_of[seen.values.numpy()]
        kept = np.ones((question.batch.num_rows, wanted + 1), bool)
        kept[row_E, place_E] = False
        kept = kept[:, :wanted]
        first = np.argsort(~kept, axis=1, kind="stable")[:, :k]
        ids = np.where(np.take_along_axis(kept, first, 1), head[first], 0)
        return np.pad(ids, ((0, 0), (0, k - ids.shape[1])))


def recent_popularity(dataset: PreparedDataset, split: str, window_us: int) -> Popularity:
    """By counts in the window before the split; then by train count."""
    until = dataset.record.starts(split)
    recent_N = np.zeros(dataset.record.num_items)
    for name in ("train", "valid") if split == "test" else ("train",):
        for table in dataset.iter_tables(name):
            # Rows of valid begin with their train events: only targets are new.
            new = _targets(table)
            times = table["time"].combine_chunks().flatten().to_numpy()
            near = new & (times >= until - window_us) & (times < until)
            items = table["item"].combine_chunks().flatten().to_numpy()
            recent_N += np.bincount(items[near], minlength=len(recent_N))
    counts_N = dataset.item_counts()
    return Popularity(recent_N + counts_N / (counts_N.sum() + 1))


def _targets(table: pa.Table) -> np.ndarray:
    """(E,) bool: entries of a table's lists that are positive targets."""
    lengths = pc.list_value_length(table["item"].combine_chunks()).to_numpy()
    from_end = np.repeat(np.cumsum(lengths), lengths) - np.arange(lengths.sum())
    new = from_end <= np.repeat(table["num_targets"].to_numpy(), lengths)
    if "label" in table.column_names:
        new &= table["label"].combine_chunks().flatten().to_numpy() > 0
    return np.asarray(new)


class ItemFilter:
    """Normalised item-item linear filter: the walk item -> user -> item (the linear part of GF-CF, Shen et al.,
    CIKM 2021, between D_i^-1/2 and D_i^1/2).

    With R the user-item matrix of train, a user with items x scores x D_i^-1 R' D_u^-1 R. The products are
    sparse: no item-item matrix is made.
    """

    def __init__(self, dataset: PreparedDataset) -> None:
        n = dataset.record.num_items
        users, items, before = [], [], 0
        for table in dataset.iter_tables("train"):
            kept = torch.from_numpy(_targets(table))
            lengths = torch.from_numpy(pc.list_value_length(table["item"].combine_chunks()).to_numpy().astype(np.int64))
            item = torch.from_numpy(table["item"].combine_chunks().flatten().to_numpy().astype(np.int64))
            row = torch.repeat_interleave(torch.arange(len(lengths)), lengths) + before
            pairs = torch.unique((row * n + item)[kept])
            users.append(pairs // n)
            items.append(pairs % n)
            before += len(lengths)
        user_E, item_E = torch.cat(users), torch.cat(items)
        self._by_user = _sparse(user_E, item_E, 1 / torch.bincount(item_E)[item_E].float(), (before, n))
        self._by_item = _sparse(item_E, user_E, 1 / torch.bincount(user_E)[user_E].float(), (n, before))

    def __call__(self, question: Question, k: int, filter_seen: bool) -> np.ndarray:
        out = []
        at_once = max(1, _ENTRIES // max(self._by_user.shape))
        offsets = question.seen.offsets
        for low in range(0, question.batch.num_rows, at_once):
            part = offsets[low : low + at_once + 1]
            lengths, items = part.diff(), question.seen.values[part[0] : part[-1]]
            row = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
            had_NB = torch.zeros(self._by_user.shape[1], len(lengths))
            had_NB[items, row] = 1.0
            scores_BN = (self._by_item @ (self._by_user @ had_NB)).T.contiguous()
            scores_BN[:, :FIRST_ID] = -torch.inf
            if filter_seen:
                scores_BN[row, items] = -torch.inf
            out.append(best_of(scores_BN, k)[0])
        return torch.cat(out).numpy()


def _sparse(row_E: Tensor, column_E: Tensor, value_E: Tensor, shape: tuple[int, int]) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls its sparse matrices beta, once a process
        return torch.sparse_coo_tensor(torch.stack([row_E, column_E]), value_E, shape).to_sparse_csr()
