"""Property test: prepare gives what an independent pandas implementation gives, or refuses and names the cause."""

from __future__ import annotations

import tempfile
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings

from helpers.inline_tasks import TIME_BINS, inline_prepare
from helpers.made_logs import MadeLog, Schema, made_logs, schemas
from helpers.pandas_prepare import SPLITS, Bounds, Expected, Refused, encoded, expected, ordered
from recray.config import parse_config
from recray.data.dataset import PreparedDataset
from recray.data.infer import inferred
from recray.errors import RecrayError
from recray.records import DatasetRecord


def same_as_pandas(log: MadeLog) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = parse_config(log.write(folder))
        try:
            record = inline_prepare(config)
        except RecrayError as error:
            check_refusal(log, str(error))
            return
        assert log.flawed_column is None, f"{log.flaw} was accepted"
        if log.split == "given" and not kept(log)["code"].eq(1).any():
            return  # validation events are drawn at random
        wanted = expectation(
            log,
            Bounds(*(record.split[key] for key in ("valid_start", "test_start", "end")))
            if log.split == "temporal"
            else None,
        )
        if log.split == "temporal":
            check_bounds(log, record)
        check_dataset(PreparedDataset.open(f"{config.run_uri}/dataset/current"), wanted, log)


def expectation(log: MadeLog, bounds: Bounds | None) -> Expected:
    options = {
        **log.options,
        "split": log.split,
        "context": {c.name: {"kind": c.kind, "min_count": c.min_count} for c in log.context},
        "item_features": log.side_features(),
        "user_features": log.side_features(),
    }
    side = {"item_table": log.side_table("item"), "user_table": log.side_table("user")}
    return expected(log.events(), options, timed=log.timed or log.time == "order", bounds=bounds, **side)


def check_refusal(log: MadeLog, message: str) -> None:
    """Whatever is refused has a cause, and the message names it."""
    if log.flawed_column is not None:
        assert repr(log.flawed_column)[1:-1] in repr(message), message
        return
    if (
        log.split == "temporal"
    ):  # the boundaries of a refused log are not known: ties leave a split empty, or few events
        assert any(
            words in message
            for words in ("no events fall in", "no item has", "no events are left", "no event of the", "have weight 0")
        ), message
        return
    with pytest.raises(Refused) as caught:
        expectation(log, None)
        pytest.fail(f"refused without a cause: {message}")
    assert any(words in message for words in caught.value.words), (message, caught.value.words)


def check_bounds(log: MadeLog, record: DatasetRecord) -> None:
    """A fifth of the events each, from below, and within a bin of the histogram."""
    events = kept(log)
    time = np.sort(events["time"].to_numpy(dtype=np.int64))
    valid, test, end = (record.split[key] for key in ("valid_start", "test_start", "end"))
    bin_width = (time[-1] + 1 - time[0]) / TIME_BINS + 1
    assert end == time[-1] + 1 and valid <= test <= end
    for start, until in ((test, end), (valid, test)):
        inside = int(((start <= time) & (time < until)).sum())
        more = int(((start - bin_width <= time) & (time < until)).sum())
        assert inside <= 0.2 * len(time) <= more


def kept(log: MadeLog) -> pd.DataFrame:
    """The events without duplicates."""
    return ordered(log.events(), log.options, log.timed or log.time == "order")[0]


def check_dataset(dataset: PreparedDataset, wanted: Expected, log: MadeLog) -> None:
    counts = dataset.record.counts
    assert {key: counts[key] for key in wanted.counts} == wanted.counts
    items = dataset.items()
    keys, numbers = items["item"].to_pylist(), items["count"].to_pylist()
    assert list(zip(keys[2:], numbers[2:], strict=True)) == wanted.items
    grown = dataset.refitted().items()["item"].to_pylist()
    assert grown[2:] == keys[2:] + wanted.new_items and dataset.record.new_items == len(wanted.new_items)
    fits = check_features(dataset.record, wanted)
    users = dataset.user_keys().to_pydict()
    key_of = dict(zip(users["user_id"], users["user"], strict=True))
    assert sorted(key_of) == list(range(2, dataset.record.num_users)) and len(set(users["user"])) == len(key_of)
    side = {
        role: table.set_index("key")
        for role in ("item", "user")
        for table in [log.side_table(role)]
        if table is not None
    }
    for name, how in log.side_features().items():
        if "item" in side:
            told = [side["item"][name].get(key) for key in keys[2:]]
            same(items[f"item_{name}"].to_pylist()[2:], [encoded(value, how, fits["item", name]) for value in told])
    for split in SPLITS:
        found = [row for table in dataset.iter_tables(split) for row in table.to_pylist()]
        assert sorted(map(str, (key_of[row["user"]] for row in found))) == sorted(map(str, wanted.rows[split]))
        for row in found:
            user = key_of[row["user"]]
            want = wanted.rows[split][user]
            assert [keys[i] if i > 1 else None for i in row["item"]] == want["item"]
            assert row["time"] == want["time"] and [row["num_targets"]] == want["num_targets"]
            for column in ("label", "weight"):
                assert (row.get(column) == want[column]) if column in want else column not in row
            for context in log.context:
                how = {"kind": context.kind, "min_count": context.min_count}
                same(
                    row[f"context_{context.name}"],
                    [encoded(v, how, fits["context", context.name]) for v in want[context.inside]],
                )
            for name, how in log.side_features().items():
                if "user" in side:
                    same([row[f"user_{name}"]], [encoded(side["user"][name].get(user), how, fits["user", name])])


def check_features(record: DatasetRecord, wanted: Expected) -> dict[tuple[str, str], Any]:
    """The fitted features are the expected ones; returns their statistics by role and name."""
    fits = {(role, name): fit for role in ("context", "item", "user") for name, fit in getattr(wanted, role).items()}
    assert {(feature.role, feature.name) for feature in record.features} == set(fits)
    for feature in record.features:
        fit = fits[feature.role, feature.name]
        if feature.kind == "numeric":
            assert (feature.mean, feature.std) == pytest.approx(fit, rel=1e-9, abs=1e-9)
        else:
            new = wanted.new_values.get((feature.role, feature.name), [])
            assert feature.vocabulary == fit + new and feature.cardinality == len(fit) + 2
            assert feature.new_values == len(new)
    return fits


def same(found: list[Any], want: list[Any]) -> None:
    if want and isinstance(want[0], float):
        np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-5)
    else:
        assert found == want


@settings(max_examples=100, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(made_logs())
def test_prepare_agrees_with_pandas(log: MadeLog) -> None:
    same_as_pandas(log)


@pytest.mark.slow
@pytest.mark.timeout(1_800)
@settings(max_examples=2_000, deadline=None, database=None, print_blob=True, suppress_health_check=list(HealthCheck))
@given(made_logs())
def test_prepare_agrees_with_pandas_on_2000_logs(log: MadeLog) -> None:
    same_as_pandas(log)


def prepare_accepts_what_init_writes(schema: Schema) -> None:
    """Without open questions prepare accepts the file as it is; with some, the file still loads."""
    with tempfile.TemporaryDirectory() as name:
        found = inferred(schema.write(Path(name)))
        table = tomllib.loads(found.toml)
        table["run"]["output"] = f"{name}/runs"
        config = parse_config(table)
        roles = [table["data"]["columns"].get(role) for role in ("user", "item", "timestamp")]
        if schema.usual:
            assert not {None, "?"} & set(roles), roles
        try:
            record = inline_prepare(config)
            assert record.counts["events_read"] == schema.rows
        except RecrayError as error:
            # What a few rows cannot show: a split without events of one kind, all of whose rows are negatives, say.
            assert found.questions or "no event" in str(error), str(error)


@settings(max_examples=100, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(schemas())
def test_prepare_accepts_what_init_writes(schema: Schema) -> None:
    prepare_accepts_what_init_writes(schema)


@pytest.mark.slow
@pytest.mark.timeout(1_800)
@settings(max_examples=1_000, deadline=None, database=None, print_blob=True, suppress_health_check=list(HealthCheck))
@given(schemas())
def test_prepare_accepts_what_init_writes_for_1000_schemas(schema: Schema) -> None:
    prepare_accepts_what_init_writes(schema)
