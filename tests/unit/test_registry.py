"""Plug-ins by name: shipped, a file next to the configuration, an import path."""

import importlib
from pathlib import Path
from typing import get_args

import pytest

from recray import registry
from recray.artifacts import CHECKPOINT, INDEX
from recray.config import Config, load_config, parse_config
from recray.errors import ConfigError
from recray.registry import Kind

SHIPPED = [(kind, name) for kind in get_args(Kind) if kind != "metric" for name in registry.names(kind)]
MODEL = """
from recray.config import ModelOptions

class Options(ModelOptions):
    name: str = "mine"
    twist: int = 3

def build(options, dataset, items):
    return options.twist
"""


@pytest.mark.parametrize(("kind", "name"), SHIPPED)
def test_a_shipped_plugin_is_complete(kind: Kind, name: str) -> None:
    module = registry.load(kind, name)
    options = registry.options(kind, name)
    assert module.Options is options
    entries = {"model": "build", "loss": "loss", "source": "read", "baseline": "build", "tracker": "build"}
    assert callable(getattr(module, entries[kind]))
    assert module.__doc__ and len(module.__doc__) > 60
    if "name" in options.model_fields:
        assert options().name == name


@pytest.mark.parametrize(
    ("kind", "package"),
    [("model", "models"), ("loss", "losses"), ("baseline", "retrieval.baselines"), ("tracker", "tracking")],
)
def test_every_file_of_a_folder_of_plugins_is_registered(kind: Kind, package: str) -> None:
    home = importlib.import_module(f"recray.{package}")
    files = {path.stem for path in Path(home.__path__[0]).glob("*.py")} - {"__init__", "base"}
    assert files == set(registry.names(kind))


def test_an_unknown_name_shows_the_nearest_all_and_where_it_looked(tmp_path: Path) -> None:
    (tmp_path / "my_tower.py").write_text(MODEL)
    with pytest.raises(ConfigError, match=r"unknown model 'two_towr'; did you mean 'two_tower'\? Known: .*sasrec"):
        registry.load("model", "two_towr")
    with pytest.raises(ConfigError, match=r"did you mean 'my_tower'\?.*There is no file .*my_towr\.py, or any import"):
        registry.load("model", "my_towr", str(tmp_path))


def test_a_file_next_to_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MODEL)
    (tmp_path / "my.toml").write_text('[model]\nname = "mine"\ntwist = 4\n')
    config = load_config(str(tmp_path / "my.toml"), ["run.output=" + str(tmp_path)])
    assert config.run.plugins == str(tmp_path)
    assert config.model.model_dump()["twist"] == 4
    assert registry.load("model", config.model.name, config.run.plugins).build(config.model, None, None) == 4
    again = Config.model_validate(config.model_dump(mode="json"))
    assert again.model_dump() == config.model_dump()
    with pytest.raises(ConfigError, match=r"unknown key 'model\.twst'; did you mean 'model\.twist'\?"):
        load_config(str(tmp_path / "my.toml"), ["model.twst=1"])
    (tmp_path / "mine.py").write_text(MODEL.replace("options.twist", "-options.twist"))
    assert registry.load("model", "mine", str(tmp_path)).build(config.model, None, None) == -4


def test_an_edited_file_is_another_artefact(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MODEL)
    config = parse_config({"run": {"plugins": str(tmp_path)}, "model": {"name": "mine"}})
    before, index = CHECKPOINT.values(config), INDEX.values(config)
    (tmp_path / "mine.py").write_text(MODEL + "# another line\n")
    after = CHECKPOINT.values(config)
    assert {key for key in after if after[key] != before[key]} == {"model.name: file of mine"}
    assert INDEX.values(config) == index
    assert not [key for key in CHECKPOINT.values(parse_config({})) if "file of" in key]


def test_no_plugin_folder_without_python_files(tmp_path: Path) -> None:
    (tmp_path / "my.toml").write_text("")
    assert load_config(str(tmp_path / "my.toml")).run.plugins is None


def test_an_import_path_outside_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "outside"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "good.py").write_text(MODEL)
    (package / "bad.py").write_text("x = 1\n")
    (package / "half.py").write_text("def build():\n    return 1\n")
    (package / "broken.py").write_text("import absent_module\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert parse_config({"model": {"name": "outside.good"}}).model.model_dump()["twist"] == 3
    with pytest.raises(ConfigError, match=r"model 'outside.bad' \(.*bad\.py\) does not define 'build'"):
        registry.load("model", "outside.bad")
    with pytest.raises(ConfigError, match=r"needs a class 'Options' that extends recray\.config\.ModelOptions"):
        registry.load("model", "outside.half")
    with pytest.raises(ConfigError, match=r"cannot be imported: ModuleNotFoundError: No module named 'absent_module'"):
        registry.load("model", "outside.broken")
    with pytest.raises(ConfigError, match=r"source 'outside\.absent' cannot be imported"):
        registry.load("source", "outside.absent")
