"""Example users of a report: their history, what they chose next, and the list of each system."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recray.data.dataset import PreparedDataset
from recray.ids import FIRST_ITEM
from recray.loading.collate import EvalQuery
from recray.records import Example

_SHARDS = 10  # whose first queries examples are taken from
_PER_SHARD, _EXAMPLES = 5, 5  # each with a hit, and as many without
_SHOWN = 10  # items of a history, of the targets and of a list
_HIDDEN = ("oracle", "hindsight")  # not possible in practice


def wanted(number: int) -> bool:
    """Whether examples are taken from this shard."""
    return number < _SHARDS


def take(
    dataset: PreparedDataset, file: str, query: EvalQuery, lists: Mapping[str, np.ndarray], hits_BK: np.ndarray
) -> list[Example]:
    """Users of some queries of a shard, with and without a hit by the model. lists: system -> (B, K) ids.

    file: of the shard; the users of all splits with the same number are in one file.
    """
    asked = (query.seen.lengths() > 0).numpy()
    hit: np.ndarray = np.asarray(hits_BK[:, :_SHOWN].any(axis=1))
    rows = np.concatenate([np.flatnonzero(asked & (hit == one))[:_PER_SHARD] for one in (True, False)])
    if not len(rows):
        return []
    users = dataset.read_file(f"users/{file.rpartition('/')[2]}")
    row_of = pc.index_in(pa.array(query.batch.user_B.numpy()[rows].astype(np.int32)), users["user_id"].combine_chunks())
    names = [str(key) for key in users["user"].combine_chunks().take(row_of).to_pylist()]
    items = dataset.items()["item"].combine_chunks()

    def keys(ids: Iterable[int]) -> list[str]:
        return [str(items[int(one)].as_py()) if one >= FIRST_ITEM else "" for one in ids]

    seen, targets = query.seen, query.targets
    found = []
    for row, name in zip(rows.tolist(), names, strict=True):
        start, stop = seen.offsets[row : row + 2].tolist()
        first, last = targets.offsets[row : row + 2].tolist()
        chosen = {system: ids[row, :_SHOWN] for system, ids in lists.items() if system not in _HIDDEN}
        found.append(
            Example(
                user=name,
                events=stop - start,
                history=keys(seen.values[max(start, stop - _SHOWN) : stop].tolist()),
                targets=keys(dict.fromkeys(targets.values[first:last].tolist())),
                lists={system: keys(ids[ids >= FIRST_ITEM].tolist()) for system, ids in chosen.items()},
                hit=bool(hit[row]),
            )
        )
    return found


def choose(examples: Iterable[Example]) -> list[Example]:
    """Up to five with a hit of the model and as many without; another user each."""
    users = {one.user: one for one in examples}.values()
    return [one for hit in (True, False) for one in [e for e in users if e.hit == hit][:_EXAMPLES]]
