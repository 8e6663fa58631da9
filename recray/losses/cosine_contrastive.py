"""Cosine contrastive loss of SimpleX (Mao et al., CIKM 2021).

    loss = (1 - cos+) + w mean over negatives m of max(0, cos_m - margin)        w: negative_weight

Only negatives that come nearer than the margin cost anything. The temperature is not part of this loss.
"""

from __future__ import annotations

from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor

from recray.config.losses import CosineContrastiveOptions as Options
from recray.loading.batch import Batch, ItemTable
from recray.losses.base import Gather, sampled, weighted_sum
from recray.models import Retriever


def loss(options: Options, model: Retriever, batch: Batch, items: ItemTable, gather: Gather) -> Tensor:
    found = sampled(options, model, batch, items)
    q_QD, positive_QD, negative_MD = (
        F.normalize(x, dim=-1) for x in (found.q_QD, found.positive_QD, found.negative_MD)
    )
    found = replace(found, q_QD=q_QD, positive_QD=positive_QD, negative_MD=negative_MD)
    positive_Q, negative_QM = found.scores()
    too_near_Q = (found.share_QM() * F.relu(negative_QM - options.margin)).sum(1)
    return weighted_sum(1 - positive_Q + options.negative_weight * too_near_Q, batch)
