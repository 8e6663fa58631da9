"""Configuration: precedence, types of overrides, every problem at once, nearest names."""

from pathlib import Path

import pytest

from recray.config import Config, load_config, parse_config
from recray.errors import ConfigError


def test_defaults_need_nothing() -> None:
    assert parse_config({}).model.name == "two_tower"


def test_overrides_win_over_the_file_and_take_the_declared_type(tmp_path: Path) -> None:
    path = tmp_path / "my.toml"
    path.write_text("[training]\nepochs = 3\n[optim]\nlearning_rate = 0.5\n")
    config = load_config(str(path), ["training.epochs=7", "run.name=abc", "data.columns.context=['a', 'b']"])
    assert config.training.epochs == 7
    assert config.optim.learning_rate == 0.5
    assert config.run.name == "abc"
    assert config.data.columns.context == ["a", "b"]


def test_unknown_key_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"unknown key 'training.epoch'; did you mean 'training.epochs'\?"):
        parse_config({"training": {"epoch": 3}})


def test_unknown_key_of_a_model_is_answered_from_its_own_options() -> None:
    with pytest.raises(ConfigError, match=r"unknown key 'model.layer'; did you mean 'model.layers'\?"):
        parse_config({"model": {"name": "sasrec", "layer": 3}})


def test_every_problem_is_reported_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({"training": {"epochs": 0}, "optim": {"learning_rate": -1}, "nonsense": 1})
    message = str(caught.value)
    assert "3 problems" in message
    for expected in ("training.epochs", "optim.learning_rate", "unknown key 'nonsense'. Known in"):
        assert expected in message


def test_a_batch_that_does_not_divide_shows_the_arithmetic() -> None:
    with pytest.raises(ConfigError, match=r"1000 is not divisible .* = 3: the remainder is 1; use 999 or 1002"):
        parse_config({"training": {"global_batch_size": 1000}, "scaling": {"num_workers": 3}})


def test_unknown_model_lists_what_there_is() -> None:
    with pytest.raises(ConfigError, match=r"unknown model 'sasrek'; did you mean 'sasrec'\? Known: .*two_tower"):
        parse_config({"model": {"name": "sasrek"}})


def test_a_malformed_override_shows_the_form() -> None:
    with pytest.raises(ConfigError, match=r"section\.key=value"):
        parse_config({}, ["training.epochs"])


def test_round_trip_through_json() -> None:
    config = parse_config({"model": {"name": "sasrec", "layers": 3}})
    assert Config.model_validate(config.model_dump(mode="json")) == config
