from pathlib import Path

import pytest

from recray import registry
from recray.errors import ConfigError


def test_models_and_sources_are_found_by_their_files() -> None:
    assert {"two_tower", "sasrec"} <= set(registry.names("model"))
    assert {"parquet", "simulated"} <= set(registry.names("source"))


def test_parts_in_the_same_folder_are_not_plugins() -> None:
    assert not {"batch", "losses", "base"} & {*registry.names("model"), *registry.names("source")}


@pytest.mark.parametrize("name", registry.names("model"))
def test_every_model_has_options_and_build(name: str) -> None:
    module = registry.load("model", name)
    assert callable(module.build)
    assert module.Options(name=name).name == name


@pytest.mark.parametrize("name", registry.names("source"))
def test_every_source_can_be_loaded(name: str) -> None:
    assert callable(registry.load("source", name).read)


def test_an_unknown_name_shows_the_nearest_and_all() -> None:
    with pytest.raises(ConfigError, match=r"unknown model 'two_towr'; did you mean 'two_tower'\?.*sasrec"):
        registry.load("model", "two_towr")


def test_an_import_path_outside_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "outside"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "good.py").write_text("def build():\n    return 1\n")
    (package / "bad.py").write_text("x = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert registry.load("model", "outside.good").build() == 1
    with pytest.raises(ConfigError, match="has no function 'build'"):
        registry.load("model", "outside.bad")
    with pytest.raises(ConfigError, match=r"source 'outside\.absent' cannot be imported"):
        registry.load("source", "outside.absent")
