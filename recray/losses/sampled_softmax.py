"""Softmax cross-entropy over in-batch positives and uniform negatives, corrected for how they are sampled.

    loss = -log( exp(s+ / t) / (exp(s+ / t) + sum over candidates c of exp(s_c / t - log e_c)) )

e_c is how often item c is expected among the candidates: P f_c + M / N, with P positives in the batch of all workers, f_c
the item's share of training events, and M uniform draws out of N items. The correction makes the sum an estimate of the
full softmax (Yi et al., RecSys 2019; Yang et al., WWW 2020 for the mixture of both kinds of negatives).

Shape legend: Q queries, P positives of all workers, M uniform negatives, C = P + M candidates, D width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from recray.config.losses import SampledSoftmaxOptions as Options
from recray.ids import FIRST_ITEM
from recray.loading.batch import Batch, ItemTable
from recray.losses.base import Gather, draw, item_vectors, weighted_sum, weights
from recray.models import Retriever


def loss(options: Options, model: Retriever, batch: Batch, items: ItemTable, gather: Gather) -> Tensor:
    assert batch.target_Q is not None
    q_QD = model.query_vectors(batch)
    candidate_C = draw(options, items, q_QD.device)
    positive_QD, v_CD = item_vectors(model, batch.target_Q, candidate_C)
    positive_Q = (q_QD * positive_QD).sum(-1).float() / options.temperature
    present_C = torch.ones(len(candidate_C), device=q_QD.device)
    in_batch = 0.0
    if options.in_batch:
        # Workers may have different numbers of real queries; the rest of a batch is padding, which is no candidate.
        present_P = gather.all_gather((weights(batch, q_QD.device) > 0).float())
        in_batch = float(present_P.sum())
        candidate_C = torch.cat([gather.all_gather(batch.target_Q), candidate_C])
        v_CD = torch.cat([gather.all_gather(positive_QD), v_CD])
        present_C = torch.cat([present_P, present_C])
    logits_QC = (q_QD @ v_CD.T).float() / options.temperature
    if options.logq:
        # An item can come from both draws: the expected counts add up, whichever draw it came from.
        share_C = items.counts_N[candidate_C] / items.total
        uniform = options.negatives / max(items.num_items - FIRST_ITEM, 1)
        logits_QC = logits_QC - torch.log(in_batch * share_C + uniform)
    excluded_QC = (candidate_C[None] == batch.target_Q[:, None]) | (present_C[None] == 0)
    logits_QC = logits_QC.masked_fill(excluded_QC, -math.inf)
    # The positive is given, not sampled, so it is not corrected (Khrylchenko et al., RecSys 2025).
    loss_Q = torch.logsumexp(torch.cat([positive_Q[:, None], logits_QC], dim=1), dim=1) - positive_Q
    return weighted_sum(loss_Q, batch)
