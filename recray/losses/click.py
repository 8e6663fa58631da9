"""The loss of click prediction: one value per impression, from logits and 0/1 labels.

bce        weight * BCE(sigmoid(z), y'),  y' = y (1 - s) + s / 2 with label smoothing s,
           weight = positive_weight for clicks, 1 for the others
pairwise   + pairwise_weight * softplus(z- - z+) for a click and a non-click of the batch, each row
           paired with one other at random (RankNet, Burges et al., ICML 2005)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recray.config import LossConfig
from recray.loading.batch import Batch
from recray.models import Ranker


def click_loss(config: LossConfig, logit_B: Tensor, label_B: Tensor, weight_B: Tensor) -> Tensor:
    """(B,) float32. Rows of weight 0 are in no pair."""
    z = logit_B.float()
    target = label_B * (1 - config.label_smoothing) + config.label_smoothing / 2
    loss_B = F.binary_cross_entropy_with_logits(z, target, reduction="none")
    loss_B = loss_B * torch.where(label_B > 0, config.positive_weight, 1.0)
    if config.pairwise_weight:
        other = torch.randperm(len(z), device=z.device)
        sign = label_B - label_B[other]  # 1: this row is the click, -1: the other one is
        paired = sign.abs() * (weight_B[other] > 0)
        loss_B = loss_B + config.pairwise_weight * paired * F.softplus(-sign * (z - z[other]))
    return loss_B


class ClickObjective(nn.Module):
    """Model and loss as one module, so that DDP sees one forward: batch -> (weighted sum of losses, sum of weights)."""

    def __init__(self, model: nn.Module, config: LossConfig) -> None:
        super().__init__()
        self.model = model
        self._config = config

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        assert isinstance(self.model, Ranker) and batch.label_Q is not None and batch.weight_Q is not None
        loss_B = click_loss(self._config, self.model.logits(batch), batch.label_Q, batch.weight_Q)
        return (loss_B * batch.weight_Q).sum(), batch.weight_Q.sum()
