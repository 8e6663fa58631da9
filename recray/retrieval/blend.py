"""What a model and the item filter find together, in the order of both.

    score = model's score / its temperature + weight log(share of the filter's score + 1e-5)

A model generalises, the filter remembers pairs that few users had; their best lists
differ, and the sum beats both (gowalla: see README). Candidates are the best of each.

Shape legend: B queries, C candidates, N items, D width, K places.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from recray.config import Config
from recray.data.dataset import PreparedDataset
from recray.errors import ConfigError
from recray.ids import FIRST_ITEM
from recray.loading.collate import EvalQuery
from recray.retrieval.exact import best_of
from recray.retrieval.item_knn import MAX_EVENTS, ItemKNN, allowed, num_events
from recray.retrieval.recommenders import System, queries

_LEAST = 1e-5  # of a share: what the filter has no score for is unlikely, not impossible


@dataclass(frozen=True)
class Blended:
    """vectors_ND: all items, row i is item id i. candidates: so many of each half."""

    search: System
    model: nn.Module
    vectors_ND: Tensor
    item_filter: ItemKNN
    weight: float
    temperature: float
    candidates: int

    def __call__(self, question: EvalQuery, k: int, filter_seen: bool) -> np.ndarray:
        return self.scored(question, k, filter_seen)[0]

    def scored(self, question: EvalQuery, k: int, filter_seen: bool) -> tuple[np.ndarray, np.ndarray]:
        wanted = max(k, self.candidates)
        found_BC = torch.from_numpy(self.search(question, wanted, filter_seen))
        q_BD = queries(self.model, question) / self.temperature
        ids, scores = [], []
        for rows, filter_BN in self.item_filter.blocks(question):
            share_BN = filter_BN / filter_BN.sum(1, keepdim=True).clamp(min=1e-12)
            its_own, _ = best_of(allowed(filter_BN, question, rows, filter_seen), wanted)
            # By id, so that equal scores stand in order of id; an item that both found counts once.
            item_BC, _ = torch.cat([found_BC[rows], its_own], dim=1).sort(dim=1)
            score_BC = torch.bmm(self.vectors_ND[item_BC], q_BD[rows, :, None])[:, :, 0]
            score_BC += self.weight * torch.log(share_BN.gather(1, item_BC) + _LEAST)
            out = item_BC < FIRST_ITEM
            out[:, 1:] |= item_BC[:, 1:] == item_BC[:, :-1]
            best, order = score_BC.masked_fill(out, -torch.inf).sort(dim=1, descending=True, stable=True)
            ids.append(torch.where(best == -torch.inf, 0, item_BC.gather(1, order))[:, :k])
            scores.append(best[:, :k])
        return torch.cat(ids).numpy(), torch.cat(scores).numpy()


def check_blend(config: Config, dataset: PreparedDataset, splits: tuple[str, ...]) -> None:
    """Raises ConfigError where `retrieval.filter_weight` asks for a filter over too many events."""
    events = num_events(dataset, splits)
    if config.retrieval.filter_weight and events > MAX_EVENTS:
        raise ConfigError(
            f"retrieval.filter_weight = {config.retrieval.filter_weight}: every query of the filter is a pass over all events, "
            f"and {events:,} are more than {MAX_EVENTS:,}: set retrieval.filter_weight = 0"
        )


def open_blend(
    config: Config,
    dataset: PreparedDataset,
    splits: tuple[str, ...],
    search: System,
    model: nn.Module,
    vectors_ND: Tensor,
) -> Blended | None:
    """The blend of `retrieval.filter_weight` over the events of `splits`; None where it is 0."""
    options = config.retrieval
    if not options.filter_weight:
        return None
    check_blend(config, dataset, splits)
    item_filter = ItemKNN(dataset, splits)
    return Blended(search, model, vectors_ND, item_filter, options.filter_weight, config.loss.temperature, options.k)
