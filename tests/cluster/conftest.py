"""Clusters that tests share."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from nodes import Cluster, Nodes


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    folder = Path(tempfile.mkdtemp(prefix="rr-", dir="/tmp"))  # a socket's path has at most 107 characters
    cluster = Nodes(folder)
    yield cluster
    cluster.stop()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A head with the dashboard and one CPU, and a second node with two."""
    pytest.importorskip("aiohttp", reason="jobs need ray[default]: pip install 'recray[cluster]'")
    nodes = Nodes(Path(tempfile.mkdtemp(prefix="rr-", dir="/tmp")))
    try:
        nodes.head("--num-cpus=1", "--dashboard-host=127.0.0.1", f"--dashboard-port={nodes.dashboard_port}")
        nodes.worker("--num-cpus=2")
        nodes.wait_for(nodes.dashboard_port)
        nodes.wait_for_nodes(2)
        folder = tmp_path_factory.mktemp("out")
        yield Cluster(f"127.0.0.1:{nodes.port}", f"http://127.0.0.1:{nodes.dashboard_port}", nodes.env, folder)
    finally:
        nodes.stop()
        shutil.rmtree(nodes.folder, ignore_errors=True)
