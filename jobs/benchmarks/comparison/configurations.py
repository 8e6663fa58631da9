"""What is run by both checkouts: small configurations that together use every model, loss and way to train.

Keys are those of the base commit; `recray` of a later one may know them by another name (adapter.KEYS).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RETRIEVERS = ("two_tower", "sasrec")

_CATEGORY = {"kind": "categorical"}
_SIMULATED: dict[str, Any] = {
    "source": "simulated",
    "shard_events": 5000,  # several shards
    "columns": {"timestamp": "timestamp", "context": ["device", "hour"]},
    "context_features": {"device": _CATEGORY, "hour": _CATEGORY},
    "simulated": {"events": 20_000, "users": 400, "items": 300, "categories": 10},
}
_LOG: dict[str, Any] = {
    "path": "{log}/events.parquet",
    "users": "{log}/users.parquet",
    "items": "{log}/items.parquet",
    "shard_events": 6000,
    "columns": {"timestamp": "timestamp", "weight": "weight", "context": ["slot", "price_shown", "words"]},
    "context_features": {
        "slot": {"kind": "categorical", "min_count": 20},
        "price_shown": {"kind": "numeric", "scale": "quantiles", "quantiles": 8},
        "words": {"kind": "list", "hash_buckets": 16},
    },
    "user_features": {
        "age": {"kind": "numeric"},
        "income": {"kind": "numeric", "scale": "log"},
        "country": _CATEGORY,
        "likes": {"kind": "list"},
    },
}


@dataclass(frozen=True)
class Run:
    """One run folder: prepare, train, index (of a retriever), evaluate, recommend (of a retriever)."""

    name: str
    table: Mapping[str, Any]
    until: int | None = None  # train so far first, then go on
    splits: tuple[str, ...] = ("test",)  # evaluated

    @property
    def retriever(self) -> bool:
        return self.table["model"]["name"] in RETRIEVERS

    @property
    def workers(self) -> int:
        return int(self.table.get("scaling", {}).get("num_workers", 1))


@dataclass(frozen=True)
class Configuration:
    """Runs that one process makes, one after the other."""

    name: str
    runs: tuple[Run, ...]
    ends_early: bool = False  # its patience ends before its epochs do: what it is there for


def _one(
    name: str,
    data: Mapping[str, Any],
    until: int | None = None,
    splits: tuple[str, ...] = ("test",),
    ends_early: bool = False,
    **sections: Mapping[str, Any],
) -> Configuration:
    return Configuration(name, (Run(name, {"data": data, **sections}, until, splits),), ends_early)


def _with(data: Mapping[str, Any], **keys: Any) -> dict[str, Any]:
    return {**data, **keys}


def _batch(size: int, epochs: int = 2, **keys: Any) -> dict[str, Any]:
    return {"global_batch_size": size, "epochs": epochs, **keys}


# A recall target that only searching all lists reaches, or none: which setting is chosen must not depend on the clock.
_LISTS = {"index": "IVF16,Flat", "recall_target": 1.0, "k": 60}
_CODES = {"index": "IVF8,SQ4", "recall_target": 1.0, "k": 60}
_TWO = {"num_workers": 2}


def _two_tower() -> list[Configuration]:
    return [
        _one(
            "two_tower-sampled",
            _SIMULATED,
            splits=("test", "valid"),
            model={"name": "two_tower", "dim": 16, "hidden": [32], "dropout": 0.1},
            loss={"name": "sampled_softmax", "negatives": 64, "in_batch": True, "logq": True},
            optim={
                "learning_rate": 5e-3,
                "schedule": "cosine",
                "warmup_steps": 10,
                "clip_norm": 1.0,
                "ema_decay": 0.95,
            },
            training=_batch(512, 3),
            retrieval=_LISTS | {"filter_weight": 0.5},
            evaluation={"baselines": ["popularity", "recent_popularity", "hindsight", "item_filter", "oracle"]},
        ),
        _one(
            "two_tower-softmax-refit",
            _with(_SIMULATED, split={"valid": "3d", "test": "3d"}),
            ends_early=True,
            model={"name": "two_tower", "dim": 16, "item_bias": True},
            loss={"name": "softmax", "chunk_size": 100},
            optim={"learning_rate": 1.5e-2},
            training=_batch(256, 10, refit=True, half_life="5d", patience=1, metric="recall@20"),
            evaluation={"queries": "event", "k": [5, 20]},
        ),
        _one(
            "two_tower-gbce-sparse",
            _LOG,
            model={
                "name": "two_tower",
                "dim": 16,
                "hidden": [24],
                "history": "others",
                "normalize": True,
                "embedding": {"mode": "sparse_replicated"},
            },
            loss={"name": "gbce", "negatives": 64, "calibration": 0.9, "temperature": 0.1},
            optim={
                "learning_rate": 3e-3,
                "schedule": "linear",
                "table_optimizer": "adagrad",
                "table_learning_rate": 0.05,
                "clip_norm": 0.5,
            },
            training=_batch(512, accumulation_steps=2),
            evaluation={"baselines": ["popularity", "item_filter"], "filter_seen": False},
        ),
        _one(
            "two_tower-bpr-resume",
            _with(_SIMULATED, split={"kind": "leave_last"}, min_item_events=3),
            until=1,
            model={"name": "two_tower", "dim": 16, "pooling": "none"},
            loss={"name": "bpr", "negatives": 32},
            optim={"name": "adam", "learning_rate": 5e-3, "weight_decay": 1e-4},
            training=_batch(512, 3, validate_every=2, metric="mrr@10"),
            retrieval=_CODES,
        ),
        _one(
            "two_tower-two-workers",
            _SIMULATED,
            model={"name": "two_tower", "dim": 16, "hidden": [32]},
            loss={"name": "sampled_softmax", "negatives": 64, "in_batch": True, "logq": False},
            optim={"learning_rate": 5e-3, "clip_norm": 1.0, "ema_decay": 0.9},
            training=_batch(512),
            scaling=_TWO,
        ),
        _one(
            "two_tower-two-workers-sharded",
            _SIMULATED,
            until=1,
            model={"name": "two_tower", "dim": 16, "hidden": [32], "embedding": {"mode": "row_sharded"}},
            loss={"name": "gbce", "negatives": 64},
            optim={
                "learning_rate": 5e-3,
                "clip_norm": 1.0,
                "table_optimizer": "adagrad",
                "table_learning_rate": 0.05,
                "embedding_decay": 1e-3,
            },
            training=_batch(512),
            scaling=_TWO,
        ),
    ]


def _sasrec() -> list[Configuration]:
    small = {"name": "sasrec", "dim": 16, "history_length": 40}
    return [
        _one(
            "sasrec-softmax-resume",
            _with(_SIMULATED, split={"kind": "leave_last"}),
            until=1,
            model=small | {"layers": 2, "heads": 2, "dropout": 0.2},
            loss={"name": "softmax"},
            optim={"learning_rate": 3e-3, "schedule": "cosine", "warmup_steps": 5, "clip_norm": 1.0, "ema_decay": 0.9},
            training=_batch(32, 3),
            retrieval={"filter_weight": 1.0},
        ),
        _one(
            "sasrec-cosine-contrastive",
            _SIMULATED,
            model=small | {"layers": 1, "feed_forward": "gated", "normalize": True, "dropout": 0.1},
            loss={"name": "cosine_contrastive", "negatives": 64, "margin": 0.3, "negative_weight": 20.0},
            optim={"learning_rate": 3e-3, "weight_decay": 1e-3, "embedding_decay": 1e-4},
            training=_batch(32, accumulation_steps=2),
            evaluation={"queries": "event", "k": [10]},
        ),
        _one(
            "sasrec-sharded-early",
            _SIMULATED,
            until=1,
            ends_early=True,
            model=small | {"layers": 1, "embedding": {"mode": "row_sharded"}},
            loss={"name": "sampled_softmax", "negatives": 100, "in_batch": False},
            optim={"name": "sgd", "learning_rate": 0.3},
            training=_batch(16, 10, patience=1, metric="hr@10"),
        ),
        _one(
            "sasrec-two-workers",
            _with(_SIMULATED, split={"kind": "leave_last"}),
            model=small | {"layers": 1, "embedding": {"mode": "sparse_replicated"}},
            loss={"name": "sampled_softmax", "negatives": 64, "in_batch": True},
            optim={"learning_rate": 3e-3, "schedule": "linear"},
            training=_batch(32, accumulation_steps=2, refit=True),
            scaling=_TWO | {"reader": "ray_data"},
        ),
        _behind(small),
    ]


def _behind(small: Mapping[str, Any]) -> Configuration:
    """A ranker behind a retriever, on the same data."""
    data = _with(_SIMULATED, min_history=2, negatives={"per_positive": 2})
    ranker = {
        "data": data,
        "model": {"name": "din", "dim": 8, "hidden": [32, 16], "attention": [16, 8], "history_length": 20},
        "optim": {"learning_rate": 5e-3},
        "training": _batch(1024, 1),
    }
    retriever = {
        "data": data,
        "model": {**small, "layers": 1},
        "loss": {"name": "sampled_softmax", "negatives": 100},
        "optim": {"learning_rate": 3e-3},
        "training": _batch(32, 1),
        "retrieval": {"ranker": "{output}/ranker", "k": 40, "filter_weight": 0.5},
    }
    return Configuration("sasrec-with-ranker", (Run("ranker", ranker), Run("retriever", retriever)))


def _rankers() -> list[Configuration]:
    drawn = _with(_SIMULATED, min_history=2, negatives={"per_positive": 1})
    labelled = _with(_LOG, columns=_LOG["columns"] | {"label": "label"})
    given = _with(labelled, columns=labelled["columns"] | {"split": "split"}, split={"kind": "given", "valid": 0.15})
    tower = {"dim": 8, "hidden": [32, 16], "history_length": 20}
    return [
        _one(
            "din-pairwise",
            drawn,
            splits=("test", "valid"),
            model=tower | {"name": "din", "attention": [16, 8], "min_history": 3, "dropout": 0.1},
            loss={"pairwise_weight": 0.5, "label_smoothing": 0.1, "positive_weight": 2.0},
            optim={"learning_rate": 5e-3, "ema_decay": 0.95, "clip_norm": 1.0},
            training=_batch(1024, metric="gauc"),
        ),
        _one(
            "din-two-workers",
            drawn,
            model=tower | {"name": "din", "attention": [16, 8], "embedding": {"mode": "row_sharded"}},
            loss={"label_smoothing": 0.05},
            optim={"learning_rate": 5e-3, "clip_norm": 1.0},
            training=_batch(1024),
            scaling=_TWO,
        ),
        _one(
            "dlrm-sparse",
            _with(_SIMULATED, negatives={"per_positive": 2, "draw": "uniform"}),
            model=tower | {"name": "dlrm", "bottom": [16], "embedding": {"mode": "sparse_replicated"}},
            optim={
                "learning_rate": 5e-3,
                "schedule": "linear",
                "table_optimizer": "adagrad",
                "table_learning_rate": 0.05,
            },
            training=_batch(1024, accumulation_steps=2),
        ),
        _one(
            "dlrm-labelled-early",
            labelled,
            ends_early=True,
            model=tower | {"name": "dlrm", "bottom": [16], "user_embedding": True},
            loss={"positive_weight": 3.0},
            optim={"learning_rate": 3e-3, "weight_decay": 1e-3},
            training=_batch(512, 10, patience=1, metric="log_loss"),
        ),
        _one(
            "dcn_v2-recent-refit",
            _with(_SIMULATED, negatives={"draw": "recent", "recent_events": 500}),
            model=tower | {"name": "dcn_v2", "rank": 8},
            optim={"learning_rate": 5e-3, "schedule": "cosine", "warmup_steps": 8, "ema_decay": 0.9},
            training=_batch(1024, refit=True),
        ),
        _one(
            "dcn_v2-sharded-resume",
            drawn,
            until=1,
            model=tower | {"name": "dcn_v2", "structure": "stacked", "rank": 0, "embedding": {"mode": "row_sharded"}},
            loss={"pairwise_weight": 0.3},
            optim={"name": "adam", "learning_rate": 5e-3, "clip_norm": 0.5},
            training=_batch(1024, 3, metric="log_loss"),
        ),
        _one(
            "wide_deep-half-life",
            _with(_SIMULATED, split={"kind": "leave_last"}, negatives={"per_positive": 1}),
            until=1,
            model=tower | {"name": "wide_deep", "history": "none", "dropout": 0.2},
            optim={"learning_rate": 5e-3, "ema_decay": 0.9},
            training=_batch(1024, half_life="4d", accumulation_steps=2),
        ),
        _one(
            "wide_deep-given",
            given,
            model=tower | {"name": "wide_deep", "feature_dims": {"item": 12, "country": 4}, "user_embedding": True},
            loss={"label_smoothing": 0.1},
            optim={"name": "sgd", "learning_rate": 0.1, "clip_norm": 5.0},
            training=_batch(512, metric="gauc_impressions"),
        ),
        _one(
            "wide_deep-two-workers-fsdp",
            drawn,
            model=tower | {"name": "wide_deep"},
            optim={"learning_rate": 5e-3, "clip_norm": 1.0},
            training=_batch(1024),
            scaling=_TWO | {"fsdp": True},
        ),
    ]


def all_configurations() -> list[Configuration]:
    return [*_two_tower(), *_sasrec(), *_rankers()]


def filled(table: Mapping[str, Any], places: Mapping[str, str]) -> dict[str, Any]:
    """The table with "{log}" and "{output}" in its texts replaced."""

    def fill(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: fill(one) for key, one in value.items()}
        if isinstance(value, str):
            for name, place in places.items():
                value = value.replace(f"{{{name}}}", place)
        return value

    return {key: fill(value) for key, value in table.items()}


def write_log(folder: Path, rows: int = 20_000, users: int = 300, items: int = 250) -> None:
    """Impressions with labels, weights, context of every kind and a column of splits; users and items with features.

    Users and items are of six groups, and a user clicks on the own group's items more often.
    """
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(parents=True)
    rng = np.random.default_rng(7)
    user, item = rng.integers(0, users, rows), (items * rng.random(rows) ** 2).astype(np.int64)
    chance = np.where(user % 6 == item % 6, 0.7, 0.25) * np.where(item % 10 == 0, 0.6, 1.0)
    seconds = np.sort(rng.integers(0, 20 * 86_400, rows))
    price = rng.lognormal(2, 1, rows)
    price[rng.random(rows) < 0.02] = np.nan
    words = [[f"word-{n}" for n in rng.integers(0, 40, count).tolist()] for count in rng.integers(0, 4, rows).tolist()]
    events = {
        "user_id": [f"user-{n:04d}" for n in user.tolist()],
        "item_id": [f"item-{n:04d}" for n in item.tolist()],
        "timestamp": 1_700_000_000 + seconds,
        "label": (rng.random(rows) < chance).astype(np.int8),
        "weight": rng.choice([0.5, 1.0, 2.0], rows),
        "split": np.where(seconds > 17 * 86_400, "test", "train"),
        "slot": [f"slot-{n}" for n in (12 * rng.random(rows) ** 2).astype(np.int64).tolist()],
        "price_shown": price,
        "words": words,
    }
    pq.write_table(pa.table(events), folder / "events.parquet")
    age = rng.normal(40, 12, users).round(1)
    age[::17] = np.nan
    of_users = {
        "user_id": [f"user-{n:04d}" for n in range(users)],
        "age": age,
        "income": rng.lognormal(10, 1, users),
        "country": [f"country-{n % 6}" for n in range(users)],
        "likes": [[f"like-{n % 6}", f"like-{n % 11}"] for n in range(users)],
    }
    pq.write_table(pa.table(of_users), folder / "users.parquet")
    of_items = {
        "item_id": [f"item-{n:04d}" for n in range(items)],
        "category": [f"category-{n % 6}" for n in range(items)],
        "size": rng.normal(0, 3, items),
    }
    pq.write_table(pa.table(of_items), folder / "items.parquet")
