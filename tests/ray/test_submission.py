"""`recray submit`: the job gets the same configuration, and the report comes back through its log."""

import json
import os
import shutil
import tomllib
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import tomli_w
from ray.job_submission import JobStatus
from typer.testing import CliRunner

from helpers.configs import SHIPPED, shipped
from recray.cli import app
from recray.cluster.submit import Jobs, is_report, portable, write_files
from recray.config import load_config, parse_config
from recray.records import ReportRecord


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_submitted_configuration_is_the_same_one(path: Path) -> None:
    config = shipped(path)
    sent = portable(config)
    mine, other = (
        config.model_dump(mode="json"),
        parse_config(tomllib.loads(tomli_w.dumps(sent))).model_dump(mode="json"),
    )
    for before, after in ((mine["data"], other["data"]), (mine["data"]["split"], other["data"]["split"])):
        for key in {"path", "items", "users", "train_path", "valid_path", "test_path"} & set(before):
            assert after[key] == (before[key] and os.path.abspath(before[key]))
            before.pop(key)
            after.pop(key)
    assert other == mine


def test_a_list_of_files_and_a_uri() -> None:
    config = parse_config({"data": {"path": ["a.parquet", "s3://bucket/b.parquet"]}})
    assert portable(config)["data"]["path"] == [os.path.abspath("a.parquet"), "s3://bucket/b.parquet"]


def test_plug_ins_next_to_the_toml_are_sent(tmp_path: Path) -> None:
    """The job's folder has the same files, and the configuration means the same there."""
    here, there = tmp_path / "here", tmp_path / "there"
    shutil.copytree(Path(__file__).parents[2] / "jobs" / "examples", here)
    there.mkdir()
    (path,) = here.glob("*.toml")
    config = load_config(str(path), ["data.path=events.parquet"])
    write_files(config, there)
    assert {file.name for file in there.iterdir()} == {"config.toml", *(file.name for file in here.glob("*.py"))}
    sent = load_config(str(there / "config.toml"))
    assert sent.run.plugins == str(there)
    assert sent.model_dump(exclude={"run": {"plugins"}}) == parse_config(
        portable(config), [f"run.plugins={there}"]
    ).model_dump(exclude={"run": {"plugins"}})


class _Client:
    """A job client whose log arrives in pieces that do not end where lines end."""

    def __init__(self, status: str, text: str) -> None:
        self.status, self.text = status, text

    def get_job_info(self, job: str) -> SimpleNamespace:
        status = JobStatus(self.status)
        return SimpleNamespace(status=status, message="exit code 2, last available logs (...)", driver_exit_code=2)

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        for start in range(0, len(self.text), 7):
            yield self.text[start : start + 7]


def _jobs(status: str, text: str) -> Jobs:
    jobs = Jobs.__new__(Jobs)
    jobs._client = _Client(status, text)
    return jobs


def test_the_report_is_fetched_and_not_shown(tmp_path: Path) -> None:
    report = {"split": "test", "metrics": {"model": {}}}
    log = f'train: epoch 1\n{{"event": "epoch"}}\n{{not json\n{json.dumps(report)}\nlast line'
    shown: list[str] = []
    assert _jobs("SUCCEEDED", log).wait("a", shown.append, str(tmp_path / "report.json")) == 0
    assert shown == ["train: epoch 1", '{"event": "epoch"}', "{not json", "last line"]
    assert json.loads((tmp_path / "report.json").read_text()) == report


@pytest.mark.parametrize(("status", "code"), [("FAILED", 2), ("STOPPED", 3)])
def test_a_job_that_does_not_succeed(status: str, code: int, caplog: pytest.LogCaptureFixture) -> None:
    assert _jobs(status, "ResourceError: no GPU\n").wait("a", lambda line: None) == code
    assert caplog.messages == [f"submit: job a: {status.lower()}: exit code 2"]


def test_run_prints_the_report_as_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The two ends fit: what `recray run --report -` prints is what `wait` looks for."""
    record = ReportRecord(split="test", metrics={}, counts={})
    monkeypatch.setattr("recray.run", lambda config: record)
    monkeypatch.setattr("recray.report.text.render", lambda record: "a table")
    config = tmp_path / "my.toml"
    config.write_text("[data]\nsource = 'simulated'\n")
    result = CliRunner().invoke(app, ["run", str(config), "--report", "-"])
    assert [is_report(line) for line in result.output.splitlines()] == [False, True]
    CliRunner().invoke(app, ["run", str(config), "--report", str(tmp_path / "report.json")])
    assert json.loads((tmp_path / "report.json").read_text()) == json.loads(result.output.splitlines()[1])
