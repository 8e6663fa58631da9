"""Tables in one process: the rows that are drawn, updates of touched rows against torch's, and how `auto` picks."""

import pytest
import torch
from torch import nn

from recray.config import OptimConfig, parse_config
from recray.errors import ConfigError
from recray.layers.embedding import Table, TablePlan, read_missing, tables, use_plan
from recray.layers.feature_encoder import mean_pool
from recray.layers.hooks import run_hooks, step_hooks
from recray.loading.batch import Jagged
from recray.training.distributed import LocalContext
from recray.training.embedding_plan import table_plan
from recray.training.optim import Ema, Optimizers

ROWS, DIM = 300, 6


def _table(plan: TablePlan, seed: int = 0, rows: int = ROWS) -> Table:
    torch.manual_seed(seed)
    with use_plan(plan):
        return Table(rows, DIM)


def _ids(step: int) -> torch.Tensor:
    return torch.randint(0, 40, (50,), generator=torch.Generator().manual_seed(step))  # many twice, some PAD


@pytest.mark.parametrize("workers", [1, 2, 3, 7])
def test_a_sharded_table_has_the_same_rows_on_any_number_of_workers(
    workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("recray.layers.embedding._BLOCK", 64)
    whole = torch.zeros(ROWS, DIM)
    for rank in range(workers):
        whole[rank::workers] = _table(TablePlan("row_sharded", rank, workers)).weight.detach()
    assert torch.equal(whole, _table(TablePlan("row_sharded")).weight)
    assert not whole[0].any() and whole[1:].std() == pytest.approx(DIM**-0.5, rel=0.05)
    assert len(torch.unique(whole, dim=0)) == ROWS


def _sync(model: nn.Module) -> None:
    """The end of a step on a single worker."""
    run_hooks(step_hooks(model), lambda total: total, False)


@pytest.mark.parametrize("mode", ["sparse_replicated", "row_sharded"])
@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_touched_rows_are_updated_as_torch_does(name: str, mode: str) -> None:
    table = _table(TablePlan(mode))  # type: ignore[arg-type]
    reference = nn.Embedding(ROWS, DIM, padding_idx=0, sparse=True, _weight=table.weight.detach().clone())
    ours = Optimizers(OptimConfig(name=name), table)
    kind = torch.optim.SGD if name == "sgd" else torch.optim.SparseAdam
    theirs = kind(reference.parameters(), 0.1)
    ours.set_learning_rate(0.1)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    for step in range(6):
        ids = _ids(step)
        for part in ids.chunk(2):  # accumulated
            for one in (table, reference):
                (one(part).pow(2).sum() + one(part[:5]).sum()).backward()
        _sync(table)
        ours.step(scaler)
        theirs.step()
        theirs.zero_grad()
    assert torch.allclose(table.weight, reference.weight, atol=1e-6)
    assert not table.weight[0].any()


def test_row_wise_adagrad_by_hand() -> None:
    table = _table(TablePlan("row_sharded"))
    optimizer = Optimizers(OptimConfig(table_optimizer="adagrad", table_learning_rate=0.5, embedding_decay=0.1), table)
    optimizer.set_learning_rate(OptimConfig().learning_rate)
    before, total = table.weight.detach().clone(), 0.0
    row = before[7].clone()
    for _ in range(3):
        (table(torch.tensor([7, 7])).sum() * 2).backward()
        _sync(table)
        optimizer.step(torch.amp.GradScaler("cpu", enabled=False))
        total += 16.0  # the mean of squares of (4, 4, ...)
        row = row * (1 - 0.5 * 0.1) - 0.5 * 4 / total**0.5
    assert torch.allclose(table.weight[7], row, atol=1e-6)
    others = torch.arange(ROWS) != 7
    assert torch.equal(table.weight[others], before[others])
    assert [tuple(v.shape) for v in optimizer.table_state()["weight"].values()] == [(ROWS,)]


def test_rows_without_a_gradient_do_not_move_by_momentum() -> None:
    """What only padding touched: a worker more must not change what is learned."""
    table = _table(TablePlan("sparse_replicated"))
    optimizer = Optimizers(OptimConfig(name="adam"), table)
    optimizer.set_learning_rate(0.1)
    for weight in (1.0, 0.0):
        before = table.weight.detach().clone()
        (table(torch.tensor([5])).sum() * weight).backward()
        _sync(table)
        optimizer.step(torch.amp.GradScaler("cpu", enabled=False))
        assert torch.equal(before, table.weight) == (weight == 0.0)


@pytest.mark.parametrize("overflow", ["dense", "table"])
@pytest.mark.parametrize("clip", [False, True])
def test_an_overflow_in_dense_weights_or_in_a_table_skips_the_step_of_both(overflow: str, clip: bool) -> None:
    model = nn.ModuleDict({"table": _table(TablePlan("sparse_replicated")), "dense": nn.Linear(DIM, 1)})
    optimizer, scaler = Optimizers(OptimConfig(), model), torch.amp.GradScaler("cpu", init_scale=8.0)
    optimizer.set_learning_rate(0.1)
    for finite in (False, True):
        before = [p.detach().clone() for p in model.parameters()]
        scaler.scale(model["dense"](model["table"](torch.tensor([5, 7]))).sum()).backward()
        _sync(model)
        if not finite:
            table, dense = model["table"].weight.grad, model["dense"].weight.grad
            (dense if overflow == "dense" else table._values())[0] = torch.inf
        if clip:
            optimizer.clip(scaler, 1.0)
        optimizer.step(scaler)
        moved = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
        assert moved == [finite] * 3, moved
        assert scaler.get_scale() == 4.0


@pytest.mark.parametrize("mode", ["dense", "sparse_replicated", "row_sharded"])
def test_means_of_histories(mode: str) -> None:
    table = _table(TablePlan(mode))  # type: ignore[arg-type]
    history = Jagged(torch.tensor([5, 9, 9, 3]), torch.tensor([0, 3, 3, 4]))
    w = table.weight.detach()
    wanted = torch.stack([(w[5] + 2 * w[9]) / 3, torch.zeros(DIM), w[3]])
    assert torch.allclose(mean_pool(table, history), wanted, atol=1e-6)
    assert not mean_pool(table, Jagged(history.values[:0], torch.zeros(3, dtype=torch.int64))).any()


def test_ema_of_touched_rows() -> None:
    table = _table(TablePlan("sparse_replicated"))
    ema, before = Ema(table, 0.9), table.weight.detach().clone()
    with torch.no_grad():
        table.weight[4] += 1
    ema.update()
    assert torch.allclose(ema.weights()["weight"][4], before[4] + 0.1, atol=1e-6)


def test_auto_by_hand() -> None:
    def chosen(rows: int, **more: object) -> str:
        plan = TablePlan(world_size=2, touched={"item": 20_000}, memory=10**9, **more)  # type: ignore[arg-type]
        return plan.choose(rows, 64, "item")

    assert chosen(40_000) == "dense"  # small
    assert chosen(159_000) == "dense"  # 4 x 20,000 x 2 rows touched cost as much as 160,000 streamed
    assert chosen(161_000) == "sparse_replicated"
    assert chosen(651_000) == "sparse_replicated"  # 12 x 64 bytes a row are 0.5 GB
    assert chosen(652_000) == "row_sharded"
    assert chosen(1_900_000, row_bytes=4) == "sparse_replicated"
    assert TablePlan(touched={"item": 20_000}, memory=10**9).choose(10**7, 64, "item") == "sparse_replicated"
    plan = TablePlan(touched={"user": 100})
    for _ in range(2):
        plan.choose(10**6, 8, "user")
    assert plan.explain() == "sparse_replicated (a step touches up to 100 rows): 1,000,000 x 8"


def test_a_stored_table_has_no_rows_until_they_are_loaded_or_read() -> None:
    before = torch.random.get_rng_state()
    with use_plan(TablePlan(stored=True)):
        loaded, read, huge = Table(ROWS, DIM), Table(ROWS, DIM), Table(10**12, 64)
    assert torch.equal(before, torch.random.get_rng_state()) and huge.weight.is_meta
    weight, ids = torch.randn(ROWS, DIM), torch.tensor([7, 2, 7, 0])
    model = nn.ModuleDict({"loaded": loaded, "read": read}).eval()
    asked = []

    def rows(name: str, ids: torch.Tensor) -> torch.Tensor:
        asked.append((name, ids.tolist()))
        return weight[ids]

    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict({"loaded.weight": weight[1:], "read.weight": weight}, assign=True)
    read_missing(model, {"loaded.weight": weight}, rows)
    model.load_state_dict({"loaded.weight": weight}, assign=True)
    history = Jagged(ids, torch.tensor([0, 3, 3, 4]))
    for table in (loaded, read):
        assert torch.equal(table(ids), weight[ids])
        assert torch.allclose(mean_pool(table, history)[:2], torch.stack([weight[[7, 2, 7]].mean(0), torch.zeros(DIM)]))
    assert asked == [("read.weight", [0, 2, 7])] * 2, "each distinct id once"


def test_what_does_not_go_together_is_refused() -> None:
    sharded = {"model": {"name": "sasrec", "embedding": {"mode": "row_sharded"}}}
    with pytest.raises(ConfigError, match=r"'softmax' scores every item .* use loss.name = 'sampled_softmax'"):
        parse_config({**sharded, "loss": {"name": "softmax"}})
    with pytest.raises(ConfigError, match=r"optim.ema_decay averages every row .* set optim.ema_decay = 0"):
        parse_config({**sharded, "optim": {"ema_decay": 0.99}})
    with pytest.raises(ConfigError, match=r"model.embedding.mode: Input should be 'auto', 'dense'"):
        parse_config({"model": {"embedding": {"mode": "sparse"}}})

    class Foreign(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(3, 2, sparse=True)

    with pytest.raises(
        ConfigError,
        match=r"'table' of the model is an nn.Embedding\(sparse=True\), .*: use recray.layers.embedding.Table",
    ):
        Optimizers(OptimConfig(), Foreign())
    assert not tables(Foreign())


def test_what_auto_goes_by() -> None:
    config = parse_config(
        {"model": {"history_length": 9}, "training": {"global_batch_size": 64, "accumulation_steps": 2}},
        ["loss.negatives=100", "optim.table_optimizer=adagrad"],
    )
    found = table_plan(config, LocalContext(), 1000)
    assert found.touched == {"user": 64, "item": 64 * 10 + 2 * 100, "feature": 64 * 10 + 2 * 100}
    assert (found.row_bytes, found.memory, found.world_size) == (4, None, 1)
    everything = parse_config({"model": {"name": "sasrec"}, "loss": {"name": "softmax"}})
    assert table_plan(everything, LocalContext(), 1000).touched["item"] == 1000
