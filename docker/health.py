"""Whether the container does what it was started for: a notebook answers, a Ray node is alive; a run needs no check."""

import subprocess
import sys
import urllib.request
from pathlib import Path


def main() -> int:
    commands = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    if any(b"jupyter" in command for command in commands):
        with urllib.request.urlopen("http://127.0.0.1:8888/api", timeout=10) as answer:  # nosec B310 - a constant
            return int(answer.status != 200)
    if any(b"gcs_server" in command for command in commands):  # the head
        return subprocess.run(["ray", "health-check"], timeout=15, check=False).returncode
    if any(b"ray start" in command.replace(b"\0", b" ") for command in commands):
        return int(not any(b"raylet" in command for command in commands))
    return 0


if __name__ == "__main__":
    sys.exit(main())
