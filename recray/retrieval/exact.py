"""Exact search: the items with the largest inner products with a query, over the whole catalogue.

It is the ground truth of every index and metric: fp32 matrix products of some queries with all items, then the best of
each row, ties by lower id. For a query (1, 0) and the items 2: (3, 1), 3: (5, 0), 4: (5, 9), the best two are items 3 and
4 with score 5 each.

Shape legend: B queries, N items, D width, K places.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from recray.ids import FIRST_ITEM, PAD
from recray.loading.collate import EvalQuery
from recray.loading.jagged import Jagged
from recray.models import Retriever

# Scores in memory at a time: 28 MB, because glibc requests blocks above 32 MB from the kernel at every call. Each pass reads
# all item vectors, so it takes at least 32 queries as long as their scores fit in 128 MB.
_SCORES, _ROWS, _MOST_SCORES = 7 << 20, 32, 1 << 25
_SCORES_ON_GPU = 1 << 27  # 512 MB: on a GPU launching kernels costs more than reading the items
_HEAD = 4096  # columns that are first searched for ties
_TILE = 32  # columns that are first compared by their maximum only


@dataclass(frozen=True)
class ExactSearch:
    """Recommends by exact search with a model's vectors."""

    model: Retriever
    vectors_ND: Tensor  # of all items; row i is item id i

    def recommend(self, query: EvalQuery, k: int, exclude_seen: bool) -> tuple[np.ndarray, np.ndarray]:
        ids, scores = top_k(query_vectors(self.model, query), self.vectors_ND, k, query.seen if exclude_seen else None)
        return ids.numpy(), scores.numpy()


@torch.inference_mode()
def query_vectors(model: Retriever, query: EvalQuery) -> Tensor:
    """(B, D) float32."""
    return model.query_vectors(query.batch).float()


def top_k(
    q_BD: Tensor, v_ND: Tensor, k: int, exclude: Jagged | None = None, share: tuple[int, int] = (0, 1)
) -> tuple[Tensor, Tensor]:
    """Item ids (B, k) int64 and scores (B, k), best first, ties by lower id.

    Row i of v_ND is item id i, or first + i * step if it holds only the share (first, step) of the items. Reserved ids and
    those in `exclude` are never returned. A row with fewer than k items left ends in PAD and -inf.
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
            seen = exclude.rows(at, at + rows_at_once)
            here = seen.values % step == first
            score[seen.row_index()[here], seen.values[here] // step] = -torch.inf
        found, best = best_of(score, k)
        ids.append(torch.where(best == -torch.inf, PAD, first + found * step))
        scores.append(best)
    return torch.cat(ids), torch.cat(scores)


def merge(ids_BK: Tensor, scores_BK: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best of the lists that were found in several shares of the items, given side by side."""
    by_id = ids_BK.argsort(dim=1)
    best, place = scores_BK.gather(1, by_id).sort(dim=1, descending=True, stable=True)
    return ids_BK.gather(1, by_id).gather(1, place)[:, :k], best[:, :k]


def best_of(scores_BN: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best columns of every row and their scores, ties by lower column; PAD and -inf where only -inf is left."""
    wanted = min(k, scores_BN.shape[1])
    best, found = _largest(scores_BN, min(wanted + 1, scores_BN.shape[1]))
    if best.shape[1] > wanted:
        # If the next best score equals the last one kept, topk may have returned any of the tied columns.
        tied = (best[:, wanted - 1] == best[:, wanted]) & (best[:, wanted] > -torch.inf)
        best, found = best[:, :wanted], found[:, :wanted]
        if bool(tied.any()):
            for row in torch.split(tied.nonzero()[:, 0], max(1, _SCORES // scores_BN.shape[1])):
                found[row] = _lowest_of_ties(scores_BN, row, best[row], found[row])
            best = scores_BN.gather(1, found)
    # Sorted by id, then stably by score: equal scores are in order of id.
    found, _ = found.sort(dim=1)
    best, by_score = scores_BN.gather(1, found).sort(dim=1, descending=True, stable=True)
    found = torch.where(best == -torch.inf, PAD, found.gather(1, by_score))
    short = (0, k - wanted)
    return F.pad(found, short, value=PAD), F.pad(best, short, value=-torch.inf)


def _largest(scores_BN: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of every row, best first, and their columns; any of the columns if values are equal.

    With many columns, the tiles with the k largest maxima are selected first: they contain the k largest columns.
    """
    width = scores_BN.shape[1]
    tiles = width // _TILE
    if tiles <= 4 * k:
        best, found = scores_BN.topk(k, dim=1)
        return best, found
    whole = tiles * _TILE
    _, tile_BK = scores_BN[:, :whole].view(-1, tiles, _TILE).amax(2).topk(k, dim=1, sorted=False)
    column = tile_BK[:, :, None] * _TILE + torch.arange(_TILE, device=tile_BK.device)
    rest = torch.arange(whole, width, device=tile_BK.device).expand(len(tile_BK), -1)
    candidates = torch.cat([column.flatten(1), rest], dim=1)
    best, place = scores_BN.gather(1, candidates).topk(k, dim=1)
    return best, candidates.gather(1, place)


def _lowest_of_ties(scores_BN: Tensor, row_R: Tensor, best_RK: Tensor, found_RK: Tensor) -> Tensor:
    """(R, K) columns of the K best scores of these rows: those above the last one, and the lowest columns that equal it.

    best_RK, found_RK: the K best scores, best first, and any columns that have them.
    """
    columns, left = found_RK.clone(), torch.arange(len(row_R), device=row_R.device)
    tied_RK = best_RK == best_RK[:, -1:]
    wanted_R = tied_RK.sum(1, keepdim=True)
    width = min(_HEAD, scores_BN.shape[1])  # the lowest of many ties are usually here
    while len(left):
        equal = scores_BN[row_R[left], :width] == best_RK[left, -1:]
        place = equal.cumsum(1, dtype=torch.int32)
        complete = place[:, -1] >= wanted_R[left, 0]
        done = left[complete]
        kept = equal[complete] & (place[complete] <= wanted_R[done])
        columns[done] = columns[done].masked_scatter(tied_RK[done], kept.nonzero()[:, 1])
        left, width = left[~complete], scores_BN.shape[1]
    return columns
