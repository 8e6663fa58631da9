"""No command deletes, replaces or follows what recray did not write."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

import recray
from helpers.inline_tasks import inline_prepare
from helpers.small_run import make_run, small_config
from recray import folders, inventory, layout, storage
from recray.artifacts import CHECKPOINT, INDEX, Run
from recray.config import parse_config
from recray.digests import FileDigest
from recray.errors import ConfigError, LineageError, StorageError
from recray.records import DatasetRecord, Shard
from recray.training import launch


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a complete run."""
    folder = tmp_path_factory.mktemp("made")
    make_run(small_config(folder))
    return folder


@pytest.fixture
def output(made: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    shutil.copytree(made, tmp_path / "runs", symlinks=True)
    return tmp_path / "runs"


def _plant(root: Path, outside: Path) -> dict[Path, str]:
    """A file, a folder with a file and a link to the outside in every folder below `root`; file -> content."""
    outside.mkdir()
    (outside / "thesis.txt").write_text("years of work")
    planted = {outside / "thesis.txt": "years of work"}
    for folder in [root, *(path for path in root.rglob("*") if path.is_dir() and not path.is_symlink())]:
        (folder / "photos").mkdir()
        for name in ("notes.txt", "photos/a.jpg", "model.bin"):
            (folder / name).write_text(str(folder))
            planted[folder / name] = str(folder)
        (folder / "elsewhere").symlink_to(outside, target_is_directory=True)
    return planted


def _check(planted: dict[Path, str]) -> None:
    assert [str(path) for path, text in planted.items() if not path.exists() or path.read_text() != text] == []
    links = [path.parent / "elsewhere" for path in planted if path.name == "notes.txt"]
    assert all(link.is_symlink() for link in links)


def test_everything_that_recray_writes_is_known_to_be_its_own(output: Path) -> None:
    """Else prune would leave it."""
    config = small_config(output)
    for stage, artifact in (
        (name, path) for name in layout.WRITTEN for path in (output / "small" / name).glob("????????")
    ):
        layout.refuse_foreign(str(artifact), layout.WRITTEN[stage])
    layout.refuse_foreign(str(output / "lists"), layout.LISTS)
    run = Run(config)
    for artifact in (run.index(), run.checkpoint(), run.dataset()):
        assert artifact is not None
        artifact.clear()
        assert not os.path.exists(artifact.uri)


def test_files_in_every_folder_survive_every_command(output: Path, tmp_path: Path) -> None:
    planted = _plant(output, tmp_path / "outside")
    config = small_config(output)
    with pytest.raises(
        StorageError, match=r"lists holds .*notes\.txt.*, which recray did not write: move it elsewhere"
    ):
        recray.recommend(config, str(output / "lists"), k=3)
    _check(planted)
    # Everything again, into the same folders: what the stages had is deleted first.
    for artifact in (Run(config).dataset(), Run(config).checkpoint(), Run(config).index()):
        assert artifact is not None
        os.unlink(storage.join(artifact.uri, artifact.stage.record.file_name()))
    inline_prepare(config)
    again = small_config(output, "training.resume=false")
    recray.train(again)
    recray.train(again)
    recray.index(config)
    recray.evaluate(config)
    _check(planted)
    for name in ("8", "16", "32", "64", "128"):
        recray.train(small_config(output, f"model.dim={name}", "training.epochs=1"))
    assert inventory.prune(str(output / "small"), keep=0)
    _check(planted)


def test_folders_without_the_mark_are_refused(tmp_path: Path, made: Path) -> None:
    config = small_config(made)
    index, run = Run(config).index(), Run(small_config(tmp_path))
    assert index is not None
    for stage in (CHECKPOINT, INDEX):
        artifact = run.artifact(stage, ["an-input"])
        (Path(artifact.uri) / "sub").mkdir(parents=True)
        (Path(artifact.uri) / "sub/mine.txt").write_text("mine")
        with pytest.raises(StorageError, match=r"holds sub/, sub/mine.txt, which recray did not write"):
            run.begin(artifact)
        run.discard(artifact)
        artifact.clear()
        assert (Path(artifact.uri) / "sub/mine.txt").read_text() == "mine"


def test_a_link_is_no_folder_of_recray(output: Path, tmp_path: Path) -> None:
    config = small_config(output)
    checkpoint = Run(config).checkpoint()
    shutil.move(checkpoint.uri, tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", checkpoint.uri)
    with pytest.raises(StorageError, match=r"is a link: recray deletes only in folders that it made"):
        recray.train(small_config(output, "training.resume=false"))
    assert (tmp_path / "elsewhere/model.safetensors").exists()


def test_phases_keep_what_is_not_theirs(tmp_path: Path) -> None:
    phase = launch.refit(str(tmp_path), 9)
    for epoch in (1, 2, 3, 4):
        for name in ("checkpoint.json", "state.pt", "mine.txt"):
            storage.write_bytes(storage.join(phase.folder(epoch), name), b"x")
    phase.delete_old(best=2)
    assert sorted(os.listdir(phase.folder(1))) == ["mine.txt"]
    assert len(os.listdir(phase.folder(2))) == len(os.listdir(phase.folder(3))) == 3


def test_the_link_to_what_is_in_use_replaces_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "current").write_text("mine")
    storage.link(str(tmp_path / "current"), "1a2b3c4d")
    assert (tmp_path / "current").read_text() == "mine"
    (tmp_path / "other").symlink_to("/somewhere/else")
    storage.link(str(tmp_path / "other"), "1a2b3c4d")
    assert os.readlink(tmp_path / "other") == "/somewhere/else"
    assert sorted(os.listdir(tmp_path)) == ["current", "other"]


def test_a_current_json_of_somebody_else_is_refused_and_stays(output: Path) -> None:
    file = output / "small/current.json"
    file.write_text('{"checkpoint": "../../.."}')
    with pytest.raises(LineageError, match=r"current\.json was written by recray another version"):
        Run(small_config(output)).current()
    assert file.read_text() == '{"checkpoint": "../../.."}'


@pytest.mark.parametrize(
    "name", ["..", ".", "", "a/b", "../a", "/etc", "a\\b", "a\0b", "a\nb", "\x1b", "x" * 256, "ä" * 128, "\ud800"]
)
def test_a_name_that_is_no_folder_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"run\.name"):
        parse_config({"run": {"name": name}})


@pytest.mark.parametrize("name", ["news", "2017-10 a=b", "ä" * 127, "x" * 255, "..a", "-"])
def test_a_name_that_is_a_folder_is_taken(name: str, tmp_path: Path) -> None:
    config = parse_config({"run": {"name": name, "output": str(tmp_path)}})
    storage.write_json(storage.join(config.run_uri, "a.json"), {})
    assert (tmp_path / name / "a.json").exists()


@pytest.mark.parametrize("key", ["output", "dataset", "plugins"])
def test_a_path_with_control_characters_is_refused(key: str) -> None:
    with pytest.raises(ConfigError, match="control characters"):
        parse_config({"run": {key: "a\0b"}})


@pytest.mark.parametrize(
    "file",
    ["../x.parquet", "train/../../x", "/etc/passwd", "s3://b/x", "file:///x", "", ".", "a//b", "a\\..\\b", "a\0"],
)
def test_paths_in_records_stay_below_them(file: str, output: Path) -> None:
    dataset = Run(small_config(output)).dataset()
    record = dataset.record
    shard = Shard.model_construct(file=file, rows=1, events=1, impressions=1)
    digest = FileDigest(bytes=1, sha256="")
    for change in (
        {"shards": {**record.shards, "train": [shard]}},
        {"early": {"train": [file]}},
        {"files": {file: digest}},
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(storage, "sync", lambda *_: None)
            record.model_copy(update=change).write(dataset.uri)
        with pytest.raises(LineageError, match="is no path below the folder of its record"):
            DatasetRecord.read(dataset.uri)


def test_deleting_does_not_follow_links(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/part-00000.parquet").write_text("mine")
    (tmp_path / "data/users").mkdir(parents=True)
    (tmp_path / "data/users/part-00000.parquet").symlink_to(tmp_path / "outside/part-00000.parquet")
    (tmp_path / "data/train").symlink_to(tmp_path / "outside", target_is_directory=True)
    left = folders.delete_written(str(tmp_path / "data"), layout.WRITTEN["dataset"])
    assert sorted(left) == ["train@", "users/part-00000.parquet@"]
    assert (tmp_path / "outside/part-00000.parquet").read_text() == "mine"
