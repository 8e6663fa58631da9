"""Softmax cross-entropy over all items.

    loss = -log( exp(s+ / t) / sum over items i of exp(s_i / t) )        t: temperature

Exact, without negatives to choose. The logits of all queries and items are never in memory together
(recray.kernels.chunked_softmax).
"""

from __future__ import annotations

import torch
from torch import Tensor

from recray.config.losses import SoftmaxOptions as Options
from recray.ids import FIRST_ITEM
from recray.kernels.chunked_softmax import chunked_softmax
from recray.loading.batch import Batch, ItemTable
from recray.losses.base import Gather, weights
from recray.models import Retriever


def loss(options: Options, model: Retriever, batch: Batch, items: ItemTable, gather: Gather) -> Tensor:
    assert batch.target_Q is not None
    q_QD = model.query_vectors(batch)
    weight_Q = weights(batch, q_QD.device)
    v_ND = model.item_vectors(torch.arange(FIRST_ITEM, items.num_items, device=q_QD.device))
    # A query of weight 0 is padding and may hold NaN, which a weight of 0 would not remove from the gradient.
    q_QD = torch.where(weight_Q[:, None] > 0, q_QD.float(), 0.0)
    return chunked_softmax(q_QD, v_ND, batch.target_Q - FIRST_ITEM, weight_Q, options.temperature, options.chunk_size)
