"""A submitted configuration is the same one, with paths that mean the same from another folder."""

import os
import tomllib
from pathlib import Path

import pytest
import tomli_w

from helpers.configs import SHIPPED, shipped
from recray.cluster.submit import portable
from recray.config import parse_config


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_submitted_configuration_is_the_same_one(path: Path) -> None:
    config = shipped(path)
    sent = portable(config)
    mine, other = (
        config.model_dump(mode="json"),
        parse_config(tomllib.loads(tomli_w.dumps(sent))).model_dump(mode="json"),
    )
    for before, after in ((mine["data"], other["data"]), (mine["data"]["split"], other["data"]["split"])):
        for key in {"path", "items", "users", "train_path", "valid_path", "test_path"} & set(before):
            assert after[key] == (before[key] and os.path.abspath(before[key]))
            before.pop(key)
            after.pop(key)
    assert other == mine


def test_a_list_of_files_and_a_uri() -> None:
    config = parse_config({"data": {"path": ["a.parquet", "s3://bucket/b.parquet"]}})
    assert portable(config)["data"]["path"] == [os.path.abspath("a.parquet"), "s3://bucket/b.parquet"]
