"""Everything that answers a question with a ranking: the model, its index, the simulator's oracle.

The baselines are in recray.retrieval.baselines. All leave out what the user had when
`filter_seen` says so, and fill lists that fall short with id 0.

Shape legend: B queries, K places.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from recray.batches import Question
from recray.data.prepared import PreparedDataset
from recray.data.sources.simulated import SimulatedOracle
from recray.models.batch import FIRST_ID
from recray.models.scoring import top_k
from recray.retrieval.faiss_index import ItemIndex


class System(Protocol):
    def __call__(self, question: Question, k: int, filter_seen: bool) -> np.ndarray:
        """(B, k) int64 item ids, best first; 0 where nothing is left."""
        ...


@dataclass(frozen=True)
class ExactSearch:
    """Exact search with the model's vectors. vectors_ND: all items, row i is item id i."""

    model: nn.Module
    vectors_ND: Tensor

    def __call__(self, question: Question, k: int, filter_seen: bool) -> np.ndarray:
        return top_k(_queries(self.model, question), self.vectors_ND, k, question.seen if filter_seen else None)[
            0
        ].numpy()


@dataclass(frozen=True)
class IndexSearch:
    """The same queries, answered by the index."""

    model: nn.Module
    index: ItemIndex

    def __call__(self, question: Question, k: int, filter_seen: bool) -> np.ndarray:
        exclude = (question.seen.values.numpy(), question.seen.offsets.numpy()) if filter_seen else None
        return self.index.search(_queries(self.model, question).numpy(), k, exclude)[0]


@torch.inference_mode()
def _queries(model: nn.Module, question: Question) -> Tensor:
    return model.query_vectors(question.batch).float()  # type: ignore[operator, no-any-return]


class Oracle:
    """The simulator's own answer. Items that training never saw are in it: the oracle knows them."""

    def __init__(self, oracle: SimulatedOracle, dataset: PreparedDataset, split: str) -> None:
        self._oracle = oracle
        self._keys = dataset.items()["item"].to_numpy(zero_copy_only=False)
        self._id_of_key = np.ones(oracle.options.items, np.int64)
        self._id_of_key[self._keys[FIRST_ID:].astype(np.int64)] = np.arange(FIRST_ID, len(self._keys))
        users = dataset.user_keys()
        self._key_of_user = np.zeros(dataset.record.num_users, np.int64)
        self._key_of_user[users["user_id"].to_numpy()] = users["user"].to_numpy()
        self._until = dataset.record.starts(split)

    def __call__(self, question: Question, k: int, filter_seen: bool) -> np.ndarray:
        seen = question.seen.values.numpy()
        exclude = []
        for begin, end in itertools.pairwise(question.seen.offsets.tolist()):
            mine = seen[begin:end] if filter_seen else seen[:0]
            exclude.append(self._keys[mine[mine >= FIRST_ID]].astype(np.int64))
        users = self._key_of_user[question.batch.user_B.numpy()].tolist()
        out = np.zeros((len(users), k), np.int64)
        for row, answer in zip(out, self._oracle(users, self._until, k, exclude), strict=True):
            row[: len(answer)] = self._id_of_key[answer]
        return out
