"""`recray submit`: run all stages as a job of a Ray cluster and follow it from here.

Uploaded are the configuration, the Python files next to it (its plug-ins) and this package, so the cluster runs the
submitter's code. The job is the ordinary command

    python -m recray run config.toml --report -

which prints the report as one JSON line at its end. That is how the report comes back from a cluster whose storage
cannot be read from here.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import logging
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

import tomli_w

import recray
from recray import credentials, log, storage
from recray.cluster import cpus, runtime
from recray.config import Config
from recray.errors import ClusterError, DependencyError

_STOPPED = 3  # exit code if the job was stopped
_COMMAND = "python -m recray run config.toml --report -"
_LOGGERS = ("dashboard.modules.dashboard_sdk", "dashboard.modules.job.sdk", "_private.runtime_env.packaging")


class Jobs:
    """The jobs of one cluster."""

    def __init__(self, address: str) -> None:
        """Connect to the dashboard at `address`.

        Raises ClusterError if it does not answer or refuses the token, DependencyError if Ray's job client is not installed.
        """
        if importlib.util.find_spec("aiohttp") is None:
            raise DependencyError("jobs need Ray's dashboard: pip install 'recray[cluster]'")
        credentials.refuse(f"//{address.rpartition('//')[2]}", "the address of the dashboard")
        try:
            runtime.within_seconds(partial(_ask_version, _url(address)), address)
        except (OSError, ValueError, HTTPException) as error:
            raise _unreachable(address, error) from error
        from ray.exceptions import AuthenticationError
        from ray.job_submission import JobSubmissionClient

        os.environ.pop("RAY_ADDRESS", None)  # Ray would use it instead of `address`
        for name in _LOGGERS:  # they log every upload
            logging.getLogger(f"ray.{name}").setLevel(logging.WARNING)
        try:
            self._client = JobSubmissionClient(_url(address))
        except AuthenticationError as error:
            raise ClusterError(
                f"{address} refuses the token: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH, to the cluster's"
            ) from error
        except (ConnectionError, RuntimeError) as error:
            raise _unreachable(address, error) from error

    def submit(self, config: Config, requirements: str | None = None) -> str:
        """Start the job and return its id. `requirements` is a lock file that Ray installs on nodes that lack it."""
        environment: dict[str, Any] = {"py_modules": [str(Path(recray.__file__).parent)], "env_vars": cpus.waiting()}
        if requirements is not None:
            lines = storage.read_bytes(requirements).decode().splitlines()
            environment["pip"] = {"packages": [line for line in lines if line and not line.startswith("#")]}
        with tempfile.TemporaryDirectory() as folder:
            write_files(config, Path(folder))
            job: str = self._client.submit_job(
                entrypoint=_COMMAND,
                submission_id=f"{config.run.name}-{secrets.token_hex(4)}",
                runtime_env=environment | {"working_dir": folder},
                metadata={"run": config.run_uri},
            )
        return job

    def wait(self, job: str, show: Callable[[str], None], report: str | None = None) -> int:
        """Follow the job to its end: pass every line that it prints to `show`, write its report to `report`.

        Returns the job's exit code, 3 if it was stopped.
        """
        found = asyncio.run(self._follow(job, show))
        while not (info := self._client.get_job_info(job)).status.is_terminal():
            time.sleep(0.5)
        if info.status == "SUCCEEDED":
            if report is not None and found is not None:
                storage.write_json(report, json.loads(found))
                log.info("submit", f"report: {report}", event="report", values={"uri": report})
            return 0
        reason = info.message.partition(", last available logs")[0]  # the logs were shown already
        log.warning(
            "submit", f"job {job}: {info.status.lower()}: {reason}", event="job", values={"status": info.status}
        )
        return _STOPPED if info.status == "STOPPED" else int(info.driver_exit_code or 1)

    async def _follow(self, job: str, show: Callable[[str], None]) -> str | None:
        """Show the job's lines as they come. The report's line is not shown but returned."""
        rest, found = "", None
        async for piece in self._client.tail_job_logs(job):  # pieces do not end where lines end
            *lines, rest = (rest + piece).split("\n")
            for line in lines:
                if is_report(line):
                    found = line
                else:
                    show(line)
        if rest:
            show(rest)
        return found


def _url(address: str) -> str:
    return address if "://" in address else f"http://{address}"


def _ask_version(url: str) -> None:
    """Raise if no web server answers: Ray's client would wait for ever. Other schemes are Ray's to resolve."""
    if url.startswith("ray://"):
        raise ValueError
    if url.startswith(("http://", "https://")):
        with contextlib.suppress(HTTPError):  # it answers; Ray's client tells what is wrong
            urlopen(f"{url.rstrip('/')}/api/version").close()  # nosec B310 - http and https only


def _unreachable(address: str, error: Exception) -> ClusterError:
    if address.startswith("ray://"):
        return ClusterError(f"{address} is not the address of a dashboard: use http://HOST:8265")
    reason = (str(getattr(error, "reason", error)).strip().splitlines() or [type(error).__name__])[-1]
    return ClusterError(
        f"no Ray dashboard answers at {address} ({reason}): check the address, and forward the port if the dashboard "
        "listens on the head node only, for example with `ray dashboard CLUSTER.yaml` or `kubectl port-forward`"
    )


def is_report(line: str) -> bool:
    """Whether a line of a job's log is the report: a JSON object with metrics."""
    try:
        body = json.loads(line) if line.startswith("{") else None
    except json.JSONDecodeError:
        return False
    return isinstance(body, dict) and "metrics" in body and "split" in body


def write_files(config: Config, folder: Path) -> None:
    """Write the job's working directory: config.toml, and next to it the Python files of the folder of plug-ins."""
    table = portable(config)
    plugins = table["run"].pop("plugins", None)  # there as here, the folder of the TOML file is searched
    for file in sorted(Path(plugins).glob("*.py")) if plugins else []:
        shutil.copy(file, folder)
    (folder / "config.toml").write_text(tomli_w.dumps(table))


def portable(config: Config) -> dict[str, Any]:
    """The configuration as a TOML table, with relative paths made absolute so that it works from another folder."""
    # TOML has no null, and None is the default wherever it is allowed.
    table: dict[str, Any] = config.model_dump(mode="json", exclude_none=True)
    data = table["data"]
    for section, keys in (
        (data, ("path", "items", "users")),
        (data["split"], ("train_path", "valid_path", "test_path")),
        (table["retrieval"], ("ranker",)),
    ):
        section.update({key: _absolute(section[key]) for key in keys if key in section})
    return table


def _absolute(location: Any) -> Any:
    if isinstance(location, list):
        return [_absolute(one) for one in location]
    return location if "://" in location else os.path.abspath(location)
