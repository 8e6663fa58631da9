"""One flipped bit anywhere in an artefact is refused by name, or changes nothing; and what `recray verify` says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import recray
from helpers import damage
from helpers.small_run import make_run, small_config
from recray import cli, digests, sealed
from recray.artifacts import DATASET, Run, identity_of
from recray.data.dataset import PreparedDataset
from recray.errors import LineageError, StorageError
from recray.records import CheckpointRecord, DatasetRecord, ReportRecord
from recray.training import checkpoint
from recray.verification import verify

TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    make_run(small_config(folder))
    return folder


def _flip(output: Path, kind: str, flips: int, seed: int) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])}
    command = [sys.executable, damage.__file__, str(output), kind, str(flips), str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert [one for one in results if one["ended"] not in ("same", "refused")] == []
    assert done.returncode == 0, done.stderr[-2000:]  # it neither crashed nor changed a file
    assert len(results) == flips
    # Only JSON has bits without a meaning: white space, and the names of seals.
    assert all(one["ended"] == "refused" or one["file"].endswith(".json") for one in results)
    assert sum(one["ended"] == "refused" for one in results) > flips / 3  # a report is drawn without its identity.json


@pytest.mark.parametrize("kind", damage.USES)
def test_a_flipped_bit_is_refused_by_name(output: Path, kind: str) -> None:
    _flip(output, kind, 15, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", damage.USES)
def test_two_hundred_flipped_bits_are_refused_by_name(output: Path, kind: str) -> None:
    _flip(output, kind, 200, seed=2)


def test_a_missing_part_is_named(output: Path) -> None:
    config = small_config(output)
    for artifact in (Run(config).dataset(), Run(config).checkpoint(), Run(config).index()):
        assert artifact is not None
        for name in artifact.record.files:
            file = Path(artifact.uri, name)
            data = file.read_bytes()
            file.unlink()
            with pytest.raises(StorageError, match=rf"{name} is missing: restore it"):
                digests.check_present(artifact.uri, artifact.record.files)
            file.symlink_to(__file__)
            with pytest.raises(StorageError, match=rf"{name} is damaged \(a link"):
                digests.check_present(artifact.uri, artifact.record.files)
            file.unlink()
            file.write_bytes(data)
    dataset = Run(config).dataset()
    part = Path(dataset.uri, "users/part-00001.parquet")
    data = part.read_bytes()
    part.unlink()
    with pytest.raises(StorageError, match=r"users/part-00001\.parquet is missing"):
        recray.recommend(config, str(output / "others"))
    part.write_bytes(data)


def test_a_dataset_that_is_a_link_inside_is_refused(output: Path, tmp_path: Path) -> None:
    config = small_config(output)
    train = Path(Run(config).dataset().uri, "train")
    train.rename(tmp_path / "train")
    train.symlink_to(tmp_path / "train")
    with pytest.raises(StorageError, match=r"train/part-\d+\.parquet is damaged \(a link"):
        PreparedDataset.of(Run(config))
    train.unlink()
    (tmp_path / "train").rename(train)


def test_verify_names_what_is_damaged_missing_and_unknown(output: Path) -> None:
    run = CliRunner()
    intact = run.invoke(cli.app, ["verify", str(output / "small")])
    assert intact.exit_code == 0 and intact.output.count(": ok, ") == 6  # four artefacts and two epochs
    assert sum(one.files for one in verify(str(output / "small"))) > 20
    config = small_config(output)
    uri = Path(Run(config).dataset().uri)
    shard, items = uri / "test/part-00000.parquet", uri / "items.parquet"
    before = shard.read_bytes(), items.read_bytes()
    shard.write_bytes(before[0][:-1] + b"x")
    items.unlink()
    (uri / "users/part-00099.parquet").write_bytes(b"x")
    damaged = run.invoke(cli.app, ["verify", str(output / "small")])
    shard.write_bytes(before[0]), items.write_bytes(before[1]), (uri / "users/part-00099.parquet").unlink()
    assert damaged.exit_code == 1
    assert f"{shard} is damaged" in damaged.output
    assert f"{items} is missing" in damaged.output
    assert f"{uri}/users/part-00099.parquet is in no record" in damaged.output
    assert run.invoke(cli.app, ["verify", str(output / "small")]).exit_code == 0
    with pytest.raises(LineageError, match="holds no record of recray"):
        verify(str(output / "small/dataset/none"))


def test_offsets_that_lead_outside_are_refused(output: Path, tmp_path: Path) -> None:
    """They ended the interpreter, even where the file is as its record says."""
    source = Path(Run(small_config(output)).checkpoint().uri)
    record = CheckpointRecord.read(str(source))
    tensors = load_file(source / "items.safetensors")
    values, offsets = tensors["counts"].long() * 0, tensors["counts"].long().cumsum(0)
    for name in record.files:
        (tmp_path / name).write_bytes((source / name).read_bytes())
    for wrong in (offsets, -offsets, offsets * 1_000_000):
        save_file(
            {**tensors, "tags:values": values, "tags:offsets": wrong.contiguous()}, tmp_path / "items.safetensors"
        )
        files = record.files | digests.of_files(str(tmp_path), ["items.safetensors"])
        record.model_copy(update={"files": files}).write(str(tmp_path))
        with pytest.raises(LineageError, match=r"items\.safetensors has offsets of 'tags' that do not divide"):
            checkpoint.load_model(str(tmp_path))


def test_a_dataset_of_an_older_layout_is_not_up_to_date(output: Path) -> None:
    config = small_config(output)
    artifact = Run(config).dataset()
    assert artifact.identity == identity_of(artifact.keys, artifact.inputs, DATASET.version)
    assert artifact.identity != identity_of(artifact.keys, artifact.inputs)
    older = Path(artifact.uri).with_name(identity_of(artifact.keys, artifact.inputs))
    older.mkdir()
    for name in ("identity.json", "dataset.json"):
        body = sealed.read(f"{artifact.uri}/{name}", "")
        sealed.write(str(older / name), body | {"identity": older.name})
    Run(config).publish(type(artifact)(DATASET, str(older), older.name, artifact.keys, artifact.inputs))
    assert Run(config).dataset().identity == artifact.identity
    Run(config).publish(artifact)
    for name in ("identity.json", "dataset.json"):
        (older / name).unlink()
    older.rmdir()


def test_a_record_has_the_id_of_its_content(output: Path, tmp_path: Path) -> None:
    record = Run(small_config(output)).dataset().record
    body = record.model_dump(mode="json")
    sealed.write(str(tmp_path / "dataset.json"), body)
    assert DatasetRecord.read(str(tmp_path)) == record
    sealed.write(str(tmp_path / "dataset.json"), body | {"num_items": record.num_items + 1})
    with pytest.raises(LineageError, match="does not have the id of its content"):
        DatasetRecord.read(str(tmp_path))


def test_a_report_of_another_version_is_not_drawn() -> None:
    for kind in ("lists", "clicks"):
        old = ReportRecord(kind=kind, split="test", metrics={"model": {}}, counts={"queries": 3})
        with pytest.raises(LineageError, match=r"written by another version .*users.*run `recray evaluate` again"):
            recray.render(old)
