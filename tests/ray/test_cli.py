"""Every verb of the `recray` command: exit codes, and what goes to standard output and to standard error."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
import tomli_w

from helpers.cli import recray_command
from helpers.configs import REPOSITORY, simulated_table
from recray.config import load_config

pytest.importorskip("faiss")


@pytest.fixture(scope="module")
def config(ray_local: None, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A configuration file; its dataset, checkpoint and index are made by the verbs below, through `index`."""
    folder = tmp_path_factory.mktemp("cli")
    table = simulated_table(
        folder / "runs",
        events=4000,
        users=120,
        items=80,
        model={"name": "two_tower", "dim": 8},
        training={"epochs": 1, "global_batch_size": 256},
        scaling={"num_workers": 0},
        evaluation={"k": [10], "bootstrap": 0, "baselines": ["popularity"]},
        retrieval={"k": 20},
        tune={
            "search": "grid",
            "scheduler": "none",
            "top": 0,
            "space": {"optim.learning_rate": {"choices": [0.01, 0.001]}},
        },
    )
    path = folder / "small.toml"
    path.write_text(tomli_w.dumps(table))
    return str(path)


@pytest.fixture(scope="module")
def indexed(config: str) -> str:
    """The configuration of a run whose stages are complete up to the index."""
    for verb, said in (("prepare", "dataset"), ("train", "(validation)"), ("index", "recall@20 = 1.0000")):
        done = recray_command(verb, config)
        assert done.code == 0, done.err
        # One line: where the result is, its id, and its figure.
        (line,) = done.out.splitlines()
        assert said in line and str(Path(config).parent / "runs") in line
    return config


def test_run_reuses_what_the_verbs_made_and_prints_the_report(indexed: str) -> None:
    done = recray_command("run", indexed)
    assert done.code == 0, done.err
    assert "ndcg@10" in done.out and "popularity" in done.out
    for verb in ("prepare", "train", "index"):
        assert f"{verb}: up to date" in done.err


@pytest.mark.parametrize("split", ["test", "valid"])
def test_evaluate(indexed: str, split: str) -> None:
    done = recray_command("evaluate", indexed, "--split", split)
    assert done.code == 0, done.err
    assert "ndcg@10" in done.out and "model" in done.out


def test_recommend_writes_lists_of_the_users_asked_for(indexed: str, tmp_path: Path) -> None:
    pq.write_table(pa.table({load_config(indexed).data.columns.user: pa.array([3, 5, 7])}), tmp_path / "users.parquet")
    done = recray_command(
        "recommend",
        indexed,
        "--output",
        str(tmp_path / "lists"),
        "--users",
        str(tmp_path / "users.parquet"),
        "--k",
        "4",
    )
    assert done.code == 0, done.err
    lists = pa.dataset.dataset(sorted((tmp_path / "lists").glob("part-*.parquet"))).to_table()
    assert lists.num_rows == 3 * 4 and set(lists["user"].to_pylist()) == {3, 5, 7}


def test_tune_prints_its_trials_and_writes_the_winner(indexed: str) -> None:
    done = recray_command("tune", indexed)
    assert done.code == 0, done.err
    assert "trial" in done.out
    (best,) = Path(indexed).parent.glob("runs/small/tune/**/best.toml")
    assert tomllib.loads(best.read_text())["optim"]["learning_rate"] in (0.01, 0.001)


def test_init_prints_a_configuration_that_loads(ray_local: None, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    events = {"user_id": rng.integers(0, 40, 500), "item_id": rng.integers(0, 60, 500)}
    pq.write_table(pa.table({**events, "timestamp": 1_700_000_000 + np.arange(500) * 60}), tmp_path / "log.parquet")
    done = recray_command("init", str(tmp_path / "log.parquet"))
    assert done.code == 0, done.err
    (tmp_path / "my.toml").write_text(done.out)  # `recray init ... > my.toml`
    config = load_config(str(tmp_path / "my.toml"))
    assert (config.data.columns.user, config.data.columns.item) == ("user_id", "item_id")
    assert config.data.columns.timestamp == "timestamp"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "{config}", "--set", "training.epoch=3"], "unknown key 'training.epoch'; did you mean"),
        (["train", "{folder}/none.toml"], "none.toml"),
        (["init", "{folder}/none"], "none"),
        (["index", "{config}", "--set", "run.name=never-prepared"], "run `recray prepare` with it first"),
        (["submit", "{config}", "--address", "http://127.0.0.1:9"], "no Ray dashboard answers at http://127.0.0.1:9"),
    ],
    ids=["unknown key", "no file", "no log", "not prepared", "no cluster"],
)
def test_an_error_is_on_stderr_and_exit_code_2(config: str, arguments: list[str], message: str) -> None:
    if arguments[0] == "submit":
        pytest.importorskip("aiohttp", reason="jobs need ray[default]")
    words = [word.format(config=config, folder=Path(config).parent) for word in arguments]
    done = recray_command(*words)
    assert (done.code, done.out) == (2, "")
    first, *problems = done.err.splitlines()
    # One line; a configuration's problems follow, one line each.
    assert first.partition(":")[0].endswith("Error") and message in done.err
    assert all(line.startswith("  - ") for line in problems) and ("problem" in first) is bool(problems)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian", "my.toml"], "No such command 'trian'"),
        (["train"], "Missing argument"),
        (["recommend", "my.toml"], "--output"),
    ],
)
def test_wrong_usage_is_exit_code_2(arguments: list[str], message: str) -> None:
    done = recray_command(*arguments)
    assert (done.code, done.out) == (2, "") and message in done.err


def test_help_names_every_verb() -> None:
    done = recray_command("--help")
    assert done.code == 0
    for verb in (
        "init",
        "run",
        "prepare",
        "train",
        "tune",
        "index",
        "evaluate",
        "recommend",
        "submit",
        "doctor",
        "runs",
        "prune",
    ):
        assert verb in done.out
        assert recray_command(verb, "--help").code == 0


def test_json_is_one_object_a_line_on_stdout(indexed: str) -> None:
    done = recray_command("train", indexed, "--json")
    assert (done.code, done.err) == (0, "")
    said = [json.loads(line) for line in done.out.splitlines()]
    assert {one["stage"] for one in said} == {"train"}
    assert said[-1]["values"]["uri"].startswith(str(Path(indexed).parent / "runs"))
    assert said[-1]["values"]["epoch"] == 1


def test_quiet_says_nothing_but_the_result(indexed: str) -> None:
    done = recray_command("prepare", indexed, "--quiet")
    assert (done.code, done.err, len(done.out.splitlines())) == (0, "", 1)


def test_runs_lists_artefacts_and_prune_deletes_none_in_use(indexed: str) -> None:
    listed = recray_command("runs", str(Path(indexed).parent / "runs"))
    assert listed.code == 0, listed.err
    for stage in ("dataset", "checkpoint", "index"):
        assert any(stage in line and "in use" in line for line in listed.out.splitlines())
    pruned = recray_command("prune", indexed, "--keep", "0", "--yes")
    assert pruned.code == 0, pruned.err
    assert recray_command("runs", str(Path(indexed).parent / "runs")).out.count("in use") == listed.out.count("in use")


def test_doctor_names_the_machines_parts(ray_local: None) -> None:
    done = recray_command("doctor", "--env")
    # The exit code tells whether this machine is in order, which is not what is tested here.
    assert done.code in (0, 1), done.err
    assert all(name in done.out for name in ("python", "torch", "ray", "faiss"))


def test_the_installed_command_ends_with_the_same_codes(config: str) -> None:
    """Once as a process: nothing but the message on stderr, nothing from Ray."""
    command = [sys.executable, "-m", "recray", "train", config, "--set", "training.epochs=0"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("ConfigError: 1 problem in ") and len(done.stderr.splitlines()) == 2
    assert "training.epochs: " in done.stderr and "(given: 0)" in done.stderr
