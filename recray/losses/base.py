"""What losses share: the module that DDP wraps, weights, and uniform negatives.

Shape legend: Q queries, M shared negatives, D width. Scores are inner products.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from recray import registry
from recray.config import LossOptions, SampledLossOptions
from recray.ids import FIRST_ITEM
from recray.loading.batch import Batch, ItemTable
from recray.models import Retriever


class Gather(Protocol):
    """Access to the rows of other workers."""

    def all_gather(self, x: Tensor) -> Tensor:
        """Rows of all workers; this worker's part is differentiable. Every worker must have the same number of rows."""
        ...


class Objective(nn.Module):
    """Model and loss as one module, so that DDP sees one forward: batch -> sum of weight * loss and sum of weights, () each.

    plugins: run.plugins of the configuration, the folder of losses outside the package.
    """

    def __init__(
        self, model: nn.Module, options: LossOptions, items: ItemTable, gather: Gather, plugins: str | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self._loss = registry.load("loss", options.name, plugins).loss
        self._options, self._items, self._gather = options, items, gather

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        total: Tensor = self._loss(self._options, self.model, batch, self._items, self._gather)
        return total, weights(batch, total.device).sum()


def weighted_sum(loss_Q: Tensor, batch: Batch) -> Tensor:
    """() sum of weight * loss. A query of weight 0 may hold anything, NaN too: it is padding."""
    weight_Q = weights(batch, loss_Q.device)
    return (torch.where(weight_Q > 0, loss_Q, 0.0) * weight_Q).sum()


def weights(batch: Batch, device: torch.device) -> Tensor:
    """(Q,) weights of the batch's queries; ones if it has none."""
    assert batch.target_Q is not None
    return batch.weight_Q if batch.weight_Q is not None else torch.ones(len(batch.target_Q), device=device)


def draw(options: SampledLossOptions, items: ItemTable, device: torch.device) -> Tensor:
    """(M,) item ids, uniform over the catalogue, with repetitions."""
    return torch.randint(FIRST_ITEM, items.num_items, (options.negatives,), device=device)


def item_vectors(model: Retriever, target_Q: Tensor, negative_M: Tensor) -> tuple[Tensor, Tensor]:
    """(Q, D) and (M, D); an item that occurs twice is computed once."""
    unique, inverse = torch.unique(torch.cat([target_Q, negative_M]), return_inverse=True)
    v_UD = model.item_vectors(unique)
    return v_UD[inverse[: len(target_Q)]], v_UD[inverse[len(target_Q) :]]


@dataclass(frozen=True)
class Sampled:
    """A batch's queries with their positives and shared negatives.

    allowed_QM: 1.0, or 0.0 where the negative is the row's own positive, which is never a negative of it.
    """

    q_QD: Tensor
    positive_QD: Tensor
    negative_MD: Tensor
    allowed_QM: Tensor

    def scores(self) -> tuple[Tensor, Tensor]:
        """(Q,) scores of the positives and (Q, M) of the negatives, float32."""
        return (self.q_QD * self.positive_QD).sum(-1).float(), (self.q_QD @ self.negative_MD.T).float()

    def share_QM(self) -> Tensor:
        """Weights that average over each row's allowed negatives."""
        return self.allowed_QM / self.allowed_QM.sum(1, keepdim=True).clamp(min=1)


def sampled(options: SampledLossOptions, model: Retriever, batch: Batch, items: ItemTable) -> Sampled:
    assert batch.target_Q is not None
    q_QD = model.query_vectors(batch)  # before the draw: its dropout draws random numbers too
    negative_M = draw(options, items, q_QD.device)
    positive_QD, negative_MD = item_vectors(model, batch.target_Q, negative_M)
    return Sampled(q_QD, positive_QD, negative_MD, (negative_M[None] != batch.target_Q[:, None]).float())
