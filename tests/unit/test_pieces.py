"""Tables in pieces on disk: another number of workers reads them, and a process that holds none of them."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from recray.config import Config, parse_config
from recray.digests import FileDigest
from recray.errors import LineageError
from recray.layers import embedding
from recray.layers.embedding import Mode, TablePlan, use_plan
from recray.loading.batch import Batch, ItemTable, Jagged
from recray.metrics import higher_is_better
from recray.models.two_tower import Options, build
from recray.records import CheckpointRecord, DatasetRecord
from recray.training import checkpoint, sharded_tables
from recray.training.optim import Ema, Optimizers
from recray.training.sharded_tables import ShardedTables
from recray.training.state import TrainProgress, TrainState

ITEMS, USERS = 203, 150
RECORD = DatasetRecord(fingerprint="", num_items=ITEMS, num_users=USERS, counts={}, shards={}, seed=0, id="dataset-1")
TABLE = ItemTable(torch.ones(ITEMS))


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

    def barrier(self) -> None:
        pass


def _config(folder: Path, *overrides: str) -> Config:
    table = {"run": {"output": str(folder)}, "model": {"dim": 4, "item_bias": True}, "training": {"epochs": 3}}
    return parse_config(table, ["optim.name=adam", *overrides])


def _state(config: Config, mode: Mode, worker: _Worker, ema_decay: float = 0.0) -> TrainState:
    torch.manual_seed(0)
    options = config.model
    assert isinstance(options, Options)
    with use_plan(TablePlan(mode, worker.rank, worker.world_size)):
        model = build(options, RECORD, TABLE)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    return TrainState(model, Optimizers(config.optim, model), scaler, Ema(model, ema_decay))


def _written(config: Config, mode: Mode, workers: int) -> tuple[str, dict[str, Tensor]]:
    """A folder written by all workers, and its tables as whole ones: row i of each holds numbers that tell i."""
    folder, whole = f"{config.run_uri}/epoch-0001", dict[str, Tensor]()
    files: dict[str, FileDigest] = {}
    for rank in reversed(range(workers)):
        worker = _Worker(rank, workers)
        state = _state(config, mode, worker)
        for at, (name, table) in enumerate(embedding.tables(state.model).items()):
            rows = (torch.arange(table.rows)[:, None] * 10.0 + at).expand(-1, table.embedding_dim)
            share = slice(rank, None, workers) if mode == "row_sharded" else slice(None)
            table.weight.data.copy_(rows[share])
            state.optimizers.load_table_state(
                name, {"step": 5, "mean": rows[share] + 0.25, "square": rows[share] + 0.5}
            )
            whole |= {name: rows, f"{name}:mean": rows + 0.25, f"{name}:square": rows + 0.5}
        state.progress.end_epoch({"loss": 1.0, "seconds": 1.0}, 7, "ndcg@10")
        files |= state.save(folder, worker)  # type: ignore[arg-type]
    record = CheckpointRecord(
        config=config.model_dump(mode="json"),
        **{"epoch": 1, "step": 0, "rows": 7, "metric": "ndcg@10", "value": 0.0, "dataset_uri": ""},  # type: ignore[arg-type]
        pieces=state.table_files,
    )
    checkpoint.save_record(folder, record, RECORD, TABLE, files)
    return folder, whole


@pytest.mark.parametrize("now", ["row_sharded 1", "row_sharded 2", "row_sharded 5", "sparse_replicated 2"])
@pytest.mark.parametrize("then", ["row_sharded 3", "row_sharded 1", "sparse_replicated 2"])
def test_training_resumes_with_another_number_of_workers(then: str, now: str, tmp_path: Path) -> None:
    config = _config(tmp_path)
    mode, workers = then.split()
    folder, whole = _written(config, mode, int(workers))  # type: ignore[arg-type]
    mode, workers = now.split()
    for rank in range(int(workers)):
        worker = _Worker(rank, int(workers))
        state = _state(config, mode, worker)  # type: ignore[arg-type]
        state.load(folder)
        assert state.progress == TrainProgress(epoch=1, rows=7, history=[{"loss": 1.0, "seconds": 1.0}])
        share = slice(rank, None, int(workers)) if mode == "row_sharded" else slice(None)
        for name, table in embedding.tables(state.model).items():
            assert torch.equal(table.weight, whole[name][share])
            moments = state.optimizers.table_state()[name]
            assert moments["step"] == 5
            assert torch.equal(moments["mean"], whole[f"{name}:mean"][share])
            assert torch.equal(moments["square"], whole[f"{name}:square"][share])


def test_a_model_whose_rows_stay_on_disk_gives_the_vectors_of_one_that_holds_them(tmp_path: Path) -> None:
    sharded = _config(tmp_path / "a")
    folder, whole = _written(sharded, "row_sharded", 3)
    stored, record = checkpoint.load_model(folder)
    assert record.pieces == 3 and sum(p.numel() for p in stored.parameters()) == 0
    torch.manual_seed(0)
    held = build(sharded.model, RECORD, TABLE).eval()  # type: ignore[arg-type]
    held.load_state_dict({name: whole[name] for name in held.state_dict()})
    batch = Batch(torch.tensor([3, 140]), Jagged(torch.tensor([5, 9, 9]), torch.tensor([0, 0, 3])))
    with torch.inference_mode():
        assert torch.equal(stored.query_vectors(batch), held.query_vectors(batch))  # type: ignore[operator]
        ids = torch.arange(ITEMS)
        assert torch.equal(stored.item_vectors(ids), held.item_vectors(ids))  # type: ignore[operator]


def test_resuming_with_other_sparse_tables_is_refused(tmp_path: Path) -> None:
    config = _config(tmp_path)
    folder, _ = _written(config, "row_sharded", 2)
    state = _state(config, "dense", _Worker(0, 1))
    with pytest.raises(LineageError, match=r"sparse updates for item_table.weight, .* for none: .*resume = false"):
        state.load(folder)


def test_a_state_with_averages_is_saved_and_loaded_whole(tmp_path: Path) -> None:
    config, worker = _config(tmp_path), _Worker(0, 1)
    state = _state(config, "dense", worker, ema_decay=0.5)
    before = {name: tensor.clone() for name, tensor in state.model.state_dict().items()}
    state.optimizers.set_learning_rate(0.1)
    for _ in range(2):
        state.model.item_vectors(torch.arange(2, 9)).square().sum().backward()  # type: ignore[operator]
        state.optimizers.step(state.scaler)
        state.ema.update()
    trained = {name: tensor.clone() for name, tensor in state.model.state_dict().items()}
    with state.averaged():
        averaged = {name: tensor.clone() for name, tensor in state.model.state_dict().items()}
    name = "item_table.weight"
    assert not torch.equal(trained[name], averaged[name]) and not torch.equal(before[name], averaged[name])
    assert torch.equal(state.model.state_dict()[name], trained[name]), "the block puts the trained weights back"
    state.save(str(tmp_path), worker)  # type: ignore[arg-type]
    assert torch.equal(checkpoint.load_weights(str(tmp_path))[name], averaged[name]), "averages are what is published"

    other = _state(config, "dense", worker, ema_decay=0.5)
    other.load(str(tmp_path))
    assert all(torch.equal(tensor, trained[n]) for n, tensor in other.model.state_dict().items())
    assert all(torch.equal(tensor, averaged[n]) for n, tensor in other.ema.shadow.items())
    ours, theirs = other.optimizers.state_dict()["state"], state.optimizers.state_dict()["state"]
    assert all(torch.equal(ours[n]["exp_avg"], theirs[n]["exp_avg"]) for n in theirs) and ours.keys() == theirs.keys()


def test_progress_remembers_the_best_epoch() -> None:
    for metric, values, best in (("ndcg@10", [0.1, 0.3, 0.3, 0.2], 2), ("log_loss", [0.5, 0.6, 0.4, 0.4], 3)):
        progress = TrainProgress()
        for value in values:
            progress.end_epoch({metric: value}, 10, metric, higher_is_better(metric))
        progress.end_epoch({}, 10, metric)  # not validated: neither better nor worse
        assert (progress.best_epoch, progress.best_value) == (best, values[best - 1])
        assert (progress.epoch, progress.rows, progress.epochs_without_improvement) == (5, 50, 4 - best)
