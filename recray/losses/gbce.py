"""Generalized binary cross-entropy of gSASRec: the positive's probability to the power beta (Petrov & Macdonald, RecSys 2023).

    loss = -beta log sigmoid(s+ / t) - sum over negatives m of log(1 - sigmoid(s_m / t))
    beta = alpha (c (1 - 1 / alpha) + 1 / alpha),  alpha = M / (N - 1),  c: calibration

Negative sampling makes a model overconfident, because it sees a share alpha of the negatives only; beta corrects that.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from recray.config.losses import GbceOptions as Options
from recray.ids import FIRST_ITEM
from recray.loading.batch import Batch, ItemTable
from recray.losses.base import Gather, sampled, weighted_sum
from recray.models import Retriever


def loss(options: Options, model: Retriever, batch: Batch, items: ItemTable, gather: Gather) -> Tensor:
    found = sampled(options, model, batch, items)
    positive_Q, negative_QM = (score / options.temperature for score in found.scores())
    alpha = min(1.0, options.negatives / max(items.num_items - FIRST_ITEM - 1, 1))
    beta = alpha * (options.calibration * (1 - 1 / alpha) + 1 / alpha)
    loss_Q = beta * F.softplus(-positive_Q) + (found.allowed_QM * F.softplus(negative_QM)).sum(1)
    return weighted_sum(loss_Q, batch)
