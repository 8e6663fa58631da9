"""A loss of your own: every negative should score at least `margin` below the positive.

loss = mean over negatives m of max(0, margin - s+ + s_m)
"""

from __future__ import annotations

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from recray.config import SampledLossOptions
from recray.loading.batch import Batch, ItemTable
from recray.losses.base import Gather, sampled, weighted_sum
from recray.models import Retriever


class Options(SampledLossOptions):  # brings the keys temperature and negatives
    name: str = "hinge"
    margin: float = Field(1.0, gt=0, description="smallest difference of scores that costs nothing")


def loss(options: Options, model: Retriever, batch: Batch, items: ItemTable, gather: Gather) -> Tensor:
    found = sampled(options, model, batch, items)
    positive_Q, negative_QM = found.scores()
    too_near_QM = F.relu(options.margin - positive_Q[:, None] + negative_QM)
    return weighted_sum((found.share_QM() * too_near_QM).sum(1), batch)
