"""Models: one file each. A file `recray/models/<name>.py` is the model `<name>`.

It holds a docstring (paper, formula, shape legend), `Options` (a ModelOptions),
the torch module, and `build(options, dataset, items) -> module`.

Two families by protocol: a `Retriever` finds items for a query, a `Ranker` says how likely an item is chosen.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor

from recray.loading.batch import Batch
from recray.loading.examples import Examples as Examples


@runtime_checkable
class Retriever(Protocol):
    """Scores a query against an item by an inner product, so faiss and training agree.

    `examples` says how training rows are cut:
    "events": one row per training event, its history the events before it;
    "others": the same with all other events of the user as history, for logs without order;
    "sequences": one row per user, every position a query (Batch.position_Q).
    """

    examples: Examples

    def query_vectors(self, batch: Batch) -> Tensor:
        """(Q, D): one vector per query of the batch."""
        ...

    def item_vectors(self, item_ids: Tensor) -> Tensor:
        """(N, D): vectors of these item ids, any shape of ids flattened first."""
        ...


@runtime_checkable
class Ranker(Protocol):
    """Scores a candidate (Batch.target_Q) for a row. Its examples are "impressions"."""

    examples: Examples

    def logits(self, batch: Batch) -> Tensor:
        """(B,): log p / (1 - p), p the probability that the candidate is chosen."""
        ...
