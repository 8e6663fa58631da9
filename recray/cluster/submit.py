"""`recray submit`: all stages as a job of a Ray cluster, followed from here.

What is uploaded is the configuration and this package, so that the cluster runs the code of whoever submits. The job
(`python -m recray.cluster.submit`) prints its report as one line beside the table, which is how the report comes back from a
cluster whose storage cannot be read from here.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import logging
import os
import secrets
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import tomli_w

import recray
from recray import storage
from recray.config import Config, load_config
from recray.errors import ClusterError, DependencyError, RecrayError

_MARK = "recray-report: "
_STOPPED = 3  # exit code of a job that was stopped


class Jobs:
    """The jobs of one cluster."""

    def __init__(self, address: str) -> None:
        """`address` is that of the dashboard. Raises ClusterError where none answers, or it refuses the token."""
        if importlib.util.find_spec("aiohttp") is None:
            raise DependencyError("jobs need Ray's dashboard: pip install 'recray[cluster]'")
        from ray.exceptions import AuthenticationError
        from ray.job_submission import JobSubmissionClient

        os.environ.pop("RAY_ADDRESS", None)  # it would win over the address that was given
        for module in (
            "dashboard.modules.dashboard_sdk",
            "dashboard.modules.job.sdk",
            "_private.runtime_env.packaging",
        ):
            logging.getLogger(f"ray.{module}").setLevel(logging.WARNING)  # they tell of every upload
        self._address = address
        try:
            self._client = JobSubmissionClient(address)
        except AuthenticationError as error:
            raise ClusterError(
                f"{address} refuses the token: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH, to the cluster's"
            ) from error
        except (ConnectionError, RuntimeError) as error:
            last = str(error).strip().splitlines()[-1]
            raise ClusterError(
                f"no Ray dashboard answers at {address} ({last}): check the address, and that the way is open, for example "
                f"`ray dashboard CLUSTER.yaml` or `kubectl port-forward`"
            ) from error

    def submit(self, config: Config, requirements: str | None = None) -> str:
        """Start the job; its id. `requirements` is a lock file that Ray installs where the image lacks it."""
        package = str(Path(recray.__file__).parent)
        environment: dict[str, Any] = {"py_modules": [package]}
        if requirements is not None:
            lines = storage.read_bytes(requirements).decode().splitlines()
            environment["pip"] = {"packages": [line for line in lines if line and not line.startswith("#")]}
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.toml").write_text(tomli_w.dumps(portable(config)))
            job: str = self._client.submit_job(
                entrypoint="python -m recray.cluster.submit config.toml",
                submission_id=f"{config.run.name}-{secrets.token_hex(4)}",
                runtime_env=environment | {"working_dir": folder},
                metadata={"run": config.run_uri},
            )
        return job

    def wait(self, job: str, report: str | None = None) -> int:
        """Show what the job prints until it ends; write its report to `report`. The job's exit code, 3 where it was stopped."""
        found = asyncio.run(self._follow(job))
        while not (info := self._client.get_job_info(job)).status.is_terminal():
            time.sleep(0.5)
        if info.status == "SUCCEEDED":
            if report is not None and found is not None:
                storage.write_json(report, json.loads(found))
                print(f"report: {report}", flush=True)
            return 0
        reason = info.message.partition(", last available logs")[0]  # which were shown already
        print(f"job {job}: {info.status.lower()}: {reason}", file=sys.stderr, flush=True)
        return _STOPPED if info.status == "STOPPED" else int(info.driver_exit_code or 1)

    async def _follow(self, job: str) -> str | None:
        """Print whole lines as they come; the report's line is kept and not shown."""
        rest, found = "", None
        async for piece in self._client.tail_job_logs(job):
            *lines, rest = (rest + piece).split("\n")
            for line in lines:
                if line.startswith(_MARK):
                    found = line.removeprefix(_MARK)
                else:
                    print(line, flush=True)
        if rest:
            print(rest, flush=True)
        return found


def portable(config: Config) -> dict[str, Any]:
    """The whole configuration as a TOML table whose paths mean the same from another folder."""
    table: dict[str, Any] = _without_none(config.model_dump(mode="json"))
    data = table["data"]
    for section, key in ((data, "path"), (data, "items"), (data, "users"), (table["retrieval"], "ranker")):
        section.update({key: _absolute(section[key])} if key in section else {})
    for key in ("train_path", "valid_path", "test_path"):
        data["split"].update({key: _absolute(data["split"][key])} if key in data["split"] else {})
    return table


def _without_none(value: Any) -> Any:
    """TOML knows no null; a key that is not there has its default, which is null wherever null is allowed."""
    if isinstance(value, dict):
        return {key: _without_none(one) for key, one in value.items() if one is not None}
    return value


def _absolute(location: Any) -> Any:
    if isinstance(location, list):
        return [_absolute(one) for one in location]
    return location if "://" in location else os.path.abspath(location)


def main() -> None:
    """What the job runs."""
    from recray.report.text import render
    from recray.stages import run

    config = load_config(sys.argv[1])
    report = run(config)
    print(render(report), flush=True)
    print(f"{config.run_uri}/report/{report.identity}  {report.id}", flush=True)
    print(_MARK + report.model_dump_json(), flush=True)


if __name__ == "__main__":
    try:
        main()
    except RecrayError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(2)
