"""What a model sees: tensors of one batch, and the item table.

Shape legend: B rows, T history entries of all rows together, Q queries,
N items, F entries of a list feature.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from recray.ids import FIRST_ITEM
from recray.ids import PAD as PAD

FIRST_ID = FIRST_ITEM


@dataclass(frozen=True)
class Jagged:
    """Rows of different lengths without padding: row b is values[offsets[b] : offsets[b + 1]]."""

    values: Tensor  # (T,)
    offsets: Tensor  # (B + 1,) int64, offsets[0] == 0

    def lengths(self) -> Tensor:
        return self.offsets[1:] - self.offsets[:-1]

    def last(self, length: int) -> Jagged:
        """The last `length` entries of every row."""
        lengths = self.lengths()
        kept = lengths.clamp(max=length)
        offsets = torch.cat([kept.new_zeros(1), kept.cumsum(0)])
        entries = int(offsets[-1])
        shift = torch.repeat_interleave(self.offsets[1:] - kept - offsets[:-1], kept, output_size=entries)
        return Jagged(self.values[shift + torch.arange(entries, device=kept.device)], offsets)

    def rows(self, start: int, stop: int) -> Jagged:
        offsets = self.offsets[start : stop + 1]
        return Jagged(self.values[int(offsets[0]) : int(offsets[-1])], offsets - offsets[0])

    def each(self, function: Callable[[Tensor], Tensor]) -> Jagged:
        return Jagged(function(self.values), function(self.offsets))

    def to(self, device: torch.device) -> Jagged:
        return self.each(lambda x: x.to(device))

    def padded(self, length: int) -> Tensor:
        """(B, length) with row b's last entries at the right end and PAD before them."""
        lengths = self.lengths()
        out = self.values.new_zeros(len(lengths), length)
        row_T = torch.repeat_interleave(
            torch.arange(len(lengths), device=self.values.device), lengths, output_size=len(self.values)
        )
        from_end_T = self.offsets[1:][row_T] - torch.arange(len(self.values), device=self.values.device)
        keep_T = from_end_T <= length
        out[row_T[keep_T], length - from_end_T[keep_T]] = self.values[keep_T]
        return out


Feature = Tensor | Jagged


@dataclass(frozen=True)
class Batch:
    """Rows on their way through a model.

    A *query* is a point in a row's history at which the next item is asked for.
    With `position_Q` None there is one query per row, after its whole history.
    A sequence model trains on every position at once: then position_Q[q] is the
    index into history.values of the last entry that query q may see.
    """

    user_B: Tensor  # int64 user ids
    history: Jagged  # int64 item ids, oldest first
    target_Q: Tensor | None = None  # int64: the item each query should find
    weight_Q: Tensor | None = None  # float32; 0 marks a query that only pads the batch
    position_Q: Tensor | None = None
    label_Q: Tensor | None = None  # float32, of impressions: 1 when target_Q was chosen, 0 when it was only shown
    user_features: dict[str, Feature] = field(default_factory=dict)
    context: dict[str, Feature] = field(default_factory=dict)  # of the target event, one entry per row
    shard_B: Tensor | None = None  # int64: identity of the row: which shard,
    row_B: Tensor | None = None  # int64: and which row (or event) of it

    @property
    def num_rows(self) -> int:
        return len(self.user_B)

    def each(self, function: Callable[[Tensor], Tensor]) -> Batch:
        """The batch with every tensor replaced."""

        def of(value: Feature) -> Feature:
            return value.each(function) if isinstance(value, Jagged) else function(value)

        replaced: dict[str, object] = {}
        for entry in fields(self):
            value = getattr(self, entry.name)
            if isinstance(value, dict):
                replaced[entry.name] = {name: of(one) for name, one in value.items()}
            elif value is not None:
                replaced[entry.name] = of(value)
        return replace(self, **replaced)  # type: ignore[arg-type]

    def split(self, parts: int) -> list[Batch]:
        """The rows in order, in `parts` batches or as many as there are rows."""
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
            shard_B=None if self.shard_B is None else self.shard_B[start:stop],
            row_B=None if self.row_B is None else self.row_B[start:stop],
        )

    def to(self, device: torch.device) -> Batch:
        return self.each(lambda x: x.to(device))


@dataclass(frozen=True)
class ItemTable:
    """Everything known about items, indexed by item id; rows PAD and UNKNOWN included.

    counts_N: float32, training events of each item (0 for PAD and UNKNOWN).
    features: categorical (N,) int64 ids, numeric (N,) float32, list Jagged of int64 ids.
    """

    counts_N: Tensor
    features: dict[str, Feature] = field(default_factory=dict)

    @cached_property
    def total(self) -> Tensor:
        """Sum of counts_N, at least 1."""
        return self.counts_N.sum().clamp(min=1)

    @property
    def num_items(self) -> int:
        """Rows of the table: real items + NUM_RESERVED."""
        return len(self.counts_N)
