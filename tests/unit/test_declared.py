"""Groups by declared features, against pandas."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from recray.evaluation.declared import _groups

_RANDOM = np.random.default_rng(0)


def _found(values: pa.Array) -> dict[str, list[bool]]:
    return {name: mask.tolist() for name, mask in _groups(values)}


@pytest.mark.parametrize(
    "values",
    [
        [None if one == 3 else f"v{one}" for one in _RANDOM.zipf(1.5, 300) % 30],
        _RANDOM.integers(0, 5, 300).tolist(),
        [bool(one) for one in _RANDOM.integers(0, 2, 300)],
    ],
)
def test_frequent_values_others_and_missing(values: list[Any]) -> None:
    found, series = _found(pa.array(values)), pd.Series(values, dtype=object)
    counts = series.value_counts()
    top = sorted(counts.index, key=lambda value: (-counts[value], value))[:10]
    expected = {str(value): (series == value).tolist() for value in top}
    if (others := series.notna() & ~series.isin(top)).any():
        expected["other values"] = others.tolist()
    if series.isna().any():
        expected["missing"] = series.isna().tolist()
    assert found == expected and sum(map(sum, found.values())) == len(values)


def test_quarters_of_numbers() -> None:
    values = [None, float("nan"), *_RANDOM.normal(0, 100, 400).tolist()]
    found = _found(pa.array(values))
    numbers = pd.Series(values, dtype=float)
    quarter = pd.qcut(numbers, 4, labels=False)
    assert list(found)[-1] == "missing" and len(found) == 5
    for number, mask in enumerate(list(found.values())[:4]):
        assert sum(mask) == 100 and sorted(numbers[mask]) == sorted(numbers[quarter == number])


def test_lists_are_in_the_group_of_each_value() -> None:
    values = [None, [], ["a"], ["a", "b"], ["b", None], [f"rare {one}" for one in range(12)]]
    found = _found(pa.array(values))
    assert found["a"] == [False, False, True, True, False, False]
    assert found["b"] == [False, False, False, True, True, False]
    assert found["missing"] == [True, True, False, False, False, False]
    assert len(found) == 11 and "other values" not in found  # eight of the rare ones have groups, too
