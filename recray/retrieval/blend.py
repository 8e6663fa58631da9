"""Candidates of a model and of the item-item baseline, ordered by both.

    score = model's score / its temperature + weight log(share of the baseline's score + 1e-5)

The model generalises, the baseline remembers pairs that few users had: their best lists differ, and the sum is better than
either (gowalla: see jobs/configs). The candidates of a query are the best items of both. With temperature 0.5 and weight 2,
an item of model score 1.2 that has a tenth of the baseline's total score for the user gets 2.4 + 2 log(0.10001) = -2.2.

Shape legend: B queries, C candidates, N items, D width, K places.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from recray.config import Config
from recray.data.dataset import PreparedDataset
from recray.errors import ConfigError
from recray.ids import FIRST_ITEM, PAD
from recray.loading.collate import EvalQuery
from recray.retrieval import Recommender
from recray.retrieval.baselines.item_knn import MAX_EVENTS, ItemKNN, mask_excluded
from recray.retrieval.events import num_events
from recray.retrieval.exact import ExactSearch, best_of, query_vectors

_LEAST = 1e-5  # of a share: an item without a score in the baseline is unlikely, not impossible


@dataclass(frozen=True)
class Blended:
    """`candidates` items of `search` and as many of the baseline, in the order of both scores."""

    search: Recommender
    exact: ExactSearch  # scores the candidates
    item_knn: ItemKNN
    weight: float
    temperature: float
    candidates: int

    def recommend(self, query: EvalQuery, k: int, exclude_seen: bool) -> tuple[np.ndarray, np.ndarray]:
        wanted = max(k, self.candidates)
        found_BC = torch.from_numpy(self.search.recommend(query, wanted, exclude_seen)[0])
        q_BD = query_vectors(self.exact.model, query) / self.temperature
        sum_B = self.item_knn.sums(query).clamp(min=1e-12)
        ids, scores = [], []
        for rows, knn_BN in self.item_knn.blocks(query):
            share_BN = knn_BN / sum_B[rows, None]
            own_BC, _ = best_of(mask_excluded(knn_BN, query, rows, exclude_seen), wanted)
            # Sorted by id, so that equal scores stay in order of id and an item that both found is next to its duplicate.
            item_BC, _ = torch.cat([found_BC[rows], own_BC], dim=1).sort(dim=1)
            score_BC = torch.bmm(self.exact.vectors_ND[item_BC], q_BD[rows, :, None])[:, :, 0]
            score_BC += self.weight * torch.log(share_BN.gather(1, item_BC) + _LEAST)
            dropped = item_BC < FIRST_ITEM
            dropped[:, 1:] |= item_BC[:, 1:] == item_BC[:, :-1]
            best, order = score_BC.masked_fill(dropped, -torch.inf).sort(dim=1, descending=True, stable=True)
            ids.append(torch.where(best == -torch.inf, PAD, item_BC.gather(1, order))[:, :k])
            scores.append(best[:, :k])
        return torch.cat(ids).numpy(), torch.cat(scores).numpy()


def check_blend(config: Config, dataset: PreparedDataset, splits: Sequence[str]) -> None:
    """Raise ConfigError if `retrieval.item_knn_weight` needs the item-item baseline over too many events."""
    events = num_events(dataset, splits)
    if config.retrieval.item_knn_weight and events > MAX_EVENTS:
        raise ConfigError(
            f"retrieval.item_knn_weight = {config.retrieval.item_knn_weight}: the item-item baseline counts all pairs of "
            f"items of a user, and {events:,} events are more than {MAX_EVENTS:,}: set retrieval.item_knn_weight = 0"
        )
