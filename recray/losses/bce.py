"""Binary cross-entropy of click prediction, with an optional pairwise term.

    loss = w * BCE(sigmoid(z), y')  +  pairwise_weight * softplus(z- - z+)

z is the logit, y' = y (1 - s) + s / 2 the label after label smoothing s, and w = positive_weight for clicks, 1 for
non-clicks. In the pairwise term every row is paired with one random other row of the batch; pairs of a click and a
non-click count (RankNet, Burges et al., ICML 2005).

Shape legend: B impressions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from recray.config.losses import BceOptions as Options
from recray.loading.batch import Batch, ItemTable
from recray.losses.base import Gather
from recray.models import Ranker


def loss(options: Options, model: Ranker, batch: Batch, items: ItemTable, gather: Gather) -> Tensor:
    assert batch.label_Q is not None and batch.weight_Q is not None
    return (per_impression(options, model.logits(batch), batch.label_Q, batch.weight_Q) * batch.weight_Q).sum()


def per_impression(options: Options, logit_B: Tensor, label_B: Tensor, weight_B: Tensor) -> Tensor:
    """(B,) float32 losses before weighting. Rows of weight 0 are padding and form no pairs."""
    z = logit_B.float()
    target = label_B * (1 - options.label_smoothing) + options.label_smoothing / 2
    loss_B = F.binary_cross_entropy_with_logits(z, target, reduction="none")
    loss_B = loss_B * torch.where(label_B > 0, options.positive_weight, 1.0)
    if options.pairwise_weight:
        other = torch.randperm(len(z), device=z.device)
        sign = label_B - label_B[other]  # 1: this row is the click, -1: the other row is
        paired = sign.abs() * (weight_B[other] > 0)
        loss_B = loss_B + options.pairwise_weight * paired * F.softplus(-sign * (z - z[other]))
    return loss_B
