"""Contracts that every retriever keeps, found by name; and what is true of one model."""

from dataclasses import replace

import pytest
import torch

from helpers.collectives import OneProcess
from recray import registry
from recray.config import parse_config
from recray.errors import ConfigError
from recray.loading.batch import Batch, ItemTable, Jagged
from recray.losses.base import Objective
from recray.models import Ranker, Retriever, build_model
from recray.records import DatasetRecord, Feature

ITEMS, USERS = 40, 20
MODELS = [n for n in registry.names("model") if registry.load("model", n).Options.family == "retriever"]
RECORD = DatasetRecord(fingerprint="", num_items=ITEMS, num_users=USERS, counts={}, shards={}, seed=0)
COUNTS = torch.cat([torch.zeros(2), torch.arange(ITEMS - 2, 0, -1).float()])
TABLE = ItemTable(COUNTS)


def _model(name: str, **options: object) -> torch.nn.Module:
    torch.manual_seed(0)
    module = registry.load("model", name)
    return module.build(module.Options(dim=16, history_length=8, **options), RECORD, TABLE)


def _batch(examples: str, lengths: tuple[int, ...] = (3, 0, 8, 1)) -> Batch:
    generator = torch.Generator().manual_seed(1)
    offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    history = Jagged(torch.randint(1, ITEMS, (int(offsets[-1]),), generator=generator), offsets)
    user = torch.arange(2, 2 + len(lengths))
    position = torch.arange(int(offsets[-1])) if examples == "sequences" else None
    queries = len(user) if position is None else len(position)
    target = torch.randint(2, ITEMS, (queries,), generator=generator)
    return Batch(user, history, target, torch.ones(queries), position)


@pytest.mark.parametrize("name", MODELS)
def test_shapes_and_protocol(name: str) -> None:
    model = _model(name).eval()
    assert isinstance(model, Retriever)
    batch = _batch(model.examples)
    assert model.query_vectors(batch).shape == (len(batch.target_Q), 16)  # type: ignore[arg-type]
    assert model.query_vectors(_batch("events")).shape == (4, 16)
    assert model.item_vectors(torch.arange(ITEMS)).shape == (ITEMS, 16)
    assert torch.isfinite(model.query_vectors(_batch("events"))).all()


@pytest.mark.parametrize("loss", ["softmax", "sampled_softmax", "gbce", "cosine_contrastive", "bpr"])
@pytest.mark.parametrize("name", MODELS)
def test_overfits_a_small_set_with_every_loss(name: str, loss: str) -> None:
    model = _model(name, **({"dropout": 0.0}))
    options = registry.options("loss", loss)(**({} if loss == "softmax" else {"negatives": 30}))
    objective = Objective(model, options, TABLE, OneProcess())
    batch = _batch(model.examples)
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    losses = []
    for _ in range(120):
        total, weight = objective(batch)
        (total / weight).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float((total / weight).detach()))
    assert torch.isfinite(torch.tensor(losses)).all()
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


@pytest.mark.parametrize("name", MODELS)
def test_the_loss_is_the_weighted_sum_over_queries(name: str) -> None:
    """A query of weight 0 adds nothing and changes no other query's loss; each one's loss is checked in float64."""
    model = _model(name).eval().double()
    objective = Objective(model, registry.options("loss", "softmax")(temperature=0.5), TABLE, OneProcess())
    batch = _batch(model.examples)
    assert batch.weight_Q is not None and batch.target_Q is not None
    logits_QN = model.query_vectors(batch) @ model.item_vectors(torch.arange(ITEMS)).T  # type: ignore[operator]
    logits_QN = logits_QN / 0.5
    logits_QN[:, :2] = -torch.inf  # padding and the unknown item are no candidates
    each_Q = torch.nn.functional.cross_entropy(logits_QN, batch.target_Q, reduction="none")
    weights_Q = torch.linspace(0, 3, len(each_Q))
    for weight_Q in (torch.ones(len(each_Q)), weights_Q, *torch.eye(len(each_Q))):
        total, weight = objective(replace(batch, weight_Q=weight_Q))
        assert total.item() == pytest.approx((each_Q * weight_Q).sum().item(), rel=1e-6)
        assert weight.item() == pytest.approx(weight_Q.sum().item())
    # Exactly: whatever the query of weight 0 asks for.
    other = batch.target_Q.clone()
    other[0] = (other[0] - 2 + 1) % (ITEMS - 2) + 2
    first, second = (objective(replace(batch, weight_Q=weights_Q, target_Q=t))[0] for t in (batch.target_Q, other))
    assert torch.equal(first, second)


@pytest.mark.parametrize("name", MODELS)
def test_state_keeps_vectors(name: str) -> None:
    model, other = _model(name).eval(), _model(name).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    other.load_state_dict(model.state_dict())
    assert torch.equal(model.item_vectors(torch.arange(ITEMS)), other.item_vectors(torch.arange(ITEMS)))  # type: ignore[operator]
    batch = _batch("events")
    assert torch.equal(model.query_vectors(batch), other.query_vectors(batch))  # type: ignore[operator]


@pytest.mark.parametrize("name", registry.names("model"))
def test_columns_may_be_called_like_methods_of_modules(name: str) -> None:
    columns = ["type", "items", "keys", "forward", "train"]
    features = [Feature(name=column, role="user", kind="categorical", cardinality=3) for column in columns]
    module = registry.load("model", name)
    model = module.build(module.Options(dim=8), RECORD.model_copy(update={"features": features}), TABLE)
    history = Jagged(torch.tensor([2, 3]), torch.tensor([0, 2]))
    one = torch.ones(1, dtype=torch.int64)
    batch = Batch(one * 2, history, one * 4, user_features={column: one for column in columns})
    assert (model.logits(batch) if isinstance(model, Ranker) else model.query_vectors(batch)).isfinite().all()


class _Neither(torch.nn.Module):
    def query_vectors(self, batch: Batch) -> torch.Tensor:
        return batch.user_B


def test_a_plug_in_extends_the_class_of_its_family(monkeypatch: pytest.MonkeyPatch) -> None:
    module = registry.load("model", "two_tower")
    config = parse_config({"model": {"name": "two_tower"}})
    assert isinstance(build_model(config, RECORD, TABLE), Retriever)
    monkeypatch.setattr(module, "build", lambda *_: _Neither())
    with pytest.raises(
        ConfigError, match=r"build\(\) returned a _Neither, but .* is 'retriever': .* extends recray.models.Retriever"
    ):
        build_model(config, RECORD, TABLE)
    with pytest.raises(TypeError, match="abstract method"):

        class Half(Retriever):
            def query_vectors(self, batch: Batch) -> torch.Tensor:
                return batch.user_B

        Half()  # type: ignore[abstract]


def test_sasrec_does_not_see_the_future() -> None:
    model = _model("sasrec", layers=2, heads=2).eval()
    batch = _batch("sequences", (8, 5))
    changed = batch.history.values.clone()
    changed[7] = changed[7] % 37 + 2  # the last entry of the first row
    later = Batch(batch.user_B, Jagged(changed, batch.history.offsets), position_Q=batch.position_Q)
    before, after = model.query_vectors(batch), model.query_vectors(later)  # type: ignore[operator]
    assert torch.allclose(before[:7], after[:7], atol=1e-6)
    assert not torch.allclose(before[7], after[7], atol=1e-4)
    assert torch.allclose(before[8:], after[8:], atol=1e-6)


def test_sasrec_jagged_equals_one_row_at_a_time() -> None:
    model = _model("sasrec", layers=2, heads=2, feed_forward="gated").eval().double()
    batch = _batch("events", (3, 8, 1, 5, 8, 2))
    together = model.query_vectors(batch)  # type: ignore[operator]
    for row in range(6):
        values = batch.history.values[batch.history.offsets[row] : batch.history.offsets[row + 1]]
        alone = Batch(batch.user_B[row : row + 1], Jagged(values, torch.tensor([0, len(values)])))
        assert torch.allclose(model.query_vectors(alone)[0], together[row], atol=1e-12)  # type: ignore[operator]


@pytest.mark.parametrize("lengths", [[1, 1], [1, 3]])
def test_users_with_one_event_ask_nothing_and_train(lengths: list[int]) -> None:
    import pyarrow as pa

    from recray.loading.collate import iter_batches
    from recray.loading.sampler import ShardSlice

    table = pa.table(
        {
            "user": pa.array([2, 3], pa.int32()),
            "item": pa.array([[2 + i for i in range(n)] for n in lengths], pa.list_(pa.int32())),
            "time": pa.array([list(range(n)) for n in lengths], pa.list_(pa.int64())),
            "num_targets": pa.array(lengths, pa.int32()),
        }
    )
    (batch,) = iter_batches([(ShardSlice(0, 0, 0, 2), table)], 2, "sequences", 4, seed=0)
    model = _model("sasrec")
    loss, weight = Objective(model, registry.options("loss", "softmax")(), TABLE, OneProcess())(batch)
    loss.backward()
    assert torch.isfinite(loss) and float(weight) == sum(n - 1 for n in lengths)
    assert all(parameter.grad is not None for parameter in model.parameters())  # DDP waits for all of them
