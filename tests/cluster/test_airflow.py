"""The DAG over three days, by Airflow's own `dag.test`, on a real Ray cluster and a simulated S3.

Airflow wants an environment of its own: RECRAY_AIRFLOW names its Python (`make test-airflow` makes one). Its tasks are
commands, and find `recray` of this installation on PATH, as Airflow's workers would.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import tomli_w
from nodes import REPOSITORY, Nodes

from helpers.growing_log import growing_config, write_day
from recray.served import served_of

AIRFLOW = os.environ.get("RECRAY_AIRFLOW", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not AIRFLOW, reason="RECRAY_AIRFLOW names no Python with Airflow: make test-airflow"),
]

# One day of the DAG, every task in this process; the exit code is 0 if all of them succeed.
_DAY = """
import sys
from datetime import datetime, timezone
from airflow.dag_processing.dagbag import DagBag

bag = DagBag(sys.argv[1])
assert not bag.import_errors, bag.import_errors
dag = bag.dags["recray_daily"]
for task in dag.tasks:
    task.retries = 0  # a retry waits for ten minutes
run = dag.test(logical_date=datetime.fromisoformat(sys.argv[2]).replace(tzinfo=timezone.utc))
for task in run.get_task_instances():
    print("task", task.task_id, task.state)
sys.exit(str(run.state) != "success")
"""


DAYS = ("2025-12-31", "2026-01-01", "2026-01-02", "2026-01-03")


class Site:
    """A bucket, a cluster and an Airflow that know one another."""

    def __init__(self, folder: Path, nodes: Nodes, endpoint: str) -> None:
        self.folder = folder
        import boto3

        self.s3 = boto3.client("s3", endpoint_url=endpoint)
        self.s3.create_bucket(Bucket="bucket")
        extra = {"endpoint_url": endpoint, "region_name": "us-east-1"}
        self._env = nodes.env | {
            "AIRFLOW_HOME": f"{folder}/airflow",
            "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
            "AIRFLOW__CORE__DAGS_FOLDER": str(REPOSITORY / "cluster" / "airflow"),
            "AIRFLOW_VAR_RECRAY_BUCKET": "s3://bucket",
            "AIRFLOW_VAR_RECRAY_ADDRESS": f"http://127.0.0.1:{nodes.dashboard_port}",
            "AIRFLOW_CONN_AWS_DEFAULT": json.dumps({"conn_type": "aws", "extra": extra}),
            "PATH": f"{folder}/bin{os.pathsep}{nodes.env['PATH']}",
        }
        (folder / "bin").mkdir()
        script = folder / "bin" / "recray"
        script.write_text(f'#!/bin/sh\nPYTHONPATH={REPOSITORY} exec {sys.executable} -m recray "$@"\n')
        script.chmod(0o755)
        # Airflow's own packages must not be shadowed by those of this environment.
        self._env.pop("PYTHONPATH")
        subprocess.run([AIRFLOW, "-m", "airflow", "db", "migrate"], env=self._env, check=True, capture_output=True)

    def put(self, key: str, data: bytes) -> None:
        self.s3.put_object(Bucket="bucket", Key=key, Body=data)

    def configure(self) -> None:
        table = growing_config(self.folder, "data.append=true", "training.start_from=previous").model_dump(
            mode="json", exclude_unset=True
        )
        table["data"]["path"] = "s3://bucket/clicks/"
        self.put("config/my.toml", tomli_w.dumps(table).encode())

    def night(self, day: str) -> tuple[int, str]:
        command = [AIRFLOW, "-c", _DAY, str(REPOSITORY / "cluster" / "airflow"), day]
        done = subprocess.run(command, env=self._env, capture_output=True, text=True, timeout=1200)
        return done.returncode, done.stdout + done.stderr

    def served(self) -> str:
        found = served_of("s3://bucket/runs/daily")
        assert found is not None
        return found.checkpoint


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    server_module = pytest.importorskip("moto.server", reason="needs moto[server]")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    host, port = server.get_host_and_port()
    for name, value in (
        ("AWS_ENDPOINT_URL", f"http://{host}:{port}"),
        ("AWS_ACCESS_KEY_ID", "test"),
        ("AWS_SECRET_ACCESS_KEY", "test"),
        ("AWS_DEFAULT_REGION", "us-east-1"),
    ):
        monkeypatch.setenv(name, value)
    nodes = Nodes(Path(tempfile.mkdtemp(prefix="rr-", dir="/tmp")))
    try:
        nodes.head("--num-cpus=2", "--dashboard-host=127.0.0.1", f"--dashboard-port={nodes.dashboard_port}")
        nodes.wait_for(nodes.dashboard_port)
        yield Site(tmp_path, nodes, f"http://{host}:{port}")
    finally:
        nodes.stop()
        shutil.rmtree(nodes.folder, ignore_errors=True)
        server.stop()


def test_three_days(site: Site, tmp_path: Path) -> None:
    """Two nights are served; the third has a broken file, fails, and leaves the second one served."""
    site.configure()
    served = []
    for day, name in enumerate(DAYS):
        write_day(tmp_path / "clicks", day)
        data = (tmp_path / "clicks" / f"day-{day}.parquet").read_bytes()
        site.put(f"clicks/day={name}/part-0.parquet", data if day < 3 else data[:-100])
        site.put(f"clicks/day={name}/_SUCCESS", b"")
        if day == 0:
            continue  # two days are test and validation already
        code, output = site.night(name)
        (tmp_path / f"night-{day}.log").write_text(output)
        said = [line for line in output.splitlines() if "subprocess" in line or line.startswith("task ")]
        assert (code == 0) == (day < 3), "\n".join(said[-60:])
        served.append(site.served())
    assert served[0] != served[1] == served[2]
    assert "part-0.parquet" in output and "Parquet" in output  # the log of the failed task names the file
