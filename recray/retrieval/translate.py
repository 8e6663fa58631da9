"""A recommender asked with the ids of another prepared dataset: two models of a log that grows, on the same queries.

Ids of items, users and categories differ between two datasets; their keys and values are the same. A recommender over
dataset B answers queries of dataset A by tables from the ids of A to those of B, and back for the items that it finds.
Items that only B has cannot be among the targets; they keep their place in the list, as PAD.

Shape legend: B queries, K places, V ids of a feature.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from recray.data import features, id_maps
from recray.data.dataset import PreparedDataset
from recray.ids import PAD
from recray.loading import batch
from recray.loading.collate import EvalQuery
from recray.loading.jagged import Jagged
from recray.records import Feature
from recray.retrieval import Recommender

_Map = Callable[[batch.Feature], batch.Feature]


@dataclass(frozen=True)
class Translated:
    """Answers queries of one dataset by a recommender over another one."""

    recommender: Recommender
    history_length: int  # of its model
    items: Tensor  # (ids of the query's dataset,) ids of the recommender's
    back: np.ndarray  # (ids of the recommender's dataset,) ids of the query's
    users: Tensor
    features: dict[str, dict[str, Callable[[int, Mapping[str, batch.Feature]], batch.Feature]]]  # role -> name -> value

    def recommend(self, query: EvalQuery, k: int, exclude_seen: bool) -> tuple[np.ndarray, np.ndarray]:
        seen = Jagged(self.items[query.seen.values], query.seen.offsets)
        rows, given = query.batch.num_rows, {"user": query.batch.user_features, "context": query.batch.context}
        found = {
            role: {name: of(rows, given[role]) for name, of in self.features[role].items()}
            for role in ("user", "context")
        }
        asked = replace(
            query.batch,
            user_B=self.users[query.batch.user_B],
            history=seen.last(self.history_length),
            user_features=found["user"],
            context=found["context"],
        )
        ids, scores = self.recommender.recommend(replace(query, batch=asked, seen=seen), k, exclude_seen)
        return self.back[ids], scores


def translated(
    recommender: Recommender, history_length: int, asked: PreparedDataset, own: PreparedDataset
) -> Translated:
    """`recommender` over the dataset `own`, for queries of the dataset `asked`; both as their models know them.

    Raises LineageError if keys of one are text and of the other numbers.
    """
    by_role: dict[str, dict[str, Callable[[int, Mapping[str, batch.Feature]], batch.Feature]]] = {
        "user": {},
        "context": {},
    }
    known = {one.column: one for one in asked.record.features}
    for feature in own.record.features:
        if feature.role != "item":
            by_role[feature.role][feature.name] = _value_of(feature, known.get(feature.column))
    return Translated(
        recommender,
        history_length,
        torch.from_numpy(id_maps.items(asked, own)),
        id_maps.items(own, asked, PAD),
        # Users without a row are those of no training: their vector is 0.
        torch.from_numpy(id_maps.users(asked, own)),
        by_role,
    )


def _value_of(own: Feature, asked: Feature | None) -> Callable[[int, Mapping[str, batch.Feature]], batch.Feature]:
    """What a batch of the other dataset holds of a feature, encoded as in this one; missing where the other lacks it."""
    if asked is None or asked.kind != own.kind:
        return lambda rows, _: _missing(own, rows)
    convert, name = _conversion(asked, own), own.name
    return lambda rows, given: convert(given[name])


def _missing(feature: Feature, rows: int) -> batch.Feature:
    if feature.kind == "list":
        return Jagged(torch.zeros(0, dtype=torch.int64), torch.zeros(rows + 1, dtype=torch.int64))
    return torch.zeros(rows, dtype=torch.float32 if feature.kind == "numeric" else torch.int64)


def _conversion(asked: Feature, own: Feature) -> _Map:
    if asked.kind == "numeric":
        return lambda value: _rescaled(value, asked, own)
    ids = torch.from_numpy(id_maps.categories(asked, own))
    return lambda value: Jagged(ids[value.values], value.offsets) if isinstance(value, Jagged) else ids[value]


def _rescaled(value: batch.Feature, asked: Feature, own: Feature) -> Tensor:
    """Standard deviations of the one dataset as those of the other."""
    assert isinstance(value, Tensor)
    raw = value.double() * asked.std + asked.mean
    if asked.log != own.log:
        raw = torch.sign(raw) * (torch.expm1(raw.abs()) if asked.log else torch.log1p(raw.abs()))
    scaled = ((raw - own.mean) / own.std).clamp(-features.LARGEST, features.LARGEST).float()
    return torch.where(value == 0, 0.0, scaled)  # a missing value is 0 in both
