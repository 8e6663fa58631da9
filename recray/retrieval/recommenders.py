"""What answers a question with a ranking: the model, its index, both with a ranker behind, the oracle.

The item filter beside the model is in recray.retrieval.blend, baselines are in baselines and item_filter. All leave out
what the user had when `filter_seen` says so, and fill lists that fall short with id 0.

Shape legend: B queries, K places.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recray.data.dataset import PreparedDataset
from recray.data.sources.simulated import SimulatedOracle
from recray.ids import FIRST_ITEM
from recray.loading.batch import Batch, Jagged, select
from recray.loading.collate import EvalQuery
from recray.retrieval.exact import top_k
from recray.retrieval.faiss_index import ItemIndex

_ROWS = 8192  # candidates scored at a time


class System(Protocol):
    def __call__(self, question: EvalQuery, k: int, filter_seen: bool) -> np.ndarray:
        """(B, k) int64 item ids, best first; 0 where nothing is left."""
        ...


class Scorer(System, Protocol):
    def scored(self, question: EvalQuery, k: int, filter_seen: bool) -> tuple[np.ndarray, np.ndarray]:
        """The same, and (B, k) scores; -inf where nothing is left."""
        ...


@dataclass(frozen=True)
class ExactSearch:
    """Exact search with the model's vectors. vectors_ND: all items, row i is item id i."""

    model: nn.Module
    vectors_ND: Tensor

    def __call__(self, question: EvalQuery, k: int, filter_seen: bool) -> np.ndarray:
        return self.scored(question, k, filter_seen)[0]

    def scored(self, question: EvalQuery, k: int, filter_seen: bool) -> tuple[np.ndarray, np.ndarray]:
        exclude = question.seen if filter_seen else None
        ids, scores = top_k(queries(self.model, question), self.vectors_ND, k, exclude)
        return ids.numpy(), scores.numpy()


@dataclass(frozen=True)
class IndexSearch:
    """The same queries, answered by the index."""

    model: nn.Module
    index: ItemIndex

    def __call__(self, question: EvalQuery, k: int, filter_seen: bool) -> np.ndarray:
        return self.scored(question, k, filter_seen)[0]

    def scored(self, question: EvalQuery, k: int, filter_seen: bool) -> tuple[np.ndarray, np.ndarray]:
        exclude = (question.seen.values.numpy(), question.seen.offsets.numpy()) if filter_seen else None
        return self.index.search(queries(self.model, question).numpy(), k, exclude)


@torch.inference_mode()
def queries(model: nn.Module, question: EvalQuery) -> Tensor:
    """(B, D) float32."""
    return model.query_vectors(question.batch).float()  # type: ignore[operator, no-any-return]


@dataclass(frozen=True)
class Reranked:
    """What another system finds, in the order of a ranker. history_length: of the ranker."""

    search: System
    ranker: nn.Module
    candidates: int
    history_length: int

    def __call__(self, question: EvalQuery, k: int, filter_seen: bool) -> np.ndarray:
        return self.scored(question, k, filter_seen)[0]

    def scored(self, question: EvalQuery, k: int, filter_seen: bool) -> tuple[np.ndarray, np.ndarray]:
        return self.order(question, self.search(question, self.candidates, filter_seen), k)

    @torch.inference_mode()
    def order(self, question: EvalQuery, found_BC: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k best of the candidates found, and their logits; 0 and -inf where nothing is left."""
        found = torch.from_numpy(found_BC)
        row, place = (found >= FIRST_ITEM).nonzero(as_tuple=True)
        rows_of_history = question.seen.last(self.history_length)
        scores_BC = torch.full(found.shape, -torch.inf)
        for at in range(0, len(row), _ROWS):
            part = slice(at, at + _ROWS)
            batch = _candidates(question.batch, rows_of_history, row[part], found[row[part], place[part]])
            scores_BC[row[part], place[part]] = self.ranker.logits(batch).float()  # type: ignore[operator]
        best, order = scores_BC.sort(dim=1, descending=True, stable=True)
        best, order = best[:, :k], order[:, :k]
        ids = torch.where(best == -torch.inf, 0, found.gather(1, order))
        short = (0, k - ids.shape[1])
        return F.pad(ids, short).numpy(), F.pad(best, short, value=-torch.inf).numpy()


def _candidates(batch: Batch, history: Jagged, rows: Tensor, items: Tensor) -> Batch:
    """One row per candidate: its user's row again, and the item."""
    repeated = select(history, rows)
    assert isinstance(repeated, Jagged)
    return Batch(
        user_B=batch.user_B[rows],
        history=repeated,
        target_Q=items,
        user_features={name: select(feature, rows) for name, feature in batch.user_features.items()},
        context={name: select(feature, rows) for name, feature in batch.context.items()},
    )


class Oracle:
    """The simulator's own answer. Items that training never saw are in it: the oracle knows them."""

    def __init__(self, oracle: SimulatedOracle, dataset: PreparedDataset, split: str) -> None:
        self._oracle = oracle
        self._keys = dataset.items()["item"].to_numpy(zero_copy_only=False)
        self._id_of_key = np.ones(oracle.options.items, np.int64)
        self._id_of_key[self._keys[FIRST_ITEM:].astype(np.int64)] = np.arange(FIRST_ITEM, len(self._keys))
        users = dataset.user_keys()
        self._key_of_user = np.zeros(dataset.record.num_users, np.int64)
        self._key_of_user[users["user_id"].to_numpy()] = users["user"].to_numpy()
        self._until = dataset.record.starts(split)

    def __call__(self, question: EvalQuery, k: int, filter_seen: bool) -> np.ndarray:
        seen = question.seen.values.numpy()
        exclude = []
        for begin, end in itertools.pairwise(question.seen.offsets.tolist()):
            mine = seen[begin:end] if filter_seen else seen[:0]
            exclude.append(self._keys[mine[mine >= FIRST_ITEM]].astype(np.int64))
        users = self._key_of_user[question.batch.user_B.numpy()].tolist()
        out = np.zeros((len(users), k), np.int64)
        for row, answer in zip(out, self._oracle(users, self._until, k, exclude), strict=True):
            row[: len(answer)] = self._id_of_key[answer]
        return out
