"""The logger: silent unless configured, and the same in a worker process as in the one that started it."""

import json
import subprocess
import sys

CODE = """
import sys
from recray import log
if sys.argv[1] == "configured":
    log.configure("json")
setting = log.setting()
log.configure_worker(setting)
log.info("train", "epoch 1/3", event="epoch", values={"epoch": 1.0, "loss": 0.5})
log.debug("train", "not shown")
print(setting, file=sys.stderr)
"""


def test_a_worker_logs_as_the_process_that_started_it() -> None:
    for how in ("silent", "configured"):
        done = subprocess.run([sys.executable, "-c", CODE, how], capture_output=True, text=True, check=True)
        if how == "silent":
            assert not done.stdout
            continue
        (line,) = done.stdout.splitlines()
        event = json.loads(line)
        assert (event["stage"], event["event"], event["level"]) == ("train", "epoch", "info")
        assert event["values"] == {"epoch": 1.0, "loss": 0.5} and done.stderr.strip() == "json:20"
