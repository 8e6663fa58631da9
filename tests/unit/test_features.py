"""Feature columns to numbers."""

import numpy as np
import pyarrow as pa
import pytest

from recray.config import FeatureConfig
from recray.data import features, vocab
from recray.errors import DataError

CATEGORY = FeatureConfig(kind="categorical")


def column(*chunks: list, type: pa.DataType | None = None) -> pa.ChunkedArray:
    return pa.chunked_array([pa.array(chunk, type) for chunk in chunks])


def fitted(values: pa.ChunkedArray, config: FeatureConfig) -> features.Feature:
    """Fitted through a merge, one part per chunk."""
    parts = [features.count_values(pa.chunked_array([chunk]), config) for chunk in values.chunks]
    return features.fit("f", "item", config, features.merge(*parts))


def test_categories_by_falling_count_then_value() -> None:
    values = column(["b", "a", "c", None], ["c", "b", "a", "c", "d"])
    feature = fitted(values, CATEGORY)
    assert feature.vocabulary == ["c", "a", "b", "d"] and feature.cardinality == 6
    assert features.encode(column(["c", "a", "b", "d", "new", None]), feature).to_pylist() == [2, 3, 4, 5, 1, 0]


def test_rare_categories_share_the_unknown_id() -> None:
    feature = fitted(column([7, 7, 9, 3, 3, 3]), FeatureConfig(kind="categorical", min_count=2))
    assert feature.vocabulary == [3, 7]
    assert features.encode(column([9, 7, 3]), feature).to_pylist() == [1, 3, 2]


def test_nan_category_is_missing() -> None:
    feature = fitted(column([1.0, np.nan, 1.0]), CATEGORY)
    assert feature.vocabulary == ["1"]
    assert features.encode(column([np.nan, 1.0, 2.0]), feature).to_pylist() == [0, 2, 1]


@pytest.mark.parametrize("kind", [pa.list_(pa.string()), pa.large_list(pa.string())])
def test_lists(kind: pa.DataType) -> None:
    values = column([["x", "y"], [], None], [["y"], ["z", None]], type=kind)
    feature = fitted(values, FeatureConfig(kind="list"))
    assert feature.vocabulary == ["y", "x", "z"]
    assert features.encode(values, feature).to_pylist() == [[3, 2], [], [], [2], [4]]
    assert features.encode(values, feature).type == pa.list_(pa.int32())


def test_numbers_are_standardised_and_missing_is_the_mean() -> None:
    values = column([1.0, 3.0, None, np.nan], [np.inf, 5.0, 7.0])  # mean 4, variance (9 + 1 + 1 + 9) / 4 = 5
    feature = fitted(values, FeatureConfig(kind="numeric"))
    assert feature.mean == pytest.approx(4) and feature.std == pytest.approx(np.sqrt(5))
    expected = np.array([-3, -1, 0, 0, 0, 1, 3]) / np.sqrt(5)
    np.testing.assert_allclose(features.encode(values, feature).to_numpy(), expected, rtol=1e-6)


def test_large_numbers_keep_their_spread_and_constants_are_zero() -> None:
    big = fitted(column([1e15 + 1, 1e15 + 3], [1e15 + 5]), FeatureConfig(kind="numeric"))
    assert big.std == pytest.approx(np.sqrt(8 / 3))
    constant = fitted(column([2, 2], [2]), FeatureConfig(kind="numeric"))
    assert features.encode(column([2, 3]), constant).to_pylist() == [0.0, 1.0]


def item_counts(train: list[int], valid: list[int] | tuple[()] = ()) -> pa.Table:
    """What partition.count gives for these chosen items."""
    numbers = {"n": len(train) * [1] + len(valid) * [0], "n_valid": len(train) * [0] + len(valid) * [1]}
    columns = {"value": [*train, *valid], **numbers, "chosen": numbers["n"], "chosen_valid": numbers["n_valid"]}
    return features.merge(pa.table(columns))


def test_catalogue_and_item_table() -> None:
    counts = item_counts(train=[5, 9, 9, 4, 4, 7, 9])
    items, new = vocab.catalogue(counts, 1)
    assert items["item"].to_pylist() == [9, 4, 5, 7] and items["count"].to_pylist() == [3, 2, 1, 1] and not len(new)
    assert vocab.catalogue(counts, 2)[0]["item"].to_pylist() == [9, 4]
    assert vocab.item_ids(column([7], [9, 8]), items["item"].combine_chunks()).tolist() == [5, 2, 1]
    side = pa.table({"item": [4, 5, 9, 100], "item_brand": ["a", "b", "b", "c"]})
    table, (feature,) = vocab.item_table(items, 6, side, {"brand": CATEGORY})
    assert table["item"].to_pylist() == [None, None, 9, 4, 5, 7]
    assert table["count"].to_pylist() == [0, 0, 3, 2, 1, 1]
    assert feature.vocabulary == ["b", "a"]  # "c" belongs to an item that nobody trained on
    assert table["item_brand"].to_pylist() == [0, 0, 2, 3, 2, 0]
    with pytest.raises(DataError, match=r"no item has 4 train events \(the most frequent of 4 has 3\)"):
        vocab.catalogue(counts, 4)


def test_shown_and_never_chosen_is_known_and_comes_last() -> None:
    zeros = {"n_valid": [0, 0, 0], "chosen_valid": [0, 0, 0]}
    items, _ = vocab.catalogue(pa.table({"value": [3, 4, 5], "n": [9, 2, 1], "chosen": [0, 1, 1], **zeros}), 1)
    assert items["item"].to_pylist() == [4, 5, 3] and items["count"].to_pylist() == [1, 1, 0]


def test_what_validation_adds_comes_after_what_train_has() -> None:
    counts = item_counts(train=[5, 9, 9, 4], valid=[6, 9, 8, 8, 4])
    items, new = vocab.catalogue(counts, 1)
    assert items["item"].to_pylist() == [9, 4, 5]
    assert new.to_pydict() == {"item": [8, 6], "count": [0, 0], "count_valid": [2, 1]}
    items, new = vocab.catalogue(counts, 2)  # 4 has one train and one validation event
    assert items["item"].to_pylist() == [9]
    assert new.to_pydict() == {"item": [4, 8], "count": [1, 0], "count_valid": [1, 2]}

    side = pa.table({"item": [4, 9, 8, 6], "item_tags": [["a"], ["b", "c"], ["c", "d"], ["e", "d"]]})
    kinds = {"tags": FeatureConfig(kind="list")}
    items, new = vocab.catalogue(counts, 1)
    table, (feature,) = vocab.item_table(pa.concat_tables([items, new]), 5, side, kinds)
    assert (feature.cardinality, feature.new_values, feature.vocabulary) == (5, 2, ["a", "b", "c", "d", "e"])
    assert table["item_tags"].to_pylist() == [[], [], [3, 4], [2], [], [4, 5], [6, 5]]


def test_hashed_categories_and_their_collisions() -> None:
    values = pa.array([f"v{i}" for i in range(3000)])
    config = FeatureConfig(kind="categorical", hash_buckets=4096)
    feature = fitted(pa.chunked_array([values[:2000], values[1000:]]), config)
    assert feature.cardinality == 4098 and feature.vocabulary is None
    ids = features.encode(pa.chunked_array([values]), feature).to_numpy()
    _, n = np.unique(ids, return_counts=True)
    assert ids.min() >= 2 and ids.max() < 4098
    assert feature.collisions == pytest.approx(1 - (n == 1).sum() / 3000, abs=0.03)
    lists = features.encode(column([["v1", None], None, []]), feature.model_copy(update={"kind": "list"}))
    assert lists.to_pylist() == [[ids[1]], [], []]


@pytest.mark.parametrize("seed", range(3))
def test_quantiles_merge_to_those_of_all_rows(seed: int) -> None:
    x = np.random.default_rng(seed).lognormal(size=50_000)
    feature = fitted(
        pa.chunked_array([pa.array(part) for part in np.split(x, [9_000, 31_000])]),
        FeatureConfig(kind="numeric", scale="quantiles", quantiles=10),
    )
    ids = features.encode(pa.chunked_array([pa.array(x)]), feature).to_numpy()
    assert feature.kind == "categorical" and feature.cardinality == 12
    assert np.bincount(ids)[2:] / len(x) == pytest.approx(np.full(10, 0.1), abs=0.002)
    odd = features.encode(column([None, np.nan, np.inf, -np.inf, -5.0, 1e9]), feature).to_pylist()
    assert odd == [0, 0, 0, 0, 2, 11]


def test_quantiles_of_few_values_and_of_none() -> None:
    config = FeatureConfig(kind="numeric", scale="quantiles", quantiles=4)
    feature = fitted(column([1.0, 1.0, 1.0, 2.0]), config)
    assert feature.edges == [2.0] and features.encode(column([1.0, 2.0]), feature).to_pylist() == [2, 3]
    assert fitted(column([7.0, 7.0]), config).edges == []
    assert fitted(column([None, None], type=pa.float64()), config).edges == []


@pytest.mark.parametrize("scale", ["standard", "log"])
def test_a_number_that_stands_for_missing_is_named(scale: str) -> None:
    rng, config = np.random.default_rng(0), FeatureConfig(kind="numeric", scale=scale)

    def said(*parts: np.ndarray) -> str | None:
        counts = features.merge(*(features.count_values(pa.chunked_array([pa.array(part)]), config) for part in parts))
        return features.sentinel(features.fit("age", "user", config, counts), counts)

    ages = rng.normal(40, 8, 2_000)
    missing = np.where(np.arange(2_000) % 50 == 0, -999.0, ages)
    assert said(ages, ages) is None and said(np.zeros(0), ages) is None
    text = said(missing, ages[:500], missing)
    assert text is not None and text.startswith("user feature 'age': 80 of 4,500 values are -999, ")
    assert said(np.where(np.arange(2_000) == 7, 1e6, ages)) is None  # once: an outlier
    for usual in (
        rng.integers(0, 2, 2_000) * 1.0,
        (rng.random(2_000) < 0.02) * 1.0,
        rng.poisson(0.1, 2_000) * 1.0,
        np.full(9, 7.0),
    ):
        assert said(usual) is None
    years = np.where(rng.random(2_000) < 0.1, 0.0, rng.integers(1990, 2021, 2_000))
    assert "values are 0, " in (said(years) or "")


def test_log_scale() -> None:
    x = np.array([-9.0, 0.0, 1.0, 1e6])
    feature = fitted(pa.chunked_array([pa.array(x)]), FeatureConfig(kind="numeric", scale="log"))
    y = np.sign(x) * np.log1p(np.abs(x))
    scaled = features.encode(pa.chunked_array([pa.array(x)]), feature).to_numpy()
    assert scaled == pytest.approx((y - y.mean()) / y.std(), rel=1e-5)


@pytest.mark.parametrize("wrong", [{"kind": "numeric", "hash_buckets": 8}, {"kind": "list", "scale": "log"}])
def test_a_kind_refuses_what_is_for_another(wrong: dict) -> None:
    with pytest.raises(ValueError, match="is for kind"):
        FeatureConfig.model_validate(wrong)
