"""Malformed records and configurations raise recray's own errors only.

RECRAY_FUZZ sets the number of inputs of each test; `make fuzz` tries 100,000 in all.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers.configs import SHIPPED
from recray import sealed, storage
from recray.config import Config, load_config, parse_config
from recray.config.reference import keys
from recray.errors import LineageError, RecrayError
from recray.records import (
    CheckpointRecord,
    DatasetRecord,
    Feature,
    IndexRecord,
    Interval,
    ListsRecord,
    Record,
    ReportRecord,
    Shard,
    Trial,
    TrialRecord,
    TuneRecord,
)

INPUTS = int(os.environ.get("RECRAY_FUZZ", "120"))
fuzzed = settings(
    max_examples=INPUTS,
    deadline=None,
    database=None,
    derandomize=INPUTS <= 250,
    suppress_health_check=list(HealthCheck),
)
pytestmark = pytest.mark.timeout(0 if INPUTS > 250 else 180)

_LINEAGE: dict[str, Any] = {
    "identity": "1a2b3c4d",
    "keys": {"model.dim": 8},
    "parents": ["dataset-1"],
    "config": {"a": [1]},
}
_TRIAL = Trial(number=1, values={"optim.learning_rate": 0.1}, seed=1, status="done")
RECORDS: list[Record] = [
    DatasetRecord(
        **_LINEAGE,
        fingerprint="f",
        num_items=3,
        num_users=3,
        counts={"events_train": 1},
        features=[Feature(name="x", role="item", kind="categorical", cardinality=3, vocabulary=["a"])],
        shards={"train": [Shard(file="train/part-00000.parquet", rows=1, events=1, impressions=1)]},
        early={"train": ["early-train/part-00000.parquet"]},
        seed=1,
    ),
    CheckpointRecord(
        **_LINEAGE, epoch=1, step=2, rows=3, metric="auc", value=0.5, dataset_uri="/d", history=[{"loss": 1.0}]
    ),
    IndexRecord(
        **_LINEAGE,
        **{"factory": "Flat", "dim": 8, "num_items": 3, "k": 5, "setting": {"nprobe": 1}, "recall": 1.0},  # type: ignore[arg-type]
        **{"recall_target": 0.9, "device": "cpu", "build_seconds": 0.1, "bytes": 9, "curve": []},  # type: ignore[arg-type]
        dataset_uri="/d",
        checkpoint_uri="/c",
    ),
    ReportRecord(**_LINEAGE, split="test", metrics={"model": {"ndcg@10": Interval(value=0.1)}}, counts={"users": 3}),
    ListsRecord(**_LINEAGE, k=3, counts={"users": 1}),
    TrialRecord(**_LINEAGE, trial=_TRIAL),
    TuneRecord(**_LINEAGE, metric="auc", mode="max", trials=[_TRIAL], winner=1, cpu_hours=0.1, dataset_uri="/d"),
]
NAMES = [type(record).__name__ for record in RECORDS]

_numbers = st.one_of(
    st.integers(), st.floats(), st.sampled_from([0, -1, 2**31, 2**63, 2**64, 10**400, 1e308, -1e308, 5e-324])
)
_text = st.one_of(st.text(), st.sampled_from(["", "..", "../x", "/etc/passwd", "s3://a/b", "\0", "\ud800", "a" * 5000]))
_values = st.recursive(
    st.one_of(st.none(), st.booleans(), _numbers, _text),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(_text, inner, max_size=4)),
    max_leaves=12,
)


def _nested(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


@st.composite
def _changed(draw: st.DrawFn, value: Any) -> Any:
    """The value with one place of it changed: replaced, removed, or with a key more."""
    if isinstance(value, dict) and value and draw(st.integers(0, 4)):
        key = draw(st.sampled_from(sorted(value)))
        action = draw(st.integers(0, 5))
        if action == 0:
            return {name: one for name, one in value.items() if name != key}
        if action == 1:
            return {**value, draw(_text): draw(_values)}
        return {**value, key: draw(_changed(value[key]))}
    if isinstance(value, list) and value and draw(st.integers(0, 3)):
        at = draw(st.integers(0, len(value) - 1))
        return [*value[:at], draw(_changed(value[at])), *value[at + 1 :]]
    return draw(st.one_of(_values, st.builds(_nested, st.integers(1, 80))))


@st.composite
def _broken(draw: st.DrawFn, data: bytes) -> bytes:
    """The bytes damaged: cut off, replaced, in another encoding, repeated, or nested deep."""
    at = draw(st.integers(0, len(data)))
    end = draw(st.integers(at, min(len(data), at + 40)))
    return draw(
        st.one_of(
            st.just(data[:at]),
            st.binary(max_size=200),
            st.builds(lambda more: data[:at] + more + data[end:], st.binary(max_size=20)),
            st.sampled_from([data.decode().encode(one) for one in ("utf-16", "utf-32", "utf-8-sig")]),
            st.sampled_from(
                [b"[" * 100_000, b'{"a":' * 50_000, b"1" * 5000, b"NaN", b'{"id": 1e999}', b"null", b'"x"']
            ),
            st.just(data.replace(b'"id"', b'"seed"')),
            st.just(data[:-2] + b"," + data[1:]),  # every key twice
        )
    )


def _only_ours(call: Callable[[], object]) -> None:
    try:
        call()
    except RecrayError as error:
        assert str(error)


@pytest.mark.parametrize("record", RECORDS, ids=NAMES)
@fuzzed
@given(data=st.data())
def test_records(record: Record, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = _folder(tmp_path_factory)
    file = folder / record.file_name()
    record.model_copy(update={"files": {}}).write(str(folder))
    whole = json.loads(file.read_bytes())
    kind = data.draw(st.integers(0, 2))
    if kind == 0:  # damaged as a file
        file.write_bytes(data.draw(_broken(file.read_bytes())))
    elif kind == 1:  # another content under the old hash
        file.write_bytes(json.dumps(data.draw(_changed(whole))).encode())
    else:  # another content with its own hash and id
        body = data.draw(_changed({key: value for key, value in whole.items() if key not in ("id", "sha256")}))
        if not isinstance(body, dict):
            body = {"x": body}
        try:
            file.write_bytes(sealed.dump(body | {"id": type(record)._id_of(json.loads(json.dumps(body)))}))
        except (ValueError, RecursionError):
            return  # not even JSON
    try:
        found = type(record).read(str(folder))
    except LineageError as error:
        assert file.name in str(error)
    else:
        assert type(found) is type(record)


def _folder(factory: pytest.TempPathFactory) -> Path:
    folder = factory.getbasetemp() / "fuzzed"
    folder.mkdir(exist_ok=True)
    return folder


@fuzzed
@given(data=st.data())
def test_marks_and_pointers(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    from recray.artifacts import DATASET, artifacts_of, current_of

    root = _folder(tmp_path_factory) / "run"
    (root / "1a2b3c4d").mkdir(parents=True, exist_ok=True)
    mark = {"stage": "dataset", "identity": "1a2b3c4d", "keys": {}, "inputs": [], "created": ""}
    for file, body in ((root / "1a2b3c4d/identity.json", mark), (root / "current.json", {"dataset": "1a2b3c4d"})):
        content = sealed.dump(body)
        file.write_bytes(
            data.draw(st.one_of(_broken(content), st.builds(sealed.dump, st.just(body)), st.just(content)))
        )
    _only_ours(lambda: artifacts_of(str(root), DATASET))
    _only_ours(lambda: current_of(str(root)))
    _only_ours(lambda: storage.read_json(str(root / "current.json")))


TOML = [path.read_bytes() for path in SHIPPED]
KEYS = [f"{key.section}.{key.name}" for key in keys() if key.name not in ("plugins",)]


@fuzzed
@given(data=st.data())
def test_configuration_files(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    file = _folder(tmp_path_factory) / "config.toml"
    text = data.draw(st.sampled_from(TOML))
    file.write_bytes(
        data.draw(
            st.one_of(
                _broken(text),
                st.sampled_from([b"x = " + b"[" * 50_000, b"x = " + b"1" * 5000, b"a" + b".a" * 20_000 + b" = 1"]),
                st.builds(
                    lambda one: text.replace(b"=", b"= " + one.encode("utf-8", "replace"), 1), st.text(max_size=9)
                ),
            )
        )
    )
    _only_ours(lambda: load_config(str(file)))


@fuzzed
@given(key=st.sampled_from(KEYS), value=_values, as_text=st.booleans())
def test_values_of_known_keys(key: str, value: Any, as_text: bool) -> None:
    if as_text:
        text = value if isinstance(value, str) else json.dumps(value)
        _only_ours(lambda: parse_config({}, [f"{key}={text}"]))
        return
    table: dict[str, Any] = {}
    inner = table
    *sections, name = key.split(".")
    for section in sections:
        inner = inner.setdefault(section, {})
    inner[name] = value
    _only_ours(lambda: parse_config(table))


@fuzzed
@given(table=st.dictionaries(st.one_of(st.sampled_from(list(Config.model_fields)), _text), _values, max_size=4))
def test_tables(table: dict[str, Any]) -> None:
    _only_ours(lambda: parse_config(table))


@fuzzed
@given(override=st.one_of(st.text(), st.builds("{}={}".format, st.one_of(st.sampled_from(KEYS), st.text()), st.text())))
def test_overrides(override: str) -> None:
    _only_ours(lambda: parse_config({}, [override]))
