"""The simulator's own probabilities at the start of the split: no model beats its lists on average."""

from __future__ import annotations

import itertools

import numpy as np

from recray.config import DataConfig, SimulatedOptions
from recray.config.baselines import BaselineOptions as Options
from recray.data.dataset import PreparedDataset
from recray.data.sources.simulated import SimulatedOracle
from recray.errors import NotApplicableError
from recray.ids import FIRST_ITEM, PAD, UNKNOWN
from recray.loading.collate import EvalQuery


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


def build(options: Options, dataset: PreparedDataset, split: str) -> Oracle:
    """Raises NotApplicableError for other than the built-in data."""
    data = dataset.record.config["data"]
    if data["source"] != "simulated":
        raise NotApplicableError("only the built-in data has an oracle: data.source = 'simulated'")
    source = DataConfig.model_validate(data).options
    assert isinstance(source, SimulatedOptions)
    return Oracle(SimulatedOracle(source, dataset.record.seed), dataset, split)
