"""Exact search: the best items of a query by inner product, over the whole catalogue.

Chunked matrix product and top-k in fp32; the ground truth of every index and metric.
"""

from __future__ import annotations

import torch
from torch import Tensor

from recray.models.batch import FIRST_ID, Jagged

_SCORES = 1 << 25  # scores alive at a time (128 MB)


def top_k(q_BD: Tensor, v_ND: Tensor, k: int, exclude: Jagged | None = None) -> tuple[Tensor, Tensor]:
    """Item ids (B, k) int64 and scores (B, k), best first, ties by lower id.

    Row i of v_ND is item id i; ids below FIRST_ID and those in `exclude` never
    come back. A row with fewer than k items left ends in id 0 and score -inf.
    """
    rows_at_once = max(1, _SCORES // max(len(v_ND), 1))
    ids, scores = [], []
    for at in range(0, len(q_BD), rows_at_once):
        score = q_BD[at : at + rows_at_once].float() @ v_ND.float().T
        score[:, :FIRST_ID] = -torch.inf
        if exclude is not None:
            begin, end = exclude.offsets[at], exclude.offsets[min(at + rows_at_once, len(q_BD))]
            lengths = exclude.lengths()[at : at + rows_at_once]
            row = torch.repeat_interleave(torch.arange(len(score), device=score.device), lengths)
            score[row, exclude.values[begin:end]] = -torch.inf
        found, best = best_of(score, k)
        ids.append(found)
        scores.append(best)
    return torch.cat(ids), torch.cat(scores)


def best_of(scores_BN: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best columns of every row and their scores, ties by lower column; 0 and -inf where only -inf is left."""
    best, found = scores_BN.topk(min(k, scores_BN.shape[1]), dim=1)
    # Stable by id first, then by score: equal scores stand in order of id.
    by_id = found.argsort(dim=1)
    best, found = best.gather(1, by_id), found.gather(1, by_id)
    by_score = best.argsort(dim=1, descending=True, stable=True)
    best, found = best.gather(1, by_score), found.gather(1, by_score)
    found = torch.where(best == -torch.inf, 0, found)
    short = k - found.shape[1]
    return torch.nn.functional.pad(found, (0, short)), torch.nn.functional.pad(best, (0, short), value=-torch.inf)
