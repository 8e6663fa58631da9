"""Tables of embeddings, and where their rows live while a model trains.

dense              every worker holds the table and its whole gradient; DDP averages it
sparse_replicated  every worker holds the table; workers exchange the rows that the batch touched and their gradients
row_sharded        worker r of P holds the rows with id % P == r; ids go to their owners, rows come back, gradients go again

A step of V rows of D numbers on P workers, U rows touched by each (fp32, bytes):

                   memory of a worker       wire of a worker          rows updated
    dense          16 V D (Adam)            8 V D (P - 1) / P         V
    sparse         12 V D (Adam), 4 V D + 4 V (row-wise Adagrad)
                                            (P - 1) U (4 D + 8)       U P at most
    row_sharded    the same / P             about 2 U (4 D + 8)       U at most

Tables that are not dense stay outside of DDP: `Table.after_backward` exchanges their gradients after the last
backward of a step (recray.layers.hooks). Nothing is exchanged during backward, so all workers run their
collectives in the same order.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recray.layers import collectives
from recray.loading.batch import PAD

Mode = Literal["dense", "sparse_replicated", "row_sharded"]
Ids = Literal["user", "item", "feature"]

LARGE_ABOVE = 50_000  # rows; below it updating all of them is as fast
# Updating a touched row against streaming one of a dense table, duplicates in the batch counted in (measured).
_UPDATE = 4
_BLOCK = 65_536  # rows of a sharded table that are drawn at a time
_HUGE_ABOVE, _PAGE, _MADV_HUGEPAGE = 8 << 20, 2 << 20, 14


@dataclass(frozen=True)
class TablePlan:
    """What decides about the tables of the model that is being built."""

    mode: Mode | Literal["auto"] = "auto"
    rank: int = 0
    world_size: int = 1
    touched: dict[Ids, int] = field(default_factory=dict)  # at most so many rows by a worker's step, by kind of ids
    memory: int | None = None  # bytes of a worker; None = enough
    row_bytes: int = 12  # weight and optimizer state of a number of a replicated table
    small: int = 128  # tables up to so many rows are dense whatever the mode
    stored: bool = False  # rows come from a checkpoint: none are drawn
    reasons: dict[str, list[str]] = field(default_factory=dict)  # of "auto", for the log: mode and why -> tables

    def choose(self, rows: int, dim: int, ids: Ids) -> Mode:
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


_placement: ContextVar[TablePlan | None] = ContextVar("placement", default=None)


@contextlib.contextmanager
def use_plan(placement: TablePlan) -> Iterator[None]:
    """Tables built inside live where `placement` says."""
    token = _placement.set(placement)
    try:
        yield
    finally:
        _placement.reset(token)


@dataclass(frozen=True)
class _Pull:
    """Rows that a forward fetched from their owners: what must go back."""

    rows: Tensor  # a leaf: backward leaves their gradient here
    asked: Tensor  # ids that other workers fetched here
    send: list[int]
    receive: list[int]


class Table(nn.Embedding):
    """Ids to vectors; N(0, 1/sqrt(dim)) so that inner products of fresh vectors have unit variance. Row PAD stays 0.

    `weight` holds all rows, or of a row_sharded table this worker's: id is row id // world_size of worker id % world_size.
    """

    def __init__(self, rows: int, dim: int, std: float | None = None, ids: Ids = "feature") -> None:
        placement = _placement.get() or TablePlan()
        self.rows = rows
        self.mode: Mode = placement.choose(rows, dim, ids)
        self.rank, self.world_size = placement.rank, placement.world_size
        std = dim**-0.5 if std is None else std
        sparse = self.mode == "sparse_replicated"
        if placement.stored:
            super().__init__(0, dim, _weight=torch.empty(0, dim))
        elif self.mode == "row_sharded":
            mine = len(range(self.rank, rows, self.world_size))
            super().__init__(mine, dim, _weight=huge_pages(torch.empty(mine, dim)))
            self._draw(std)
        else:
            # Of small ones nn.Embedding draws once more.
            whole = huge_pages(torch.empty(rows, dim)) if rows > LARGE_ABOVE else None
            super().__init__(rows, dim, padding_idx=PAD, sparse=sparse, _weight=whole)
            nn.init.normal_(self.weight, std=std)
            with torch.no_grad():
                self.weight[PAD] = 0
        self.stored: Callable[[Tensor], Tensor] | None = None  # rows of these ids, out of a checkpoint
        self._pulls: list[_Pull] = []

    @torch.no_grad()
    def _draw(self, std: float) -> None:
        """The same numbers on any number of workers: each draws every block and keeps its rows of it."""
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
        """(rows, index): the vector of ids[i] is rows[index[i]]. Of a sharded table only the rows asked for."""
        if self.mode != "row_sharded" and self.stored is None:
            return self.weight, ids
        unique, inverse = torch.unique(ids, return_inverse=True)
        if self.stored is not None:
            return self.stored(unique), inverse
        rows, position = self._pull(unique)
        return rows, inverse if position is None else position[inverse]

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _pull(self, unique: Tensor) -> tuple[Tensor, Tensor | None]:
        """Rows of these ids in order of their owners, and the place of each id there (None: the same order)."""
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
    """Every id once, in order, with the sum of its gradients.

    Rows whose gradient is 0, as those that only padding touched, are left out: they must not move by momentum.
    """
    size = (rows, values.shape[1])
    summed = torch.sparse_coo_tensor(ids[None], values, size, check_invariants=False).coalesce()
    ids, values = summed.indices()[0], summed.values()
    kept = values.any(dim=1)
    return (ids, values) if bool(kept.all()) else (ids[kept], values[kept])


def huge_pages(tensor: Tensor) -> Tensor:
    """The same tensor, of 2 MB pages where it is large and on a CPU: rows at random then miss the TLB less.

    For fresh memory, before it is filled. Measured on a table of 1.5 GB: a third off the update of 22,000 rows.
    """
    size = tensor.numel() * tensor.element_size()
    if tensor.device.type == "cpu" and size > _HUGE_ABOVE:
        begin = -(-tensor.data_ptr() // _PAGE) * _PAGE
        with contextlib.suppress(OSError, AttributeError):  # not Linux
            end = tensor.data_ptr() + size
            ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _MADV_HUGEPAGE)
    return tensor


class Rows(Protocol):
    """Where rows lie that no process holds."""

    def rows(self, name: str, ids: Tensor) -> Tensor: ...


def load(module: nn.Module, weights: dict[str, Tensor], pieces: Rows) -> None:
    """Give the tables of a model that was built as `stored` their weights, or the pieces that hold their rows."""
    for name, table in module.named_modules():
        if isinstance(table, Table):
            key = f"{name}.weight".lstrip(".")
            if key in weights:
                table.weight = nn.Parameter(weights[key])
            else:
                table.register_parameter("weight", None)
                table.stored = partial(pieces.rows, key)


def tables(module: nn.Module) -> dict[str, Table]:
    """Tables of which only touched rows are updated, by the name of their weight."""
    named = module.named_modules()
    return {f"{n}.weight".lstrip("."): m for n, m in named if isinstance(m, Table) and m.mode != "dense"}


def sharded(module: nn.Module) -> dict[str, Table]:
    return {name: table for name, table in tables(module).items() if table.mode == "row_sharded"}


def waits_in_forward(module: nn.Module) -> bool:
    """Whether a forward waits for other workers, because it fetches rows of a sharded table from them."""
    return bool(sharded(module))
