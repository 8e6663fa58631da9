"""Tables in pieces on disk: another number of workers reads them, and a process that holds none of them."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from recray.config import Config, parse_config
from recray.errors import LineageError
from recray.layers import embedding
from recray.layers.embedding import Mode, TablePlan, use_plan
from recray.loading.batch import Batch, ItemTable, Jagged
from recray.models.two_tower import Options, build
from recray.records import DatasetRecord
from recray.training import checkpoint, sharded_tables
from recray.training.optim import Ema, Optimizers
from recray.training.sharded_tables import ShardedTables
from recray.training.state import Phase, Position

ITEMS, USERS = 203, 150
RECORD = DatasetRecord(fingerprint="", num_items=ITEMS, num_users=USERS, counts={}, shards={}, seed=0, id="dataset-1")
TABLE = ItemTable(torch.ones(ITEMS))
DATASET: Any = SimpleNamespace(record=RECORD, uri="nowhere")


def test_a_piece_is_a_safetensors_file(tmp_path: Path) -> None:
    tensors = {"a.weight": torch.randn(5, 3), "a.weight:sum": torch.randn(5), "empty": torch.zeros(0, 2)}
    sharded_tables.write(str(tmp_path), "tables", 1, 3, tensors)
    found = load_file(tmp_path / "tables-00001-of-00003.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("count", [1, 2, 5])
def test_any_number_of_workers_reads_what_another_wrote(count: int, tmp_path: Path) -> None:
    whole = torch.randn(ITEMS, 4)
    for piece in range(count):
        sharded_tables.write(
            str(tmp_path), "tables", piece, count, {"a": whole[piece::count], "a:sum": whole[piece::count, 0]}
        )
    source = ShardedTables(str(tmp_path), "tables", count)
    assert source.names() == ["a", "a:sum"]
    for workers in (1, 2, 3, 4):
        for rank in range(workers):
            out = torch.full_like(whole[rank::workers], torch.nan)
            source.fill("a", out, rank, workers)
            assert torch.equal(out, whole[rank::workers])
    out = torch.empty(ITEMS)
    source.fill("a:sum", out, 0, 1)
    assert torch.equal(out, whole[:, 0])
    ids = torch.tensor([202, 0, 7, 7, 101])
    assert torch.equal(source.rows("a", ids), whole[ids])
    assert source.rows("a", ids[:0]).shape == (0, 4)


class _Worker:
    """Worker `rank` of `world_size`, of which the others are not there: what is written and read needs none."""

    device, local_size = torch.device("cpu"), 1

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size

    def sum(self, values: Tensor) -> Tensor:
        return values


def _config(folder: Path, *overrides: str) -> Config:
    table = {"run": {"output": str(folder)}, "model": {"dim": 4, "item_bias": True}, "training": {"epochs": 3}}
    return parse_config(table, ["optim.name=adam", *overrides])


def _parts(config: Config, mode: Mode, worker: _Worker) -> tuple[nn.Module, Optimizers, torch.amp.GradScaler, Ema]:
    torch.manual_seed(0)
    options = config.model
    assert isinstance(options, Options)
    with use_plan(TablePlan(mode, worker.rank, worker.world_size)):
        model = build(options, RECORD, TABLE)
    return model, Optimizers(config.optim, model), torch.amp.GradScaler("cpu", enabled=False), Ema(model, 0.0)


def _written(config: Config, mode: Mode, workers: int) -> dict[str, Tensor]:
    """Everything that was written, of all workers, as whole tables: row i of each holds numbers that tell i."""
    whole: dict[str, Tensor] = {}
    for rank in reversed(range(workers)):
        worker = _Worker(rank, workers)
        model, optimizer, scaler, ema = _parts(config, mode, worker)
        for at, (name, table) in enumerate(embedding.tables(model).items()):
            rows = (torch.arange(table.rows)[:, None] * 10.0 + at).expand(-1, table.embedding_dim)
            share = slice(rank, None, workers) if mode == "row_sharded" else slice(None)
            table.weight.data.copy_(rows[share])
            optimizer.load_table_state(name, {"step": 5, "mean": rows[share] + 0.25, "square": rows[share] + 0.5})
            whole |= {name: rows, f"{name}:mean": rows + 0.25, f"{name}:square": rows + 0.5}
        position = Position()
        position.epoch, position.history = 1, [{"loss": 1.0, "seconds": 1.0}]
        position.save_tables(config, Phase("train", 3), model, optimizer, worker)  # type: ignore[arg-type]
        position.save(config, Phase("train", 3), DATASET, model, optimizer, scaler, ema, TABLE, worker)  # type: ignore[arg-type]
    return whole


@pytest.mark.parametrize("now", ["row_sharded 1", "row_sharded 2", "row_sharded 5", "sparse_replicated 2"])
@pytest.mark.parametrize("then", ["row_sharded 3", "row_sharded 1", "sparse_replicated 2"])
def test_training_goes_on_with_another_number_of_workers(then: str, now: str, tmp_path: Path) -> None:
    config = _config(tmp_path)
    mode, workers = then.split()
    whole = _written(config, mode, int(workers))  # type: ignore[arg-type]
    mode, workers = now.split()
    for rank in range(int(workers)):
        worker = _Worker(rank, int(workers))
        model, optimizer, scaler, ema = _parts(config, mode, worker)  # type: ignore[arg-type]
        position = Position.resume(config, Phase("train", 3), DATASET, model, optimizer, scaler, ema)
        assert position.epoch == 1
        share = slice(rank, None, int(workers)) if mode == "row_sharded" else slice(None)
        for name, table in embedding.tables(model).items():
            assert torch.equal(table.weight, whole[name][share])
            state = optimizer.table_state()[name]
            assert state["step"] == 5
            assert torch.equal(state["mean"], whole[f"{name}:mean"][share])
            assert torch.equal(state["square"], whole[f"{name}:square"][share])


def test_a_model_whose_rows_stay_on_disk_gives_the_vectors_of_one_that_holds_them(tmp_path: Path) -> None:
    sharded = _config(tmp_path / "a")
    whole = _written(sharded, "row_sharded", 3)
    stored, record = checkpoint.load_model(f"{sharded.run_uri}/train/epoch-0001")
    assert record.pieces == 3 and sum(p.numel() for p in stored.parameters()) == 0
    torch.manual_seed(0)
    held = build(sharded.model, RECORD, TABLE).eval()  # type: ignore[arg-type]
    held.load_state_dict({name: whole[name] for name in held.state_dict()})
    batch = Batch(torch.tensor([3, 140]), Jagged(torch.tensor([5, 9, 9]), torch.tensor([0, 0, 3])))
    with torch.inference_mode():
        assert torch.equal(stored.query_vectors(batch), held.query_vectors(batch))  # type: ignore[operator]
        ids = torch.arange(ITEMS)
        assert torch.equal(stored.item_vectors(ids), held.item_vectors(ids))  # type: ignore[operator]


def test_a_table_that_is_updated_otherwise_now_is_refused(tmp_path: Path) -> None:
    config = _config(tmp_path)
    _written(config, "row_sharded", 2)
    model, optimizer, scaler, ema = _parts(config, "dense", _Worker(0, 1))
    with pytest.raises(LineageError, match=r"only touched rows of item_table.weight, .* now of none: .*resume = false"):
        Position.resume(config, Phase("train", 3), DATASET, model, optimizer, scaler, ema)
