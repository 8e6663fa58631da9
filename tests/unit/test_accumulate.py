"""Out of memory: the same gradients from parts, on one worker and on two that agree. The error is raised by the model."""

import pytest
import torch
from torch import nn

from helpers.ranks import GlooContext, run_ranks
from recray.loading.batch import Batch, Jagged
from recray.training.accumulate import Accumulation
from recray.training.distributed import LocalContext
from recray.training.optim import MixedPrecision

ROWS = 12


class _Objective(nn.Module):
    """A row's loss is w . (sum of its history's vectors) times its label; `fits` rows fit."""

    def __init__(self, fits: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.w, self.fits, self.sizes = nn.Embedding(50, 4), nn.Linear(4, 1), fits, list[int]()

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        self.sizes.append(batch.num_rows)
        if batch.num_rows > self.fits:
            raise torch.OutOfMemoryError("pretended")
        assert batch.label_Q is not None and batch.weight_Q is not None
        row = torch.repeat_interleave(torch.arange(batch.num_rows), batch.history.lengths())
        pooled = torch.zeros(batch.num_rows, 4).index_add(0, row, self.table(batch.history.values))
        return (self.w(pooled)[:, 0] * batch.label_Q * batch.weight_Q).sum(), batch.weight_Q.sum()


def _batch(begin: int, end: int) -> Batch:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(0, 5, (ROWS,), generator=generator)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    history = Jagged(torch.randint(2, 50, (int(offsets[-1]),), generator=generator), offsets)
    rows, label = torch.arange(ROWS), torch.rand(ROWS, generator=generator)
    whole = Batch(user_B=rows, history=history, target_Q=rows, label_Q=label, weight_Q=1 + label)
    return whole._rows(begin, end)


def _gradients(context: object, objective: nn.Module, batch: Batch, asks: bool = False) -> list[torch.Tensor]:
    precision = MixedPrecision("fp32", torch.device("cpu"))
    accumulate = Accumulation(objective, precision, context, forward_waits=False)  # type: ignore[arg-type]
    accumulate._asks_left = 1 if asks else 0
    accumulate([batch], torch.tensor(float(ROWS)))
    return [parameter.grad for parameter in objective.parameters() if parameter.grad is not None]


def test_a_batch_that_does_not_fit_is_split_once_and_for_all(caplog: pytest.LogCaptureFixture) -> None:
    whole = _gradients(LocalContext(), _Objective(ROWS), _batch(0, ROWS))
    small = _Objective(4)
    parts = _gradients(LocalContext(), small, _batch(0, ROWS))
    assert small.sizes == [12, 6, 3, 3, 3, 3]
    for a, b in zip(whole, parts, strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    assert "split into 4 parts, the global batch stays the same" in caplog.text


def test_one_row_that_does_not_fit_is_an_error() -> None:
    with pytest.raises(torch.OutOfMemoryError):
        _gradients(LocalContext(), _Objective(0), _batch(0, ROWS))


def test_split_keeps_queries_with_their_rows() -> None:
    history = Jagged(torch.arange(9), torch.tensor([0, 4, 4, 9]))
    position = torch.tensor([1, 3, 4, 8])
    batch = Batch(user_B=torch.arange(3), history=history, target_Q=position * 10, position_Q=position)
    parts = batch.split(2)
    found = [(p.history.values[p.position_Q] * 10).tolist() == p.target_Q.tolist() for p in parts]  # type: ignore[index, union-attr]
    assert found == [True, True] and [p.num_rows for p in parts] == [1, 2]
    assert torch.cat([p.target_Q for p in parts if p.target_Q is not None]).tolist() == batch.target_Q.tolist()  # type: ignore[union-attr]
    assert len(batch.split(9)) == 3


def _work(rank: int, world_size: int) -> list[torch.Tensor]:
    # Only rank 0 runs out of memory: rank 1 has fewer rows.
    objective = nn.parallel.DistributedDataParallel(_Objective(5))
    batch = _batch(0, 8) if rank == 0 else _batch(8, ROWS)
    return _gradients(GlooContext(rank, world_size), objective, batch, asks=True)


def test_two_workers_agree_when_one_runs_out() -> None:
    whole = _gradients(LocalContext(), _Objective(ROWS), _batch(0, ROWS))
    for gradients in run_ranks(_work, 2):
        for a, b in zip(whole, gradients, strict=True):
            assert torch.allclose(a, b, atol=1e-6)
