"""How a step's time and a worker's memory grow with the rows of a table, for the three places its rows can live."""

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.figures import report

_DIM, _HISTORY, _BATCH = 64, 20, 1024  # of the whole batch, whatever the number of workers
# Tables take turns of so many steps, after one that is not counted: the machine is alike for all.
_ROUNDS, _STEPS = 10, 4


def run(
    rows: Annotated[
        list[int] | None, typer.Option(help="of the item table; the first is what others are held against")
    ] = None,
    workers: Annotated[list[int] | None, typer.Option(help="gloo workers with a thread each")] = None,
    dense_rows: Annotated[
        int, typer.Option(help="larger dense tables are left out: 16 bytes a number and worker")
    ] = 1_000_000,
    out: Annotated[str | None, typer.Option(help="write the figures as JSON")] = None,
) -> None:
    """A two_tower step (d 64, history 20, tower 256-128, sampled softmax, batch 1024 over all workers, ids uniform over the table): milliseconds and MB a worker.

    Touched rows by row-wise Adagrad, dense tables by AdamW.
    """
    import torch.multiprocessing as mp

    rows, workers = rows or [100_000, 1_000_000, 10_000_000], workers or [1, 2]
    figures: dict[str, object] = {}
    for world_size in workers:
        for mode in ("dense", "sparse_replicated", "row_sharded"):
            sizes = [count for count in rows if mode != "dense" or count <= dense_rows]
            with tempfile.TemporaryDirectory() as folder:
                mp.spawn(_work, (mode, sizes, world_size, folder), nprocs=world_size)
                found = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(world_size)]
            for at, count in enumerate(sizes):
                # Of the slowest worker and the largest one.
                name = f"{mode}_{world_size}_workers_{count}"
                mine, first = ({key: max(one[n][key] for one in found) for key in found[0][n]} for n in (at, 0))
                figures |= {f"{name}_{key}": value for key, value in mine.items()}
                if at:
                    figures |= {f"{name}_{k}_ratio": mine[k] / first[k] for k in ("milliseconds", "cpu_milliseconds")}
    report(figures, out)


def _work(rank: int, mode: str, sizes: list[int], world_size: int, folder: str) -> None:
    import torch
    import torch.distributed as dist

    from recray.training.distributed import keep_memory

    torch.set_num_threads(1)
    keep_memory()
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    trainers, figures = [], []
    for rows in (1000, *sizes):  # the first only fills the process with what any step needs
        before = _megabytes()
        trainers.append(_Trainer(mode, rank, world_size, rows))
        for _ in range(3):
            trainers[-1].step()
        figures.append({"megabytes": _megabytes() - before})
    seconds: list[list[tuple[float, float]]] = [[] for _ in trainers]
    for _ in range(_ROUNDS):
        for trainer, mine in zip(trainers, seconds, strict=True):
            mine += [trainer.step() for _ in range(1 + _STEPS)][1:]
    for figure, mine in zip(figures, seconds, strict=True):
        figure["milliseconds"], figure["cpu_milliseconds"] = (
            statistics.median(x) * 1000 for x in zip(*mine, strict=True)
        )
    Path(folder, f"{rank}.json").write_text(json.dumps(figures[1:]))
    dist.barrier()
    dist.destroy_process_group()


class _Trainer:
    """What the training loop does with one model, without the loader."""

    def __init__(self, mode: str, rank: int, world_size: int, rows: int) -> None:
        import torch

        from recray import registry
        from recray.config import OptimConfig
        from recray.layers import embedding
        from recray.loading.batch import ItemTable
        from recray.losses.base import Objective
        from recray.records import DatasetRecord
        from recray.training.distributed import data_parallel
        from recray.training.optim import Optimizers

        module = registry.load("model", "two_tower")
        options = module.Options(dim=_DIM, history_length=_HISTORY, user_embedding=False, hidden=[256, 128])
        record = DatasetRecord(fingerprint="", num_items=rows, num_users=2, counts={}, shards={}, seed=0)
        items = ItemTable(torch.ones(rows))
        torch.manual_seed(0)
        with embedding.use_plan(embedding.TablePlan(mode, rank, world_size)):  # type: ignore[arg-type]
            model = module.build(options, record, items)
        objective: torch.nn.Module = Objective(model, registry.options("loss", "sampled_softmax")(), items, _Gather())
        self._objective = data_parallel(objective) if world_size > 1 else objective
        self._optimizer = Optimizers(OptimConfig(table_optimizer="adagrad", table_learning_rate=0.05), model)
        self._optimizer.set_learning_rate(1e-3)
        self._scaler = torch.amp.GradScaler("cpu", enabled=False)
        self._rows, self._size = rows, _BATCH // world_size
        torch.manual_seed(1 + rank)

    def step(self) -> tuple[float, float]:
        """Seconds, and seconds of the processor, without making the batch."""
        from recray.layers import collectives
        from recray.layers.hooks import run_hooks, step_hooks

        batch = _batch(self._rows, self._size)
        started, used = time.perf_counter(), time.process_time()
        loss, weight = self._objective(batch)
        (loss / weight).backward()
        run_hooks(step_hooks(self._objective), collectives.total, scaled=False)
        self._optimizer.step(self._scaler)
        return time.perf_counter() - started, time.process_time() - used


class _Gather:
    """Each worker's own positives are its negatives: what crosses workers here are rows of the table."""

    def all_gather(self, x):  # type: ignore[no-untyped-def]
        return x


def _batch(rows: int, size: int):  # type: ignore[no-untyped-def]
    import torch

    from recray.ids import FIRST_ITEM
    from recray.loading.batch import Batch, Jagged

    history = Jagged(
        torch.randint(FIRST_ITEM, rows, (size * _HISTORY,)), torch.arange(0, size * _HISTORY + 1, _HISTORY)
    )
    return Batch(
        torch.ones(size, dtype=torch.int64), history, torch.randint(FIRST_ITEM, rows, (size,)), torch.ones(size)
    )


def _megabytes() -> float:
    """Resident memory of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024
