"""Evaluation of a retriever: full ranking over the whole catalogue, what the index loses, and baselines.

A query is a user with a history, asked once at the start of the split for all later items (`evaluation.queries =
"user"`), or one query per later event, with everything before it as history ("event"). Every recommender of the run and
every baseline answers the same queries. Some targets cannot be hit: items that the model does not know, and with
`evaluation.filter_seen` items of the user's history. They count as misses; `reachable` is what lists would reach that hit
all others. Intervals resample users, and differences are of the same resampled users. There are no metrics on sampled
negatives.

Shards of the split are divided among `scaling.num_workers` tasks; results are merged in order of shards, so they do not
depend on the number of tasks.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import pyarrow as pa

from recray import digests, log, progress
from recray.artifacts import Run, report_stage
from recray.config import Config
from recray.data.dataset import PreparedDataset
from recray.data.split import before
from recray.errors import DataError
from recray.evaluation import declared, examples, scores, slices
from recray.evaluation.measured import Measured
from recray.evaluation.parallel import map_shards
from recray.evaluation.refit import check_refit
from recray.ids import NUM_RESERVED, PAD, UNKNOWN
from recray.layout import SCORES
from recray.loading.collate import EvalQuery, eval_queries
from recray.loading.drawn import drawn_rows
from recray.loading.jagged import offsets_from_lengths
from recray.metrics import higher_is_better, list_metrics, ranking
from recray.metrics.beyond_accuracy import ListCounts
from recray.records import Comparison, Example, IndexRecord, Interval, ReportRecord, Slice
from recray.report.verdict import verdict
from recray.retrieval import Recommender
from recray.retrieval.baselines import open_baselines
from recray.retrieval.blend import check_blend
from recray.retrieval.recency import check_recency
from recray.retrieval.recommenders import RunArtifacts, open_recommenders

_STAGES = ("model", "index", "blended", "recency", "reranked")  # recommenders of the run; the others are baselines
# These need a history: without one a query has no vector, and no items to start from.
_NEED_HISTORY = ("model", "index", "blended", "reranked", "item_knn")


@dataclass
class _Scores:
    """Results of one recommender on one shard, or on several."""

    lists: ListCounts
    values: list[np.ndarray] = field(default_factory=list)  # (B, M), columns in order of _names
    found: list[np.ndarray] = field(default_factory=list)  # (T,) whether each target is among the first K items
    new_users: list[np.ndarray] = field(default_factory=list)  # (B', M) as values, of queries without a history
    short_lists: int = 0
    seconds: float = 0.0  # of "reranked": without the search for candidates
    candidate_recall: float = 0.0  # of "reranked": sum over queries of the share of targets among the candidates

    def __add__(self, other: _Scores) -> _Scores:
        return _Scores(
            self.lists + other.lists,
            self.values + other.values,
            self.found + other.found,
            self.new_users + other.new_users,
            self.short_lists + other.short_lists,
            self.seconds + other.seconds,
            self.candidate_recall + other.candidate_recall,
        )


@dataclass
class _Part:
    """Results on one shard, or on several."""

    scores: dict[str, _Scores]  # by recommender
    left_out: dict[str, str]  # baselines, and why
    counts: Counter[str] = field(default_factory=Counter)
    users: list[np.ndarray] = field(default_factory=list)  # (B,) whose query it is
    reachable: list[np.ndarray] = field(default_factory=list)  # (B, M) metrics of lists that hit all that can be hit
    lengths: list[np.ndarray] = field(default_factory=list)  # (B,) events known of the user
    targets: list[np.ndarray] = field(default_factory=list)  # (3, T): user, item, time of the query
    examples: list[Example] = field(default_factory=list)

    def __add__(self, other: _Part) -> _Part:
        scores = {name: self.scores[name] + other.scores[name] for name in self.scores}
        counts = Counter(self.counts)
        counts.update(other.counts)  # unlike +, it keeps zeros
        return _Part(
            scores,
            self.left_out,
            counts,
            self.users + other.users,
            self.reachable + other.reachable,
            self.lengths + other.lengths,
            self.targets + other.targets,
            self.examples + other.examples,
        )


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
    check_recency(config, dataset)
    declared.check(config, dataset.record.features)
    artifact = run.artifact(report_stage(split), artifacts.inputs)
    if not run.begin(artifact):
        return artifact.record
    if artifacts.index is None:
        log.warning("evaluate", "no index of this checkpoint: exact search only; `recray index` builds one")
    work = partial(_score_shards, config, artifacts, split)
    found, *more = map_shards("evaluate", work, config.scaling, len(dataset.record.shards[split]))
    for part in more:
        found += part
    if not found.counts["queries"]:
        raise DataError(f"no query of the {split} split has a history: check data.split, or train on more of the log")
    for name, why in found.left_out.items():
        log.warning("evaluate", f"baseline {name} is left out: {why}")
    users = np.concatenate(found.users)
    metrics = _metrics(found.scores, users, config, dataset)
    index = artifacts.index.record if artifacts.index else None
    _write_scores(artifact.uri, found, users, config, dataset)
    report = ReportRecord(
        **artifact.lineage,
        config=config.model_dump(mode="json"),
        split=split,
        metrics=metrics,
        counts=_counts(found, users, dataset),
        reachable=dict(zip(_names(config), np.concatenate(found.reachable).mean(axis=0).tolist(), strict=True)),
        comparisons=_comparisons(found.scores, users, config),
        new_users=_new_users(found.scores, config),
        left_out=found.left_out,
        slices=_slices(found, users, config, dataset, before(split)),
        examples=examples.choose(found.examples),
        index=_index_loss(index, metrics, max(config.evaluation.k)) if index else {},
        rerank=_rerank(found.scores, metrics, config, len(users)) if "reranked" in metrics else {},
        files=digests.of_files(artifact.uri, [SCORES]),
        seconds=time.perf_counter() - started,
    )
    words = verdict(report, artifacts.checkpoint.record, config)
    report = report.model_copy(update={"verdict": [*words, *_drawn(report, config, dataset)]}).write(artifact.uri)
    run.publish(artifact)
    return report


def _drawn(report: ReportRecord, config: Config, dataset: PreparedDataset) -> list[str]:
    shards = dataset.record.shards[report.split]
    if drawn_rows(shards, config.evaluation.max_queries, config.evaluation.queries, config.run.seed) is None:
        return []
    return [
        f"{report.counts['users']:,} users with a history were drawn from {sum(shard.rows for shard in shards):,} "
        f"(evaluation.max_queries = {config.evaluation.max_queries}): intervals are those of the drawn users"
    ]


def _counts(found: _Part, users: np.ndarray, dataset: PreparedDataset) -> dict[str, int]:
    return {
        **found.counts,
        "users": len(np.unique(users)),
        "short_lists": found.scores["model"].short_lists,
        "catalogue": dataset.record.num_items - NUM_RESERVED,
    }


def _score_shards(config: Config, artifacts: RunArtifacts, split: str, numbers: Iterable[int]) -> Iterator[_Part]:
    dataset = artifacts.dataset
    opened = open_recommenders(artifacts, config, before(split), always_exact=True)
    assert opened.exact is not None
    vectors_ND = opened.exact.vectors_ND.numpy()
    recommenders, candidates = opened.by_name(), None
    if opened.reranked is not None:
        candidates = Measured(opened.reranked.search)
        recommenders["reranked"] = replace(opened.reranked, search=candidates)
    built: dict[str, Recommender] = {"item_knn": opened.blended.item_knn} if opened.blended is not None else {}
    baselines, left_out = open_baselines(config, dataset, split, built)
    scorer = _Scorer(recommenders | baselines, candidates, vectors_ND, config)
    options, shards = config.evaluation, dataset.record.shards[split]
    drawn = drawn_rows(shards, options.max_queries, options.queries, config.run.seed)
    for number in numbers:
        table = dataset.read(shards[number].file)
        table = table if drawn is None else table.take(pa.array(drawn[number]))
        part = _Part(scorer.no_scores(), left_out)
        for query in eval_queries(table, options.batch_size, config.model.history_length, options.queries):
            lists = scorer.score(query, part)
            if examples.wanted(number) and not part.examples:
                hits_BK = ranking.hits(lists["model"], query.targets.values.numpy(), query.targets.offsets.numpy())
                part.examples = examples.take(dataset, shards[number].file, query, lists, hits_BK)
        yield part


@dataclass(frozen=True)
class _Scorer:
    recommenders: dict[str, Recommender]
    candidates: Measured | None  # what "reranked" reorders
    vectors_ND: np.ndarray
    config: Config

    def no_scores(self) -> dict[str, _Scores]:
        size, found = len(self.vectors_ND), dict[str, _Scores]()
        for name in self.recommenders:
            twin = self._twin(name)
            found[name] = _Scores(ListCounts(np.zeros(size, np.int64))) if twin is None else found[twin]
        return found

    def _twin(self, name: str) -> str | None:
        """The recommender before this one that is the same: an index that is exact search."""
        for other, recommender in self.recommenders.items():
            if other == name:
                return None
            if recommender is self.recommenders[name]:
                return other
        raise KeyError(name)

    def score(self, query: EvalQuery, part: _Part) -> dict[str, np.ndarray]:
        """Rank one batch of queries by every recommender, and add to their results; the lists by recommender."""
        ks, exclude_seen = self.config.evaluation.k, self.config.evaluation.filter_seen
        rows = (query.seen.lengths() > 0).numpy()
        values, offsets = query.targets.values.numpy(), query.targets.offsets.numpy()
        number = ranking.num_distinct(values, offsets)
        wanted = number[rows]
        self._count(query, rows, wanted, part)
        asked, lists = np.repeat(rows, np.diff(offsets)), dict[str, np.ndarray]()
        for name, recommender in self.recommenders.items():
            if (twin := self._twin(name)) is not None:
                lists[name] = lists[twin]
                continue
            scores = part.scores[name]
            started = time.perf_counter()
            lists[name] = ids = recommender.recommend(query, max(ks), exclude_seen)[0]
            scores.seconds += time.perf_counter() - started
            scores.found.append(ranking.found(ids[:, : _headline_k(self.config)], values, offsets)[asked])
            hits_BK = ranking.hits(ids, values, offsets)
            scores.values.append(self._metrics(hits_BK[rows], wanted))
            if name not in _NEED_HISTORY:
                scores.new_users.append(self._metrics(hits_BK[~rows], number[~rows]))
            scores.lists.add(ids[rows], self.vectors_ND)
            scores.short_lists += int((ids[rows] == PAD).any(axis=1).sum())
        if self.candidates is not None:
            hit = ranking.hits(self.candidates.ids, values, offsets)[rows].sum(axis=1) / wanted
            part.scores["reranked"].candidate_recall += float(hit.sum())
            part.scores["reranked"].seconds -= self.candidates.seconds
        return lists

    def _count(self, query: EvalQuery, rows: np.ndarray, wanted_B: np.ndarray, part: _Part) -> None:
        """Count queries and targets, and what of them no list can hit. rows: the queries that have a history."""
        values, offsets = query.targets.values.numpy(), query.targets.offsets.numpy()
        asked = np.repeat(rows, np.diff(offsets))
        unknown = values == UNKNOWN
        seen = ~unknown & ranking.shared(values, offsets, query.seen.values.numpy(), query.seen.offsets.numpy())
        part.counts.update(
            queries=int(rows.sum()),
            queries_without_history=int((~rows).sum()),
            targets=int(asked.sum()),
            targets_without_history=int((~asked).sum()),
            unknown_targets=int((unknown & asked).sum()),
            seen_targets=int((seen & asked).sum()),
        )
        kept = ~unknown & ~(seen & self.config.evaluation.filter_seen)
        reachable_B = ranking.num_distinct(values[kept], offsets_from_lengths(kept)[offsets])[rows]
        hits_BK = np.arange(max(self.config.evaluation.k)) < reachable_B[:, None]
        part.reachable.append(self._metrics(hits_BK, wanted_B))
        user_B, time_B = query.batch.user_B.numpy(), query.time_B.numpy()
        part.users.append(user_B[rows])
        part.lengths.append(query.seen.lengths().numpy()[rows])
        row_T = np.repeat(np.arange(len(rows)), np.diff(offsets))[asked]
        part.targets.append(np.stack([user_B[row_T], values[asked], time_B[row_T]]))

    def _metrics(self, hits_BK: np.ndarray, wanted_B: np.ndarray) -> np.ndarray:
        """(B, M) values, columns in order of _names."""
        found = ranking.per_user(hits_BK, wanted_B, self.config.evaluation.k, list_metrics(self.config))
        return np.stack(list(found.values()), axis=1)


def _names(config: Config) -> list[str]:
    return [f"{name}@{k}" for k in config.evaluation.k for name in list_metrics(config)]


def _metrics(
    scores: dict[str, _Scores], users: np.ndarray, config: Config, dataset: PreparedDataset
) -> dict[str, dict[str, Interval]]:
    """All metrics of every recommender, with intervals of the same resampled users."""
    names = [(system, name) for system in scores for name in _names(config)]
    values = [np.concatenate(one.values) for one in scores.values()]
    means = [mean for one in values for mean in one.mean(axis=0).tolist()]
    out: dict[str, dict[str, Interval]] = {system: {} for system in scores}
    with progress.task("evaluate", "metrics and intervals"):
        bounds = _bounds(np.concatenate(values, axis=1), users, config)
    for (system, name), mean, (low, high) in zip(names, means, bounds, strict=True):
        out[system][name] = Interval(value=mean, low=low, high=high)
    k, users_train, counts_N = max(config.evaluation.k), dataset.record.counts["users_train"], dataset.item_counts()
    for system, one in scores.items():
        lists = one.lists.metrics(k, counts_N, users_train)
        out[system] |= {name: Interval(value=value) for name, value in lists.items()}
    return out


def _new_users(scores: dict[str, _Scores], config: Config) -> dict[str, dict[str, float]]:
    """Means over the queries without a history, by recommender that answers them; empty if there are no such queries."""
    values = {name: np.concatenate(one.new_users) for name, one in scores.items() if one.new_users}
    return {
        name: dict(zip(_names(config), one.mean(axis=0).tolist(), strict=True))
        for name, one in values.items()
        if len(one)
    }


def _write_scores(folder: str, found: _Part, users: np.ndarray, config: Config, dataset: PreparedDataset) -> None:
    """What each user adds to the metrics of the run's own recommenders."""
    values = {name: np.concatenate(one.values) for name, one in found.scores.items() if name in _STAGES}
    columns = {f"{name}/{n}": one[:, i] for name, one in values.items() for i, n in enumerate(_names(config))}
    scores.write(folder, dataset, users, np.ones(len(users)), columns)


def _bounds(values_BM: np.ndarray, users: np.ndarray, config: Config) -> list[tuple[float | None, float | None]]:
    """The interval of each column's mean; None without resamples."""
    if not config.evaluation.bootstrap:
        return [(None, None)] * values_BM.shape[1]
    low, high = ranking.bootstrap(values_BM, config.evaluation.bootstrap, config.run.seed, users)
    return list(zip(low.tolist(), high.tolist(), strict=True))


def _headline(config: Config) -> str:
    """The metric that recommenders are compared by."""
    names = _names(config)
    return config.training.metric if config.training.metric in names else f"ndcg@{config.evaluation.k[0]}"


def _headline_k(config: Config) -> int:
    return int(_headline(config).rpartition("@")[2])


def _slices(
    found: _Part, users: np.ndarray, config: Config, dataset: PreparedDataset, known: tuple[str, ...]
) -> list[Slice]:
    """The headline metric by the user's history, and the share of targets found by popularity and age of the item."""
    metric, k = _headline(config), _headline_k(config)
    at, sign = _names(config).index(metric), 1 if higher_is_better(metric, config.run.plugins) else -1
    columns = {name: np.concatenate(one.values)[:, at] for name, one in found.scores.items()}
    user_T, item_T, time_T = np.concatenate(found.targets, axis=1)
    first_N = slices.first_seen(dataset, known)
    age_T = None if first_N is None else time_T - first_N[item_T]
    hit = {name: np.concatenate(one.found) for name, one in found.scores.items()}
    lengths = np.concatenate(found.lengths)
    by_item = slices.by_item(hit, item_T, age_T, user_T, dataset.item_counts(), config, k)
    own = declared.of_lists(declared.read(config, dataset), columns, users, hit, item_T, user_T, config, metric, sign)
    return slices.by_history(columns, lengths, users, config, metric, sign) + by_item + own


def _comparisons(scores: dict[str, _Scores], users: np.ndarray, config: Config) -> list[Comparison]:
    """The model, and what is made of its lists, against every baseline and against the stage before it."""
    names, metric = _names(config), _headline(config)
    sign = 1 if higher_is_better(metric, config.run.plugins) else -1
    column = {name: np.concatenate(one.values)[:, names.index(metric)] for name, one in scores.items()}
    stages = [name for name in _STAGES if name in scores]
    pairs = [(stage, stages[at - 1]) for at, stage in enumerate(stages) if stage in ("blended", "recency", "reranked")]
    pairs += [(stage, name) for stage in stages if stage != "index" for name in scores if name not in _STAGES]
    if not pairs:
        return []
    gains_BP = sign * np.stack([column[one] - column[other] for one, other in pairs], axis=1)
    bounds = _bounds(gains_BP, users, config)
    return [
        Comparison(system=one, other=other, metric=metric, gain=gain, low=low, high=high)
        for (one, other), gain, (low, high) in zip(pairs, gains_BP.mean(axis=0).tolist(), bounds, strict=True)
    ]


def _index_loss(index: IndexRecord, metrics: dict[str, dict[str, Interval]], k: int) -> dict[str, float]:
    lost = {n: metrics["index"][n].value - metrics["model"][n].value for n in (f"ndcg@{k}", f"recall@{k}")}
    return {f"recall@{index.k}_against_exact": index.recall, **{f"{n}_lost": v for n, v in lost.items()}}


def _rerank(
    scores: dict[str, _Scores], metrics: dict[str, dict[str, Interval]], config: Config, queries: int
) -> dict[str, float]:
    """What re-ranking adds at each K; the share of targets among its candidates; milliseconds per query."""
    first = next(name for name in ("recency", "blended", "index", "model") if name in scores)
    out = {f"recall@{config.retrieval.k}_of_candidates": scores["reranked"].candidate_recall / queries}
    for k in config.evaluation.k:
        for name in ("recall", "ndcg"):
            key = f"{name}@{k}"
            out[f"{key}_added"] = metrics["reranked"][key].value - metrics[first][key].value
    return out | {
        "search_milliseconds": scores[first].seconds / queries * 1000,
        "rank_milliseconds": scores["reranked"].seconds / queries * 1000,
    }
