"""Walk a log forward: at each step train on what came before it, and ask the models what comes next.

At step s, of all events before s, three models answer the queries of [s, s + step):

    frozen       the model of the first step
    continued    trained on from the continued model of the step before (training.start_from)
    retrained    trained from scratch

The queries are asked of the baselines `rolling_popularity` and `transitions`, too. Each query sees what happened before it:
histories, and the counts of baselines and of `retrieval.recency`, for all systems alike. Weights change between steps only.

    <output>/<name>-replay/          a run: the datasets, checkpoints and indexes of all steps
        replay/<identity>/step-<time>.json    figures of a step, written when it is complete; it is not done again
        replay/<identity>/replay.json         all steps

Every step has the configuration's split, moved: as much training data and validation before s as the configuration has before
its test_start.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np

from recray import log, sealed, storage
from recray.artifacts import Run, flatten, identity_of
from recray.cluster import runtime
from recray.config import Config, with_values
from recray.data.prepare import prepare
from recray.data.split import before, duration
from recray.errors import ConfigError
from recray.evaluation.promote import older
from recray.loading.collate import eval_queries
from recray.metrics import find, ranking
from recray.report.text import TITLES
from recray.retrieval import Recommender
from recray.retrieval.baselines import open_baselines
from recray.retrieval.build import index
from recray.retrieval.recommenders import RunArtifacts, open_recommenders
from recray.training.launch import train

_MODELS = ("frozen", "continued", "retrained")
_BASELINES = ["rolling_popularity", "transitions"]
_FOLDER = "replay"


@dataclass(frozen=True)
class Step:
    """Figures of one step."""

    start: str  # ISO time at which its queries begin
    queries: int  # with a history
    metrics: dict[str, dict[str, float]]  # system -> metric -> mean over these queries
    seconds: dict[str, float]  # model -> training time; 0 where it did not train


@dataclass(frozen=True)
class Replay:
    """All steps of a replay, and where they are written."""

    uri: str
    step: str
    steps: list[Step]

    def means(self) -> dict[str, dict[str, float]]:
        """System -> metric -> mean over the queries of all steps."""
        weight = np.array([one.queries for one in self.steps], np.float64)
        return {
            system: {
                metric: float(np.average([one.metrics[system][metric] for one in self.steps], weights=weight))
                for metric in values
            }
            for system, values in self.steps[0].metrics.items()
        }

    def seconds(self) -> dict[str, float]:
        """Model -> training time of the steps after the first one, which all models share."""
        return {name: sum(one.seconds[name] for one in self.steps[1:]) for name in _MODELS}

    def as_json(self) -> dict[str, Any]:
        return {"step": self.step, "means": self.means(), "training_seconds": self.seconds()} | {
            "steps": [asdict(one) for one in self.steps]
        }


def replay(config: Config, step: str, begin: datetime, end: datetime) -> Replay:
    """Replay the log from `begin` to `end` in steps of a duration such as '1h' or '1d'; complete steps are not done again.

    Raises ConfigError for a ranker, for splits that are not by time, and for an empty period.
    """
    starts = _starts(config, step, begin, end)
    base = with_values(config, {"run.name": f"{config.run.name}-replay"})
    keys = {name: value for name, value in flatten(base.model_dump(mode="json")).items() if not _free(name)}
    folder = storage.join(base.run_uri, _FOLDER, identity_of(keys | {"step": step}, [starts[0].isoformat()]))
    steps, first, previous = list[Step](), _at(base, starts[0], step), None
    for number, start in enumerate(starts):
        file = storage.join(folder, f"step-{start:%Y%m%dT%H%M%S}.json")
        if storage.exists(file):
            body = sealed.read(file, "delete it, and run the replay again")
            steps.append(Step(**body["figures"]))
            previous = body["continued"]
            continue
        log.info("replay", f"step {number + 1} of {len(starts)}: {_iso(start)}", event="step")
        found, previous = _replay_step(_at(base, start, step), first, start, previous)
        sealed.write(file, {"figures": asdict(found), "continued": previous})
        steps.append(found)
    result = Replay(folder, step, steps)
    storage.write_json(storage.join(folder, "replay.json"), result.as_json())
    _write_page(result, config.run.name)
    return result


def _starts(config: Config, step: str, begin: datetime, end: datetime) -> list[datetime]:
    if config.model.family == "ranker":
        raise ConfigError("replay compares lists, and a ranker makes none: replay the retriever whose lists it orders")
    if config.data.split.kind != "temporal":
        raise ConfigError(
            f"replay needs data.split.kind = 'temporal', not '{config.data.split.kind}': it moves the split in time"
        )
    if config.training.start_from is not None:
        raise ConfigError("replay sets training.start_from itself, for the continued model: leave it unset")
    begin, end = (one if one.tzinfo else one.replace(tzinfo=UTC) for one in (begin, end))
    length = timedelta(microseconds=duration(step))
    if not length or begin + length > end:
        raise ConfigError(
            f"from {_iso(begin)} to {_iso(end)} there is no step of {step}: choose a shorter one, or a later end"
        )
    return [begin + number * length for number in range(int((end - begin) / length))]


def _free(key: str) -> bool:
    """Whether a key changes no figure."""
    return key.startswith(("scaling.", "promotion.", "report.", "tracking.", "tune.", "run.output", "run.keep"))


def _iso(time: datetime) -> str:
    return time.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _at(base: Config, start: datetime, step: str) -> Config:
    """The configuration whose test split begins at `start`, and is one step long."""
    split, values = base.data.split, dict[str, Any]()
    values["data.split.test_start"] = _iso(start)
    values["data.split.end"] = _iso(start + timedelta(microseconds=duration(step)))
    if split.valid_start is not None and split.test_start is not None:
        values["data.split.valid_start"] = _iso(start - (split.test_start - split.valid_start))
    if split.start is not None and split.test_start is not None:
        values["data.split.start"] = _iso(start - (split.test_start - split.start))
    return with_values(base, values)


def _replay_step(config: Config, first: Config, start: datetime, previous: str | None) -> tuple[Step, str]:
    """Prepare, train and evaluate one step; its figures, and the folder of its continued checkpoint."""
    prepare(config)
    runtime.stop_own()  # training often needs none, and starts another one if it does
    fresh, seconds = _train(config)
    continued, seconds_on = fresh, seconds
    going_on = config
    if previous is not None:
        going_on = with_values(config, {"training.start_from": previous})
        continued, seconds_on = _train(going_on)
    frozen = RunArtifacts.of(Run(first))
    systems: dict[str, Recommender] = {
        "frozen": older(first, frozen, fresh.dataset, before("test")),
        "continued": open_recommenders(continued, going_on, before("test")).final,
        "retrained": open_recommenders(fresh, config, before("test")).final,
    }
    evaluation = config.evaluation.model_copy(update={"baselines": _BASELINES})
    baselines, left_out = open_baselines(
        config.model_copy(update={"evaluation": evaluation}), fresh.dataset, "test", {}
    )
    for name, why in left_out.items():
        log.warning("replay", f"baseline {name} is left out: {why}")
    queries, metrics = _ask(config, fresh, systems | baselines)
    text = ", ".join(f"{name} {next(reversed(values.values())):.4f}" for name, values in metrics.items())
    log.info(
        "replay", f"{_iso(start)}: {queries:,} queries, {next(reversed(metrics['frozen']))}: {text}", event="figures"
    )
    took = {"frozen": 0.0 if previous else seconds, "continued": seconds_on, "retrained": seconds}
    return Step(_iso(start), queries, metrics, took), continued.checkpoint.uri


def _train(config: Config) -> tuple[RunArtifacts, float]:
    """The trained and indexed artefacts, and the time of the training, also of an earlier call that was interrupted."""
    record = train(config)
    index(config)
    return RunArtifacts.of(Run(config)), record.seconds


def _ask(
    config: Config, artifacts: RunArtifacts, systems: Mapping[str, Recommender]
) -> tuple[int, dict[str, dict[str, float]]]:
    """Number of queries of the test split with a history, and the means of each system over them."""
    options, k = config.evaluation, config.evaluation.k[0]
    rules = {name: find(name, config.run.plugins) for name in ("hr", "ndcg")}
    wanted = {name: rule for name, rule in rules.items() if isinstance(rule, ranking.ListMetric)}
    sums, queries = {name: dict.fromkeys((f"hr@{k}", f"ndcg@{k}"), 0.0) for name in systems}, 0
    for table in artifacts.dataset.iter_tables("test"):
        for query in eval_queries(table, options.batch_size, config.model.history_length, options.queries):
            values, offsets = query.targets.values.numpy(), query.targets.offsets.numpy()
            rows = (query.seen.lengths() > 0).numpy()
            number = ranking.num_distinct(values, offsets)[rows]
            queries += len(number)
            for name, system in systems.items():
                ids, _ = system.recommend(query, k, options.filter_seen)
                found = ranking.per_user(ranking.hits(ids, values, offsets)[rows], number, [k], wanted)
                for metric, one in found.items():
                    sums[name][metric] += float(one.sum())
    return queries, {
        name: {metric: total / max(1, queries) for metric, total in one.items()} for name, one in sums.items()
    }


def render(found: Replay) -> str:
    """A table of the headline metric by step, means over all queries, and training times."""
    systems, means, seconds = list(found.steps[0].metrics), found.means(), found.seconds()
    lines = []
    for metric in found.steps[0].metrics[systems[0]]:
        lines += [f"{metric:22}{'queries':>9}" + "".join(f"{TITLES.get(one, one):>20}" for one in systems)]
        for one in found.steps:
            cells = "".join(f"{one.metrics[system][metric]:20.4f}" for system in systems)
            lines.append(f"{one.start:22}{one.queries:9,}{cells}")
        total = sum(one.queries for one in found.steps)
        lines += [f"{'all':22}{total:9,}" + "".join(f"{means[system][metric]:20.4f}" for system in systems), ""]
    times = ", ".join(f"{name} {value:.1f} s" for name, value in seconds.items())
    return "\n".join([*lines, f"training after the first step: {times}", found.uri])


def _write_page(found: Replay, name: str) -> None:
    """replay.html: a curve of each metric over time, and the table."""
    from recray.report import charts, html

    if not html.available("replay", "replay.html"):
        return
    systems, means = list(found.steps[0].metrics), found.means()
    times, plots = [one.start for one in found.steps], []
    legend = [(TITLES.get(one, one), charts.look_of(systems)[one][0]) for one in systems]
    for metric in found.steps[0].metrics[systems[0]]:
        looks = charts.look_of(systems)
        traces = [
            charts.line(times, [one.metrics[s][metric] for one in found.steps], TITLES.get(s, s), *looks[s])
            for s in systems
        ]
        caption = f"{metric} of each step of {found.step}; over all queries " + ", ".join(
            f"{TITLES.get(one, one)} {means[one][metric]:.4f}" for one in systems
        )
        plots.append(html.figure(traces, f"{caption}.", "start of the step (UTC)", metric, legend=legend))
    rows = [
        [one.start, metric, one.queries, *(one.metrics[s][metric] for s in systems)]
        for metric in found.steps[0].metrics[systems[0]]
        for one in found.steps
    ]
    seconds = [[name, one] for name, one in found.seconds().items()]
    page = html.page(
        "replay.html",
        title=f"{name}: replay in steps of {found.step}",
        plots=plots,
        steps=html.table(["start", "metric", "queries", *(TITLES.get(s, s) for s in systems)], rows, text=(0, 1)),
        seconds=html.table(["model", "training after the first step, seconds"], seconds),
    )
    uri = storage.join(found.uri, "replay.html")
    storage.write_bytes(uri, page.encode())
    log.info("replay", f"page: {uri}", event="page", values={"uri": uri})
