"""Artefacts: which configuration keys decide which stage, identities, current.json, listing and pruning."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from pydantic import BaseModel

from recray import inventory, sealed, storage
from recray.artifacts import (
    CHECKPOINT,
    DATASET,
    INDEX,
    NO_RESULT,
    STAGES,
    Artifact,
    Run,
    artifacts_of,
    differences,
    flatten,
    identity_of,
    in_use,
)
from recray.artifacts.stage import _ADDED
from recray.config import Config, parse_config, with_values
from recray.errors import ConfigError, LineageError
from recray.records import CheckpointRecord, DatasetRecord, Record

# Which stages are made again when a key changes, before a change of their inputs is counted. The longest prefix of a key
# decides. "-": no stage. A stage whose input changes is made again, too: see test_a_change_reaches_the_stages_behind_it.
_EVALUATION = "report report-valid"
_TRAINING = "checkpoint tune"
TABLE = {
    "run.name": "-",
    "run.output": "-",
    "run.dataset": "-",
    "run.keep": "-",
    "run.plugins": "-",
    "run.seed": f"dataset index {_EVALUATION} {_TRAINING}",
    "data": "dataset",
    "model": _TRAINING,
    "loss": _TRAINING,
    "loss.chunk_size": "-",
    "optim": _TRAINING,
    "training": _TRAINING,
    "training.resume": "-",
    "training.compile": "-",
    "training.save_every": "-",
    "training.refit": "checkpoint",
    "scaling": "-",
    "retrieval": "index",
    "retrieval.k": f"index {_EVALUATION}",
    "retrieval.ranker": _EVALUATION,
    "retrieval.item_knn_weight": _EVALUATION,
    "evaluation": _EVALUATION,
    "evaluation.batch_size": "-",
    "promotion": "-",
    "report": "-",
    "tracking": "-",
    "evaluation.filter_seen": f"{_EVALUATION} {_TRAINING}",
    "evaluation.queries": f"index {_EVALUATION} {_TRAINING}",
    "tune": "tune",
    "tune.trials": "-",
    "tune.seconds": "-",
    "tune.epochs": "-",
    "tune.concurrent": "-",
    "tune.cpus_per_trial": "-",
    "tune.gpus_per_trial": "-",
    "tune.top": "-",
    "tune.seeds": "-",
}
RANKER = {
    "evaluation.filter_seen": _EVALUATION,
    "evaluation.max_queries": _EVALUATION,
    "evaluation.queries": f"index {_EVALUATION}",
}

CONFIGS = {
    "two_tower": {"model": {"name": "two_tower"}},
    "sasrec": {"model": {"name": "sasrec"}, "loss": {"name": "softmax"}},
    "gbce": {"loss": {"name": "gbce"}, "data": {"source": "simulated"}},
    "din": {"model": {"name": "din"}},
    "dlrm": {"model": {"name": "dlrm"}},
    "dcn_v2": {"model": {"name": "dcn_v2"}},
    "wide_deep": {"model": {"name": "wide_deep"}},
}

_FIXED = {("dlrm", "model.feature_dims")}  # refused by this model, whatever its value


def _expected(key: str, table: dict[str, str]) -> set[str]:
    rows = [row for row in table if key == row or key.startswith(f"{row}.")]
    assert rows, f"'{key}' is a new key: say in the table which stages it decides"
    return set(table[max(rows, key=len)].split()) - {"-"}


def _moved(before: Config, after: Config) -> set[str]:
    return {s.name for s in STAGES if identity_of(s.values(before), []) != identity_of(s.values(after), [])}


def _alternatives(config: Config, key: str) -> Iterator[Any]:
    """Other values of a key, likely ones first; some are refused."""
    section: BaseModel = config
    *path, name = key.split(".")
    for part in path:
        section = section.options if part == config.data.source else getattr(section, part)
    value, kind = getattr(section, name), type(section).model_fields[name].annotation
    kinds = [kind, *get_args(kind)]
    yield from (choice for k in kinds if get_origin(k) is Literal for choice in get_args(k) if choice != value)
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, int | float):
        yield from (value * 2, value + 1, value / 2, 0.5)
    elif isinstance(value, str):
        yield from ("two", "12h", "ndcg@20", "log_loss", "recall@20", "2", "other")
    elif isinstance(value, list):
        yield from ([], [16], [7, 8], ["other"], ["popularity"], ["recall"], ["auc"], ["mlflow"])
    elif isinstance(value, dict):
        yield from (
            {"recent_popularity": {"window": "2h"}},
            {"mlflow": {"experiment": "other"}},
            {"x": {"kind": "numeric"}},
            {"optim.learning_rate": {"choices": [1e-3]}},
        )
    yield from ({"x": 4}, 4, 0.25, "12h", "2017-10-08T03:00:00Z", ["a"], {}, {"per_positive": 2}, True)


def _keys(config: Config) -> list[str]:
    """Dotted keys of every value of a configuration; a table with free names is one value."""
    found = []

    def walk(section: BaseModel, prefix: str) -> None:
        for name in type(section).model_fields:
            value = getattr(section, name)
            if isinstance(value, BaseModel):
                # A source's options are the table with the source's name.
                walk(value, f"{prefix}{config.data.source if name == 'options' else name}.")
            else:
                found.append(f"{prefix}{name}")

    walk(config, "")
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_a_changed_key_moves_the_stages_of_the_table(name: str) -> None:
    config = parse_config(CONFIGS[name])
    table = TABLE | (RANKER if config.model.family == "ranker" else {})
    walked = 0
    for key in _keys(config):
        if key in ("model.name", "loss.name", "data.source"):
            continue  # another name brings other keys with it: below
        changed = None
        for value in _alternatives(config, key):
            try:
                changed = with_values(config, {key: value})
            except ConfigError:
                continue
            if flatten(changed.model_dump(mode="json")) != flatten(config.model_dump(mode="json")):
                break
            changed = None
        if changed is None:
            assert (name, key) in _FIXED, f"no other value found for {key}"
            continue
        # A value that has another follow (a default that depends on it) would move more.
        assert _moved(config, changed) == _expected(key, table), key
        walked += 1
    assert walked > 90


def test_another_model_or_loss_moves_training() -> None:
    config = parse_config({})
    assert _moved(config, with_values(config, {"model.name": "sasrec"})) == {"checkpoint", "tune"}
    assert _moved(config, with_values(config, {"loss.name": "gbce"})) == {"checkpoint", "tune"}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_key_is_claimed_by_a_stage_or_declared_without_result(name: str) -> None:
    config = with_values(parse_config(CONFIGS[name]), dict.fromkeys(_ADDED, 100))  # claimed where they are set
    claimed = set().union(*(stage.values(config) for stage in STAGES))
    declared = {
        key for key in flatten(config.model_dump(mode="json")) for no in NO_RESULT if (key + ".").startswith(no + ".")
    }
    assert claimed | declared == set(flatten(config.model_dump(mode="json")))
    assert not claimed & declared


def _config(tmp_path: Path, **values: Any) -> Config:
    return with_values(parse_config({"run": {"output": str(tmp_path), "name": "r"}}), values)


def _dataset(config: Config, log: str = "log-1") -> Artifact[DatasetRecord]:
    """A prepared dataset without its files."""
    run = Run(config)
    artifact = run.artifact(DATASET, [log])
    if run.begin(artifact):
        DatasetRecord(
            **artifact.lineage,
            fingerprint=log,
            num_items=3,
            num_users=3,
            counts={"events_train": 1, "events_valid": 1, "events_test": 1},
            shards={"train": [], "valid": [], "test": []},
            seed=1,
        ).write(artifact.uri)
        run.publish(artifact)
    return artifact


def _checkpoint(config: Config) -> Artifact[CheckpointRecord]:
    run = Run(config)
    artifact = run.artifact(CHECKPOINT, [run.dataset().record.id])
    if run.begin(artifact):
        record = CheckpointRecord(
            **artifact.lineage, epoch=1, step=1, rows=1, metric="ndcg@10", value=0.1, dataset_uri=run.dataset().uri
        )
        record.write(artifact.uri)
        run.publish(artifact)
    return artifact


def test_changing_a_value_keeps_the_old_artefact_and_changing_it_back_finds_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="recray")
    wide, narrow = _config(tmp_path), _config(tmp_path, **{"model.dim": 8})
    _dataset(wide)
    first, second = _checkpoint(wide), _checkpoint(narrow)
    assert first.uri != second.uri and first.complete() and second.complete()
    assert "train: new artefact" in caplog.text and "model.dim 64 -> 8" in caplog.text
    assert Run(wide).current()["checkpoint"] == second.identity
    assert os.readlink(tmp_path / "r/checkpoint/current") == second.identity
    caplog.clear()
    assert not Run(wide).begin(Run(wide).checkpoint())
    assert f"train: up to date ({first.identity})" in caplog.text
    assert Run(wide).current()["checkpoint"] == first.identity
    assert os.readlink(tmp_path / "r/checkpoint/current") == first.identity


def test_a_change_reaches_the_stages_behind_it(tmp_path: Path) -> None:
    config, other = _config(tmp_path), _config(tmp_path, **{"data.min_user_events": 5})
    _dataset(config), _dataset(other)
    _checkpoint(config), _checkpoint(other)
    mine, its = Run(config), Run(other)
    assert mine.dataset().identity != its.dataset().identity
    assert mine.checkpoint().identity != its.checkpoint().identity  # no key of its own differs
    assert CHECKPOINT.values(config) == CHECKPOINT.values(other)
    assert mine.index_artifact().identity != its.index_artifact().identity
    assert mine.index() is None


def test_what_is_missing_is_named_with_what_differs(tmp_path: Path) -> None:
    config = _config(tmp_path)
    with pytest.raises(
        LineageError, match=r"no dataset of this configuration in .*: run `recray prepare` with it first"
    ):
        Run(config).dataset()
    _dataset(config)
    with pytest.raises(LineageError, match=r"run `recray prepare`.*nearest is .*: data.min_item_events 1 -> 40"):
        Run(_config(tmp_path, **{"data.min_item_events": 40})).dataset()
    _checkpoint(config)
    with pytest.raises(LineageError, match=r"run `recray train`.*nearest is .*: model.dim 64 -> 32"):
        Run(_config(tmp_path, **{"model.dim": 32})).checkpoint()


def test_of_two_datasets_of_one_configuration_the_one_in_use_is_taken(tmp_path: Path) -> None:
    config = _config(tmp_path)
    old, new = _dataset(config, "log-1"), _dataset(config, "log-2")
    assert Run(config).dataset().identity == new.identity
    Run(config).publish(old)
    assert Run(config).dataset().identity == old.identity


def test_a_dataset_of_another_run(tmp_path: Path) -> None:
    artifact = _dataset(_config(tmp_path))
    for place in (artifact.uri, str(tmp_path / "r/dataset"), str(tmp_path / "r/dataset/current")):
        config = _config(tmp_path, **{"run.name": "other", "run.dataset": place})
        assert Run(config).dataset().record == artifact.record
    with pytest.raises(LineageError, match=r"was prepared with other values: run.seed 1 -> 7"):
        Run(_config(tmp_path, **{"run.dataset": artifact.uri, "run.seed": 7})).dataset()


def test_a_folder_that_holds_something_else_is_refused(tmp_path: Path) -> None:
    config = _config(tmp_path)
    artifact = _dataset(config)
    file = f"{artifact.uri}/identity.json"
    sealed.write(file, sealed.read(file, "") | {"keys": {"data.path": "elsewhere"}})
    with pytest.raises(LineageError, match="holds an artefact of another configuration"):
        Run(config).artifact(DATASET, ["log-1"])
    Path(artifact.uri, "identity.json").write_text("{")
    with pytest.raises(LineageError, match=r"identity.json is damaged .*: delete the folder"):
        Run(config).artifact(DATASET, ["log-1"])


def test_what_a_run_uses_is_found_by_its_folder(tmp_path: Path) -> None:
    config = _config(tmp_path)
    _dataset(config)
    artifact = _checkpoint(config)
    for place in (str(tmp_path / "r"), artifact.uri, str(tmp_path / "r/checkpoint/current")):
        assert in_use(place, CHECKPOINT).record.id == artifact.record.id
    with pytest.raises(LineageError, match="holds no index: give the folder of a run that `recray index` made"):
        in_use(str(tmp_path / "r"), INDEX)


def test_differences_are_short() -> None:
    assert differences({"a": 1, "b": 2}, {"a": 1, "b": 2}) == ""
    assert differences({"a": 1}, {"b": "x" * 50}) == f"a 1 -> unset, b unset -> {'x' * 37}..."
    assert differences(dict.fromkeys("abcdef", 1), dict.fromkeys("abcdef", 2)).endswith("d 1 -> 2 and 2 more")


def _age(artifact: Artifact[Record], days: int) -> None:
    """Say that a record is so old."""
    file = f"{artifact.uri}/{artifact.stage.record.file_name()}"
    sealed.write(file, sealed.read(file, "") | {"created": f"2026-01-{31 - days:02d}T00:00:00+00:00"})


def test_prune_keeps_what_is_in_use_the_newest_and_their_inputs(tmp_path: Path) -> None:
    configs = [_config(tmp_path, **{"model.dim": dim}) for dim in (8, 16, 32, 64)]
    data = [_dataset(_config(tmp_path, **{"data.min_user_events": n})) for n in (0, 2)]
    made = [_checkpoint(config) for config in configs]
    for days, one in enumerate(reversed(made)):
        _age(one, days)
    _age(data[0], 20), _age(data[1], 10)
    Run(configs[0]).publish(made[0])  # the oldest is in use
    (tmp_path / "r/checkpoint/mine").mkdir()  # a folder of the user
    (tmp_path / "r/checkpoint/mine/notes.txt").write_text("keep")
    run = str(tmp_path / "r")
    assert {e.identity for e in inventory.prunable(run, keep=1)} == {made[1].identity, made[2].identity}
    assert all(one.complete() for one in made)  # a dry run
    assert len(inventory.list_artifacts(run)) == 6
    deleted = inventory.prune(run, keep=1)
    assert {e.identity for e in deleted} == {made[1].identity, made[2].identity}
    left = {one.identity for one in artifacts_of(f"{run}/checkpoint", CHECKPOINT)}
    assert left == {made[0].identity, made[3].identity}
    # Every checkpoint that is kept was made from the older dataset: it stays, although it is not among the newest.
    assert {one.identity for one in artifacts_of(f"{run}/dataset", DATASET)} == {one.identity for one in data}
    assert (tmp_path / "r/checkpoint/mine/notes.txt").read_text() == "keep"


def test_runs_are_listed_with_metric_age_and_size(tmp_path: Path) -> None:
    config = _config(tmp_path)
    _dataset(config), _checkpoint(config)
    dataset, checkpoint = inventory.list_runs(str(tmp_path))
    assert (dataset.run, dataset.stage, dataset.in_use, dataset.summary) == ("r", "dataset", True, "3 events")
    assert (checkpoint.stage, checkpoint.summary) == ("checkpoint", "ndcg@10 0.1000 at epoch 1")
    assert checkpoint.bytes == sum(f.stat().st_size for f in Path(checkpoint.uri).iterdir())
    assert checkpoint.age_seconds is not None and 0 <= checkpoint.age_seconds < 60
    storage.write_json(f"{tmp_path}/r/checkpoint/current.json", {})  # not an artefact
    assert len(inventory.list_runs(str(tmp_path))) == 2


def test_prune_keeps_what_another_run_was_made_from(tmp_path: Path) -> None:
    mine = [_dataset(_config(tmp_path, **{"data.min_user_events": n})) for n in (0, 2)]
    _age(mine[0], 20), _age(mine[1], 10)
    shared = {"run.name": "other", "run.dataset": str(tmp_path / "r/dataset")}
    assert [one.identity for one in inventory.prunable(str(tmp_path / "r"), keep=0)] == [mine[0].identity]
    _checkpoint(_config(tmp_path, **shared))
    assert inventory.prunable(str(tmp_path / "r"), keep=0) == []
