"""What a refit knows that the model it was selected with does not: items and categories that validation adds.

The right numbers are computed from the raw log with pandas.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import recray
from recray.artifacts import Run
from recray.config import Config, parse_config
from recray.data.dataset import PreparedDataset
from recray.loading.collate import item_table
from recray.records import DatasetRecord
from recray.training import checkpoint
from tests.helpers.configs import REPOSITORY

pytestmark = pytest.mark.usefixtures("ray_local")
HOUR = 3_600_000_000
START = 1_704_067_200_000_000  # 2024-01-01
VALID, TEST, END = START + 80 * HOUR, START + 90 * HOUR, START + 100 * HOUR
BEAUTY = REPOSITORY.parent / "shared" / "data" / "amazon-beauty" / "events.parquet"


def _news(folder: Path) -> pd.DataFrame:
    """A log in which items and pages appear as time goes on, and the table of its items."""
    rng = np.random.default_rng(5)
    time = np.sort(rng.integers(0, 100 * HOUR, 3000))
    newest = 20 + time // HOUR
    log = pd.DataFrame(
        {
            "user_id": rng.integers(0, 80, len(time)),
            "item_id": newest - np.minimum(rng.geometric(0.08, len(time)) - 1, newest),
            "timestamp": START + time,
            "click": rng.integers(0, 2, len(time)),
            "page": [f"p{hour // 10}" for hour in time // HOUR],
        }
    ).drop_duplicates(["user_id", "item_id", "timestamp"])
    log.to_parquet(folder / "events.parquet", index=False)
    items = np.arange(130)
    table = pa.table({"item_id": items, "brand": [f"b{item // 7}" for item in items]})
    pq.write_table(table, folder / "items.parquet")
    return log


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, pd.DataFrame]:
    folder = tmp_path_factory.mktemp("news")
    return folder, _news(folder)


@pytest.fixture(scope="module")
def config(log: tuple[Path, pd.DataFrame]) -> Callable[..., Config]:
    """A configuration on the log, with its overrides."""
    folder, _ = log

    def made(*overrides: str) -> Config:
        table = {
            "run": {"name": "news", "output": str(folder / "runs")},
            "data": {
                "path": str(folder / "events.parquet"),
                "items": str(folder / "items.parquet"),
                "timestamp_unit": "us",
                "columns": {"timestamp": "timestamp", "label": "click", "context": ["page"]},
                "split": {"valid_start": "2024-01-04T08:00:00Z", "test_start": "2024-01-04T18:00:00Z"},
                "shard_events": 1000,
            },
            "model": {"name": "two_tower", "dim": 8, "hidden": [8], "history_length": 10},
            "training": {"epochs": 2, "global_batch_size": 64, "refit": True},
            "evaluation": {
                "k": [10],
                "queries": "event",
                "filter_seen": False,
                "baselines": ["popularity", "item_knn"],
            },
            "scaling": {"num_workers": 0},
        }
        return parse_config(table, list(overrides))

    return made


def _order(log: pd.DataFrame, after: list[int]) -> list[int]:
    """Items of the log that are not in `after`, by falling clicks, then by key."""
    clicks = log.groupby("item_id").click.sum()
    return [item for item in sorted(clicks.index, key=lambda i: (-clicks[i], i)) if item not in after]


def test_items_and_categories_that_validation_adds_come_after_those_of_train(
    log: tuple[Path, pd.DataFrame], config: Callable[..., Config]
) -> None:
    _, raw = log
    recray.prepare(config())
    dataset = PreparedDataset.of(Run(config()))
    train, valid = raw[raw.timestamp < VALID], raw[(raw.timestamp >= VALID) & (raw.timestamp < TEST)]
    known = _order(train, [])
    new = _order(valid, known)
    assert len(new) > 5 and set(raw[raw.timestamp >= TEST].item_id) - set(known) - set(new)
    refit = dataset.refitted()
    assert dataset.items()["item"].to_pylist()[2:] == known
    assert refit.items()["item"].to_pylist()[2:] == known + new
    both = pd.concat([train, valid])
    for view, events in ((dataset, train), (refit, both)):
        clicks = events.groupby("item_id").click.sum()
        assert view.item_counts()[2:].tolist() == [clicks[i] for i in view.items()["item"].to_pylist()[2:]]
        assert len(item_table(view).counts_N) == view.record.num_items
        _check_rows(view, raw, set(events.item_id), set(events.page))
        _check_brands(view, set(events.item_id))


def _check_rows(view: PreparedDataset, raw: pd.DataFrame, items: set[int], pages: set[str]) -> None:
    """The shards read as what the log says, and what is not in `items` or `pages` as unknown (1)."""
    users = dict(zip(*(view.user_keys()[name].to_pylist() for name in ("user_id", "user")), strict=True))
    keys = view.items()["item"].to_pylist()
    (page,) = (f for f in view.record.features if f.name == "page")
    assert page.vocabulary is not None and set(page.vocabulary[: page.cardinality - 2]) == pages
    of_user = dict(list(raw.sort_values("timestamp", kind="stable").groupby("user_id")))
    until = {"train": VALID, "valid": TEST, "test": END}
    start = {"train": START, "valid": VALID, "test": TEST}
    targets = 0
    for split, end in until.items():
        for table in view.iter_tables(split):
            for row in table.to_pylist():
                events = of_user[users[row["user"]]]
                events = events[events.timestamp < end]
                events = events[(events.click > 0) | (events.timestamp >= start[split])]
                assert row["item"] == [keys.index(i, 2) if i in items else 1 for i in events.item_id]
                assert row["context_page"] == [page.vocabulary.index(p) + 2 if p in pages else 1 for p in events.page]
                targets += row["num_targets"]
    assert targets == len(raw)


def _check_brands(view: PreparedDataset, items: set[int]) -> None:
    (brand,) = (f for f in view.record.features if f.name == "brand")
    found = view.items()
    assert brand.vocabulary is not None
    assert {f"b{item // 7}" for item in items} == set(brand.vocabulary[: brand.cardinality - 2])
    assert [brand.vocabulary[i - 2] for i in found[brand.column].to_pylist()[2:]] == [
        f"b{item // 7}" for item in found["item"].to_pylist()[2:]
    ]


@pytest.mark.parametrize("refit", [True, False])
def test_a_refit_learns_finds_and_counts_the_items_that_validation_adds(
    log: tuple[Path, pd.DataFrame], config: Callable[..., Config], tmp_path: Path, refit: bool
) -> None:
    _, raw = log
    chosen = config(f"training.refit={str(refit).lower()}", "retrieval.item_knn_weight=0.5")
    recray.prepare(chosen)
    recray.train(chosen)
    index, report = recray.index(chosen), recray.evaluate(chosen)
    known = raw[raw.timestamp < (TEST if refit else VALID)]
    assert index.num_items == known.item_id.nunique() + 2
    assert report.counts["catalogue"] == known.item_id.nunique()
    asked = raw[(raw.timestamp >= TEST) & (raw.click > 0)]
    before = raw[raw.click > 0].sort_values("timestamp", kind="stable").groupby("user_id").cumcount()
    asked = asked[before[asked.index] > 0]
    assert report.counts["queries"] == len(asked)
    assert report.counts["unknown_targets"] == (~asked.item_id.isin(known.item_id)).sum()
    popular = set(_order(known, [])[:10])
    assert report.metrics["popularity"]["recall@10"].value == pytest.approx(asked.item_id.isin(popular).mean())

    lists = recray.recommend(chosen, str(tmp_path / "lists"))
    found = pd.concat([pd.read_parquet(tmp_path / "lists" / name) for name in lists.files])
    assert set(found.item) <= set(known.item_id)
    model, _ = checkpoint.load_model(Run(chosen).checkpoint().uri)
    assert len(model.item_table.weight) == index.num_items
    first = DatasetRecord.read(PreparedDataset.of(Run(chosen)).uri).num_items
    if refit:  # rows of ids that had no gradient would still be those of the start
        new = model.item_table.weight[first:]
        assert len(new) > 5 and set(found.item) & (set(known.item_id) - set(raw[raw.timestamp < VALID].item_id))


def test_a_ranker_and_its_refit(log: tuple[Path, pd.DataFrame], config: Callable[..., Config]) -> None:
    _, raw = log
    counts = {}
    for refit in (True, False):
        chosen = config(f"training.refit={str(refit).lower()}", "model.name=dcn_v2", "run.name=ranker", "loss.name=bce")
        recray.prepare(chosen)
        recray.train(chosen)
        report = recray.evaluate(chosen)
        known = raw[raw.timestamp < (TEST if refit else VALID)]
        asked = raw[raw.timestamp >= TEST]
        assert report.counts["impressions"] == len(asked)
        counts[refit] = report.counts["unknown_items"]
        assert counts[refit] == (~asked.item_id.isin(known.item_id)).sum()
    assert counts[True] < counts[False]


@pytest.mark.skipif(not BEAUTY.exists(), reason="needs the data set amazon-beauty")
def test_unknown_targets_of_amazon_beauty(tmp_path: Path) -> None:
    """Each user's last event is the test: 138 of 22,363 ask for items that train never saw, and 52 with validation."""
    table = {
        "run": {"output": str(tmp_path)},
        "data": {"path": str(BEAUTY), "timestamp_unit": "order", "split": {"kind": "leave_last"}},
    }
    table["data"]["columns"] = {"timestamp": "timestamp"}
    config = parse_config(table, [])
    recray.prepare(config)
    dataset = PreparedDataset.of(Run(config))
    raw = pd.read_parquet(BEAUTY).sort_values(["user_id", "timestamp"], kind="stable")
    from_end = raw.groupby("user_id").cumcount(ascending=False)
    test = raw[from_end == 0]
    for view, last, expected in ((dataset, 2, 138), (dataset.refitted(), 1, 52)):
        unknown = ~test.item_id.isin(raw[from_end >= last].item_id)
        targets = np.concatenate(
            [[row["item"][-1] for row in table.select(["item"]).to_pylist()] for table in view.iter_tables("test")]
        )
        assert len(targets) == len(test) and (targets == 1).sum() == unknown.sum() == expected
        assert view.record.num_items == raw[from_end >= last].item_id.nunique() + 2
