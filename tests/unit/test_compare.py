"""`recray compare`: paired differences against numpy, configuration, cost, the page; pages in `recray runs`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from helpers.cli import recray_command
from helpers.small_run import make_run, small_config
from recray.artifacts import REPORT, in_use
from recray.config import Config, with_values
from recray.errors import ConfigError
from recray.report.compare import compare


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Config]:
    """Two models on one dataset, in runs `a` and `b`."""
    root = tmp_path_factory.mktemp("runs")
    base = with_values(small_config(root), {"evaluation.bootstrap": 200, "run.name": "a"})
    longer = {"run.name": "b", "model.dim": 16, "training.epochs": 12, "run.dataset": f"{base.run_uri}/dataset"}
    both = base, with_values(base, longer)
    for config in both:
        make_run(with_values(config, {"run.output": str(root)}))
    return both


def _scores(config: Config) -> pd.DataFrame:
    return pd.read_parquet(f"{in_use(config.run_uri, REPORT).uri}/scores.parquet").set_index("user")


def test_scores_sum_to_the_metrics_of_the_report(runs: tuple[Config, Config]) -> None:
    for config in runs:
        report, scores = in_use(config.run_uri, REPORT).record, _scores(config)
        assert scores["size"].sum() == report.counts["queries"] and len(scores) == report.counts["users"]
        for system in ("model", "index"):
            for name in ("ndcg@10", "recall@10", "mrr@10"):
                mean = scores[f"{system}/{name}"].sum() / scores["size"].sum()
                assert mean == pytest.approx(report.metrics[system][name].value, abs=1e-6)


def test_differences_are_paired_over_users(runs: tuple[Config, Config]) -> None:
    found = compare([config.run_uri for config in runs])
    a, b = (_scores(config) for config in runs)
    difference = (b["index/ndcg@10"] - a["index/ndcg@10"]).to_numpy()
    gain = next(one for one in found.gains if one.metric == "ndcg@10")
    assert gain.users == len(a) and gain.gain == pytest.approx(difference.mean(), abs=1e-6)
    rng = np.random.default_rng(0)
    means = [difference[rng.integers(0, len(a), len(a))].mean() for _ in range(4_000)]
    low, high = np.quantile(means, [0.025, 0.975])
    assert (gain.low, gain.high) == (
        pytest.approx(low, abs=0.15 * (high - low)),
        pytest.approx(high, abs=0.15 * (high - low)),
    )
    coverage = next(one for one in found.gains if one.metric.startswith("coverage"))
    assert coverage.users == 0 and coverage.result == "no interval"  # no mean over users
    assert found.verdict[0].startswith(f"b: {gain.result}") and f"in ndcg@10, {gain.gain:+.4f} (" in found.verdict[0]
    assert found.runs == ["a", "b"] and found.notes == []
    assert found.configuration["model.dim"] == [8, 16] and found.configuration["training.epochs"] == [2, 12]
    assert found.cost["epochs trained"] == [2, 12]


def test_a_run_does_not_differ_from_itself(runs: tuple[Config, Config]) -> None:
    uri = runs[0].run_uri
    found = compare([uri, uri])
    assert found.runs[0] == found.runs[1] and found.configuration == {}
    assert {one.gain for one in found.gains if one.users} == {0.0}
    assert {one.result for one in found.gains if one.users} == {"no clear difference"}


def test_the_command_and_its_page(runs: tuple[Config, Config], tmp_path: Path) -> None:
    a, b = (config.run_uri for config in runs)
    done = recray_command("compare", a, b, "--html", str(tmp_path / "c.html"))
    assert done.code == 0, done.err
    assert "differences from a (above 0 is better), with 95 % intervals" in done.out
    assert "paired over" in done.out and "training, s" in done.out
    page = (tmp_path / "c.html").read_text()
    assert "<title>a against b</title>" in page and "model.dim" in page and "http://" not in page.split("</script>")[-1]
    result = json.loads(recray_command("--json", "compare", a, b).out.splitlines()[-1])["values"]
    assert result["metrics"].keys() >= {"ndcg@10", "recall@10"}
    listed = recray_command("runs", a.rpartition("/")[0])
    assert f"a  {in_use(a, REPORT).uri}/report.html" in listed.out
    assert recray_command("verify", a).code == 0


def test_what_cannot_be_compared(runs: tuple[Config, Config]) -> None:
    uri = runs[0].run_uri
    with pytest.raises(ConfigError, match="two runs or more"):
        compare([uri])
    done = recray_command("compare", uri, f"{uri}-nothing")
    assert done.code == 2 and "holds no report" in done.err
