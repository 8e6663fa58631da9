"""Workers without rows: of a training, a validation or both splits with a single user, every model trains on 3 workers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.datasets import small_dataset
from helpers.ranks import GlooContext, run_ranks
from recray import storage
from recray.config import parse_config
from recray.data.dataset import PreparedDataset
from recray.layers import collectives
from recray.training.distributed import data_parallel, read_shards
from recray.training.phase import Phase
from recray.training.trainer import Trainer

WORKERS = 3


class _Context(GlooContext):
    local_size = WORKERS

    def tables(self, dataset: PreparedDataset, shards: Any, slices: Any) -> Any:
        return read_shards(dataset, shards, slices)

    def all_gather(self, x: Tensor) -> Tensor:
        return collectives.all_gather(x)

    def barrier(self) -> None:
        self.sum(torch.zeros(1))

    def wrap(self, module: torch.nn.Module) -> torch.nn.Module:
        return data_parallel(module)


def _train(rank: int, world_size: int, table: dict[str, Any]) -> list[dict[str, float]]:
    config = parse_config(table)
    phase = Phase("train", config.training.epochs, f"{config.run_uri}/epochs")
    dataset = PreparedDataset.open(str(config.run.dataset))
    trainer = Trainer(config, dataset, phase, _Context(rank, world_size))
    return trainer.fit().history


@pytest.mark.parametrize(
    ("train_users", "valid_users"),
    [(1, 1), *(pytest.param(*users, marks=pytest.mark.slow) for users in ((1, 12), (12, 1)))],
)
def test_workers_without_rows(train_users: int, valid_users: int, tmp_path: Path) -> None:
    """One process group for all models: starting one takes seconds."""
    found = run_ranks(_train_all, WORKERS, str(tmp_path), train_users, valid_users)
    for name, histories in found[0].items():
        assert len(histories) == 2 and all(torch.isfinite(torch.tensor(entry["loss"])) for entry in histories), name
        for other in found[1:]:
            assert [entry["loss"] for entry in other[name]] == [entry["loss"] for entry in histories], name
    for name in found[0]:
        epochs = storage.list_folders(f"{tmp_path}/{name}/runs/run/epochs")
        assert epochs[-1] == "epoch-0002", name


def _train_all(rank: int, world_size: int, folder: str, train_users: int, valid_users: int) -> dict[str, Any]:
    found = {}
    for model, mode, loss in (
        ("two_tower", "dense", "softmax"),
        ("two_tower", "row_sharded", "sampled_softmax"),
        ("sasrec", "sparse_replicated", "sampled_softmax"),
        ("din", "row_sharded", "bce"),
        ("din", "dense", "bce"),
    ):
        name = f"{model}-{mode}"
        data = Path(folder, name, f"data-{rank}")
        small_dataset(data, valid_users, train_users, labelled=model == "din")
        table = {
            "run": {"output": f"{folder}/{name}/runs", "dataset": str(data)},
            "model": {"name": model, "dim": 4, "history_length": 5, "embedding": {"mode": mode}},
            "loss": {"name": loss},
            "training": {"epochs": 2, "global_batch_size": 18, "accumulation_steps": 2},
            "scaling": {"num_workers": WORKERS},
        }
        found[name] = _train(rank, world_size, table)
    return found
