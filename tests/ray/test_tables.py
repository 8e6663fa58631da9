"""Sharded tables through the stages: two workers train, validate together and write pieces; one goes on; the index reads pieces."""

from pathlib import Path

import numpy as np
import pytest
import torch

import recray
from helpers.configs import simulated_table
from recray.artifacts import Run
from recray.config import Config, parse_config
from recray.retrieval import embed
from recray.training import checkpoint

pytest.importorskip("faiss")


def _config(folder: Path, *overrides: str) -> Config:
    table = simulated_table(
        folder,
        "sharded",
        data={"negatives": {"per_positive": 1}},
        model={"dim": 8, "embedding": {"mode": "row_sharded"}},
        optim={"learning_rate": 0.01, "table_optimizer": "adagrad", "table_learning_rate": 0.05},
        training={"epochs": 1, "global_batch_size": 240},
        evaluation={"k": [10], "bootstrap": 0, "baselines": []},
        retrieval={"k": 20},
    )
    return parse_config(table, ["scaling.num_workers=2", *overrides])


@pytest.mark.parametrize("name", ["two_tower", pytest.param("dcn_v2", marks=pytest.mark.slow)])
def test_two_workers_then_one(name: str, ray_local: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = f"model.name={name}"
    config = _config(tmp_path, chosen)
    recray.prepare(config)
    record = recray.train(config)
    assert record.pieces == 2
    # What the workers found together is what a process that reads all pieces finds alone.
    alone = parse_config(config.model_dump(mode="json"), ["scaling.num_workers=0"])
    found = recray.evaluate(alone, split="valid").metrics["model"][record.metric].value
    assert record.value == pytest.approx(found, abs=1e-6)
    if name == "two_tower":
        _index_is_of_all_pieces(config, monkeypatch)

    config = _config(tmp_path, chosen, "training.epochs=2", "scaling.num_workers=0")
    longer = recray.train(config)
    assert longer.pieces == 1 and longer.step == 2 * record.step
    assert longer.history[0] == record.history[0] and longer.history[1]["loss"] < record.history[0]["loss"]


def _index_is_of_all_pieces(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    assert recray.index(config).recall == pytest.approx(1.0)
    source, items = Run(config).checkpoint(), recray.prepare(config).num_items
    model, _ = checkpoint.load_model(source.uri)
    with torch.inference_mode():
        vectors = model.item_vectors(torch.arange(items)).numpy()  # type: ignore[operator]
    # Products of other numbers of rows add in another order: the last bit of vectors of length about 1.
    np.testing.assert_allclose(
        embed.load_vectors(f"{config.run_uri}/index/current", items), vectors, rtol=1e-5, atol=1e-6
    )
    monkeypatch.setattr(embed, "_CHUNK", 30)
    monkeypatch.setattr(embed, "_TASK", 50)
    monkeypatch.setattr(embed, "_PARALLEL_ABOVE", 0)
    monkeypatch.setattr(embed, "_MAPPED_ABOVE", 0)
    found = embed.item_vectors(source, model, items, config.scaling)
    np.testing.assert_allclose(found, vectors, rtol=1e-5, atol=1e-6)
