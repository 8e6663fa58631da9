"""Embedding tables whose rows live on every worker, or each on one of them.

A table of 10 M ids and 64 dimensions takes 2.6 GB and three times that with Adam's moments, and its dense gradient
another 2.6 GB, of which a batch fills a few thousand rows. So a `Table` is an nn.Embedding in one of three modes:

    dense              every worker holds the table and its whole gradient; DDP averages it
    sparse_replicated  every worker holds the table; workers exchange the rows that the batch used and their gradients
    row_sharded        worker r of P holds the rows with id % P == r

What each costs: recray/layers/README.md. A row_sharded table of 7 rows on 2 workers: worker 0 owns ids 0 2 4 6, worker 1
owns 1 3 5, and id 5 is row 5 // 2 = 2 of its weight. Worker 1 looks up 5 4 4 1:

    distinct ids, by owner       4 | 1 5
    forward, ids to owners       4 goes to worker 0, 1 and 5 stay; worker 0 sends ids that it needs to worker 1
    forward, rows back           row 2 of worker 0's weight, rows 0 and 2 of its own; they are leaves of autograd
    after the last backward      the gradient of id 4 goes to worker 0, which adds up what all workers sent

Tables that are not dense stay outside of DDP: `Table.after_backward` exchanges their gradients after the last
backward of a step (recray.layers.hooks). Nothing is exchanged during backward, so all workers run their
collectives in the same order.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Container, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recray.ids import PAD
from recray.layers import collectives

Mode = Literal["dense", "sparse_replicated", "row_sharded"]
Ids = Literal["user", "item", "feature"]

LARGE_ABOVE = 50_000  # rows; in a smaller table updating all rows is as fast
# Time to update one row of a sparse gradient, duplicates in the batch included, over the time to stream one row of a
# dense table (measured).
_UPDATE = 4
_BLOCK = 65_536  # rows of a sharded table that are initialised at a time
_HUGE_ABOVE, _PAGE, _MADV_HUGEPAGE = 8 << 20, 2 << 20, 14


@dataclass(frozen=True)
class TablePlan:
    """What the mode of each table is chosen by."""

    mode: Mode | Literal["auto"] = "auto"
    rank: int = 0
    world_size: int = 1
    touched: dict[Ids, int] = field(default_factory=dict)  # most rows that a step uses on a worker, by kind of ids
    memory: int | None = None  # bytes of a worker; None = enough
    row_bytes: int = 12  # weight and optimizer state per element of a replicated table
    small: int = 128  # tables of at most this many rows are dense in any mode
    stored: bool = False  # weights come from a checkpoint: none are allocated or initialised
    reasons: dict[str, list[str]] = field(default_factory=dict)  # of "auto", for the log: mode and why -> tables

    def choose(self, rows: int, dim: int, ids: Ids) -> Mode:
        """The mode of a table of ids of this kind."""
        if rows <= self.small or self.stored:
            return "dense"
        if self.mode != "auto":
            return self.mode
        if rows <= LARGE_ABOVE:
            return "dense"
        touched = min(rows, self.touched.get(ids, 0))
        size = self.row_bytes * rows * dim
        mode: Mode = "sparse_replicated"
        why = f"a step touches up to {touched:,} rows" + (" on each worker" if self.world_size > 1 else "")
        if self.memory is not None and self.world_size > 1 and 2 * size > self.memory:
            mode, why = "row_sharded", f"{size / 1e9:.1f} GB of {self.memory / 1e9:.1f} GB that a worker has"
        elif _UPDATE * touched * self.world_size > rows:
            mode = "dense"
        same = self.reasons.setdefault(f"{mode} ({why})", [])
        if f"{rows:,} x {dim}" not in same:
            same.append(f"{rows:,} x {dim}")
        return mode

    def explain(self) -> str:
        """'sparse_replicated (a step touches up to 8,192 rows): 100,002 x 16, 158,488 x 16'; empty without large tables."""
        return "; ".join(f"{reason}: {', '.join(tables)}" for reason, tables in self.reasons.items())


_plan: ContextVar[TablePlan | None] = ContextVar("table_plan", default=None)


@contextlib.contextmanager
def use_plan(plan: TablePlan) -> Iterator[None]:
    """Tables constructed inside this block follow `plan`; outside of any, a table follows TablePlan().

    The plan is ambient, as the device is inside `with torch.device("meta")`: it depends on the run (workers, memory,
    optimizer, training or serving) and not on the model, so that models construct tables without passing it on. It is
    read once, in Table.__init__.
    """
    token = _plan.set(plan)
    try:
        yield
    finally:
        _plan.reset(token)


@dataclass(frozen=True)
class _Pull:
    """Rows that a forward fetched from their owners, and what their gradients need on the way back."""

    rows: Tensor  # a leaf: backward stores their gradient here
    asked: Tensor  # ids that all workers fetched from this one
    send: list[int]  # number of ids sent to each worker
    receive: list[int]  # number of ids received from each worker


class Table(nn.Embedding):
    """Ids to vectors. Row PAD is 0 and stays 0.

    Where the rows are:
        in `weight`                   all rows; the normal case
        in `weight`, row_sharded      id is row id // world_size of the weight of worker id % world_size
        `weight` on the meta device   built with TablePlan(stored=True), before the model's load_state_dict(assign=True)
        `weight` None                 after `read_from`: rows are read from a checkpoint when they are looked up
    """

    def __init__(self, rows: int, dim: int, std: float | None = None, ids: Ids = "feature", column: str = "") -> None:
        """Rows are drawn from N(0, std^2). std: 1 / sqrt(dim) if None, so that fresh vectors have a length of about 1.
        ids: what the rows stand for, by which a plan knows how many of them a step uses. column: of a feature, by which
        another training finds its rows (recray.training.warm_start)."""
        plan = _plan.get() or TablePlan()
        self.rows, self.rank, self.world_size = rows, plan.rank, plan.world_size
        self.ids, self.column = ids, column
        self.mode: Mode = plan.choose(rows, dim, ids)
        std = dim**-0.5 if std is None else std
        if plan.stored:
            super().__init__(rows, dim, _weight=torch.empty(rows, dim, device="meta"))
        elif self.mode == "row_sharded":
            mine = len(range(self.rank, rows, self.world_size))
            super().__init__(mine, dim, _weight=huge_pages(torch.empty(mine, dim)))
            self._init_shard(std)
        else:
            # Without a weight nn.Embedding draws one itself: of a large table that would be the time of a second draw.
            whole = huge_pages(torch.empty(rows, dim)) if rows > LARGE_ABOVE else None
            super().__init__(rows, dim, padding_idx=PAD, sparse=self.mode == "sparse_replicated", _weight=whole)
            nn.init.normal_(self.weight, std=std)
            with torch.no_grad():
                self.weight[PAD] = 0
        self._read: Callable[[Tensor], Tensor] | None = None
        self._pulls: list[_Pull] = []

    def read_from(self, read: Callable[[Tensor], Tensor]) -> None:
        """Get rows by read(ids) -> (len(ids), dim) from now on, without a weight in memory. For inference only."""
        self.register_parameter("weight", None)
        self._read = read

    def read_all(self) -> None:
        """Have all rows in `weight`, after `read_from`. For `torch.export`."""
        if self._read is not None:
            self.weight = nn.Parameter(self._read(torch.arange(self.rows)), requires_grad=False)
            self._read = None

    @torch.no_grad()
    def _init_shard(self, std: float) -> None:
        """The same rows on any number of workers: each draws every block of the table and keeps its rows of it."""
        seed = int(torch.randint(2**62, ()))
        for start in range(0, self.rows, _BLOCK):
            generator = torch.Generator().manual_seed(seed + start)
            block = torch.empty(min(_BLOCK, self.rows - start), self.embedding_dim).normal_(0, std, generator=generator)
            if start <= PAD < start + _BLOCK:
                block[PAD - start] = 0
            first = (self.rank - start) % self.world_size
            at = (start + first) // self.world_size
            kept = block[first :: self.world_size]
            self.weight[at : at + len(kept)] = kept

    def forward(self, ids: Tensor) -> Tensor:
        source, index = self.look_up(ids)
        return F.embedding(index, source, self.padding_idx, sparse=self.sparse)

    def look_up(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """(rows, index): the vector of ids[i] is rows[index[i]]. rows: the weight, or if it does not hold all rows here,
        those of the distinct ids."""
        if self.mode != "row_sharded" and self._read is None:
            return self.weight, ids
        unique, inverse = torch.unique(ids, return_inverse=True)
        if self._read is not None:
            return self._read(unique), inverse
        rows, position = self._pull(unique)
        return rows, inverse if position is None else position[inverse]

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _pull(self, unique: Tensor) -> tuple[Tensor, Tensor | None]:
        """Rows of distinct ids in order of their owners, and each id's place among them (None: the same order)."""
        position, asked, send, receive = None, unique, [len(unique)], [len(unique)]
        if self.world_size > 1:
            owner = unique % self.world_size
            order = torch.argsort(owner, stable=True)
            position = torch.empty_like(order)
            position[order] = torch.arange(len(order), device=order.device)
            to_owners = torch.bincount(owner, minlength=self.world_size)
            send, receive = to_owners.tolist(), collectives.counts(to_owners)
            asked = collectives.all_to_all(unique[order], send, receive)
        rows = self.weight.detach().index_select(0, asked // self.world_size)
        if self.world_size > 1:
            rows = collectives.all_to_all(rows, receive, send)
        if torch.is_grad_enabled():
            self._pulls.append(_Pull(rows.requires_grad_(), asked, send, receive))
        return rows, position

    def after_backward(self, scaled: bool) -> Tensor:
        """StepHook: exchange the gradients of the rows that this step used.

        Returns (1,) of a row_sharded table under a GradScaler: 1 if a gradient of this worker's rows overflowed, else 0.
        """
        if self.mode != "dense":
            self._exchange_gradients()
        gradient = self.weight.grad
        if not scaled or self.mode != "row_sharded" or self.world_size == 1 or gradient is None:
            return torch.empty(0, dtype=torch.float64)
        return (~gradient._values().isfinite()).any().double().view(1)

    def after_sum(self, total: Tensor) -> None:
        """StepHook: an overflow that one worker finds in its rows must be one for all, so that all skip the step."""
        if total[0] > 0:
            nan = torch.full((1, self.embedding_dim), torch.nan, device=self.weight.device)
            at = torch.zeros(1, 1, dtype=torch.int64, device=self.weight.device)
            self.weight.grad = torch.sparse_coo_tensor(at, nan, self.weight.shape, is_coalesced=True)

    def discard(self) -> None:
        """StepHook: forget what forwards fetched in a step that starts again."""
        self._pulls.clear()

    @torch.no_grad()
    def _exchange_gradients(self) -> None:
        """Set `weight.grad` to the mean over workers, sparse: the rows used, or of a sharded table those of this worker."""
        dim = self.embedding_dim
        ids, values = self.weight.new_empty(0, dtype=torch.int64), self.weight.new_empty(0, dim)
        if self.mode == "row_sharded":
            parts = [(pull.asked, self._push(pull)) for pull in self._pulls]
            self._pulls.clear()
            ids, values = torch.cat([ids, *(a for a, _ in parts)]), torch.cat([values, *(v for _, v in parts)])
            kept = ids != PAD
            ids, values = ids[kept] // self.world_size, values[kept]
        elif self.weight.grad is not None:
            ids, values = self.weight.grad._indices()[0], self.weight.grad._values()
        if self.mode == "sparse_replicated" and self.world_size > 1:
            ids, values = _summed(ids, values, self.rows)
            ids, values = collectives.all_gather(ids), collectives.all_gather(values)
        ids, values = _summed(ids, values, self.rows)
        self.weight.grad = torch.sparse_coo_tensor(
            ids[None], values.div_(self.world_size), self.weight.shape, is_coalesced=True, check_invariants=False
        )

    def _push(self, pull: _Pull) -> Tensor:
        gradient = pull.rows.grad if pull.rows.grad is not None else torch.zeros_like(pull.rows)
        return gradient if self.world_size == 1 else collectives.all_to_all(gradient, pull.send, pull.receive)


def _summed(ids: Tensor, values: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Each id once, in order, with the sum of its gradients.

    Rows whose gradient is 0, such as those that only padding used, are left out: momentum must not move them.
    """
    size = (rows, values.shape[1])
    summed = torch.sparse_coo_tensor(ids[None], values, size, check_invariants=False).coalesce()
    ids, values = summed.indices()[0], summed.values()
    kept = values.any(dim=1)
    return (ids, values) if bool(kept.all()) else (ids[kept], values[kept])


def huge_pages(tensor: Tensor) -> Tensor:
    """The same tensor in pages of 2 MB instead of 4 KB, if it is large and on a CPU. For memory not written to yet.

    Rows are used in random order, and the address of nearly every one misses the TLB: 2,048 entries of it cover 8 MB of
    small pages, 4 GB of large ones. Measured on a table of 1.5 GB: updating 22,000 rows takes a third less time.
    """
    size = tensor.numel() * tensor.element_size()
    if tensor.device.type == "cpu" and size > _HUGE_ABOVE:
        begin = -(-tensor.data_ptr() // _PAGE) * _PAGE
        with contextlib.suppress(OSError, AttributeError):  # not Linux
            end = tensor.data_ptr() + size
            ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _MADV_HUGEPAGE)
    return tensor


def read_missing(module: nn.Module, weights: Container[str], read: Callable[[str, Tensor], Tensor]) -> None:
    """Have each table whose weight is not among `weights` get its rows by read(name of the weight, ids)."""
    for name, table in module.named_modules():
        key = f"{name}.weight".lstrip(".")
        if isinstance(table, Table) and key not in weights:
            table.read_from(partial(read, key))


def tables(module: nn.Module) -> dict[str, Table]:
    """The tables that are not dense, by the name of their weight."""
    named = module.named_modules()
    return {f"{n}.weight".lstrip("."): m for n, m in named if isinstance(m, Table) and m.mode != "dense"}


def sharded(module: nn.Module) -> dict[str, Table]:
    """The row_sharded tables, by the name of their weight."""
    return {name: table for name, table in tables(module).items() if table.mode == "row_sharded"}


def waits_in_forward(module: nn.Module) -> bool:
    """Whether a forward waits for other workers, because it fetches rows of a sharded table from them."""
    return bool(sharded(module))
