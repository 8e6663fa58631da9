"""The gate before serving: a candidate is served if it passes its checks, and what is served stays otherwise.

Checks, each on the test split of the candidate's dataset, which has the newest events:

- served         the metric against what is served now, on the same queries
- <baseline>     the same against each of promotion.baselines
- index          recall of the index against exact search, against retrieval.recall_target
- unknown items  share of the targets that the candidate does not know
- withdrawn      whether these artefacts were served before, and withdrawn by a rollback

A difference is paired by query, and its interval resamples users. Two models may belong to different prepared datasets of
a log that has grown (recray.retrieval.translate).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np

from recray import log, served, storage
from recray.artifacts import CHECKPOINT, Run, in_use
from recray.config import Config
from recray.data import id_maps
from recray.data.dataset import PreparedDataset
from recray.data.split import before
from recray.errors import ConfigError, DataError, LineageError
from recray.evaluation.parallel import map_shards
from recray.ids import SPLITS, UNKNOWN
from recray.inference import config_of
from recray.loading.collate import eval_queries
from recray.metrics import find, higher_is_better, parse, ranking
from recray.retrieval import Recommender
from recray.retrieval.baselines import open_baselines
from recray.retrieval.events import Steps
from recray.retrieval.recent_counts import RecentCounts
from recray.retrieval.recommenders import RunArtifacts, open_recommenders
from recray.retrieval.translate import translated
from recray.served import Served

_SPLIT = "test"
_RESAMPLES = 500  # if evaluation.bootstrap = 0: a check needs an interval


@dataclass(frozen=True)
class Check:
    """One check of a candidate."""

    name: str
    passed: bool
    text: str
    values: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Promotion:
    """What `promote` decided."""

    promoted: bool  # the candidate is served now
    checkpoint: str  # identity of the candidate's
    checks: list[Check] = field(default_factory=list)  # none if it was served already
    forced: bool = False

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def promote(config: Config, force: bool = False) -> Promotion:
    """Serve the checkpoint and the index of a configuration if they pass the checks of [promotion].

    force: serve them in any case. What was served before stays if a check fails or an error is raised.

    Raises LineageError if the artefacts are not complete, ConfigError for a ranker, whose lists come from a retriever, and
    for models that cannot be compared.
    """
    run = Run(config)
    artifacts = RunArtifacts.of(run)
    candidate = _entry(config, artifacts, force)
    standing = served.served_of(run.uri)
    if standing is not None and standing.same_as(candidate):
        _say(f"{candidate.checkpoint} is served already")
        return Promotion(True, candidate.checkpoint)
    checks = [] if force else _checks(config, artifacts, candidate, standing)
    passed = all(check.passed for check in checks)
    if passed:
        served.promote(run.uri, candidate)
        _say(f"serving checkpoint {candidate.checkpoint}{' without checks' if force else ''}: {run.uri}")
    else:
        stays = f"{standing.checkpoint} stays served" if standing is not None else "nothing is served"
        failed = ", ".join(check.name for check in checks if not check.passed)
        log.warning("promote", f"{candidate.checkpoint} is held back ({failed}); {stays}", event="held_back")
    return Promotion(passed, candidate.checkpoint, checks, force)


def rollback(config: Config) -> Served:
    """Serve what was served before the last promotion. Raises LineageError if there is nothing to return to."""
    previous = served.rollback(config.run_uri)
    _say(f"serving checkpoint {previous.checkpoint} again, promoted {previous.at}: {config.run_uri}")
    return previous


def _say(text: str) -> None:
    log.info("promote", text)


def _entry(config: Config, artifacts: RunArtifacts, forced: bool) -> Served:
    body = config.model_dump(mode="json")
    return Served(
        checkpoint=artifacts.checkpoint.identity,
        index=artifacts.index.identity if artifacts.index is not None else None,
        dataset=artifacts.dataset.record.identity,
        retrieval=body["retrieval"],
        evaluation=body["evaluation"],
        at=served.now(),
        forced=forced,
    )


def _checks(config: Config, artifacts: RunArtifacts, candidate: Served, standing: Served | None) -> list[Check]:
    if config.model.family == "ranker":
        raise ConfigError(
            "checks compare lists, and a ranker makes none: promote the retriever that names it in retrieval.ranker, or "
            "serve the ranker without checks by --force"
        )
    name = _metric(config)
    work = partial(_score_shards, config, artifacts, standing, name)
    parts = map_shards("promote", work, config.scaling, len(artifacts.dataset.record.shards[_SPLIT]))
    users = np.concatenate([part.users for part in parts])
    if not len(users):
        raise DataError("no query of the test split has a history: check data.split")
    values = {one: np.concatenate([part.values[one] for part in parts]) for one in parts[0].values}
    own = values.pop("candidate")
    checks = [_compared(config, name, own, users, one, other) for one, other in values.items()]
    if standing is None:
        checks.insert(0, Check("served", True, f"nothing is served yet; {name} {own.mean():.4f}"))
    checks += [Check(one, True, f"left out: {why}") for one, why in parts[0].left_out.items()]
    checks += [_index(artifacts, config), _unknown(parts, config)]
    again = [one for one in served.history_of(Run(config).uri) if one.withdrawn and one.same_as(candidate)]
    if again:
        checks.append(Check("withdrawn", False, f"a rollback withdrew these artefacts at {again[-1].withdrawn}"))
    return checks


def _compared(
    config: Config, metric: str, own_Q: np.ndarray, users_Q: np.ndarray, name: str, other_Q: np.ndarray
) -> Check:
    sign = 1 if higher_is_better(metric, config.run.plugins) else -1
    resamples = config.evaluation.bootstrap or _RESAMPLES
    gain_Q = sign * (own_Q - other_Q)
    bounds = ranking.bootstrap(gain_Q[:, None], resamples, config.run.seed, users_Q)
    low, high = (float(bound[0]) for bound in bounds)
    own, other, gain = (float(one.mean()) for one in (own_Q, other_Q, gain_Q))
    least = -config.promotion.margin * abs(other)
    values = {"metric": metric, "candidate": own, "other": other, "gain": gain, "low": low, "high": high}
    text = (
        f"{metric} {own:.4f} against {other:.4f}: {gain:+.4f} [{low:+.4f}, {high:+.4f}] on {len(own_Q):,} queries, "
        f"at least {least:+.4f}"
    )
    return Check(name, low >= least, text, values | {"bound": least, "queries": len(own_Q)})


def _index(artifacts: RunArtifacts, config: Config) -> Check:
    if artifacts.index is None:
        return Check("index", True, "no index: exact search")
    record, target = artifacts.index.record, config.retrieval.recall_target
    values = {"recall": record.recall, "bound": target}
    return Check("index", record.recall >= target, f"recall@{record.k} {record.recall:.4f}, at least {target}", values)


def _unknown(parts: list[_Part], config: Config) -> Check:
    targets, most = sum(part.targets for part in parts), config.promotion.max_unknown
    share = sum(part.unknown for part in parts) / targets
    values = {"share": share, "targets": targets, "bound": most}
    return Check("unknown items", share <= most, f"{share:.1%} of {targets:,} events, at most {most:.1%}", values)


def _metric(config: Config) -> str:
    """Raises ConfigError for a metric that values no lists."""
    metric = config.promotion.metric or config.training.metric
    name, k = parse(metric)
    if k is None or not isinstance(find(name, config.run.plugins), ranking.ListMetric):
        raise ConfigError(f"promotion.metric = '{metric}' values no lists: use one such as hr@10 or ndcg@10")
    return metric


@dataclass(frozen=True)
class _Part:
    """Results on one shard."""

    values: dict[str, np.ndarray]  # system -> (Q,) metric of each query with a history
    users: np.ndarray  # (Q,)
    targets: int
    unknown: int
    left_out: dict[str, str]


def _score_shards(
    config: Config, artifacts: RunArtifacts, standing: Served | None, metric: str, numbers: Iterable[int]
) -> Iterator[_Part]:
    name, k = parse(metric)
    assert k is not None
    dataset, rule = artifacts.dataset, find(name, config.run.plugins)
    assert isinstance(rule, ranking.ListMetric)
    systems: dict[str, Recommender] = {"candidate": open_recommenders(artifacts, config, before(_SPLIT)).final}
    if standing is not None:
        systems["served"] = _served(config, artifacts, standing)
    evaluation = config.evaluation.model_copy(update={"baselines": config.promotion.baselines})
    wanted = config.model_copy(update={"evaluation": evaluation})
    baselines, left_out = open_baselines(wanted, dataset, _SPLIT, {})
    systems |= baselines
    options = config.evaluation
    for number in numbers:
        table = dataset.read(dataset.record.shards[_SPLIT][number].file)
        found: dict[str, list[np.ndarray]] = {one: [np.zeros(0)] for one in systems}
        users, targets, unknown = [np.zeros(0, np.int64)], 0, 0
        for query in eval_queries(table, options.batch_size, config.model.history_length, options.queries):
            values, offsets = query.targets.values.numpy(), query.targets.offsets.numpy()
            rows = (query.seen.lengths() > 0).numpy()
            num_targets = ranking.num_distinct(values, offsets)[rows]
            targets, unknown = targets + len(values), unknown + int((values == UNKNOWN).sum())
            users.append(query.batch.user_B.numpy()[rows])
            for one, system in systems.items():
                ids, _ = system.recommend(query, k, options.filter_seen)
                hits_BK = ranking.hits(ids, values, offsets)[rows]
                found[one].append(ranking.per_user(hits_BK, num_targets, [k], {name: rule})[metric])
        yield _Part(
            {one: np.concatenate(arrays) for one, arrays in found.items()},
            np.concatenate(users),
            targets,
            unknown,
            left_out,
        )


def _served(config: Config, candidate: RunArtifacts, standing: Served) -> Recommender:
    """What is served, asked with the queries of the candidate's dataset.

    Raises LineageError if it is no longer there, ConfigError if it may have been trained on these queries.
    """
    uri = Run(config).uri
    try:
        source = in_use(storage.join(uri, CHECKPOINT.name, standing.checkpoint), CHECKPOINT)
        own = config_of(source, standing)
        artifacts = RunArtifacts.of_checkpoint(Run(own), source)
    except LineageError as error:
        raise LineageError(f"what {uri} serves cannot be opened, so that nothing compares with it: {error}") from error
    mine, other = candidate.dataset.record, artifacts.dataset.record
    splits: tuple[str, ...] = before(_SPLIT)
    if mine.id != other.id:
        if not {"test_start"} <= mine.split.keys() & other.split.keys():
            raise ConfigError(
                "models of two datasets are compared on events that neither was trained on, which needs "
                "data.split.kind = 'temporal'; serve this one without checks by --force"
            )
        if other.starts(_SPLIT) > mine.starts(_SPLIT):
            raise ConfigError(
                f"what is served ({standing.checkpoint}) was trained on events after the test split of the candidate "
                f"begins: prepare the newest log, or serve the candidate without checks by --force"
            )
        if other.split["last"] < mine.starts(_SPLIT):
            splits = SPLITS
    return older(own, artifacts, candidate.dataset, splits)


def older(config: Config, artifacts: RunArtifacts, asked: PreparedDataset, splits: tuple[str, ...]) -> Recommender:
    """A model of an older dataset, for queries of the test split of the dataset `asked`. Recent counts see its events."""
    steps = None
    if config.retrieval.recency.enabled:  # counts are updated while a model is served
        ids = id_maps.items(asked, artifacts.dataset)
        seen = RecentCounts.steps_of(config.retrieval.recency, asked, (*before(_SPLIT), _SPLIT))
        steps = Steps(seen.time, ids[seen.item], ids[seen.previous])
    recommender = open_recommenders(artifacts, config, splits, steps=steps).final
    return translated(recommender, config.model.history_length, asked, artifacts.dataset)
