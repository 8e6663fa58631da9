"""The printed reference of all configuration keys."""

import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from recray.cli import app
from recray.config import Config, parse_config
from recray.config.reference import Key, keys, markdown
from recray.errors import ConfigError

PAGE = Path(__file__).parents[2] / "jobs" / "configs" / "KEYS.md"


def test_every_key_has_a_description() -> None:
    assert len(keys()) > 150
    assert [f"{key.section}.{key.name}" for key in keys() if len(key.meaning) < 10] == []


def test_every_key_of_a_configuration_is_listed() -> None:
    listed = {(re.sub(r"^(model|loss)\..*", r"\1", key.section), key.name) for key in keys()}
    every: list[tuple[str, str]] = []

    def walk(table: dict[str, Any], section: str) -> None:
        for name, value in table.items():
            if isinstance(value, dict) and value:
                walk(value, f"{section}.{name}".lstrip("."))
            else:
                every.append((section, name))

    for model in ("din", "dlrm", "dcn_v2", "two_tower", "sasrec"):
        walk(parse_config({"data": {"source": "simulated"}, "model": {"name": model}}).model_dump(mode="json"), "")
    renamed = {("model.embedding", "mode"): ("model", "mode")}
    missing = {(s, n) for s, n in every if renamed.get((s, n), (s, n)) not in listed}
    assert missing == set()


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text() == markdown(), "run: python -m recray.config.reference > jobs/configs/KEYS.md"


def test_type_range_and_default() -> None:
    (epochs,) = keys("training.epochs")
    assert epochs == Key("training", "epochs", "whole number", "10", ">= 1", "number of passes over the training data")
    (dropout,) = keys("model.sasrec.dropout")
    assert (dropout.type, dropout.default, dropout.range) == ("number", "0.2", ">= 0, < 1")
    assert {key.section for key in keys("data")} >= {"data", "data.columns", "data.simulated"}
    assert "chunk_size" in {key.name for key in keys("loss.softmax")}
    assert "name" not in {key.name for key in keys("loss.softmax")}  # is a key of [loss]
    with pytest.raises(ConfigError, match=r"no section or key 'trainin'; did you mean 'training'\? Sections: data,"):
        keys("trainin")


def test_the_command_prints_a_line_per_key() -> None:
    printed = CliRunner().invoke(app, ["keys", "optim"]).stdout.splitlines()
    assert len(printed) == len(type(parse_config({}).optim).model_fields)
    assert printed[1].split("\t")[:3] == ["optim.learning_rate", "number, > 0", "0.001"]
    assert Config.model_fields["optim"].description
