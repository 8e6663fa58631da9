"""Dense weights shared out over two workers: the same training as with all of them everywhere, also when it goes on from disk."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import recray
from helpers.configs import simulated_table
from helpers.ranks import run_ranks
from recray.artifacts import Run
from recray.config import Config, parse_config
from recray.records import CheckpointRecord
from recray.training import checkpoint, fsdp, launch
from recray.training.distributed import LocalContext, data_parallel
from recray.training.phase import Phase


class _Context(LocalContext):
    """One of two workers, on gloo without Ray."""

    world_size = 2

    def __init__(self, rank: int, shared_out: bool) -> None:
        super().__init__()
        self.rank, self._shared_out = rank, shared_out

    def sum(self, values: Tensor) -> Tensor:
        dist.all_reduce(values)
        return values

    def barrier(self) -> None:
        dist.barrier()

    def wrap(self, module: nn.Module) -> nn.Module:
        out = data_parallel(module, self._shared_out)
        assert self._shared_out == any(fsdp.local(p) is not p for p in module.parameters())
        return out


def _config(folder: str, name: str, *overrides: str) -> Config:
    table = simulated_table(
        folder,
        name,
        events=6000,
        users=200,
        items=150,
        model={"name": "two_tower", "dim": 16, "hidden": [32]},
        loss={"name": "softmax"},
        optim={"ema_decay": 0.9, "clip_norm": 0.5},
        training={"epochs": 3, "global_batch_size": 256},
        scaling={"num_workers": 2, "fsdp": name == "parts"},
    )
    return parse_config(table, [f"run.dataset={folder}/data/dataset", *overrides])


def _work(rank: int, world_size: int, folder: str) -> None:
    whole = _config(folder, "whole")
    launch.fit(_launched(whole), _Context(rank, False))
    for epochs in (2, 3):
        launch.fit(_launched(_config(folder, "parts", f"training.epochs={epochs}")), _Context(rank, True))


def _launched(config: Config) -> launch.Work:
    return launch.Work(config, Run(config).dataset().uri, f"{config.run_uri}/checkpoint", None)


def _selection(config: Config) -> Phase:
    return launch.selection(config, f"{config.run_uri}/checkpoint")


@pytest.fixture(scope="module")
def folder(ray_local: None, tmp_path_factory: pytest.TempPathFactory) -> str:
    out = str(tmp_path_factory.mktemp("fsdp"))
    recray.prepare(parse_config(simulated_table(out, "data", events=6000, users=200, items=150)))
    run_ranks(_work, 2, out)
    return out


def test_it_is_the_same_training(folder: str) -> None:
    whole, parts = (_selection(_config(folder, name)).folder(3) for name in ("whole", "parts"))
    states = [checkpoint.load_state(one) for one in (whole, parts)]
    history = [CheckpointRecord.read(one).history for one in (whole, parts)]
    metric = "ndcg@10"
    assert [entry["loss"] for entry in history[0]] == pytest.approx([entry["loss"] for entry in history[1]], rel=1e-4)
    assert history[0][-1][metric] == pytest.approx(history[1][-1][metric], abs=0.01)
    for kept in (lambda folder, _: checkpoint.load_weights(folder), lambda _, state: state["trained"]):
        ours, theirs = (kept(one, state) for one, state in zip((whole, parts), states, strict=True))
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            assert torch.allclose(value, theirs[name], atol=2e-3), name
    moments = [state["optimizer"]["state"] for state in states]
    assert [{k: v.shape for k, v in one.items()} for one in moments[0].values()] == [
        {k: v.shape for k, v in one.items()} for one in moments[1].values()
    ]


def test_a_model_of_it_is_used_as_any_other(folder: str) -> None:
    config = _config(folder, "parts")
    model, record = checkpoint.load_model(_selection(config).folder(3))
    assert record.epoch == 3
    assert all(type(p.data) is Tensor for p in model.parameters())
