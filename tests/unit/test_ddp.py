"""Two workers with half a batch each take the steps that one worker takes with all of it, for every model."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from recray import registry
from recray.config import LossConfig, OptimConfig
from recray.models import inputs
from recray.models.batch import Batch, ItemTable, Jagged
from recray.models.click_loss import ClickObjective
from recray.models.losses import RetrievalObjective
from recray.records import DatasetRecord, Feature
from recray.training.optim import Optimizers

ITEMS, ROWS, STEPS = 60, 12, 4
ABOVE = 50  # rows: the item table is sparse, the others are dense
MODELS = registry.names("model")
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


class _Alone:
    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        return x


def _batch(step: int, begin: int, end: int, sequences: bool) -> Batch:
    """Rows begin:end of a step's batch. The first half has no history and no tags, so that one worker touches less."""
    generator = torch.Generator().manual_seed(step)
    lengths = torch.randint(1, 6, (ROWS,), generator=generator)
    if not sequences:
        lengths[: ROWS // 2] = 0
    items = torch.randint(2, ITEMS, (ROWS, 6), generator=generator)
    targets = torch.randint(2, ITEMS, (ROWS, 6), generator=generator)
    hour, label = (torch.randint(0, n, (ROWS,), generator=generator) for n in (26, 2))
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


def _trained(name: str, rank: int, world_size: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    module = registry.load("model", name)
    items = ItemTable(torch.ones(ITEMS), {"price": torch.linspace(-1, 1, ITEMS)})
    ranker = module.Options.family == "ranker"
    inputs.SPARSE_ABOVE = ABOVE
    options = {"hidden": [8]} if ranker else {"dropout": 0.0}
    model = module.build(module.Options(dim=8, history_length=6, **options), RECORD, items)
    sequences = model.examples == "sequences"
    objective: nn.Module = (
        ClickObjective(model, LossConfig(name="bce"))
        if ranker
        else RetrievalObjective(model, LossConfig(name="softmax"), items, _Alone())
    )
    wrapped = nn.parallel.DistributedDataParallel(objective) if world_size > 1 else objective
    optimizer = Optimizers(OptimConfig(name="sgd"), model)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    optimizer.set_learning_rate(0.5)
    share = ROWS // world_size
    for step in range(STEPS):
        total, weight = wrapped(_batch(step, rank * share, (rank + 1) * share, sequences))
        if world_size > 1:
            dist.all_reduce(weight)
        (total * world_size / weight).backward()
        optimizer.step(scaler)
    return {key: value.detach().clone() for key, value in model.state_dict().items()}


def _work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for name in MODELS:
        state = _trained(name, rank, 2)
        if rank == 0:
            torch.save(state, f"{folder}/{name}.pt")
    dist.barrier()  # nobody leaves while the other still works
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_workers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ddp")
    mp.spawn(_work, (str(folder),), nprocs=2)
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_two_workers_equal_one(name: str, two_workers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "SPARSE_ABOVE", inputs.SPARSE_ABOVE)  # put back afterwards
    alone, together = _trained(name, 0, 1), torch.load(two_workers / f"{name}.pt")
    assert alone.keys() == together.keys()
    for key, value in alone.items():
        assert torch.allclose(value.double(), together[key].double(), atol=1e-5), key
