"""Workers with a share of a batch each take the steps that one worker takes with all of it.

For every model, wherever its tables live, with accumulation, clipping and a worker that runs out of rows; on gloo, in
processes of their own.
"""

import contextlib
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from helpers.collectives import OneProcess
from helpers.ranks import run_ranks
from recray import registry
from recray.config import OptimConfig
from recray.layers import collectives
from recray.layers.embedding import Mode, Table, TablePlan, use_plan
from recray.layers.feature_encoder import mean_pool
from recray.layers.hooks import run_hooks, step_hooks
from recray.loading.batch import Batch, ItemTable, Jagged
from recray.loading.collate import padding_like
from recray.losses.base import Objective
from recray.models import Ranker
from recray.records import DatasetRecord, Feature
from recray.training import fsdp
from recray.training.distributed import data_parallel
from recray.training.optim import Optimizers

ITEMS, ROWS, STEPS, PARTS = 61, 24, 4, 2
SMALL = 30  # rows: tables of items and users live as the mode says, the others are dense
MODELS = registry.names("model")
TABLE = ItemTable(torch.ones(ITEMS), {"price": torch.linspace(-1, 1, ITEMS)})
RECORD = DatasetRecord(
    fingerprint="",
    num_items=ITEMS,
    num_users=40,
    counts={},
    shards={},
    seed=0,
    features=[
        Feature(name="tags", role="user", kind="list", cardinality=9),
        Feature(name="hour", role="context", kind="categorical", cardinality=26),
        Feature(name="price", role="item", kind="numeric"),
    ],
)


def _batch(step: int, begin: int, end: int, sequences: bool) -> Batch:
    """Rows begin:end of a step's batch. The first half has no history and no tags, so that one worker touches less."""
    generator = torch.Generator().manual_seed(step)
    lengths = torch.randint(1, 6, (ROWS,), generator=generator)
    if not sequences:
        lengths[: ROWS // 2] = 0
    items = torch.randint(2, ITEMS, (ROWS, 6), generator=generator)
    targets = torch.randint(2, ITEMS, (ROWS, 6), generator=generator)
    hour, label = (torch.randint(0, n, (ROWS,), generator=generator) for n in (26, 2))
    if step == 1:  # worker 0 owns all of them, of 2 workers and of 3
        items, targets = ((ids // 6 * 6).clamp(min=6) for ids in (items, targets))
    keep = torch.arange(6)[None] < lengths[begin:end, None]
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths[begin:end].cumsum(0)])
    history = Jagged(items[begin:end][keep], offsets)
    count = int(offsets[-1]) if sequences else end - begin
    return Batch(
        user_B=torch.arange(2 + begin, 2 + end),
        history=history,
        target_Q=targets[begin:end][keep] if sequences else targets[begin:end, 0],
        weight_Q=torch.ones(count),
        position_Q=torch.arange(count) if sequences else None,
        label_Q=label[begin:end].float(),
        user_features={"tags": Jagged(history.values % 9, offsets)},
        context={"hour": hour[begin:end]},
    )


CASES = {
    "sgd": OptimConfig(name="sgd", learning_rate=0.5),
    "sgd clipped": OptimConfig(name="sgd", learning_rate=0.5, clip_norm=0.2),
    "adam": OptimConfig(name="adam", learning_rate=0.02, clip_norm=0.2, embedding_decay=0.1),
    "fsdp clipped": OptimConfig(name="sgd", learning_rate=0.5, clip_norm=0.2),
    "fsdp adam": OptimConfig(name="adam", learning_rate=0.02, clip_norm=0.2, embedding_decay=0.1),
    "adagrad": OptimConfig(name="sgd", learning_rate=0.1, table_optimizer="adagrad", table_learning_rate=0.05),
}
RUNS: list[tuple[str, Mode, str]] = [
    *((name, mode, "sgd clipped") for name in MODELS for mode in ("dense", "sparse_replicated", "row_sharded")),
    *((name, "dense", "fsdp clipped") for name in MODELS),
    *(("exact", mode, "fsdp adam") for mode in ("dense", "sparse_replicated", "row_sharded")),
    *(("exact", mode, case) for mode in ("sparse_replicated", "row_sharded") for case in ("sgd", "adam", "adagrad")),
]


class _Exact(nn.Module):
    """In float64: Adam makes whole steps of gradients that are nothing but rounding."""

    examples = "impressions"

    def __init__(self) -> None:
        super().__init__()
        self.users, self.items = Table(40, 8), Table(ITEMS, 8)
        self.out = nn.Linear(8, 1)
        self.double()

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        assert batch.target_Q is not None and batch.label_Q is not None and batch.weight_Q is not None
        x_BD = self.users(batch.user_B) * self.items(batch.target_Q) + mean_pool(self.items, batch.history)
        error_B = self.out(x_BD)[:, 0] - batch.label_Q
        return (error_B.square() * batch.weight_Q).sum(), batch.weight_Q.sum()


class _Objective(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        return self.model(batch)  # type: ignore[no-any-return]


def _build(name: str) -> nn.Module:
    if name == "exact":
        return _Exact()
    module = registry.load("model", name)
    more = {"hidden": [8], "user_embedding": True} if module.Options.family == "ranker" else {"dropout": 0.0}
    return module.build(module.Options(dim=8, history_length=6, **more), RECORD, TABLE)  # type: ignore[no-any-return]


def _objective(name: str, mode: Mode, rank: int, world_size: int) -> nn.Module:
    """From the same weights however many workers: those of a dense model."""
    torch.manual_seed(0)
    dense = _build(name)
    with use_plan(TablePlan(mode, rank, world_size, small=SMALL)):
        model = _build(name)
    for mine, whole in zip(model.modules(), dense.modules(), strict=True):
        if isinstance(mine, Table) and mine.mode == "row_sharded":
            mine.weight.data.copy_(whole.weight.data[rank::world_size])
            whole.weight = mine.weight
    model.load_state_dict(dense.state_dict())
    if name == "exact":
        return _Objective(model)
    if isinstance(model, Ranker):
        return Objective(model, registry.options("loss", "bce")(), TABLE, OneProcess())
    return Objective(model, registry.options("loss", "softmax")(), TABLE, OneProcess())


def _steps(name: str, mode: Mode, case: str, rank: int, world_size: int, of: int) -> dict[str, torch.Tensor]:
    """rank of world_size workers; `of` workers is what the rows are cut for. A worker alone sees all of their rows."""
    objective, config = _objective(name, mode, rank, world_size), CASES[case]
    wrapped = data_parallel(objective, case.startswith("fsdp")) if world_size > 1 else objective
    optimizer, scaler = Optimizers(config, objective.model), torch.amp.GradScaler("cpu", enabled=False)  # type: ignore[arg-type]
    optimizer.set_learning_rate(config.learning_rate)
    sequences = objective.model.examples == "sequences"  # type: ignore[union-attr]
    share = ROWS // PARTS // of
    for step in range(STEPS):
        out = step == 2 and name != "din"  # the last worker has no rows left; Dice's averages would see the padding
        micro = []
        for part in range(PARTS):
            begin = part * ROWS // PARTS
            if world_size > 1:
                batch = _batch(step, begin + rank * share, begin + (rank + 1) * share, sequences)
                micro.append(padding_like(batch) if out and rank == of - 1 else batch)
            else:
                micro.append(_batch(step, begin, begin + (of - out) * share, sequences))
        weight = torch.stack([batch.weight_Q.sum() for batch in micro if batch.weight_Q is not None]).sum()
        if world_size > 1:
            dist.all_reduce(weight)
        for part, batch in enumerate(micro):
            last = part == PARTS - 1 or not isinstance(wrapped, nn.parallel.DistributedDataParallel)
            with contextlib.nullcontext() if last else wrapped.no_sync():  # type: ignore[operator, union-attr]
                total, _ = wrapped(batch)
                (total * world_size / weight).backward()
        run_hooks(step_hooks(wrapped), collectives.total if world_size > 1 else lambda total: total, False)
        if config.clip_norm:
            optimizer.clip(scaler, config.clip_norm)
        optimizer.step(scaler)
    return _whole(objective.model, world_size)  # type: ignore[arg-type]


def _whole(model: nn.Module, world_size: int) -> dict[str, torch.Tensor]:
    """The state with the rows of all workers put together."""
    state = {key: value.detach().clone() for key, value in fsdp.whole(model.state_dict()).items()}
    for name, module in model.named_modules():
        if world_size > 1 and isinstance(module, Table) and module.mode == "row_sharded":
            whole = torch.zeros(module.rows, module.embedding_dim, dtype=module.weight.dtype)
            whole[module.rank :: world_size] = module.weight.data
            dist.all_reduce(whole)
            state[f"{name}.weight"] = whole
    return state


def _overflow(rank: int, world_size: int) -> tuple[bool, float]:
    """Whether this worker's rows moved, and the scale afterwards, when only worker 0 meets an overflow."""
    with use_plan(TablePlan("row_sharded", rank, world_size)):
        table = Table(200, 4)
    optimizer, scaler = Optimizers(OptimConfig(), table), torch.amp.GradScaler("cpu", init_scale=8.0)
    optimizer.set_learning_rate(0.1)
    before = table.weight.detach().clone()
    loss = table(torch.arange(2, 20)).sum() * (torch.inf if rank == 0 else 1.0)
    scaler.scale(loss).backward()
    run_hooks(step_hooks(table), collectives.total, scaled=True)
    optimizer.step(scaler)
    return not torch.equal(before, table.weight), scaler.get_scale()


def _gathered(rank: int, world_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of all, worker r giving r + 1 of them, and the gradient of this worker's when worker r weighs row i by 10^r i."""
    mine = torch.full((rank + 1, 2), float(rank), requires_grad=True)
    rows = collectives.all_gather(mine)
    (rows * torch.arange(len(rows))[:, None] * 10.0**rank).sum().backward()
    assert mine.grad is not None
    return rows.detach(), mine.grad


def _work(rank: int, world_size: int) -> dict[Any, Any]:
    found = {run: _steps(*run, rank, world_size, world_size) for run in RUNS}
    return found | {"overflow": _overflow(rank, world_size), "gathered": _gathered(rank, world_size)}


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow)])
def workers(request: pytest.FixtureRequest) -> list[dict[Any, Any]]:
    return run_ranks(_work, request.param)


@pytest.mark.parametrize("run", RUNS, ids=" ".join)
def test_many_workers_equal_one(run: tuple[str, Mode, str], workers: list[dict[Any, Any]]) -> None:
    name, mode, case = run
    # Adam of touched rows is another method than Adam of all: there one worker with touched rows is what to equal.
    same = CASES[case].name == "sgd" and CASES[case].table_optimizer != "adagrad"
    alone = _steps(name, "dense" if same or mode == "dense" else "sparse_replicated", case, 0, 1, len(workers))
    for together in workers:
        assert alone.keys() == together[run].keys()
        for key, value in alone.items():
            assert torch.allclose(value.double(), together[run][key].double(), atol=1e-5), key


def test_an_overflow_of_one_worker_is_one_for_all(workers: list[dict[Any, Any]]) -> None:
    assert [one["overflow"] for one in workers] == [(False, 4.0)] * len(workers)


def test_gathered_rows_and_their_gradients(workers: list[dict[Any, Any]]) -> None:
    count = len(workers)
    first = 0
    for rank, one in enumerate(workers):
        rows, gradient = one["gathered"]
        assert rows[:, 0].tolist() == [float(r) for r in range(count) for _ in range(r + 1)]
        wanted = torch.arange(first, first + rank + 1) * sum(10.0**r for r in range(count))
        assert torch.equal(gradient, wanted[:, None].expand(-1, 2))
        first += rank + 1
