"""Baselines without training: what any model must beat.

Each answers `scores(question) -> (B, N)`: higher is better, row index = item id.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from recray.batches import Question
from recray.data.prepared import PreparedDataset
from recray.models.batch import FIRST_ID

MAX_ITEMS = 50_000  # an item-item matrix of this many rows takes 10 GB in fp32
_DENSE_ENTRIES = 1 << 26  # of the user-item matrix, dense at a time (256 MB)


class Popularity:
    """Items by train count. Ids are ordered by count, so the id itself is the rank and ties are settled."""

    def __init__(self, num_items: int) -> None:
        self._score_N = -torch.arange(num_items, dtype=torch.float32)

    def scores(self, question: Question) -> Tensor:
        return self._score_N.repeat(question.batch.num_rows, 1)


class RecentPopularity:
    """Items by their count in a window before the split, from every user's row; ties by train count."""

    def __init__(self, dataset: PreparedDataset, split: str, window_us: int, until_us: int) -> None:
        count_N = np.zeros(dataset.record.num_items)
        for name in ("train", "valid") if split == "test" else ("train",):
            for table in dataset.iter_tables(name):
                items = table["item"].combine_chunks().flatten().to_numpy()
                times = table["time"].combine_chunks().flatten().to_numpy()
                # Rows of valid begin with their train events: only targets are new.
                lengths = np.diff(table["item"].combine_chunks().offsets.to_numpy())
                from_end = np.repeat(np.cumsum(lengths), lengths) - np.arange(len(items))
                new = from_end <= np.repeat(table["num_targets"].to_numpy(), lengths)
                near = new & (times >= until_us - window_us) & (times < until_us)
                count_N += np.bincount(items[near], minlength=len(count_N))
        tie_N = -np.arange(len(count_N)) / (len(count_N) + 1)
        self._score_N = torch.from_numpy((count_N + tie_N).astype(np.float32))

    def scores(self, question: Question) -> Tensor:
        return self._score_N.repeat(question.batch.num_rows, 1)


class ItemFilter:
    """Normalised item-item linear filter (the linear part of GF-CF, Shen et al., CIKM 2021).

    With R the user-item matrix of train, R~ = D_u^-1/2 R D_i^-1/2 and P = R~' R~; a user's
    scores are the sum of P's rows over what they had.
    """

    def __init__(self, dataset: PreparedDataset) -> None:
        n = dataset.record.num_items
        users, items, before = [], [], 0
        for table in dataset.iter_tables("train"):
            lists = table["item"].combine_chunks()
            lengths = torch.from_numpy(np.diff(lists.offsets.to_numpy()).astype(np.int64))
            item = torch.from_numpy(lists.flatten().to_numpy().astype(np.int64))
            row = torch.repeat_interleave(torch.arange(len(lengths)), lengths) + before
            pairs = torch.unique(row * n + item)
            users.append(pairs // n)
            items.append(pairs % n)
            before += len(lengths)
        user_E, item_E = torch.cat(users), torch.cat(items)
        weight_E = (torch.bincount(user_E)[user_E] * torch.bincount(item_E)[item_E]).float().rsqrt()
        transposed = torch.sparse_coo_tensor(torch.stack([item_E, user_E]), weight_E, (n, before)).to_sparse_csr()
        by_item = torch.argsort(item_E)
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), torch.bincount(item_E, minlength=n).cumsum(0)])
        self._gram_NN = torch.empty(n, n)
        chunk = max(1, min(n, _DENSE_ENTRIES // max(before, 1)))
        for at in range(0, n, chunk):
            mine = by_item[starts[at] : starts[min(at + chunk, n)]]
            columns = torch.zeros(before, min(chunk, n - at))
            columns[user_E[mine], item_E[mine] - at] = weight_E[mine]
            self._gram_NN[:, at : at + chunk] = transposed @ columns
        self._gram_NN[:FIRST_ID] = 0

    def scores(self, question: Question) -> Tensor:
        n = len(self._gram_NN)
        seen = question.seen
        row = torch.repeat_interleave(torch.arange(question.batch.num_rows), seen.lengths())
        dense = torch.zeros(question.batch.num_rows, n)
        dense[row, seen.values] = 1.0
        return dense @ self._gram_NN
