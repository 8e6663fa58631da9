"""On one machine, no process of recray listens on anything but loopback."""

import ipaddress
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers.configs import REPOSITORY, simulated_table

_STAGES = """
import json, sys
import recray

table = json.loads(sys.argv[1])
one = recray.parse_config(table)
recray.prepare(one)
table["scaling"] = {"num_workers": 2, "threads_per_worker": 1}
two = recray.parse_config(table)
recray.train(two)
table["tune"] = {"space": {"optim.learning_rate": {"choices": [0.01, 0.003]}}, "trials": 2, "search": "random", "seeds": 1, "top": 1}
table["scaling"] = {"num_workers": 0}
recray.tune(recray.parse_config(table))
recray.index(two)
recray.evaluate(two)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="reads Linux's tables of sockets")
def test_all_stages_on_one_machine_listen_on_loopback_only(tmp_path: Path) -> None:
    """prepare, training with two workers, tune, index and evaluate: the sockets of all their processes, several times a second."""
    import json

    training = {"epochs": 2, "global_batch_size": 512}
    table = simulated_table(tmp_path, training=training, evaluation={"baselines": ["popularity"]})
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    with open(tmp_path / "output", "w+") as output:
        command = [sys.executable, "-c", _STAGES, json.dumps(table)]
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
        found: set[tuple[str, str]] = set()  # process, address
        while process.poll() is None:
            found |= _listening(_family(process.pid))
            time.sleep(0.3)
        output.seek(0)
        assert process.returncode == 0, output.read()
    listeners = {name for name, _ in found}
    assert {"gcs_server", "raylet"} <= listeners
    assert any("RayTrainWorker" in name for name in listeners), listeners
    assert [one for one in sorted(found) if not _is_loopback(one[1])] == []


def _is_loopback(address: str) -> bool:
    ip = ipaddress.ip_address(address)
    return (getattr(ip, "ipv4_mapped", None) or ip).is_loopback


def _family(root: int) -> list[int]:
    """A process and all that descend from it."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        children.setdefault(parent, []).append(int(entry.name))
    found, waiting = [], [root]
    while waiting:
        found.append(waiting.pop())
        waiting += children.get(found[-1], [])
    return found


def _listening(processes: list[int]) -> set[tuple[str, str]]:
    """(process, address) of every listening TCP socket of these processes."""
    addresses = {}
    for table in ("tcp", "tcp6"):
        for line in Path("/proc/net", table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A":  # LISTEN
                raw = bytes.fromhex(fields[1].partition(":")[0])
                raw = b"".join(raw[i : i + 4][:: -1 if sys.byteorder == "little" else 1] for i in range(0, len(raw), 4))
                family = socket.AF_INET if len(raw) == 4 else socket.AF_INET6
                addresses[f"socket:[{fields[9]}]"] = socket.inet_ntop(family, raw)
    found = set()
    for process in processes:
        try:
            command = Path(f"/proc/{process}/cmdline").read_bytes().partition(b"\0")[0].decode()
            opened = [os.readlink(entry.path) for entry in os.scandir(f"/proc/{process}/fd")]
        except OSError:  # it has just ended
            continue
        found |= {(os.path.basename(command), addresses[name]) for name in opened if name in addresses}
    return found
