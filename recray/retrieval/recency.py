"""A model's lists in the order of its scores and of what is chosen right now (`retrieval.recency`).

    score(user, i) = log P(i | user, t) + b (q - mean of q) . v_i / temperature

P counts recent events as of the query's time (recray.retrieval.recent_counts). Of the model only what it says about this
user remains: subtracting the score of the mean query removes the popularity at the time of training, which has aged by now,
while P has the one of the last minutes. Candidates are those of the search, popular items, and latest choices after the
user's last items. Users without items are ordered by P alone.

b is learned by the index stage: a and b of `a log P + b (...)` maximise the likelihood of the validation targets among the
candidates of their queries (conditional logit), and b / a is kept. After a refit the model of the best epoch before it is asked
these queries, since the refitted one was trained on their targets.

Shape legend: B queries, C (query, item) pairs, D width, K places, N items.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from recray import log, storage
from recray.artifacts import Artifact
from recray.config import Config, RetrievalLossOptions
from recray.data.dataset import PreparedDataset, read_verified
from recray.digests import FileDigest
from recray.errors import ConfigError, DataError
from recray.ids import SPLITS
from recray.loading.collate import EvalQuery, eval_queries
from recray.loading.jagged import Column
from recray.models import Retriever
from recray.records import CheckpointRecord, IndexRecord, RecencyFit
from recray.retrieval import Recommender, embed
from recray.retrieval.events import Steps, read_steps
from recray.retrieval.exact import ExactSearch, query_vectors
from recray.retrieval.recent_counts import RecentCounts, at_time, distinct, lists_of
from recray.training import checkpoint
from recray.training.phase import Phase

FILE = "recent.parquet"  # of an index: the events at the end of the log that counts need
_QUERIES = 20_000  # of the validation split that the weight is learned from, at most
_USERS = 2_000  # whose mean query is subtracted


@dataclass(frozen=True)
class WithRecency:
    """Candidates of `search` and of the counts, ordered by both."""

    search: Recommender
    exact: ExactSearch  # scores the candidates
    counts: RecentCounts
    mean_query_D: Tensor
    weight: float  # over the temperature of the loss
    candidates: int
    as_of: int | None = None  # the time of all queries; None: each has its own

    def recommend(self, query: EvalQuery, k: int, exclude_seen: bool) -> tuple[np.ndarray, np.ndarray]:
        query = query if self.as_of is None else at_time(query, self.as_of)
        row_C, item_C, probability_C, personal_C = self.scored(query, max(k, self.candidates), exclude_seen)
        score_C = np.log(probability_C) + self.weight * personal_C
        return lists_of(row_C, item_C, score_C, query.batch.num_rows, k)

    def scored(self, query: EvalQuery, k: int, exclude_seen: bool) -> tuple[np.ndarray, ...]:
        """(C,) rows, items, P, and the model's score less that of the mean query; 0 for users without items."""
        found_BK, _ = self.search.recommend(query, k, exclude_seen)
        row_C, item_C = self.counts.candidates(query)
        row_C = np.concatenate([row_C, np.repeat(np.arange(len(found_BK)), found_BK.shape[1])])
        row_C, item_C = distinct(row_C, np.concatenate([item_C, found_BK.reshape(-1)]), query, exclude_seen)
        q_BD = query_vectors(self.exact.model, query) - self.mean_query_D
        q_BD[query.seen.lengths() == 0] = 0
        row, item = torch.from_numpy(row_C), torch.from_numpy(item_C)
        personal_C = (q_BD[row] * self.exact.vectors_ND[item]).sum(dim=1).double().numpy()
        return row_C, item_C, self.counts.probabilities(query, row_C, item_C), personal_C


def check_recency(config: Config, dataset: PreparedDataset) -> None:
    """Raise ConfigError if `retrieval.recency` cannot be used."""
    if config.retrieval.recency.enabled and not dataset.record.has_time:
        raise ConfigError(
            "retrieval.recency counts by time, and the log has none: name data.columns.timestamp, or set "
            "retrieval.recency.enabled = false"
        )


def open_recency(
    config: Config,
    index: Artifact[IndexRecord] | None,
    search: Recommender,
    exact: ExactSearch,
    steps: Steps | None,
) -> WithRecency:
    """As a run recommends. steps: events that counts may see, each query those before it; None: those of the index, for
    queries after the end of the log. Raises ConfigError if the index was built without recency."""
    options = config.retrieval.recency
    if index is None or index.record.recency is None:
        raise ConfigError("retrieval.recency needs an index with its weight and counts: run `recray index`")
    fit, as_of = index.record.recency, None
    if steps is None:
        steps = load_steps(index.uri, index.record.files.get(FILE))
        as_of = int(steps.time.max(initial=0)) + 1
    counts, mean_D = RecentCounts(options, steps), torch.tensor(fit.mean_query)
    return WithRecency(search, exact, counts, mean_D, fit.weight / _temperature(config), config.retrieval.k, as_of)


def save_steps(folder: str, dataset: PreparedDataset, config: Config) -> None:
    """Write the events that counts after the end of the log need."""
    split, longest = dataset.record.split, RecentCounts.longest(config.retrieval.recency)
    # Events behind the end of a split by time were dropped.
    last = min(split["last"], split["end"] - 1) if "end" in split else None
    steps = read_steps(dataset, SPLITS, None if last is None else last - longest)
    first = int(steps.time.max(initial=0)) - longest
    kept = {name: pa.array(one[steps.time >= first]) for name, one in steps._asdict().items()}
    storage.write_table(storage.join(folder, FILE), pa.table(kept))


def load_steps(folder: str, digest: FileDigest | None) -> Steps:
    """Raises StorageError if the file does not have this digest."""
    table = read_verified(storage.join(folder, FILE), digest)
    return Steps(*(table[name].to_numpy() for name in Steps._fields))


def fit(
    source: Artifact[CheckpointRecord],
    model: Retriever,
    vectors_ND: np.ndarray,
    dataset: PreparedDataset,
    config: Config,
) -> RecencyFit:
    """The weight of a checkpoint on validation, and its mean query. model, vectors_ND, dataset: of the checkpoint.

    Raises DataError if validation has no target among the candidates.
    """
    mean_D, given = _mean_query(model, dataset, config), config.retrieval.recency.model_weight
    if given is not None:
        return RecencyFit(weight=given, mean_query=mean_D.tolist())
    own_D = mean_D
    if dataset.refit:
        epochs = Phase("train", config.training.epochs, storage.join(source.uri, "epochs"))
        selected, _ = checkpoint.load_model(epochs.folder(source.record.best_epoch))
        assert isinstance(selected, Retriever)
        model, dataset = selected, PreparedDataset.open(dataset.uri)
        vectors_ND = embed.item_vectors(source, model, dataset.record.num_items)
        own_D = _mean_query(model, dataset, config)
    exact = ExactSearch(model, torch.from_numpy(np.asarray(vectors_ND)))
    counts = RecentCounts.of(config.retrieval.recency, dataset, ("train", "valid"))
    asked = WithRecency(exact, exact, counts, own_D, 1.0, config.retrieval.k)
    row_C, x_C2, positive_C = _examples(asked, dataset, config)
    if not positive_C.any():
        raise DataError(
            "retrieval.recency: no validation target is among the candidates, so that no weight can be learned: check "
            "data.split, or set retrieval.recency.model_weight"
        )
    a, b = conditional_logit(row_C, x_C2, positive_C)
    weight = max(b, 0.0) / max(a, 1e-3)
    queries = int(positive_C.sum())
    log.info(
        "index",
        f"recency: weight of the model {weight:.3f}, learned from {queries:,} targets of the validation split",
        event="recency",
        values={"weight": weight, "targets": queries},
    )
    return RecencyFit(weight=weight, targets=queries, mean_query=mean_D.tolist())


def _temperature(config: Config) -> float:
    assert isinstance(config.loss, RetrievalLossOptions)
    return config.loss.temperature


def _mean_query(model: Retriever, dataset: PreparedDataset, config: Config) -> Tensor:
    """(D,) mean over the users who came last, after their last event that the model was trained on."""
    split = "valid" if dataset.refit else "train"
    shards = max(1, len(dataset.record.shards[split]))
    total, number = torch.zeros(config.model.dim), 0
    for table in dataset.iter_tables(split):
        times = Column.of(table["time"])
        assert times.offsets is not None
        latest = np.argsort(-times.values[times.offsets[1:] - 1], kind="stable")[: -(-_USERS // shards)]
        for query in eval_queries(table.take(pa.array(latest)), 1024, config.model.history_length, "next"):
            vectors = query_vectors(model, query)
            total = total + vectors.sum(dim=0) if number else vectors.sum(dim=0)
            number += len(vectors)
    return total / max(1, number)


def _examples(
    asked: WithRecency, dataset: PreparedDataset, config: Config
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(C,) query, (C, 2) log P and the model's part, (C,) whether it is a target; of queries with a history and a target."""
    rows, features, positives, begun = [np.zeros(0, np.int64)], [np.zeros((0, 2))], [np.zeros(0, bool)], 0
    for query in _validation(dataset, config):
        row_C, item_C, probability_C, personal_C = asked.scored(query, asked.candidates, config.evaluation.filter_seen)
        size = dataset.record.num_items
        targets = query.targets.row_index().numpy() * size + query.targets.values.numpy()
        positive_C = np.isin(row_C * size + item_C, targets)
        known_B = query.seen.lengths().numpy() > 0
        useful = (np.bincount(row_C, positive_C, len(known_B)) > 0) & known_B
        kept = useful[row_C]
        rows.append(begun + row_C[kept])
        features.append(np.stack([np.log(probability_C), personal_C / _temperature(config)], axis=1)[kept])
        positives.append(positive_C[kept])
        begun += len(known_B)
    return np.concatenate(rows), np.concatenate(features), np.concatenate(positives)


def _validation(dataset: PreparedDataset, config: Config) -> Iterator[EvalQuery]:
    """Queries of the validation split; of a large one the first ones of each shard."""
    shards = len(dataset.record.shards["valid"])
    for table in dataset.iter_tables("valid"):
        asked = 0
        for query in eval_queries(table, 512, config.model.history_length, config.evaluation.queries):
            yield query
            asked += query.batch.num_rows
            if asked * shards >= _QUERIES:
                break


def conditional_logit(row_C: np.ndarray, x_CF: np.ndarray, positive_C: np.ndarray, ridge: float = 1e-6) -> np.ndarray:
    """(F,) weights w that maximise the mean over positives of log softmax(x w) within their rows (McFadden 1974).

    Newton's method with halved steps; the likelihood is concave. row_C: rows with positives only.
    """
    _, row_C = np.unique(row_C, return_inverse=True)
    wanted_R = np.bincount(row_C, positive_C)
    total = wanted_R.sum()

    def value_of(w_F: np.ndarray) -> tuple[float, np.ndarray]:
        score_C = x_CF @ w_F
        most_R = np.full(len(wanted_R), -np.inf)
        np.maximum.at(most_R, row_C, score_C)
        exp_C = np.exp(score_C - most_R[row_C])
        sum_R = np.bincount(row_C, exp_C)
        likelihood = score_C[positive_C].sum() - (wanted_R * (np.log(sum_R) + most_R)).sum()
        return float(likelihood / total - ridge * w_F @ w_F), exp_C / sum_R[row_C]

    w_F = np.zeros(x_CF.shape[1])
    value, p_C = value_of(w_F)
    for _ in range(50):
        weight_C = p_C * wanted_R[row_C]
        mean_RF = np.stack([np.bincount(row_C, p_C * column) for column in x_CF.T], axis=1)
        gradient = (x_CF[positive_C].sum(axis=0) - weight_C @ x_CF) / total - 2 * ridge * w_F
        second = (x_CF.T * weight_C) @ x_CF - (mean_RF.T * wanted_R) @ mean_RF
        step = np.linalg.solve(second / total + 2 * ridge * np.eye(len(w_F)), gradient)
        for halving in range(30):
            better, p_C = value_of(w_F + step / 2**halving)
            if better >= value:
                break
        w_F, gain, value = w_F + step / 2**halving, better - value, better
        if gain < 1e-10:
            break
    return w_F
