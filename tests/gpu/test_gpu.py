"""What only a GPU shows. Pure torch: neither Ray nor faiss has to be installed. `python -m pytest tests/gpu`"""

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from helpers.collectives import OneProcess
from recray import registry
from recray.config import OptimConfig
from recray.kernels import chunked_softmax
from recray.layers import transformer
from recray.loading.batch import Batch, ItemTable, Jagged
from recray.losses.base import Objective
from recray.models import Examples, Ranker
from recray.records import DatasetRecord
from recray.retrieval import exact
from recray.retrieval.exact import top_k
from recray.training import optim
from recray.training.distributed import data_parallel
from recray.training.optim import Optimizers

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")

ITEMS, USERS, ROWS = 500, 40, 64
RECORD = DatasetRecord(fingerprint="", num_items=ITEMS, num_users=USERS, counts={}, shards={}, seed=0)


def _batch(examples: Examples) -> Batch:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(0, 20, (ROWS,), generator=generator)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    history = Jagged(torch.randint(2, ITEMS, (int(offsets[-1]),), generator=generator), offsets)
    count = int(offsets[-1]) if examples == "sequences" else ROWS
    return Batch(
        user_B=torch.randint(2, USERS, (ROWS,), generator=generator),
        history=history,
        target_Q=torch.randint(2, ITEMS, (count,), generator=generator),
        weight_Q=torch.ones(count),
        position_Q=torch.arange(count) if examples == "sequences" else None,
        label_Q=torch.randint(0, 2, (ROWS,), generator=generator).float() if examples == "impressions" else None,
    )


def _objective(name: str, device: str) -> torch.nn.Module:
    torch.manual_seed(0)
    items = ItemTable(torch.ones(ITEMS))
    module = registry.load("model", name)
    model = module.build(module.Options(dim=32, history_length=20, dropout=0.0), RECORD, items).to(device)
    if isinstance(model, Ranker):
        return Objective(model, registry.options("loss", "bce")(), items, OneProcess())
    items = ItemTable(items.counts_N.to(device))
    return Objective(model, registry.options("loss", "softmax")(), items, OneProcess())


def _losses(name: str, device: str, dtype: torch.dtype = torch.float32, steps: int = 8) -> list[float]:
    """Of so many steps on one batch."""
    objective = _objective(name, device)
    optimizer = Optimizers(OptimConfig(), objective)
    optimizer.set_learning_rate(1e-2)
    scaler = torch.amp.GradScaler(device, enabled=dtype is torch.float16)
    batch = _batch(objective.model.examples).to(torch.device(device))  # type: ignore[union-attr]
    retrieval = []
    for _ in range(steps):
        with torch.autocast(device, dtype, enabled=dtype is not torch.float32):
            total, weight = objective(batch)
        scaler.scale(total / weight).backward()
        optimizer.step(scaler)
        retrieval.append(float(total.detach() / weight))
    return retrieval


@pytest.mark.parametrize("name", registry.names("model"))
def test_steps_on_the_gpu_are_those_of_the_cpu(name: str) -> None:
    assert _losses(name, "cuda") == pytest.approx(_losses(name, "cpu"), rel=2e-3)


def test_parts_of_a_batch_on_the_gpu_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """As large batches have them: several groups of rows, several chunks of logits, the last one shorter."""
    monkeypatch.setattr(transformer, "_FEW", 0)
    monkeypatch.setattr(chunked_softmax, "_LOGITS", 100 * ITEMS)
    assert _losses("sasrec", "cuda") == pytest.approx(_losses("sasrec", "cpu"), rel=2e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", registry.names("model"))
def test_mixed_precision_learns_as_fp32_does(name: str, dtype: torch.dtype) -> None:
    full, mixed = _losses(name, "cuda"), _losses(name, "cuda", dtype)
    assert all(map(math.isfinite, mixed))
    # A loss near 0 has few digits left in bf16.
    assert mixed[-1] == pytest.approx(full[-1], rel=0.1, abs=0.01) and mixed[-1] < mixed[0]


def test_queries_of_the_gpu_are_those_of_the_cpu() -> None:
    """One query a row, as search asks for, of rows with histories of any length."""
    batch = _batch("events")
    vectors = [
        _objective("sasrec", device).eval().model.query_vectors(batch.to(torch.device(device))).cpu()  # type: ignore[operator, union-attr]
        for device in ("cpu", "cuda")
    ]
    assert torch.allclose(*vectors, atol=1e-4)


def test_precision_is_the_best_that_the_card_has() -> None:
    wanted = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    assert optim.MixedPrecision("auto", torch.device("cuda")).dtype is wanted


@pytest.mark.parametrize("rows_at_once", [100, 30])
def test_exact_search_finds_the_same_items(rows_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact, "_SCORES_ON_GPU", rows_at_once * 20_000)
    torch.manual_seed(0)
    q, v = torch.randn(100, 64), torch.randn(20_000, 64)
    seen = Jagged(torch.randint(2, 20_000, (5000,)), torch.arange(101) * 50)
    ids, scores = top_k(q, v, 100, seen)
    found, best = top_k(q.cuda(), v.cuda(), 100, Jagged(seen.values.cuda(), seen.offsets.cuda()))
    assert float((found.cpu() == ids).float().mean()) > 0.999  # two scores may be closer than rounding
    assert torch.allclose(best.cpu(), scores, atol=1e-3)


def test_one_rank_of_nccl_takes_the_steps_of_none(tmp_path: Path) -> None:
    objective, alone = _objective("sasrec", "cuda"), _objective("sasrec", "cuda")
    batch = _batch("sequences").to(torch.device("cuda"))
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = data_parallel(objective)
        for one in (wrapped, alone):
            total, weight = one(batch)
            (total / weight).backward()
        for mine, other in zip(objective.parameters(), alone.parameters(), strict=True):
            assert mine.grad is not None and other.grad is not None
            assert torch.allclose(mine.grad, other.grad, atol=1e-6)
    finally:
        dist.destroy_process_group()
