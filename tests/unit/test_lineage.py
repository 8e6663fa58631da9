"""Lineage on a small run: every record names what it was made from and by, down to the bytes of the log."""

import hashlib
import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import recray
from helpers.cli import recray_command
from helpers.inline_tasks import inline_prepare
from recray import digests, provenance, storage
from recray.artifacts import Run
from recray.config import Config
from recray.data.sources import parquet
from recray.errors import LineageError
from recray.lineage import diff, lineage
from recray.records import InputFile
from recray.storage import FileInfo

SENTINEL = "s3ntinel-of-a-secret"
SECRETS = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "RAY_AUTH_TOKEN", "MY_DATABASE_PASSWORD")


@dataclass(frozen=True)
class MadeRun:
    config: Config
    uri: str
    log: Path
    output: str  # all that was printed


def _write_log(path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = 4_000
    table = pa.table(
        {
            "user_id": rng.integers(0, 120, rows),
            "item_id": (rng.zipf(1.4, rows) % 60).astype(np.int64),
            "timestamp": 1_600_000_000 + np.arange(rows) * 600,
        }
    )
    pq.write_table(table, path)


def _made(folder: Path, name: str, log: Path, *overrides: str) -> Config:
    config = recray.parse_config(
        {
            "run": {"name": name, "output": str(folder)},
            "data": {"path": str(log)},
            "model": {"name": "two_tower", "dim": 8},
            "training": {"epochs": 2, "global_batch_size": 256},
            "scaling": {"num_workers": 0},
            "evaluation": {"baselines": ["popularity"]},
        },
        overrides,
    )
    inline_prepare(config)
    recray.train(config)
    return config


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> MadeRun:
    folder = tmp_path_factory.mktemp("runs")
    log = folder / "clicks.parquet"
    _write_log(log, 0)
    with pytest.MonkeyPatch.context() as patch:
        for name in SECRETS:
            patch.setenv(name, SENTINEL)
        config = _made(folder, "one", log)
        toml = folder / "one.toml"
        toml.write_text(f'[run]\nname = "one"\noutput = "{folder}"\n[data]\npath = "{log}"\n')
        shown = [recray_command("lineage", config.run_uri, *more) for more in ((), ("--json",), ("--verbose",))]
        shown += [recray_command("index", str(toml)), recray_command("runs", str(folder))]
    return MadeRun(config, config.run_uri, log, "".join(one.out + one.err for one in shown))


def test_the_chain_ends_at_the_bytes_of_the_log(made: MadeRun) -> None:
    node = lineage(made.uri)
    run = Run(made.config)
    assert [one.id for one in node.chain()] == [run.checkpoint().record.id, run.dataset().record.id]
    assert node.complete
    (file,) = run.dataset().record.inputs
    data = made.log.read_bytes()
    expected = InputFile(uri=str(made.log), bytes=len(data), known_by="content", state=hashlib.sha256(data).hexdigest())
    assert file == expected
    assert lineage(run.dataset().uri).as_json()["inputs"] == [expected.model_dump()]


def test_the_command_draws_the_chain_and_says_what_is_missing(made: MadeRun, tmp_path: Path) -> None:
    done = recray_command("lineage", made.uri)
    assert done.code == 0
    checkpoint, dataset, file = done.out.splitlines()
    assert checkpoint.startswith("checkpoint-") and dataset.startswith("  dataset-") and str(made.log) in file
    body = json.loads(recray_command("lineage", made.uri, "--json").out)["values"]
    assert body["parents"][0]["inputs"][0]["uri"] == str(made.log)
    alone = tmp_path / "somewhere" / "checkpoint" / "copy"
    storage.copy_folder(Run(made.config).checkpoint().uri, str(alone))
    record = json.loads((alone / "checkpoint.json").read_text())
    assert record["parents"] == [body["parents"][0]["id"]]
    assert recray_command("lineage", str(alone)).code == 0  # its record says where the dataset is
    nothing = recray_command("lineage", str(tmp_path))
    assert nothing.code == 2 and "holds no artefact and no run" in nothing.err


def test_a_record_says_with_what_it_was_made(made: MadeRun) -> None:
    import pyarrow

    by = Run(made.config).checkpoint().record.made_by
    assert by.versions["recray"] == recray.__version__ and by.versions["pyarrow"] == pyarrow.__version__
    assert by.versions["torch"] == torch.__version__ and by.host == os.uname().nodename
    assert by.devices[0].startswith(f"{os.cpu_count()} CPUs")


def test_no_secret_of_the_environment_is_written_or_printed(made: MadeRun) -> None:
    assert SENTINEL not in made.output
    files = [path for path in Path(made.uri).rglob("*") if path.is_file()]
    assert len(files) > 5
    assert [path for path in files if SENTINEL.encode() in path.read_bytes()] == []


def test_diff_tells_configuration_data_and_result_apart(made: MadeRun, tmp_path: Path) -> None:
    same = _made(tmp_path, "two", made.log)
    assert {name: bool(found) for name, found in diff(made.uri, same.run_uri).items()} == dict.fromkeys(
        ("configuration", "data", "code", "result"), False
    )
    assert recray_command("diff", made.uri, same.run_uri).code == 0
    wider = _made(tmp_path, "two", made.log, "model.dim=16")
    found = diff(made.uri, wider.run_uri)
    assert found["configuration"] == {"model.dim": (8, 16)} and not found["data"] and "ndcg@10" in found["result"]
    changed = tmp_path / "clicks.parquet"
    _write_log(changed, 1)
    other = _made(tmp_path, "three", changed)
    found = diff(made.uri, other.run_uri)
    assert found["configuration"].keys() == {"data.path"} and "fingerprint" in found["data"]
    done = recray_command("diff", made.uri, wider.run_uri)
    assert done.code == 1 and "model.dim  8 -> 16" in done.out and "data: the same" in done.out
    assert recray_command("diff", made.uri, str(tmp_path)).code == 2
    with pytest.raises(LineageError, match="of different stages"):
        diff(made.uri, Run(made.config).dataset().uri)


def test_a_run_remade_from_its_record_alone_has_the_same_weights(made: MadeRun, tmp_path: Path) -> None:
    before = Run(made.config).checkpoint()
    table = {**before.record.config, "run": {**before.record.config["run"], "output": str(tmp_path)}}
    again = Config.model_validate(table)
    inline_prepare(again)
    record = recray.train(again)
    assert (record.value, record.history[0]["loss"]) == (before.record.value, before.record.history[0]["loss"])
    weights = [
        storage.read_bytes(storage.join(uri, "model.safetensors")) for uri in (before.uri, Run(again).checkpoint().uri)
    ]
    assert weights[0] == weights[1]
    assert record.id == before.record.id and record.seconds != before.record.seconds
    assert recray.index(again).id == recray.index(made.config).id


def test_git_names_the_commit_and_whether_files_differ_from_it(tmp_path: Path) -> None:
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    assert provenance._git(tmp_path) is None
    (tmp_path / "model.py").write_text("a = 1\n")
    for arguments in (["init", "-q"], ["add", "model.py"], ["commit", "-qm", "First"]):
        subprocess.run([*git, *arguments], check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    ran = tmp_path / "ran"
    subprocess.run([*git, "config", "core.fsmonitor", f"touch {ran}; false"], check=True)
    assert provenance._git(tmp_path) == provenance.GitState(commit=commit, dirty=False)
    (tmp_path / "model.py").write_text("a = 2\n")
    assert provenance._git(tmp_path) == provenance.GitState(commit=commit, dirty=True)
    assert not ran.exists()  # a repository's configuration runs nothing


def test_very_many_files_are_recorded_by_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [
        InputFile(uri=f"s3://b/day={day}/{i}.parquet", bytes=i, known_by="ETag", state=f"{day}{i}")
        for day in (1, 2)
        for i in range(3)
    ]
    assert parquet._by_folder(files) == files
    monkeypatch.setattr(parquet, "_LISTED_FILES", 5)
    one, two = parquet._by_folder(files)
    assert (one.uri, one.files, one.bytes) == ("s3://b/day=1/", 3, 3) and two.uri == "s3://b/day=2/"
    touched = [*files[:2], files[2].model_copy(update={"state": "new"}), *files[3:]]
    assert [parquet._by_folder(touched)[i].state == was.state for i, was in enumerate((one, two))] == [False, True]


def test_states_are_those_that_the_fingerprint_is_made_of(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(b"abc")
    info = [FileInfo(str(path), 3)]
    states = digests.file_states(info)
    assert states == [("content", hashlib.sha256(b"abc").hexdigest())]
    assert digests.fingerprint(info, states) == digests.fingerprint(info)
