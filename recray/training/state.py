"""Training state: what an optimizer step changes, and what a checkpoint stores so that training resumes exactly.

Files in an epoch's folder:

    model.safetensors         weights of the model that is published: averaged ones with optim.ema_decay
    tables-*.safetensors      rows of row_sharded tables, one file per worker; tables-state-*: their optimizer state
    state.pt                  progress, optimizer state, loss scale, and with optim.ema_decay the weights being trained
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from recray import sealed, storage
from recray.digests import FileDigest
from recray.errors import LineageError
from recray.layers import embedding
from recray.models import Ranker, Retriever
from recray.training import checkpoint, fsdp, sharded_tables
from recray.training.distributed import Context
from recray.training.optim import Ema, Optimizers
from recray.training.sharded_tables import ShardedTables

_LEAST_SCALE = 2.0**-24  # of fp16 gradients; it begins at 2^16


@dataclass
class TrainProgress:
    """How far training is, and what was best."""

    epoch: int = 0  # complete ones
    step: int = 0  # optimizer steps since the start
    rows: int = 0  # training rows since the start, over all workers
    epochs_without_improvement: int = 0  # validations since the best one
    best_epoch: int = 0  # 0 before the first validation
    best_value: float | None = None  # of the validation metric
    history: list[dict[str, float]] = field(default_factory=list)  # one entry per epoch
    # Of the epoch that is being trained:
    segments: list[tuple[int, int]] = field(default_factory=list)  # what is consumed (recray.loading.sampler.remaining)
    sums: EpochSums = field(default_factory=lambda: EpochSums())

    def consume(self, workers: int, rows: int) -> None:
        """Note that each of `workers` took `rows` more examples of the epoch."""
        if self.segments and self.segments[-1][0] == workers:
            rows += self.segments.pop()[1]
        self.segments.append((workers, rows))

    def end_epoch(self, entry: dict[str, float], rows: int, metric: str, higher_is_better: bool = True) -> None:
        """Add an epoch; `entry` holds `metric` if the epoch was validated."""
        self.epoch += 1
        self.rows += rows
        self.segments, self.sums = [], EpochSums()
        self.history.append(entry)
        if metric in entry:
            self._compare(entry[metric], higher_is_better)

    def _compare(self, value: float, higher_is_better: bool) -> None:
        best = self.best_value
        if best is None or (value > best if higher_is_better else value < best):
            self.best_value, self.best_epoch, self.epochs_without_improvement = value, self.epoch, 0
        else:
            self.epochs_without_improvement += 1


@dataclass
class EpochSums:
    """Sums over the steps of an epoch so far. A resumed epoch adds to them, so that it reports what an undisturbed one does."""

    steps: int = 0
    loss: float = 0.0  # of losses times weights
    weight: float = 0.0
    rows: int = 0  # examples that were trained on, over all workers
    seconds: float = 0.0


@dataclass
class Snapshot:
    """What one worker writes of a training state. Its tensors are the state's own, or copies on the host."""

    weights: dict[str, Tensor]  # model.safetensors
    body: dict[str, Any]  # state.pt
    tables: dict[str, dict[str, Tensor]]  # kind -> this worker's rows of sharded tables
    rank: int
    world_size: int

    def write(self, folder: str) -> dict[str, FileDigest]:
        """Write this worker's files, and return their digests. Those of workers other than 0 are in a file, too."""
        files: dict[str, FileDigest] = {}
        for kind, tensors in self.tables.items():
            files |= sharded_tables.write(folder, kind, self.rank, self.world_size, tensors)
        if self.rank == 0:
            files |= checkpoint.save_weights(folder, self.weights) | checkpoint.save_state(folder, self.body)
        storage.sync(folder, files)  # in the thread that writes: fsync must not block training
        if files and self.rank:
            body = {name: one.model_dump() for name, one in files.items()}
            sealed.write(storage.join(folder, self.digest_file(self.rank)), body)
        return files

    @staticmethod
    def digest_file(rank: int) -> str:
        return f"digests-{rank:05d}.json"


@dataclass
class TrainState:
    """Everything that training changes. With several workers each holds its own part of what is sharded."""

    model: Retriever | Ranker
    optimizers: Optimizers
    scaler: torch.amp.GradScaler
    ema: Ema
    progress: TrainProgress = field(default_factory=TrainProgress)

    @property
    def table_files(self) -> int:
        """Files that the rows of sharded tables are saved in: one per worker, or none."""
        return max((table.world_size for table in embedding.sharded(self.model).values()), default=0)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside the block the model has its averaged weights, if it keeps any; afterwards those being trained."""
        if not self.ema.decay:
            yield
            return
        own = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        self.model.load_state_dict(self.ema.weights())
        try:
            yield
        finally:
            self.model.load_state_dict(own)

    def non_finite(self) -> list[str]:
        """Names of weights, trained or averaged, and of optimizer state that hold NaN or infinity on this worker."""
        held = [*self.model.state_dict().items(), *self.ema.shadow.items(), *self.optimizers.moments()]
        found = sorted({name for name, tensor in held if not _is_finite(fsdp.local(tensor))})
        # fp16 halves the loss scale whenever gradients overflow: at this one every step has been skipped for long.
        stuck = self.scaler.is_enabled() and self.scaler.get_scale() < _LEAST_SCALE
        return [*found, "the loss scale"] if stuck else found

    def save(self, folder: str, context: Context) -> dict[str, FileDigest]:
        """Write the state to `folder`. Called by all workers; returns once all of them have written their part.

        Returns the digests of this worker's files.
        """
        files = self.snapshot(context).write(folder)
        context.barrier()
        return files

    def snapshot(self, context: Context) -> Snapshot:
        """What this worker saves. Called by all workers, since what FSDP shards is gathered."""
        sharded, state = embedding.sharded(self.model), self.optimizers.table_state()
        parts: dict[str, dict[str, Tensor]] = {}
        if sharded:
            moments = {f"{n}:{k}": x for n in sharded for k, x in state[n].items() if isinstance(x, Tensor)}
            parts = {"tables": {name: table.weight for name, table in sharded.items()}, "tables-state": moments}
        for name in sharded:  # their tensors are in files of their own
            state[name] = {key: value for key, value in state[name].items() if not isinstance(value, Tensor)}
        body = {
            "progress": asdict(self.progress),
            "optimizer": self.optimizers.state_dict(),
            "tables": state,
            "table_files": self.table_files,
            "scaler": self.scaler.state_dict(),
            "trained": fsdp.whole(self.model.state_dict()) if self.ema.decay else None,
        }
        weights = fsdp.whole({name: value for name, value in self.ema.weights().items() if name not in sharded})
        return Snapshot(weights, body, parts, context.rank, context.world_size)

    def load(self, folder: str) -> None:
        """Read what `save` wrote, with any number of workers. Raises LineageError if other tables are sparse now."""
        body = checkpoint.load_state(folder)
        published = checkpoint.load_weights(folder)
        weights = dict(published) if body["trained"] is None else body["trained"]
        self._load_tables(folder, body, weights)
        # In the order of the model and not of the file, since workers gather and scatter weights one by one.
        weights = {n: fsdp.like(weights[n], own) for n, own in self.model.state_dict().items() if n in weights}
        tables = {name: table.weight for name, table in embedding.tables(self.model).items()}
        self.model.load_state_dict(weights | tables)
        self.optimizers.load_state_dict(body["optimizer"])
        self.scaler.load_state_dict(body["scaler"])
        self.ema.load(published)
        progress = body["progress"]
        self.progress = TrainProgress(**{**progress, "sums": EpochSums(**progress["sums"])})

    def _load_tables(self, folder: str, body: dict[str, Any], weights: dict[str, Tensor]) -> None:
        """Fill the tables that are not dense, and their optimizer state; takes their rows out of `weights`."""
        tables, state, count = embedding.tables(self.model), body["tables"], body["table_files"]
        if tables.keys() != state.keys():
            raise LineageError(
                f"{folder} has sparse updates for {', '.join(state) or 'no table'}, this training for "
                f"{', '.join(tables) or 'none'}: use the [scaling] and model.embedding.mode of that training, or set "
                f"training.resume = false to start over"
            )
        rows, moments = ShardedTables(folder, "tables", count), ShardedTables(folder, "tables-state", count)
        for name, table in tables.items():
            first, step = (table.rank, table.world_size) if table.mode == "row_sharded" else (0, 1)
            if name in weights:  # the table was replicated: model.safetensors has all rows
                table.weight.data.copy_(weights.pop(name)[first::step])
            else:
                rows.fill(name, table.weight.data, first, step)
            mine = {k: _every(v, first, step, table.weight.device) for k, v in state[name].items()}
            for key in [key for key in moments.names() if key.startswith(f"{name}:")]:
                # Row-wise Adagrad keeps one number per row, Adam a row.
                like = table.weight.data[:, 0] if key.endswith(":sum") else table.weight.data
                mine[key.removeprefix(f"{name}:")] = out = torch.empty_like(like)
                moments.fill(key, out, first, step)
            self.optimizers.load_table_state(name, mine)


def _every(value: Any, first: int, step: int, device: torch.device) -> Any:
    """Rows first, first + step, ... of a tensor; anything else unchanged."""
    return value[first::step].to(device) if isinstance(value, Tensor) else value


def _is_finite(tensor: Tensor) -> bool:
    """One pass without a copy: the least and the greatest value are NaN where any value is."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    return all(bool(bound.isfinite()) for bound in torch.aminmax(tensor))
