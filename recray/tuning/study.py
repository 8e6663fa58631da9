"""A sweep from its configuration to the winner's."""

from __future__ import annotations

import os
import statistics
import time

import tomli_w

from recray import storage
from recray.cluster import runtime
from recray.config import Config, ScalingConfig, TuneConfig, with_values
from recray.data.dataset import PreparedDataset
from recray.data.prepare import prepare
from recray.errors import RecrayError
from recray.records import Finalist, Trial, TuneRecord
from recray.tuning.asha import make_rungs
from recray.tuning.check import check, metric_of
from recray.tuning.console import Board
from recray.tuning.importance import importance
from recray.tuning.page import render
from recray.tuning.queue import Jobs
from recray.tuning.resources import Node, Share, local_node, share
from recray.tuning.search import make
from recray.tuning.space import Space, show
from recray.tuning.store import Job, SweepStore

_DEFAULT_TRIALS = {"random": 24, "tpe": 24, "pbt": 8}


def tune(config: Config) -> TuneRecord:
    """Search [tune.space], train the best again on other seeds, and write <run>/tune/: tune.json, tune.html, best.toml.

    The validation split decides; the test split is not opened. A sweep that was ended goes on with the same call.
    Raises ConfigError with everything that is wrong with the sweep before anything starts.
    """
    started = time.perf_counter()
    part, problems = share(config, _nodes(config))
    space = check(config, problems)
    metric, mode = metric_of(config)
    dataset = PreparedDataset(config.dataset_uri, prepare(config))
    ledger = SweepStore(config, dataset)
    ledger.open()
    past = ledger.past()
    if past:
        print(f"tune: {ledger.uri} has {len(past)} trials already; going on", flush=True)
    trials = _search(ledger, space, part, past)
    best = _best_first(trials, mode)[: config.tune.top]
    retrained = _retrain(ledger, part, best)
    finalists = _finalists(best, retrained, mode)
    if not any(trial.best is not None for trial in trials):
        raise RecrayError(f"no trial of {ledger.uri} reported {metric}: {_reasons(trials)}")
    winner = finalists[0].number if finalists else _best_first(trials, mode)[0].number
    record = TuneRecord(
        parents=[dataset.record.id],
        config=config.model_dump(mode="json"),
        seconds=time.perf_counter() - started,
        metric=metric,
        mode=mode,
        trials=trials,
        retrained=retrained,
        finalists=finalists,
        winner=winner,
        importance=importance(trials),
        cpu_hours=sum(trial.seconds for trial in trials + retrained) * _cpus(config, part) / 3600,
        dataset_uri=dataset.uri,
    )
    storage.write_bytes(storage.join(ledger.uri, "best.toml"), _best_toml(space, record).encode())
    storage.write_bytes(storage.join(ledger.uri, "tune.html"), render(record).encode())
    return record.write(ledger.uri)


def _nodes(config: Config) -> list[Node]:
    """What the nodes have, of the Ray that is there or of the one that will be started here."""
    import ray

    if not ray.is_initialized() and not os.environ.get("RAY_ADDRESS"):
        return [local_node(config)]
    _start(config)
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _start(config: Config) -> None:
    """Trials of one worker hold their CPUs themselves: Ray needs none beside them."""
    runtime.start(config.scaling if config.scaling.num_workers > 1 else ScalingConfig(num_workers=0))


def _search(ledger: SweepStore, space: Space, part: Share, past: list[Trial]) -> list[Trial]:
    """Every trial of the search, those of earlier starts too."""
    from recray.tuning.runner import Budget, make_scheduler, run_jobs

    config = ledger.config
    metric, mode = metric_of(config)
    ended = [trial for trial in past if trial.status != "cut"]
    total = config.tune.trials or _DEFAULT_TRIALS.get(config.tune.search, 0)
    if config.tune.search == "grid":
        total = sum(1 for _ in space.grid())
    rungs = make_rungs(config, space, mode, past)
    jobs = Jobs(ledger, make(space, mode, ended), rungs, total, past)
    seconds = config.tune.seconds
    if seconds is not None:
        seconds -= sum(trial.seconds for trial in past) / part.concurrent
    budget = Budget(seconds, config.tune.epochs, {trial.number: trial.epochs for trial in past})
    if (len(ended) >= total and not jobs.waiting()) or budget.stop_all():
        return past
    _start(config)
    scheduler = make_scheduler(config, space, metric, mode, ended)
    with Board("tune", metric, mode, total, ended) as board:
        cut = run_jobs(ledger, jobs.next, part, scheduler, budget, board, jobs.ended)
    if budget.over:
        known = {trial.number: trial for trial in [*jobs.trials(), *cut]}
        left = sum(not trial.over for trial in known.values())
        print(f"tune: the budget is used up; {left} trials are not at their end: a larger one goes on", flush=True)
        return [known[number] for number in sorted(known)]
    return [_settled(ledger, trial) for trial in jobs.trials()]


def _settled(ledger: SweepStore, trial: Trial) -> Trial:
    """With the search at its end, who still waits was ended early."""
    if trial.status != "paused":
        return trial
    trial = trial.model_copy(update={"status": "pruned"})
    ledger.end(ledger.job(trial.number, trial.values), trial)
    return trial


def _best_first(trials: list[Trial], mode: str) -> list[Trial]:
    known = [trial for trial in trials if trial.best is not None]
    return sorted(known, key=lambda trial: trial.best or 0.0, reverse=mode == "max")


def _retrain(ledger: SweepStore, part: Share, best: list[Trial]) -> list[Trial]:
    """The best again on other seeds: their own value was chosen for being high."""
    from ray.tune.schedulers import FIFOScheduler

    from recray.tuning.runner import Budget, run_jobs

    config = ledger.config
    metric, mode = metric_of(config)
    jobs = [
        Job(f"seeds/{trial.number:04d}-{seed}", trial.values, seed)
        for seed in range(config.run.seed + 1, config.run.seed + 1 + config.tune.seeds)
        for trial in best
    ]
    found = [(job, ledger.read(job.folder)) for job in jobs]
    trials = [trial for _, trial in found if trial is not None]
    left = iter([job for job, trial in found if trial is None])
    if len(trials) < len(jobs):
        _start(config)
        with Board("seeds", metric, mode, len(jobs), trials) as board:
            run_jobs(
                ledger, lambda: next(left, None), part, FIFOScheduler(), Budget(None, None, {}), board, trials.append
            )
    return sorted(trials, key=lambda trial: (trial.number, trial.seed))


def _finalists(best: list[Trial], retrained: list[Trial], mode: str) -> list[Finalist]:
    finalists = []
    for trial in best:
        own = [one for one in retrained if one.number == trial.number and one.best is not None]
        results = [one.best for one in own if one.best is not None]
        if results:
            std = statistics.stdev(results) if len(results) > 1 else 0.0
            seeds, mean = [one.seed for one in own], statistics.mean(results)
            finalists.append(
                Finalist(number=trial.number, values=trial.values, seeds=seeds, results=results, mean=mean, std=std)
            )
    return sorted(finalists, key=lambda one: one.mean, reverse=mode == "max")


def _cpus(config: Config, part: Share) -> int:
    """That a trial holds while it trains."""
    scaling = config.scaling
    return part.cpus + (scaling.num_workers * scaling.cpus_per_worker if scaling.num_workers > 1 else 0)


def _reasons(trials: list[Trial]) -> str:
    return "; ".join(dict.fromkeys(trial.reason for trial in trials if trial.reason)) or "none ended an epoch"


def _best_toml(space: Space, record: TuneRecord) -> str:
    """The winner as a configuration of its own: only what differs from the defaults."""
    assert record.winner is not None
    trial = next(trial for trial in record.trials if trial.number == record.winner)
    base = space.base
    config = with_values(
        base.model_copy(update={"tune": TuneConfig()}),
        {**trial.values, "run.name": f"{base.run.name}-best", "run.dataset": base.dataset_uri},
        where=f"trial {trial.number}",
    )
    lines = [
        f"# Found by a sweep of {len(record.trials)} trials, {base.tune.search} search: trial {trial.number}, {show(trial.values)}.",
    ]
    for finalist in record.finalists[:1]:
        lines.append(
            f"# Validation {record.metric} over {len(finalist.results)} other seeds: {finalist.mean:.4f} +- {finalist.std:.4f}."
        )
    if config.retrieval.item_knn_weight:
        lines.append(
            "# retrieval.item_knn_weight is not of the sweep: choose it anew by `recray evaluate --split valid`, without"
        )
        lines.append("# training.refit, before the test split is opened.")
    table = config.model_dump(mode="json", exclude_unset=True, exclude_none=True)
    table = {key: value for key, value in table.items() if key != "tune"}
    return "\n".join(lines) + "\n\n" + tomli_w.dumps(table)
