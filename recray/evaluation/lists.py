"""Evaluation of a retriever: full ranking over the whole catalogue, what the index loses, and baselines.

A query is a user with a history, asked once at the start of the split for all later items (`evaluation.queries =
"user"`), or one query per later event, with everything before it as history ("event"). Every recommender of the run and
every baseline answers the same queries. Unknown targets (items that training never saw) count as misses. There are no
metrics on sampled negatives.

Shards of the split are divided among `scaling.num_workers` tasks; results are merged in order of shards, so they do not
depend on the number of tasks.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from recray import log, storage
from recray.artifacts import Run, report_stage
from recray.config import Config
from recray.data.dataset import PreparedDataset
from recray.data.split import before
from recray.errors import DataError
from recray.evaluation.parallel import map_shards
from recray.evaluation.refit import check_refit
from recray.ids import NUM_RESERVED, PAD, UNKNOWN
from recray.loading.collate import EvalQuery, eval_queries
from recray.metrics import list_metrics, ranking
from recray.metrics.beyond_accuracy import ListCounts
from recray.records import IndexRecord, Interval, ReportRecord
from recray.retrieval import Recommender
from recray.retrieval.baselines import open_baselines
from recray.retrieval.blend import check_blend
from recray.retrieval.item_knn import MAX_EVENTS, num_events
from recray.retrieval.recommenders import RunArtifacts, open_recommenders

_COUNTED = ("queries", "queries_without_history", "targets", "unknown_targets")


@dataclass
class _Scores:
    """Results of one recommender on one shard, or on several."""

    lists: ListCounts
    values: list[np.ndarray] = field(default_factory=list)  # (B, M), columns in order of _names
    short_lists: int = 0
    seconds: float = 0.0  # of "reranked": without the search for candidates
    candidate_recall: float = 0.0  # of "reranked": sum over queries of the share of targets among the candidates

    def __add__(self, other: _Scores) -> _Scores:
        return _Scores(
            self.lists + other.lists,
            self.values + other.values,
            self.short_lists + other.short_lists,
            self.seconds + other.seconds,
            self.candidate_recall + other.candidate_recall,
        )


_Part = tuple[dict[str, _Scores], dict[str, int]]  # of one shard: scores by recommender, and counts


def evaluate_lists(config: Config, split: str) -> ReportRecord:
    """Evaluate the run's checkpoint and its index on a split; writes report.json.

    Raises LineageError if there is no checkpoint of this configuration, and ConfigError for the validation split of a
    refitted checkpoint and for a blend with the item-item baseline over too many events.
    """
    started = time.perf_counter()
    run = Run(config)
    artifacts = RunArtifacts.of(run)
    dataset = artifacts.dataset
    check_refit(artifacts.models, split)
    check_blend(config, dataset, before(split))
    artifact = run.artifact(report_stage(split), artifacts.inputs)
    if not run.begin(artifact):
        return artifact.record
    _warn_of_what_is_left_out(config, artifacts, split)
    work = partial(_score_shards, config, artifacts, split)
    parts = map_shards("evaluate", work, config.scaling, len(dataset.record.shards[split]))
    scores, counts = _merged(parts)
    if not counts["queries"]:
        raise DataError(f"no query of the {split} split has a history: check data.split, or train on more of the log")
    metrics = {name: _summary(one, config, dataset) for name, one in scores.items()}
    catalogue = dataset.record.num_items - NUM_RESERVED
    index = artifacts.index
    report = ReportRecord(
        **artifact.lineage,
        config=config.model_dump(mode="json"),
        split=split,
        metrics=metrics,
        counts={**counts, "short_lists": scores["model"].short_lists, "catalogue": catalogue},
        index=_index_loss(index.record, metrics, max(config.evaluation.k)) if index else {},
        rerank=_rerank(scores, metrics, config, counts["queries"]) if "reranked" in scores else {},
        seconds=time.perf_counter() - started,
    ).write(artifact.uri)
    run.publish(artifact)
    return report


def _warn_of_what_is_left_out(config: Config, artifacts: RunArtifacts, split: str) -> None:
    if artifacts.index is None:
        log.warning("evaluate", "no index of this checkpoint: exact search only; `recray index` builds one")
    events = num_events(artifacts.dataset, before(split))
    if "item_knn" in config.evaluation.baselines and events > MAX_EVENTS:
        log.warning(
            "evaluate",
            f"baseline item_knn is left out: {events:,} events before the split are more than {MAX_EVENTS:,}",
        )


def _score_shards(config: Config, artifacts: RunArtifacts, split: str, numbers: Iterable[int]) -> Iterator[_Part]:
    dataset = artifacts.dataset
    opened = open_recommenders(artifacts, config, before(split), always_exact=True)
    assert opened.exact is not None
    vectors_ND = opened.exact.vectors_ND.numpy()
    recommenders, candidates = opened.by_name(), None
    if opened.reranked is not None:
        candidates = _Measured(opened.reranked.search)
        recommenders["reranked"] = replace(opened.reranked, search=candidates)
    item_knn = opened.blended.item_knn if opened.blended is not None else None
    scorer = _Scorer(recommenders | open_baselines(config, dataset, split, item_knn), candidates, vectors_ND, config)
    options = config.evaluation
    for number in numbers:
        table = storage.read_table(dataset.file_uri(dataset.record.shards[split][number].file))
        scores = {name: _Scores(ListCounts(np.zeros(len(vectors_ND), np.int64))) for name in scorer.recommenders}
        counts = dict.fromkeys(_COUNTED, 0)
        for query in eval_queries(table, options.batch_size, config.model.history_length, options.queries):
            scorer.score(query, scores, counts)
        yield scores, counts


class _Measured:
    """A recommender that keeps its last answer and its time: what a ranker was given, and what it waited for."""

    def __init__(self, recommender: Recommender) -> None:
        self._recommender = recommender
        self.ids = np.zeros((0, 0), np.int64)
        self.seconds = 0.0

    def recommend(self, query: EvalQuery, k: int, exclude_seen: bool) -> tuple[np.ndarray, np.ndarray]:
        started = time.perf_counter()
        self.ids, scores = self._recommender.recommend(query, k, exclude_seen)
        self.seconds = time.perf_counter() - started
        return self.ids, scores


@dataclass(frozen=True)
class _Scorer:
    recommenders: dict[str, Recommender]
    candidates: _Measured | None  # what "reranked" reorders
    vectors_ND: np.ndarray
    config: Config

    def score(self, query: EvalQuery, scores: dict[str, _Scores], counts: dict[str, int]) -> None:
        """Rank one batch of queries by every recommender, and add to their results."""
        ks, exclude_seen = self.config.evaluation.k, self.config.evaluation.filter_seen
        rows = (query.seen.lengths() > 0).numpy()
        values, offsets = query.targets.values.numpy(), query.targets.offsets.numpy()
        wanted = ranking.num_distinct(values, offsets)[rows]
        target_row = np.repeat(rows, np.diff(offsets))
        added = (rows.sum(), (~rows).sum(), target_row.sum(), ((values == UNKNOWN) & target_row).sum())
        for name, number in zip(_COUNTED, added, strict=True):
            counts[name] += int(number)
        for name, recommender in self.recommenders.items():
            started = time.perf_counter()
            ids, _ = recommender.recommend(query, max(ks), exclude_seen)
            scores[name].seconds += time.perf_counter() - started
            hits = ranking.hits(ids, values, offsets)[rows]
            found = ranking.per_user(hits, wanted, ks, list_metrics(self.config))
            scores[name].values.append(np.stack(list(found.values()), axis=1))
            scores[name].lists.add(ids[rows], self.vectors_ND)
            scores[name].short_lists += int((ids[rows] == PAD).any(axis=1).sum())
        if self.candidates is not None:
            hit = ranking.hits(self.candidates.ids, values, offsets)[rows].sum(axis=1) / wanted
            scores["reranked"].candidate_recall += float(hit.sum())
            scores["reranked"].seconds -= self.candidates.seconds


def _names(config: Config) -> list[str]:
    return [f"{name}@{k}" for k in config.evaluation.k for name in list_metrics(config)]


def _merged(parts: list[_Part]) -> _Part:
    scores, counts = parts[0]
    for more, added in parts[1:]:
        scores = {name: scores[name] + more[name] for name in scores}
        counts = {name: counts[name] + added[name] for name in counts}
    return scores, counts


def _summary(scores: _Scores, config: Config, dataset: PreparedDataset) -> dict[str, Interval]:
    ks = config.evaluation.k
    values = np.concatenate(scores.values)
    low: list[float | None] = [None] * values.shape[1]
    high = low
    if config.evaluation.bootstrap:
        low, high = (x.tolist() for x in ranking.bootstrap(values, config.evaluation.bootstrap, config.run.seed))
    means = values.mean(axis=0).tolist()
    out = {n: Interval(value=m, low=a, high=b) for n, m, a, b in zip(_names(config), means, low, high, strict=True)}
    lists = scores.lists.metrics(max(ks), dataset.item_counts(), dataset.record.counts["users_train"])
    return out | {name: Interval(value=value) for name, value in lists.items()}


def _index_loss(index: IndexRecord, metrics: dict[str, dict[str, Interval]], k: int) -> dict[str, float]:
    lost = {n: metrics["index"][n].value - metrics["model"][n].value for n in (f"ndcg@{k}", f"recall@{k}")}
    return {f"recall@{index.k}_against_exact": index.recall, **{f"{n}_lost": v for n, v in lost.items()}}


def _rerank(
    scores: dict[str, _Scores], metrics: dict[str, dict[str, Interval]], config: Config, queries: int
) -> dict[str, float]:
    """What re-ranking adds at each K; the share of targets among its candidates; milliseconds per query."""
    first = next(name for name in ("blended", "index", "model") if name in scores)
    out = {f"recall@{config.retrieval.k}_of_candidates": scores["reranked"].candidate_recall / queries}
    for k in config.evaluation.k:
        for name in ("recall", "ndcg"):
            key = f"{name}@{k}"
            out[f"{key}_added"] = metrics["reranked"][key].value - metrics[first][key].value
    return out | {
        "search_milliseconds": scores[first].seconds / queries * 1000,
        "rank_milliseconds": scores["reranked"].seconds / queries * 1000,
    }
