"""A sweep, from its configuration to the winner's.

    check the space -> prepare once -> search (trials on run.seed) -> the best `tune.top` again on other seeds -> best.toml

Every step reads what earlier starts have stored (recray.tuning.store) and does only the rest.
"""

from __future__ import annotations

import statistics
import time

import tomli_w

from recray import digests, locks, log, storage
from recray.artifacts import Run
from recray.cluster import runtime
from recray.config import Config, ScalingConfig, TuneConfig, with_values
from recray.data.prepare import prepare
from recray.errors import RecrayError
from recray.records import Finalist, Trial, TuneRecord
from recray.report import html
from recray.tuning import page
from recray.tuning.asha import make_rungs
from recray.tuning.check import check
from recray.tuning.console import Board
from recray.tuning.importance import importance
from recray.tuning.objective import Objective
from recray.tuning.queue import SearchQueue, SeedQueue
from recray.tuning.search import make_search, num_trials
from recray.tuning.space import Space, show
from recray.tuning.stopping import Budget, MedianRule, Rules
from recray.tuning.store import SweepStore, TrialSpec
from recray.tuning.trial_resources import Node, TrialResources, local_node, plan_resources


def tune(config: Config) -> TuneRecord:
    """Search [tune.space], train the best trials again on other seeds, and write tune.json, tune.html and best.toml.

    Trials are compared on the validation split; the test split is not read. The same call resumes an interrupted sweep.
    Raises ConfigError with every problem of the sweep before anything starts, and RecrayError when no trial reports the
    metric.
    """
    started = time.perf_counter()
    resources, problems = plan_resources(config, _nodes(config))
    space = check(config, problems)
    objective = Objective.of(config)
    prepare(config)
    store = SweepStore.of(config)
    with locks.exclusive(store.uri):
        store.open()
        return _sweep(store, space, resources, objective, started)


def _sweep(
    store: SweepStore, space: Space, resources: TrialResources, objective: Objective, started: float
) -> TuneRecord:
    config = store.config
    trials = _search(store, space, resources)
    ranked = objective.ranked(trials)
    retrained = _retrain(store, resources, ranked[: config.tune.top])
    if not ranked:
        reasons = "; ".join(dict.fromkeys(trial.reason for trial in trials if trial.reason))
        raise RecrayError(
            f"no trial of {store.uri} reported {objective.metric}: {reasons or 'none completed an epoch'}"
        )
    finalists = _finalists(ranked[: config.tune.top], retrained, objective)
    record = TuneRecord(
        **store.artifact.lineage,
        config=config.model_dump(mode="json"),
        seconds=time.perf_counter() - started,
        metric=objective.metric,
        mode=objective.mode,
        trials=trials,
        retrained=retrained,
        finalists=finalists,
        winner=finalists[0].number if finalists else ranked[0].number,
        importance=importance(trials),
        cpu_hours=sum(trial.seconds for trial in trials + retrained) * _trial_cpus(config, resources) / 3600,
        dataset_uri=store.dataset.uri,
    )
    storage.write_bytes(storage.join(store.uri, "best.toml"), _best_toml(space, record).encode())
    _write_page(record, store.uri)
    record = record.model_copy(update={"files": digests.of_files(store.uri, ["best.toml"])}).write(store.uri)
    Run(config).publish(store.artifact)
    return record


def _write_page(record: TuneRecord, sweep_uri: str) -> None:
    if html.available("tune", "tune.html"):
        storage.write_bytes(storage.join(sweep_uri, "tune.html"), page.render(record).encode())


def _nodes(config: Config) -> list[Node]:
    """The resources of every node: of the Ray that this process has joined or will join, or of the one it will start."""
    if not (runtime.is_own() or runtime.is_shared()):
        return [local_node(config)]
    _start_ray(config)
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _start_ray(config: Config) -> None:
    # Trials of one worker hold their CPUs themselves: no training workers need room next to them.
    runtime.start(config.scaling if config.scaling.num_workers > 1 else ScalingConfig(num_workers=0))


def _search(store: SweepStore, space: Space, resources: TrialResources) -> list[Trial]:
    """All trials of the search, including those of earlier starts."""
    from recray.tuning.runner import run_trials

    config, options, objective = store.config, store.config.tune, Objective.of(store.config)
    past = store.read_trials()
    if past:
        log.info("tune", f"resuming {store.uri}, which has {len(past)} trials", event="resume")
    known = [trial for trial in past if trial.status != "interrupted"]
    total = num_trials(space)
    queue = SearchQueue(store, make_search(space, known), make_rungs(space, past), total, past)
    seconds = options.seconds
    if seconds is not None:
        seconds -= sum(trial.seconds for trial in past) / resources.concurrent
    budget = Budget(seconds, options.epochs, {trial.number: trial.epochs for trial in past})
    if (len(known) >= total and not queue.paused()) or budget.used_up():
        return past
    population = space if options.search == "pbt" else None
    median = options.scheduler == "median" and population is None
    rules = Rules(budget, MedianRule(options.grace_epochs, objective, known) if median else None, population)
    _start_ray(config)
    with Board("search", objective, total, known) as board:
        interrupted = run_trials(store, queue, rules, resources, board)
    if budget.exhausted:
        latest = {trial.number: trial for trial in [*queue.trials(), *interrupted]}
        left = sum(not trial.finished for trial in latest.values())
        log.info("tune", f"the budget is used up; a larger one would resume {left} unfinished trials", event="budget")
        return [latest[number] for number in sorted(latest)]
    if len(queue.trials()) < total:
        log.info(
            "tune",
            f"the space has {len(queue.trials())} points, fewer than {total} trials: all of them were tried",
            event="exhausted",
        )
    return [_prune_paused(store, trial) for trial in queue.trials()]


def _prune_paused(store: SweepStore, trial: Trial) -> Trial:
    """At the end of a search no trial will be promoted any more: what is still paused was stopped early."""
    if trial.status != "paused":
        return trial
    trial = trial.model_copy(update={"status": "pruned"})
    store.write_trial(store.spec(trial.number, trial.values), trial)
    return trial


def _retrain(store: SweepStore, resources: TrialResources, best: list[Trial]) -> list[Trial]:
    """The best trials on other seeds: their own values are too high, since they were selected for being high."""
    from recray.tuning.runner import run_trials

    config = store.config
    specs = [
        TrialSpec(f"seeds/{trial.number:04d}-{seed}", trial.values, seed)
        for seed in range(config.run.seed + 1, config.run.seed + 1 + config.tune.seeds)
        for trial in best
    ]
    stored = [(spec, store.read_trial(spec.folder)) for spec in specs]
    known = [trial for _, trial in stored if trial is not None]
    queue = SeedQueue([spec for spec, trial in stored if trial is None])
    if len(known) < len(specs):
        _start_ray(config)
        with Board("seeds", Objective.of(config), len(specs), known) as board:
            run_trials(store, queue, Rules(Budget(None, None, {})), resources, board)
    return sorted(known + queue.trials, key=lambda trial: (trial.number, trial.seed))


def _finalists(best: list[Trial], retrained: list[Trial], objective: Objective) -> list[Finalist]:
    """Every retrained trial with its mean over the seeds, best first."""
    finalists = []
    for trial in best:
        runs = [(one.seed, one.best) for one in retrained if one.number == trial.number and one.best is not None]
        if not runs:
            continue
        results = [best for _, best in runs]
        finalists.append(
            Finalist(
                number=trial.number,
                values=trial.values,
                seeds=[seed for seed, _ in runs],
                results=results,
                mean=statistics.mean(results),
                std=statistics.stdev(results) if len(results) > 1 else 0.0,
            )
        )
    return sorted(finalists, key=lambda one: one.mean, reverse=objective.mode == "max")


def _trial_cpus(config: Config, resources: TrialResources) -> int:
    """CPUs that a trial holds while it trains: its own process and its workers."""
    scaling = config.scaling
    return resources.cpus + (scaling.num_workers * scaling.cpus_per_worker if scaling.num_workers > 1 else 0)


def _best_toml(space: Space, record: TuneRecord) -> str:
    """The winner as a configuration; only values that differ from the defaults."""
    trial = next(trial for trial in record.trials if trial.number == record.winner)
    base = space.base
    dataset = base.run.dataset or record.dataset_uri.rpartition("/")[0]  # the folder of all datasets of this run
    config = with_values(
        base.model_copy(update={"tune": TuneConfig()}),
        {**trial.values, "run.name": f"{base.run.name}-best", "run.dataset": dataset},
        where=f"trial {trial.number}",
    )
    lines = [
        f"# Trial {trial.number} of a sweep of {len(record.trials)} ({base.tune.search} search): {show(trial.values)}."
    ]
    for one in record.finalists[:1]:
        lines.append(
            f"# Validation {record.metric} over {len(one.results)} other seeds: {one.mean:.4f} +- {one.std:.4f}."
        )
    if config.retrieval.item_knn_weight:
        lines.append(
            "# The sweep did not tune retrieval.item_knn_weight. Before you evaluate on the test split, choose it with"
        )
        lines.append("# `recray evaluate --split valid` and training.refit = false.")
    table = config.model_dump(mode="json", exclude_unset=True, exclude_none=True)
    table.pop("tune", None)
    return "\n".join(lines) + "\n\n" + tomli_w.dumps(table)
