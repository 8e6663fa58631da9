"""Exact search: the best items of a query by inner product, over the whole catalogue.

Matrix products of some queries with all items, in fp32, and the best of each row; the ground truth of every index and
metric.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from recray.ids import FIRST_ITEM
from recray.loading.batch import Jagged

# Scores alive at a time: 28 MB, as memory larger than 32 MB comes fresh from the kernel at every call; but as every pass
# reads all items up to 32 queries, while that is no more than 128 MB.
_SCORES, _ROWS, _MOST_SCORES = 7 << 20, 32, 1 << 25
_SCORES_ON_GPU = 1 << 27  # 512 MB: there the starts of kernels cost more than what they read
_TILE = 32  # columns of which only the largest is looked at first


def top_k(
    q_BD: Tensor, v_ND: Tensor, k: int, exclude: Jagged | None = None, share: tuple[int, int] = (0, 1)
) -> tuple[Tensor, Tensor]:
    """Item ids (B, k) int64 and scores (B, k), best first, ties by lower id.

    Row i of v_ND is item id i, or first + i * step where it holds only the share (first, step) of items. Ids below
    FIRST_ITEM and those in `exclude` never come back. A row with fewer than k items left ends in id 0 and score -inf.
    """
    first, step = share
    items = max(len(v_ND), 1)
    most = _SCORES_ON_GPU if q_BD.is_cuda else min(max(_ROWS * items, _SCORES), _MOST_SCORES)
    rows_at_once = max(1, most // items)
    q_BD, v_ND = q_BD.float(), v_ND.float()
    buffer = q_BD.new_empty(min(rows_at_once, len(q_BD)), len(v_ND))
    ids, scores = [], []
    for at in range(0, len(q_BD), rows_at_once):
        part_BD = q_BD[at : at + rows_at_once]
        score = torch.mm(part_BD, v_ND.T, out=buffer[: len(part_BD)])
        score[:, : len(range(first, FIRST_ITEM, step))] = -torch.inf
        if exclude is not None:
            begin, end = exclude.offsets[at], exclude.offsets[min(at + rows_at_once, len(q_BD))]
            lengths = exclude.lengths()[at : at + rows_at_once]
            row = torch.repeat_interleave(torch.arange(len(score), device=score.device), lengths)
            values = exclude.values[begin:end]
            here = values % step == first
            score[row[here], values[here] // step] = -torch.inf
        found, best = best_of(score, k)
        ids.append(torch.where(best == -torch.inf, 0, first + found * step))
        scores.append(best)
    return torch.cat(ids), torch.cat(scores)


def merge(ids_BK: Tensor, scores_BK: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best of what was found in several shares, side by side."""
    by_id = ids_BK.argsort(dim=1)
    best, place = scores_BK.gather(1, by_id).sort(dim=1, descending=True, stable=True)
    return ids_BK.gather(1, by_id).gather(1, place)[:, :k], best[:, :k]


def best_of(scores_BN: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best columns of every row and their scores, ties by lower column; 0 and -inf where only -inf is left."""
    wanted = min(k, scores_BN.shape[1])
    best, found = _largest(scores_BN, min(wanted + 1, scores_BN.shape[1]))
    if best.shape[1] > wanted:
        # Where the next one scores the same as the last, any of those could have been found.
        tied = (best[:, wanted - 1] == best[:, wanted]) & (best[:, wanted] > -torch.inf)
        best, found = best[:, :wanted], found[:, :wanted]
        if bool(tied.any()):
            for row in torch.split(tied.nonzero()[:, 0], max(1, _SCORES // scores_BN.shape[1])):
                found[row] = _lowest_of_ties(scores_BN[row], best[row, -1:], wanted)
            best = scores_BN.gather(1, found)
    # Stable by id first, then by score: equal scores stand in order of id.
    found, _ = found.sort(dim=1)
    best, by_score = scores_BN.gather(1, found).sort(dim=1, descending=True, stable=True)
    found = torch.where(best == -torch.inf, 0, found.gather(1, by_score))
    short = (0, k - wanted)
    return F.pad(found, short), F.pad(best, short, value=-torch.inf)


def _largest(scores_BN: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of every row, best first, and their columns; of equal ones any.

    Of many columns the tiles with the k largest maxima are chosen first: they hold the k largest columns.
    """
    width = scores_BN.shape[1]
    tiles = width // _TILE
    if tiles <= 4 * k:
        return tuple(scores_BN.topk(k, dim=1))  # type: ignore[return-value]
    whole = tiles * _TILE
    _, tile_BK = scores_BN[:, :whole].view(-1, tiles, _TILE).amax(2).topk(k, dim=1, sorted=False)
    column = tile_BK[:, :, None] * _TILE + torch.arange(_TILE, device=tile_BK.device)
    rest = torch.arange(whole, width, device=tile_BK.device).expand(len(tile_BK), -1)
    candidates = torch.cat([column.flatten(1), rest], dim=1)
    best, place = scores_BN.gather(1, candidates).topk(k, dim=1)
    return best, candidates.gather(1, place)


def _lowest_of_ties(scores_RN: Tensor, last_R1: Tensor, k: int) -> Tensor:
    """(R, k) columns that score more than the k-th best, and the lowest of those that score the same."""
    above, equal = scores_RN > last_R1, scores_RN == last_R1
    kept = above | (equal & (equal.cumsum(1) <= k - above.sum(1, keepdim=True)))
    return kept.nonzero()[:, 1].view(-1, k)
