"""What a model takes: the tensors of one batch, and the item table.

Shape legend: B rows, T history entries of all rows together, Q queries, N items.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from recray.ids import PAD as PAD
from recray.loading.jagged import Jagged as Jagged

Feature = Tensor | Jagged  # one number per row, or one list


def select(feature: Feature, rows: Tensor, entries: int | None = None) -> Feature:
    """These rows of a feature. `entries`: total length of their lists, if it is known; reading it waits for a GPU."""
    return feature.take(rows, entries) if isinstance(feature, Jagged) else feature[rows]


@dataclass(frozen=True)
class Batch:
    """One batch of examples or of evaluation queries.

    A *query* is a position in a row's history at which the next item is predicted. Without `position_Q` there is one
    query per row, after its whole history. A sequence model trains on every position at once: position_Q[q] is the index
    in history.values of the last entry that query q sees.

    The sequence [9, 2, 5] of one user is history = Jagged([9, 2], [0, 2]), position_Q = [0, 1], target_Q = [2, 5].
    """

    user_B: Tensor  # int64 user ids
    history: Jagged  # int64 item ids, oldest first
    target_Q: Tensor | None = None  # int64: the item to predict, or the candidate that a ranker scores
    weight_Q: Tensor | None = None  # float32; 0 for padding
    position_Q: Tensor | None = None
    label_Q: Tensor | None = None  # float32, impressions only: 1 if target_Q was chosen, 0 if it was only shown
    user_features: dict[str, Feature] = field(default_factory=dict)
    context: dict[str, Feature] = field(default_factory=dict)  # of the target event, one entry per row

    @property
    def num_rows(self) -> int:
        return self.user_B.shape[0]  # torch.export takes len() for a constant

    def each(self, function: Callable[[Tensor], Tensor]) -> Batch:
        """The batch with every tensor replaced."""

        def of(value: Feature) -> Feature:
            return value.each(function) if isinstance(value, Jagged) else function(value)

        replaced: dict[str, Any] = {}
        for entry in fields(self):
            value = getattr(self, entry.name)
            if isinstance(value, dict):
                replaced[entry.name] = {name: of(one) for name, one in value.items()}
            elif value is not None:
                replaced[entry.name] = of(value)
        return replace(self, **replaced)

    def split(self, parts: int) -> list[Batch]:
        """The rows in order, in `parts` batches; in fewer if there are fewer rows."""
        parts = min(parts, self.num_rows)
        if parts <= 1:
            return [self]
        ends = [self.num_rows * part // parts for part in range(parts + 1)]
        return [self._rows(start, stop) for start, stop in pairwise(ends)]

    def _rows(self, start: int, stop: int) -> Batch:
        begin, end = int(self.history.offsets[start]), int(self.history.offsets[stop])
        first, last = start, stop
        position_Q = self.position_Q
        if position_Q is not None:
            first, last = (int(x) for x in torch.searchsorted(position_Q, position_Q.new_tensor([begin, end])))
            position_Q = position_Q[first:last] - begin

        def part(feature: Feature) -> Feature:
            return feature.rows(start, stop) if isinstance(feature, Jagged) else feature[start:stop]

        return Batch(
            user_B=self.user_B[start:stop],
            history=self.history.rows(start, stop),
            target_Q=None if self.target_Q is None else self.target_Q[first:last],
            weight_Q=None if self.weight_Q is None else self.weight_Q[first:last],
            position_Q=position_Q,
            label_Q=None if self.label_Q is None else self.label_Q[first:last],
            user_features={name: part(feature) for name, feature in self.user_features.items()},
            context={name: part(feature) for name, feature in self.context.items()},
        )

    def to(self, device: torch.device) -> Batch:
        return self.each(lambda x: x.to(device))


@dataclass(frozen=True)
class ItemTable:
    """Everything known about items; row i describes item id i, PAD and UNKNOWN included.

    counts_N: float32, training events of each item (0 for PAD and UNKNOWN).
    features: categorical (N,) int64 ids, numeric (N,) float32, list Jagged of int64 ids.
    """

    counts_N: Tensor
    features: dict[str, Feature] = field(default_factory=dict)

    @cached_property
    def total(self) -> Tensor:
        """Sum of counts_N, or 1 if that is 0."""
        return self.counts_N.sum().clamp(min=1)

    @property
    def num_items(self) -> int:
        """Rows of the table: real items + NUM_RESERVED."""
        return len(self.counts_N)
