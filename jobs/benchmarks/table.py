"""A row of the results table of jobs/configs/README.md, by one command."""

from __future__ import annotations

import os
import statistics
import tempfile
from typing import TYPE_CHECKING, Annotated

import typer

from benchmarks.seeds import Evaluated, Runs, commit

if TYPE_CHECKING:
    from recray.config import Config

# Column -> the run and the system that it is of.
_COLUMNS = {
    "model alone": ("shipped", "model"),
    "model alone, without refit": ("without_refit", "model"),
    "with the item-item baseline blended in": ("shipped", "blended"),
    "item-item baseline": ("shipped", "item_knn"),
    "popularity": ("shipped", "popularity"),
    "rolling popularity": ("shipped", "rolling_popularity"),
}


def run(
    config: Annotated[str, typer.Argument(help="configuration of a retriever, e.g. jobs/configs/amazon-beauty.toml")],
    overrides: Annotated[list[str] | None, typer.Option("--set", help="section.key=value, of all runs")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="run.seed = 1, 2, ...")] = 1,
    folder: Annotated[str | None, typer.Option(help="keep the runs there, and reuse those that exist")] = None,
) -> None:
    """A row for each of two metrics: the model alone, without a refit, blended, and baselines; then the verdict.

    Cells are means; "seeds" is the standard deviation over seeds, "users" half of the 95 % interval over test users.
    """
    from recray.config import load_config

    settings = load_config(config, overrides or [])
    variants = {"shipped": list[str]()}
    if settings.training.refit:
        variants["without_refit"] = ["training.refit=false"]
    with tempfile.TemporaryDirectory() as temporary:
        runs = Runs(config, overrides or [], os.path.abspath(folder or temporary), 1)
        found = dict[str, list[Evaluated]]()
        for seed in range(1, seeds + 1):
            runs.prepare(seed)
            for name, keys in variants.items():
                found.setdefault(name, []).append(runs.train(name, keys, seed))
    found.setdefault("without_refit", found["shipped"])
    typer.echo("| config | test metric | " + " | ".join(_COLUMNS) + " | training, memory |")
    typer.echo("|---" * (len(_COLUMNS) + 3) + "|")
    for number, metric in enumerate(_metrics(settings)):
        cells = [_cell(found[variant], system, metric) for variant, system in _COLUMNS.values()]
        name, cost = (settings.run.name, _cost(found["shipped"])) if number == 0 else ("", "")
        typer.echo(f"| {name} | {metric} | " + " | ".join(cells) + f" | {cost} |")
    typer.echo(f"\n{seeds} seed(s), commit {commit()}, verdict of seed 1:")
    for line in found["shipped"][0].report.verdict:
        typer.echo(f"  {line}")


def _metrics(settings: Config) -> tuple[str, str]:
    """The metric that the model is selected by, or the hit rate next to NDCG; and NDCG."""
    metric, k = settings.training.metric.split("@")
    return (f"hr@{k}" if metric == "ndcg" else settings.training.metric), f"ndcg@{k}"


def _cell(runs: list[Evaluated], system: str, metric: str) -> str:
    intervals = [run.report.metrics[system][metric] for run in runs if system in run.report.metrics]
    if not intervals:
        return ""
    values = [one.value for one in intervals]
    spread = [f"seeds +- {statistics.stdev(values):.4f}"] if len(values) > 1 else []
    halves = [(one.high - one.low) / 2 for one in intervals if one.low is not None and one.high is not None]
    spread += [f"users +- {statistics.mean(halves):.4f}"] if halves else []
    return f"{statistics.mean(values):.4f}" + (f" ({', '.join(spread)})" if spread else "")


def _cost(runs: list[Evaluated]) -> str:
    seconds, megabytes = (statistics.mean(x) for x in zip(*((run.seconds, run.megabytes) for run in runs), strict=True))
    return f"{seconds / 60:.1f} min, {megabytes / 1000:.1f} GB"
