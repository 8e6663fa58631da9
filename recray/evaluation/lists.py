"""Evaluating a retriever: full ranking over the whole catalogue, the index's loss, and honest baselines.

A query is a user with a history, asked at the split for all later items
(`evaluation.queries = "user"`), or any later event, asked for with everything before
it ("event"). Exact search ranks first; then the index answers the same queries.
Unknown targets (items that training never saw) stay in the denominator as misses.
No metric on sampled negatives exists here.

Shards of the split are shared out to `scaling.num_workers` tasks; results are merged in
order of shards, so they do not depend on how many there are.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch

from recray import log, storage
from recray.artifacts import Run, report_stage
from recray.config import Config
from recray.data.dataset import PreparedDataset
from recray.data.sources.simulated import SimulatedOracle
from recray.data.split import before, duration
from recray.errors import DataError
from recray.evaluation.parallel import map_shards
from recray.evaluation.refit import check_refit
from recray.loading.collate import EvalQuery, eval_queries
from recray.metrics import ranking
from recray.metrics.beyond_accuracy import ListCounts
from recray.records import IndexRecord, Interval, ReportRecord
from recray.retrieval import baselines, embed
from recray.retrieval.blend import check_blend, open_blend
from recray.retrieval.faiss_index import ItemIndex
from recray.retrieval.item_knn import MAX_EVENTS, ItemKNN, num_events
from recray.retrieval.ranker import open_ranker, ranker_parents
from recray.retrieval.recommenders import ExactSearch, IndexSearch, Oracle, Reranked, System
from recray.training import checkpoint

_COUNTED = ("queries", "queries_without_history", "targets", "unknown_targets")


@dataclass
class _Scores:
    """What one system's lists were worth, on one shard."""

    lists: ListCounts
    values: list[np.ndarray] = field(default_factory=list)  # (B, M), columns in order of _names
    short_lists: int = 0
    seconds: float = 0.0  # of a ranker without the search
    candidate_recall: float = 0.0  # of a ranker: sum over queries of the share of targets among its candidates


_Part = tuple[dict[str, _Scores], dict[str, int]]  # of one shard: scores by system, and counts


def evaluate_lists(config: Config, split: str) -> ReportRecord:
    """Evaluate the run's checkpoint and its index on a split; writes report.json.

    Raises LineageError if there is no checkpoint of this configuration, ConfigError for the validation split of a refitted
    checkpoint, and for an item-item baseline over too many events.
    """
    started = time.perf_counter()
    run = Run(config)
    dataset, record = PreparedDataset.of(run), run.checkpoint().record
    check_refit(config, record, split)
    check_blend(config, dataset, before(split))
    found = run.index()
    index = found.record if found is not None else None
    inputs = [record.id, dataset.record.id, *([index.id] if index else []), *ranker_parents(config)]
    artifact = run.artifact(report_stage(split), inputs)
    if not run.begin(artifact):
        return artifact.record
    if index is None:
        log.warning("evaluate", "no index of this checkpoint: exact search only; `recray index` builds one")
    events = num_events(dataset, before(split))
    if "item_filter" in config.evaluation.baselines and events > MAX_EVENTS:
        log.warning(
            "evaluate", f"item_filter is left out: {events:,} events before the split are more than {MAX_EVENTS:,}"
        )
    scores, counts = _merged(
        map_shards("evaluate", partial(_score_shards, config, split), config, len(dataset.record.shards[split]))
    )
    if not counts["queries"]:
        raise DataError(f"no query of the {split} split has a history: check data.split, or train on more of the log")
    metrics = {name: _summary(one, config, dataset) for name, one in scores.items()}
    report = ReportRecord(
        **artifact.lineage,
        config=config.model_dump(mode="json"),
        split=split,
        metrics=metrics,
        counts={**counts, "short_lists": scores["model"].short_lists, "catalogue": dataset.record.num_items - 2},
        index=_index_loss(index, metrics, max(config.evaluation.k)) if index else {},
        rerank=_rerank(scores, metrics, config, counts["queries"]) if "reranked" in scores else {},
        seconds=time.perf_counter() - started,
    ).write(artifact.uri)
    run.publish(artifact)
    return report


def _score_shards(config: Config, split: str, numbers: Iterable[int]) -> Iterator[_Part]:
    run = Run(config)
    dataset = PreparedDataset.of(run)
    systems, vectors_ND = _systems(run, dataset, split)
    for number in numbers:
        table = storage.read_table(dataset.file_uri(dataset.record.shards[split][number].file))
        scores = {name: _Scores(ListCounts(np.zeros(len(vectors_ND), np.int64))) for name in systems}
        counts = dict.fromkeys(_COUNTED, 0)
        options = config.evaluation
        for question in eval_queries(table, options.batch_size, config.model.history_length, options.queries):
            _score(question, config, systems, vectors_ND, scores, counts)
        yield scores, counts


def _systems(run: Run, dataset: PreparedDataset, split: str) -> tuple[dict[str, System], np.ndarray]:
    """The model by exact search, its index, the baselines that apply; and the item vectors."""
    config, model_uri, index = run.config, run.checkpoint().uri, run.index()
    model, _ = checkpoint.load_model(model_uri)
    vectors_ND = embed.item_vectors(model_uri, dataset.record.num_items, parallel=False)
    systems: dict[str, System] = {"model": ExactSearch(model, torch.from_numpy(vectors_ND))}
    if index is not None:
        systems["index"] = IndexSearch(model, ItemIndex.open(index.uri))
    known = before(split)
    search = systems.get("index", systems["model"])
    blend = open_blend(config, dataset, known, search, model, torch.from_numpy(vectors_ND))
    if blend is not None:
        systems["blended"] = search = blend
    ranker = open_ranker(config, dataset)
    if ranker is not None:
        systems["reranked"] = Reranked(search, *ranker)
    for name in config.evaluation.baselines:
        if name == "popularity":
            systems[name] = baselines.Popularity(dataset.item_counts())
        elif name == "recent_popularity" and dataset.record.has_time:
            window = duration(config.evaluation.recent_window)
            systems[name] = baselines.recent_popularity(dataset, split, window)
        elif name == "hindsight":
            systems[name] = baselines.hindsight(dataset, split)
        elif name == "item_filter" and num_events(dataset, known) <= MAX_EVENTS:
            systems[name] = ItemKNN(dataset, known) if blend is None else blend.item_filter
        elif name == "oracle" and config.data.source == "simulated":
            oracle = SimulatedOracle(config.data.simulated, config.run.seed)
            systems[name] = Oracle(oracle, dataset, split)
    return systems, vectors_ND


def _score(
    question: EvalQuery,
    config: Config,
    systems: dict[str, System],
    vectors_ND: np.ndarray,
    scores: dict[str, _Scores],
    counts: dict[str, int],
) -> None:
    """Rank one batch of queries by every system and keep their metrics."""
    ks = config.evaluation.k
    rows = (question.seen.lengths() > 0).numpy()
    values, offsets = question.targets.values.numpy(), question.targets.offsets.numpy()
    wanted = ranking.num_distinct(values, offsets)[rows]
    target_row = np.repeat(rows, np.diff(offsets))
    added = (rows.sum(), (~rows).sum(), target_row.sum(), ((values == 1) & target_row).sum())
    for name, number in zip(_COUNTED, added, strict=True):
        counts[name] += int(number)
    for name, rank in systems.items():
        if isinstance(rank, Reranked):
            candidates = rank.search(question, rank.candidates, config.evaluation.filter_seen)
            hit = ranking.hits(candidates, values, offsets)[rows].sum(axis=1) / wanted
            scores[name].candidate_recall += float(hit.sum())
            begun = time.perf_counter()
            ids = rank.order(question, candidates, max(ks))[0]
        else:
            begun = time.perf_counter()
            ids = rank(question, max(ks), config.evaluation.filter_seen)
        scores[name].seconds += time.perf_counter() - begun
        found = ranking.per_user(ranking.hits(ids, values, offsets)[rows], wanted, ks)
        scores[name].values.append(np.stack([found[metric] for metric in _names(ks)], axis=1))
        scores[name].lists.add(ids[rows], vectors_ND)
        scores[name].short_lists += int((ids[rows] == 0).any(axis=1).sum())


def _names(ks: list[int]) -> list[str]:
    return [f"{name}@{k}" for k in ks for name in ranking.NAMES]


def _merged(parts: list[_Part]) -> _Part:
    scores, counts = parts[0]
    for more, added in parts[1:]:
        for name, one in more.items():
            old = scores[name]
            scores[name] = _Scores(
                old.lists + one.lists,
                old.values + one.values,
                old.short_lists + one.short_lists,
                old.seconds + one.seconds,
                old.candidate_recall + one.candidate_recall,
            )
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
    out = {n: Interval(value=m, low=a, high=b) for n, m, a, b in zip(_names(ks), means, low, high, strict=True)}
    lists = scores.lists.metrics(max(ks), dataset.item_counts(), dataset.record.counts["users_train"])
    return out | {name: Interval(value=value) for name, value in lists.items()}


def _index_loss(index: IndexRecord, metrics: dict[str, dict[str, Interval]], k: int) -> dict[str, float]:
    lost = {n: metrics["index"][n].value - metrics["model"][n].value for n in (f"ndcg@{k}", f"recall@{k}")}
    return {f"recall@{index.k}_against_exact": index.recall, **{f"{n}_lost": v for n, v in lost.items()}}


def _rerank(
    scores: dict[str, _Scores], metrics: dict[str, dict[str, Interval]], config: Config, queries: int
) -> dict[str, float]:
    """What ranking adds at each K, and what candidates cost: the share of targets they hold, and time."""
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
