"""Sweeps under Ray Tune: end to end, stopped early, failed, killed and resumed."""

import importlib.util
import json
import os
import stat
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

import pytest

import recray
from helpers.configs import simulated_table
from helpers.runs import dataset_of
from recray import storage
from recray.artifacts import CHECKPOINT, in_use
from recray.config import Config, load_config, parse_config
from recray.errors import StorageError
from recray.records import TrialRecord, TuneRecord
from recray.tuning.store import sweep_uri

pytestmark = pytest.mark.timeout(450)  # a sweep starts Ray twice, and a busy machine triples its time

SPACE = {
    # Tried in the order 1e-2, 1e-5, 1e30, 5e-3: ASHA shuffles a grid.
    "optim.learning_rate": {"choices": [1e30, 1e-5, 1e-2, 5e-3]},
    "model.dim": {"choices": [16]},
}


def _table(folder: Path, space: dict[str, Any] = SPACE, **tune: Any) -> dict[str, Any]:
    return simulated_table(
        folder,
        events=6000,
        users=200,
        items=100,
        model={"name": "two_tower", "dim": 8},
        training={"epochs": 4, "global_batch_size": 256},
        scaling={"num_workers": 0},
        tune={"search": "grid", "top": 1, "seeds": 2, "space": space, **tune},
    )


def _checkpoints(trial: str | Path) -> list[Path]:
    return list(Path(trial).glob("checkpoint/*"))


def _epochs(trial: str | Path) -> list[Path]:
    """What a trial could resume from."""
    return list(Path(trial).glob("checkpoint/*/epochs"))


@pytest.fixture(scope="module")
def sweep(ray_local: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, TuneRecord]:
    """A complete sweep, over a dataset whose test split is overwritten before it starts: reading it would be refused."""
    # One trial at a time, so that what a trial is compared with does not depend on timing.
    config = parse_config(_table(tmp_path_factory.mktemp("sweep"), concurrent=1))
    recray.prepare(config)
    for shard in Path(dataset_of(config).uri, "test").iterdir():
        shard.write_bytes(bytes(shard.stat().st_size))
    return config, recray.tune(config)


def test_every_trial_has_a_record_and_the_best_a_checkpoint(sweep: tuple[Config, TuneRecord]) -> None:
    config, record = sweep
    assert [trial.number for trial in record.trials] == [1, 2, 3, 4]
    folder = sweep_uri(config)
    for trial in record.trials:
        own = TrialRecord.read(f"{folder}/trials/{trial.number:04d}")
        assert own.trial == trial
        assert own.config["optim"]["learning_rate"] == trial.values["optim.learning_rate"]
        assert (own.config["model"]["dim"], own.config["run"]["dataset"]) == (16, dataset_of(config).uri)
        assert not storage.exists(f"{folder}/trials/{trial.number:04d}/dataset")
    first = record.trials[0]
    assert (first.status, [one.epoch for one in first.curve]) == ("done", [1, 2, 3, 4])
    checkpoint = in_use(f"{folder}/trials/0001", CHECKPOINT)
    assert not storage.exists(f"{checkpoint.uri}/epochs")
    assert checkpoint.record.value == first.best == max(one.value for one in first.curve)


def test_a_trial_that_diverges_is_recorded_with_its_reason(sweep: tuple[Config, TuneRecord]) -> None:
    failed = sweep[1].trials[2]
    assert failed.status == "failed" and failed.best is None
    assert failed.reason.startswith("RecrayError: the loss is ") and "lower optim.learning_rate" in failed.reason


def test_a_trial_that_learns_nothing_is_stopped_early(sweep: tuple[Config, TuneRecord]) -> None:
    config, record = sweep
    slow = record.trials[1]
    assert slow.status == "pruned" and slow.epochs < 4
    assert _checkpoints(f"{sweep_uri(config)}/trials/0002") == []


def test_the_winner_is_trained_on_other_seeds_and_written_as_a_configuration(sweep: tuple[Config, TuneRecord]) -> None:
    config, record = sweep
    (finalist,) = record.finalists
    assert finalist.seeds == [2, 3] and finalist.number == record.winner
    assert finalist.mean == pytest.approx(sum(finalist.results) / 2)
    folder = Path(sweep_uri(config))
    best = load_config(str(folder / "best.toml"))
    assert best.optim.learning_rate == finalist.values["optim.learning_rate"]
    assert (best.run.dataset, best.run.name) == (f"{config.run_uri}/dataset", "small-best")
    assert "tune" not in tomllib.loads((folder / "best.toml").read_text())
    winner = next(trial for trial in record.trials if trial.number == record.winner)
    assert winner.best is not None
    # Other numbers of threads sum in another order.
    assert recray.train(best).value == pytest.approx(winner.best, rel=0.05)
    if importlib.util.find_spec("plotly") is not None:
        assert "Plotly.newPlot(" in (folder / "tune.html").read_text()


def test_a_sweep_that_is_complete_trains_nothing_again(sweep: tuple[Config, TuneRecord]) -> None:
    config, record = sweep
    files = sorted(Path(config.run_uri).rglob("tr*.json"))
    before = [file.stat().st_mtime_ns for file in files]
    again = recray.tune(config)
    assert (again.trials, again.retrained) == (record.trials, record.retrained)
    assert [file.stat().st_mtime_ns for file in files] == before


@pytest.mark.usefixtures("ray_local")
def test_trials_with_another_metric_are_another_sweep(sweep: tuple[Config, TuneRecord]) -> None:
    """Seen items in the lists (evaluation.filter_seen) change every value; both kinds once ended up in one ranking."""
    config, record = sweep
    tune = {"scheduler": "none", "top": 0, "concurrent": 1}
    space = {"optim.learning_rate": {"choices": [1e-2]}}
    other = parse_config(_table(Path(config.run.output), space, **tune), ["training.epochs=1"])
    unfiltered = parse_config(other.model_dump(mode="json", exclude_unset=True), ["evaluation.filter_seen=false"])
    values = [recray.tune(one).trials[0].best for one in (other, unfiltered)]
    assert len({sweep_uri(one) for one in (config, other, unfiltered)}) == 3
    assert values[0] != values[1]
    assert recray.tune(config).trials == record.trials


def test_a_dataset_elsewhere_is_fetched_once_for_a_node(
    sweep: tuple[Config, TuneRecord], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from recray.tuning.trial import on_this_node

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    original = dataset_of(sweep[0])
    assert on_this_node(original.uri) == original
    local = on_this_node(f"file://{original.uri}")
    assert Path(local.uri).parent.parent == tmp_path and not Path(local.uri, "test").exists()
    assert local.record == original.record
    for split in ("train", "valid"):
        assert list(local.iter_tables(split)) == list(original.iter_tables(split))
    (Path(local.uri) / "items.parquet").write_text("mine")
    assert (Path(on_this_node(f"file://{original.uri}").uri) / "items.parquet").read_text() == "mine"


@pytest.mark.parametrize("attack", ["link", "open to others", "file"])
def test_a_folder_for_temporary_files_that_another_user_prepared_is_refused(
    attack: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its name can be guessed; in /tmp another user may make it first."""
    from recray.tuning import trial

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder, elsewhere = tmp_path / f"recray-{os.getuid()}", tmp_path / "elsewhere"
    elsewhere.mkdir(0o700)
    if attack == "link":
        folder.symlink_to(elsewhere)
    elif attack == "file":
        folder.touch()
    else:
        folder.mkdir()
        folder.chmod(0o777)
    with pytest.raises(StorageError, match=rf"recray-{os.getuid()} is not a folder that only user"):
        trial._own_folder()
    folder.unlink() if attack != "open to others" else folder.rmdir()
    assert trial._own_folder() == trial._own_folder() == str(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


@pytest.mark.usefixtures("ray_local")
def test_epochs_are_a_budget_and_a_larger_one_resumes(tmp_path: Path) -> None:
    space = {"optim.learning_rate": {"choices": [1e-2, 5e-3, 2e-3]}}
    options = {"scheduler": "none", "top": 0, "concurrent": 1}
    short = recray.tune(parse_config(_table(tmp_path, space, epochs=6, **options)))
    assert [(trial.status, trial.epochs) for trial in short.trials] == [("done", 4), ("interrupted", 2)]
    whole = recray.tune(parse_config(_table(tmp_path, space, **options)))
    assert [(trial.status, trial.epochs) for trial in whole.trials] == [("done", 4)] * 3
    assert whole.trials[1].curve[:2] == short.trials[1].curve


@pytest.mark.usefixtures("ray_local")
def test_a_trial_paused_at_a_rung_resumes_there(tmp_path: Path) -> None:
    """One trial at a time, rungs after 1 and 2 of 4 epochs; the first start stops after one epoch of two trials."""
    space = {"optim.learning_rate": {"choices": [5e-3, 1e-5, 1e-2, 2e-3]}}  # tried as 1e-2, 1e-5, 5e-3, 2e-3
    options = {"reduction_factor": 2, "top": 0, "concurrent": 1}
    short = recray.tune(parse_config(_table(tmp_path, space, epochs=2, **options)))
    assert [trial.values["optim.learning_rate"] for trial in short.trials] == [1e-2, 1e-5]
    assert [(trial.status, trial.epochs) for trial in short.trials] == [("paused", 1)] * 2
    config = parse_config(_table(tmp_path, space, **options))
    whole = recray.tune(config)
    assert {trial.status for trial in whole.trials} == {"done", "pruned"} and len(whole.trials) == 4
    for trial in whole.trials:
        assert [one.epoch for one in trial.curve] == list(range(1, trial.epochs + 1))
        assert not _epochs(f"{sweep_uri(config)}/trials/{trial.number:04d}")
    first, slow, *_ = whole.trials
    assert first.epochs > 1 and first.curve[:1] == short.trials[0].curve  # its seconds too: it was not trained again
    assert slow.epochs == 1 and slow.curve == short.trials[1].curve
    assert max(trial.epochs for trial in whole.trials) == 4


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_trials_of_several_workers_pause_and_resume(tmp_path: Path) -> None:
    """In another process, on a Ray of its own with the CPUs of one such trial: a paused one must hold none."""
    table = _table(tmp_path, {"optim.learning_rate": {"choices": [1e-5, 1e-2]}}, top=0)
    table["scaling"], table["training"]["epochs"] = {"num_workers": 2, "reader": "worker"}, 2
    (tmp_path / "sweep.json").write_text(json.dumps(table))
    code = (
        "import json, sys, ray, recray; from recray.config import parse_config\n"
        "ray.init(address='local', num_cpus=4, include_dashboard=False)\n"
        "recray.tune(parse_config(json.load(open(sys.argv[1]))))"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "sweep.json")], check=True, timeout=500)
    folder = sweep_uri(parse_config(table))
    trials = TuneRecord.read(folder).trials
    ended = {
        trial.values["optim.learning_rate"]: (trial.status, [one.epoch for one in trial.curve]) for trial in trials
    }
    assert ended == {1e-2: ("done", [1, 2]), 1e-5: ("pruned", [1])}
    for trial in trials:
        assert not _epochs(f"{folder}/trials/{trial.number:04d}")


@pytest.mark.slow
@pytest.mark.usefixtures("ray_local")
def test_a_population_copies_weights_and_stays_inside_its_ranges(tmp_path: Path) -> None:
    space = {
        "optim.learning_rate": {"low": 1e-5, "high": 1e-2, "log": True},
        "model.dropout": {"low": 0.0, "high": 0.5},
    }
    table = _table(tmp_path, space, search="pbt", trials=4, perturb_epochs=1, top=0)
    record = recray.tune(parse_config(table, ["training.epochs=8"]))
    assert [trial.status for trial in record.trials] == ["done"] * 4
    assert all(trial.epochs == 8 for trial in record.trials)
    switches = [switch for trial in record.trials for switch in trial.switches]
    assert switches
    for values in [*switches, *(trial.values for trial in record.trials)]:
        assert 1e-5 <= values["optim.learning_rate"] <= 1e-2 and 0 <= values["model.dropout"] <= 0.5


ODD = """
import os
import shutil
from recray.models import two_tower

class Options(two_tower.Options):
    name: str = "odd_model"

def build(options, dataset, items):
    if options.dim == 5:
        os.kill(os.getpid(), 9)
    if options.dim == 6:
        raise MemoryError("cannot allocate")
    return two_tower.build(options, dataset, items)
"""


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", ["none", "asha"])
def test_a_killed_sweep_resumes_and_a_killed_trial_does_not_stop_it(tmp_path: Path, scheduler: str) -> None:
    """kill -9 on the driver after three lines about trials; the next start does the rest, and nothing twice."""
    (tmp_path / "odd_models").mkdir()
    (tmp_path / "odd_models" / "odd.py").write_text(ODD)
    space = {"model.dim": {"choices": [16, 5, 12, 6, 8, 10]}}
    table = _table(tmp_path, space, top=0, scheduler=scheduler, reduction_factor=2, concurrent=2)
    table["model"]["name"], table["training"]["epochs"] = "odd_models.odd", 12
    (tmp_path / "sweep.json").write_text(json.dumps(table))
    code = (
        "import json, sys, recray; from recray import log; from recray.config import parse_config\n"
        "log.configure('plain', stream=sys.stdout)\n"
        "recray.tune(parse_config(json.load(open(sys.argv[1]))))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "sweep.json")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), str(tmp_path)])}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as child:
        assert child.stdout is not None
        count = 0
        for line in child.stdout:
            count += line.startswith("tune: search ")
            if count == 3:
                child.kill()
    (trials,) = tmp_path.glob("small/tune/*/trials")
    first = {path: TrialRecord.read(str(path.parent)).trial for path in trials.glob("*/trial.json")}
    assert first
    written = {path: path.stat().st_mtime_ns for path, trial in first.items() if trial.finished}
    assert len(written) < 6
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    assert all(path.stat().st_mtime_ns == at for path, at in written.items())
    record = TuneRecord.read(str(trials.parent))
    by_dim = {trial.values["model.dim"]: trial for trial in record.trials}
    assert sorted(by_dim) == [5, 6, 8, 10, 12, 16] and len(record.trials) == 6
    reasons = {dim: trial.reason for dim, trial in by_dim.items() if trial.status == "failed"}
    assert reasons.keys() == {5, 6}, reasons
    assert "its process was killed" in by_dim[5].reason
    assert by_dim[6].reason == "MemoryError: cannot allocate"
    for dim, trial in by_dim.items():
        assert [one.epoch for one in trial.curve] == list(range(1, trial.epochs + 1))
        assert (trial.epochs == 12) is (trial.status == "done")
        assert trial.status == "done" or dim in (5, 6) or scheduler == "asha"
        assert not _epochs(trials / f"{trial.number:04d}")
    for path, trial in first.items():  # a paused trial did not train its epochs again: their seconds are the same
        (now,) = (one for one in record.trials if one.number == trial.number)
        assert now.curve[: trial.epochs] == trial.curve, path
    if scheduler == "asha":  # rungs after 1, 2, 4 and 8 epochs; at least one of the four completes
        states = [by_dim[dim].status for dim in (8, 10, 12, 16)]
        assert set(states) == {"done", "pruned"}
