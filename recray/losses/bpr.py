"""Bayesian personalized ranking (Rendle et al., UAI 2009), with M negatives instead of one.

loss = mean over negatives m of -log sigmoid((s+ - s_m) / t)        t: temperature
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from recray.config.losses import BprOptions as Options
from recray.loading.batch import Batch, ItemTable
from recray.losses.base import Gather, sampled, weighted_sum
from recray.models import Retriever


def loss(options: Options, model: Retriever, batch: Batch, items: ItemTable, gather: Gather) -> Tensor:
    found = sampled(options, model, batch, items)
    positive_Q, negative_QM = (score / options.temperature for score in found.scores())
    loss_Q = (found.share_QM() * F.softplus(negative_QM - positive_Q[:, None])).sum(1)
    return weighted_sum(loss_Q, batch)
