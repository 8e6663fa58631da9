"""Lists of different lengths without padding, as two arrays: values and offsets.

Row b is `values[offsets[b] : offsets[b + 1]]`. The histories [5, 7], [] and [9] are

    values   [5, 7, 9]
    offsets  [0, 2, 2, 3]

Arrow stores list columns this way. `Column` is the numpy form that examples are cut from, `Jagged` the torch form that
models take. Both gather rows by one rule: the entries of a range that begins at `start` have the indices start,
start + 1, ...; for all ranges together that is `repeat(start - offset, length) + arange(total)`, without a loop over rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from recray.ids import PAD

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def offsets_from_lengths(lengths: np.ndarray) -> np.ndarray:
    """(B + 1,) int64 offsets of lists with these (B,) lengths. Of a boolean array: how many entries before each are true."""
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def range_index(starts: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices start, start + 1, ..., start + length - 1 of all ranges, one range after the other; and their offsets."""
    offsets = offsets_from_lengths(lengths)
    index = np.repeat(starts - offsets[:-1], lengths)
    index += np.arange(len(index))
    return index, offsets


@dataclass(frozen=True)
class Column:
    """One number per row, or with `offsets` one list of numbers per row."""

    values: np.ndarray
    offsets: np.ndarray | None = None  # (rows + 1,) int64

    @staticmethod
    def of(array: pa.ChunkedArray) -> Column:
        flat = array.combine_chunks()
        if not pa.types.is_list(flat.type):
            return Column(flat.to_numpy(zero_copy_only=False))
        offsets = flat.offsets.to_numpy().astype(np.int64)
        values = flat.values.slice(offsets[0], offsets[-1] - offsets[0])
        return Column(values.to_numpy(zero_copy_only=False), offsets - offsets[0])

    @staticmethod
    def from_ranges(values: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> Column:
        """Row b is the list values[starts[b] : starts[b] + lengths[b]]."""
        index, offsets = range_index(starts, lengths)
        return Column(values[index], offsets)

    def take(self, rows: np.ndarray) -> Column:
        if self.offsets is None:
            return Column(self.values[rows])
        starts = self.offsets[rows]
        return Column.from_ranges(self.values, starts, self.offsets[rows + 1] - starts)


@dataclass(frozen=True)
class Jagged:
    """Lists of different lengths as tensors: row b is values[offsets[b] : offsets[b + 1]]."""

    values: Tensor  # (T,)
    offsets: Tensor  # (B + 1,) int64, offsets[0] == 0

    @staticmethod
    def from_lengths(values: Tensor, lengths: Tensor) -> Jagged:
        """`values` divided into lists of these (B,) lengths, which sum to len(values)."""
        return Jagged(values, _offsets(lengths))

    def lengths(self) -> Tensor:
        return self.offsets[1:] - self.offsets[:-1]

    def take(self, rows: Tensor, entries: int | None = None) -> Jagged:
        """These rows in this order. Pass `entries`, their total length, if it is known: reading it waits for a GPU."""
        return self._from_ranges(self.offsets[rows], self.lengths()[rows], entries)

    def last(self, length: int) -> Jagged:
        """The last `length` entries of every row."""
        kept = self.lengths().clamp(max=length)
        return self._from_ranges(self.offsets[1:] - kept, kept)

    def rows(self, start: int, stop: int) -> Jagged:
        """Rows start to stop; values are a view."""
        offsets = self.offsets[start : stop + 1]
        return Jagged(self.values[int(offsets[0]) : int(offsets[-1])], offsets - offsets[0])

    def row_index(self) -> Tensor:
        """(T,) the row that each value belongs to."""
        lengths = self.lengths()
        return _arange(len(lengths), lengths).repeat_interleave(lengths, output_size=len(self.values))

    def with_values(self, values: Tensor) -> Jagged:
        """Other values (T,) in lists of the same lengths."""
        return Jagged(values, self.offsets)

    def each(self, function: Callable[[Tensor], Tensor]) -> Jagged:
        return Jagged(function(self.values), function(self.offsets))

    def to(self, device: torch.device) -> Jagged:
        return self.each(lambda x: x.to(device))

    def padded(self, length: int) -> Tensor:
        """(B, length) with row b's last entries at the right end and PAD before them."""
        out = self.values.new_full((len(self.offsets) - 1, length), PAD)
        row_T = self.row_index()
        from_end_T = self.offsets[1:][row_T] - _arange(len(self.values), self.values)
        keep_T = from_end_T <= length
        out[row_T[keep_T], length - from_end_T[keep_T]] = self.values[keep_T]
        return out

    def _from_ranges(self, starts: Tensor, lengths: Tensor, entries: int | None = None) -> Jagged:
        """Row b is values[starts[b] : starts[b] + lengths[b]]."""
        offsets = _offsets(lengths)
        entries = int(offsets[-1]) if entries is None else entries
        shift = (starts - offsets[:-1]).repeat_interleave(lengths, output_size=entries)
        return Jagged(self.values[shift + _arange(entries, lengths)], offsets)


@dataclass(frozen=True)
class Padded(Jagged):
    """Lists as rows of one rectangle, for `torch.export`, which takes no sizes that depend on values.

    Row b is values[b * L : b * L + lengths()[b]]; what follows it up to L is padding, any valid value. [5, 7], [] and [9]:

        values [5, 7, 0, 0, 9, 0]    real_BL [[1, 1], [0, 0], [1, 0]]

    Models take it in place of a Jagged. Only what reads `real_BL` may aggregate over entries.
    """

    real_BL: Tensor  # bool

    @staticmethod
    def of(values_BL: Tensor) -> Padded:
        """Rows of ids that end in PAD, which is no id of an entry."""
        return Padded._of(values_BL, values_BL != PAD)

    @staticmethod
    def taken(lists: Jagged, rows: Tensor, longest: int) -> Padded:
        """These rows of lists with at most `longest` entries."""
        start_B = lists.offsets[rows]
        at_L = _arange(max(longest, 1), rows)
        index_BL = (start_B[:, None] + at_L).clamp(max=max(len(lists.values) - 1, 0))
        values = lists.values if len(lists.values) else lists.values.new_zeros(1)
        return Padded._of(values[index_BL], at_L < (lists.offsets[rows + 1] - start_B)[:, None])

    @staticmethod
    def _of(values_BL: Tensor, real_BL: Tensor) -> Padded:
        rows, length = values_BL.shape
        return Padded(values_BL.reshape(-1), _arange(rows + 1, values_BL) * length, real_BL)

    def lengths(self) -> Tensor:
        return self.real_BL.sum(1)

    def with_values(self, values: Tensor) -> Padded:
        return Padded(values, self.offsets, self.real_BL)


def _offsets(lengths: Tensor) -> Tensor:
    offsets = lengths.new_zeros(len(lengths) + 1)
    offsets[1:] = lengths.cumsum(0)
    return offsets


def _arange(size: int, like: Tensor) -> Tensor:
    """0, 1, ..., size - 1 on the device of `like`."""
    import torch  # deferred, so that the numpy half of this module does not load it

    return torch.arange(size, device=like.device)
