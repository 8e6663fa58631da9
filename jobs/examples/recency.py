"""A model of your own: the query is a mean of the history in which recent events count more.

    q = sum over history of 0.5 ** (age / half_life) * v_item / sum of the same weights        score = q . v

`age` counts events back from the most recent one. Shape legend: B rows, T history entries of all rows, D width.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from recray.config import ModelOptions
from recray.layers.embedding import Table
from recray.loading.batch import Batch, ItemTable
from recray.models import Examples, Retriever
from recray.records import DatasetRecord


class Options(ModelOptions):
    name: str = "recency"
    half_life: float = Field(5.0, gt=0, description="events after which an event's weight is halved")


class Recency(Retriever):
    examples: Examples = "events"  # one training row per event, its history the events before it

    def __init__(self, options: Options, num_items: int) -> None:
        super().__init__()
        self.options = options
        self.item_table = Table(num_items, options.dim, ids="item")

    def query_vectors(self, batch: Batch) -> Tensor:
        history, lengths_B = batch.history, batch.history.lengths()
        row_T = torch.repeat_interleave(torch.arange(len(lengths_B), device=lengths_B.device), lengths_B)
        age_T = history.offsets[1:][row_T] - 1 - torch.arange(len(row_T), device=row_T.device)
        weight_T = 0.5 ** (age_T / self.options.half_life)
        sum_BD = torch.zeros(len(lengths_B), self.options.dim, device=row_T.device)
        sum_BD = sum_BD.index_add(0, row_T, self.item_table(history.values) * weight_T[:, None])
        total_B = torch.zeros(len(lengths_B), device=row_T.device).index_add(0, row_T, weight_T)
        return sum_BD / total_B.clamp(min=1e-6)[:, None]

    def item_vectors(self, item_ids: Tensor) -> Tensor:
        vectors: Tensor = self.item_table(item_ids)
        return vectors


def build(options: Options, dataset: DatasetRecord, items: ItemTable) -> Recency:
    return Recency(options, dataset.num_items)
