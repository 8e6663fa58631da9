"""Errors that need neither torch nor Ray come before either is loaded, in processes of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

# Runs the command line, then says what was loaded and how much CPU time that took.
CODE = """
import json, sys, time
from recray import cli
sys.argv = ["recray", *json.loads(sys.argv[1])]
code = 0
try:
    cli.main()
except SystemExit as end:
    code = end.code
loaded = sorted({"ray", "torch", "faiss"} & sys.modules.keys())
print(json.dumps([code, loaded, time.process_time()]))
"""


def _run(*arguments: str) -> tuple[str, int, list[str], float]:
    done = subprocess.run(
        [sys.executable, "-c", CODE, json.dumps(arguments)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    code, loaded, seconds = json.loads(done.stdout.splitlines()[-1])
    return done.stderr, code, loaded, seconds


@pytest.fixture
def config(tmp_path: Path) -> str:
    pq.write_table(pa.table({"user": [1, 2], "item": [3, 4], "ts": [1e9, 1e9 + 1]}), tmp_path / "log.parquet")
    path = tmp_path / "my.toml"
    path.write_text(
        f"[run]\noutput = '{tmp_path}/runs'\n[data]\npath = '{tmp_path}/log.parquet'\n"
        "[data.columns]\nuser = 'usr'\nitem = 'item'\ntimestamp = 'ts'\n"
    )
    return str(path)


@pytest.mark.parametrize(
    ("verb", "value", "message"),
    [
        ("prepare", "run.seed=1", "did you mean 'user'?"),
        ("run", "run.seed=1", "did you mean 'user'?"),
        ("train", "optim.lerning_rate=1", "did you mean 'optim.learning_rate'?"),
        ("evaluate", "training.metric=NDCG@10", "did you mean 'ndcg@10'?"),
        ("tune", "training.half_life=soon", "write a number and d, h, m or s"),
        ("index", "run.output=/proc/runs", "choose a folder where you can write"),
        ("run", "run.output={config}/runs", "is no folder"),
        ("train", "run.output=s4://runs", "the scheme 's4://' is not known"),
        ("train", "training.precision=fp16", "needs a GPU"),
    ],
)
def test_an_error_comes_before_torch_and_ray(verb: str, value: str, message: str, config: str) -> None:
    errors, code, loaded, seconds = _run(verb, config, "--set", value.format(config=config))
    assert message in errors and code == 2 and "Traceback" not in errors
    assert not {"torch", "ray"} & set(loaded) and seconds < 2


def test_a_tilde_is_the_home_folder(config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "my.toml"))  # a file, so that nothing can be made below it
    errors, *_ = _run("train", config, "--set", "run.output=~/runs")
    assert f"{tmp_path}/my.toml/runs/run cannot be written" in errors
