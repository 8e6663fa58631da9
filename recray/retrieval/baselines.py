"""Baselines that a model has to beat, and the oracle of simulated data, which is the upper bound.

    popularity          by training events
    recent_popularity   by events in a window before the split
    hindsight           by events of the split itself: about the best that one list for all users can reach
    item_knn            item-item neighbours (recray.retrieval.item_knn)
    oracle              the simulator's own probabilities

Shape legend: B queries, N items, K places, E seen items of all queries.
"""

from __future__ import annotations

import itertools

import numpy as np

from recray import registry
from recray.config import Config, RecentPopularityOptions, SimulatedOptions
from recray.data.dataset import PreparedDataset
from recray.data.sources.simulated import SimulatedOracle
from recray.data.split import before, duration
from recray.ids import FIRST_ITEM, PAD, UNKNOWN
from recray.loading.collate import EvalQuery
from recray.loading.jagged import Jagged
from recray.retrieval import Recommender
from recray.retrieval.item_knn import MAX_EVENTS, ItemKNN, new_events, num_events


class Popularity:
    """The same order of items for all users; scores are the counts."""

    def __init__(self, counts_N: np.ndarray) -> None:
        """counts_N: how often each item id was chosen. Equal counts are in order of id."""
        self.order = FIRST_ITEM + np.argsort(-counts_N[FIRST_ITEM:], kind="stable")
        self._counts_N = counts_N

    def recommend(self, query: EvalQuery, k: int, exclude_seen: bool) -> tuple[np.ndarray, np.ndarray]:
        seen = query.seen if exclude_seen else Jagged(query.seen.values[:0], query.seen.offsets * 0)
        # The head of the order is long enough for k items after all seen ones are removed.
        wanted = min(len(self.order), k + int(seen.lengths().max()))
        head = self.order[:wanted]
        place_of = np.full(len(self.order) + FIRST_ITEM, wanted)  # items behind the head share one extra place
        place_of[head] = np.arange(wanted)
        kept = np.ones((query.batch.num_rows, wanted + 1), bool)
        kept[seen.row_index().numpy(), place_of[seen.values.numpy()]] = False
        kept = kept[:, :wanted]
        first = np.argsort(~kept, axis=1, kind="stable")[:, :k]
        filled, ids = np.take_along_axis(kept, first, 1), head[first]
        short = ((0, 0), (0, k - ids.shape[1]))
        scores = np.where(filled, self._counts_N[ids], -np.inf).astype(np.float32)
        return (
            np.pad(np.where(filled, ids, PAD), short, constant_values=PAD),
            np.pad(scores, short, constant_values=-np.inf),
        )


def recent_popularity(dataset: PreparedDataset, split: str, window_us: int) -> Popularity:
    """By events in the window before the split; equal counts in order of training events."""
    until = dataset.record.starts(split)
    recent_N = sum(_chosen(dataset, name, until - window_us, until) for name in before(split))
    counts_N = dataset.item_counts()
    return Popularity(recent_N + counts_N / (counts_N.sum() + 1))


def hindsight(dataset: PreparedDataset, split: str) -> Popularity:
    """By events of the split itself, which are not known at its start."""
    return Popularity(_chosen(dataset, split))


def _chosen(dataset: PreparedDataset, split: str, begin: int | None = None, end: int | None = None) -> np.ndarray:
    """(N,) how often each item was chosen in a split, at begin <= time < end."""
    chosen_N = np.zeros(dataset.record.num_items)
    for table in dataset.iter_tables(split):
        # Rows of later splits begin with events of earlier ones: only targets count.
        kept = new_events(table)
        if begin is not None:
            times = table["time"].combine_chunks().flatten().to_numpy()
            kept &= (times >= begin) & (times < end)
        chosen_N += np.bincount(table["item"].combine_chunks().flatten().to_numpy()[kept], minlength=len(chosen_N))
    return chosen_N


class Oracle:
    """The simulator's answer at the start of the split. It knows items that training never saw; their id is UNKNOWN.

    It gives an order without probabilities, so the score of place p is -p.
    """

    def __init__(self, oracle: SimulatedOracle, dataset: PreparedDataset, split: str) -> None:
        self._oracle = oracle
        self._keys = dataset.items()["item"].to_numpy(zero_copy_only=False)
        self._id_of_key = np.full(oracle.options.items, UNKNOWN, np.int64)
        self._id_of_key[self._keys[FIRST_ITEM:].astype(np.int64)] = np.arange(FIRST_ITEM, len(self._keys))
        users = dataset.user_keys()
        self._key_of_user = np.zeros(dataset.record.num_users, np.int64)
        self._key_of_user[users["user_id"].to_numpy()] = users["user"].to_numpy()
        self._until = dataset.record.starts(split)

    def recommend(self, query: EvalQuery, k: int, exclude_seen: bool) -> tuple[np.ndarray, np.ndarray]:
        seen = query.seen.values.numpy()
        exclude = []
        for begin, end in itertools.pairwise(query.seen.offsets.tolist()):
            mine = seen[begin:end] if exclude_seen else seen[:0]
            exclude.append(self._keys[mine[mine >= FIRST_ITEM]].astype(np.int64))
        users = self._key_of_user[query.batch.user_B.numpy()].tolist()
        ids = np.full((len(users), k), PAD, np.int64)
        for row, answer in zip(ids, self._oracle(users, self._until, k, exclude), strict=True):
            row[: len(answer)] = self._id_of_key[answer]
        return ids, np.where(ids == PAD, -np.inf, -np.arange(k)).astype(np.float32)


def open_baselines(
    config: Config, dataset: PreparedDataset, split: str, item_knn: ItemKNN | None
) -> dict[str, Recommender]:
    """The baselines of `evaluation.baselines` that the dataset allows. item_knn: that of the blend, to be used again."""
    found: dict[str, Recommender] = {}
    for name in config.evaluation.baselines:
        if name == "popularity":
            found[name] = Popularity(dataset.item_counts())
        elif name == "recent_popularity" and dataset.record.has_time:
            recent = config.evaluation.baseline_options.get(name, RecentPopularityOptions())
            assert isinstance(recent, RecentPopularityOptions)
            found[name] = recent_popularity(dataset, split, duration(recent.window))
        elif name == "hindsight":
            found[name] = hindsight(dataset, split)
        elif name == "item_knn" and num_events(dataset, before(split)) <= MAX_EVENTS:
            found[name] = item_knn or ItemKNN(dataset, before(split))
        elif name == "oracle" and isinstance(config.data.options, SimulatedOptions):
            found[name] = Oracle(SimulatedOracle(config.data.options, config.run.seed), dataset, split)
        elif name not in registry.names("baseline"):
            module = registry.load("baseline", name, config.run.plugins)
            options = config.evaluation.baseline_options.get(name) or module.Options()
            found[name] = module.build(options, dataset, split)
    return found
