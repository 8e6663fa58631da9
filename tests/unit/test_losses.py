"""Losses against closed forms in float64."""

import contextlib
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from helpers.collectives import OneProcess
from recray import registry
from recray.config import LossOptions
from recray.kernels import chunked_softmax, matmul
from recray.loading.batch import Batch, ItemTable, Jagged

Q, N, D = 7, 30, 5


def _loss(config: LossOptions, *arguments: Any) -> torch.Tensor:
    total: torch.Tensor = registry.load("loss", config.name).loss(config, *arguments)
    return total


class _Vectors:
    """Fixed vectors as a model."""

    examples = "events"

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.q = torch.randn(Q, D, requires_grad=True)
        self.v = torch.randn(N, D, requires_grad=True)

    def query_vectors(self, batch: Batch) -> torch.Tensor:
        return self.q

    def item_vectors(self, ids: torch.Tensor) -> torch.Tensor:
        return self.v[ids]


def _batch() -> Batch:
    empty = Jagged(torch.zeros(0, dtype=torch.int64), torch.zeros(Q + 1, dtype=torch.int64))
    return Batch(torch.arange(Q), empty, torch.tensor([2, 3, 3, 9, 29, 15, 2]), torch.ones(Q))


def _each(config: LossOptions, model: _Vectors, batch: Batch, table: ItemTable) -> torch.Tensor:
    """The loss of every query: of the same draws, with all weight on one query after another."""
    state, each = torch.random.get_rng_state(), []
    for one in torch.eye(Q):
        torch.random.set_rng_state(state)
        # A weight of 0 would take the query's positive from the candidates.
        both = _loss(config, model, replace(batch, weight_Q=1 + one), table, OneProcess())
        torch.random.set_rng_state(state)
        each.append(both - _loss(config, model, replace(batch, weight_Q=torch.ones(Q)), table, OneProcess()))
    return torch.stack(each)


TABLE = ItemTable(torch.cat([torch.zeros(2), torch.arange(N - 2, 0, -1).float()]))


@pytest.mark.parametrize("chunk", [1, 3, 7, 256])  # of 7 rows
# Logits up to 5 or so, up to 50, whose powers half precision cannot hold, and so large that exp of them is infinite.
@pytest.mark.parametrize("size", [1.0, 6.0, 60.0])
@pytest.mark.parametrize("way", ["oneDNN", "mm", torch.bfloat16, torch.float16])
def test_chunked_softmax_equals_cross_entropy_with_gradients(
    chunk: int, size: float, way: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way != "oneDNN":  # as on a GPU and over many items
        for module in (chunked_softmax, matmul):
            monkeypatch.setattr(module, "fits", lambda a, b: False)
    model = _Vectors()
    batch = replace(_batch(), weight_Q=torch.rand(Q))
    with torch.no_grad():
        model.q *= size
    config = registry.options("loss", "softmax")(temperature=0.7, chunk_size=chunk)
    with torch.autocast("cpu", way) if isinstance(way, torch.dtype) else contextlib.nullcontext():
        ours = _loss(config, model, batch, TABLE, OneProcess())
    (ours * 3).backward()
    q, v = model.q.detach().double().requires_grad_(), model.v.detach().double().requires_grad_()
    assert batch.target_Q is not None and batch.weight_Q is not None
    each = F.cross_entropy(q @ v[2:].T / 0.7, batch.target_Q - 2, reduction="none")
    plain = chunked_softmax.reference(q, v[2:], batch.target_Q - 2, batch.weight_Q.double(), 0.7)
    assert torch.allclose(_each(config, model, batch, TABLE).detach().double(), each.detach(), atol=1e-5 * size)
    theirs = (each * batch.weight_Q).sum()
    (theirs * 3).backward()
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), rel=1e-5)
    assert float(plain.detach()) == pytest.approx(float(theirs.detach()), rel=1e-12)
    assert q.grad is not None and v.grad is not None and model.q.grad is not None and model.v.grad is not None
    assert torch.allclose(model.q.grad.double(), q.grad, atol=1e-5)
    assert torch.allclose(model.v.grad.double(), v.grad, atol=1e-5 * size)


@pytest.mark.parametrize("name", ["softmax", "sampled_softmax", "gbce", "cosine_contrastive", "bpr"])
def test_a_query_that_weighs_nothing_may_hold_anything(name: Any) -> None:
    model = _Vectors()
    with torch.no_grad():
        model.q[2] = math.nan
    weight = torch.ones(Q)
    weight[2] = 0
    loss = _loss(registry.options("loss", name)(), model, replace(_batch(), weight_Q=weight), TABLE, OneProcess())
    assert math.isfinite(float(loss.detach()))
    loss.backward()
    if name == "softmax":
        assert model.v.grad is not None and bool(model.v.grad.isfinite().all())


def test_sampled_softmax_with_many_negatives_comes_near_the_full_one() -> None:
    model, batch = _Vectors(), _batch()
    config = registry.options("loss", "sampled_softmax")(negatives=200_000, in_batch=False)
    torch.manual_seed(1)
    assert batch.target_Q is not None
    full = F.cross_entropy(model.q @ model.v[2:].T, batch.target_Q - 2, reduction="none")
    assert torch.allclose(_each(config, model, batch, TABLE), full, atol=0.02)


def test_the_positive_is_never_a_negative() -> None:
    """With the positive as the only possible item, nothing is left to lose against."""
    model, batch = _Vectors(), _batch()
    two = ItemTable(torch.tensor([0.0, 0.0, 5.0]))
    same = Batch(batch.user_B, batch.history, torch.full((Q,), 2), torch.ones(Q))
    for name in ("sampled_softmax", "bpr"):
        loss = _loss(registry.options("loss", name)(negatives=8), model, same, two, OneProcess())
        assert float(loss.detach()) == pytest.approx(0, abs=Q * 1e-6)


def test_gbce_beta_by_hand() -> None:
    model, batch = _Vectors(), _batch()
    config = registry.options("loss", "gbce")(negatives=9, calibration=0.5)
    torch.manual_seed(3)
    loss = _each(config, model, batch, TABLE)
    torch.manual_seed(3)
    negative = torch.randint(2, N, (9,))
    alpha = 9 / (N - 3)
    beta = alpha * (0.5 * (1 - 1 / alpha) + 1 / alpha)
    assert batch.target_Q is not None
    for i in range(Q):
        positive = float((model.q[i] @ model.v[batch.target_Q[i]]).detach())
        expected = beta * math.log1p(math.exp(-positive))
        expected += sum(
            math.log1p(math.exp(float((model.q[i] @ model.v[n]).detach()))) for n in negative if n != batch.target_Q[i]
        )
        assert float(loss[i].detach()) == pytest.approx(expected, rel=1e-5)


def test_an_item_that_is_sampled_in_two_ways_is_corrected_by_both() -> None:
    """log expected count of a candidate = log(P f + M / N), whichever draw it came from."""
    model, batch = _Vectors(), _batch()
    config = registry.options("loss", "sampled_softmax")(negatives=6)
    torch.manual_seed(4)
    loss = _each(config, model, batch, TABLE)
    torch.manual_seed(4)
    negative = torch.randint(2, N, (6,))
    target = batch.target_Q
    assert target is not None
    share = TABLE.counts_N / TABLE.counts_N.sum()
    for i in range(Q):
        logits = [float((model.q[i] @ model.v[target[i]]).detach())]
        for c in [*target.tolist(), *negative.tolist()]:
            if c != target[i]:
                logits.append(float(model.q[i] @ model.v[c]) - math.log(Q * float(share[c]) + 6 / (N - 2)))
        expected = torch.logsumexp(torch.tensor(logits), 0) - logits[0]
        assert float(loss[i]) == pytest.approx(float(expected), rel=1e-4)


def test_sampled_softmax_without_correction_is_a_softmax_over_the_candidates() -> None:
    model, batch = _Vectors(), _batch()
    config = registry.options("loss", "sampled_softmax")(negatives=6, in_batch=False, logq=False, temperature=0.5)
    torch.manual_seed(5)
    loss = _each(config, model, batch, TABLE)
    torch.manual_seed(5)
    negative = torch.randint(2, N, (6,))
    assert batch.target_Q is not None
    for i, target in enumerate(batch.target_Q.tolist()):
        candidates = torch.tensor([target, *(n for n in negative.tolist() if n != target)])
        expected = -torch.log_softmax(model.q[i] @ model.v[candidates].T / 0.5, 0)[0]
        assert float(loss[i].detach()) == pytest.approx(float(expected.detach()), rel=1e-4)


def test_cosine_contrastive_by_hand() -> None:
    model, batch = _Vectors(), _batch()
    config = registry.options("loss", "cosine_contrastive")(negatives=8, margin=0.1, negative_weight=3.0)
    torch.manual_seed(6)
    loss = _each(config, model, batch, TABLE)
    torch.manual_seed(6)
    negative = torch.randint(2, N, (8,)).tolist()
    assert batch.target_Q is not None
    cos = F.normalize(model.q.detach(), dim=1) @ F.normalize(model.v.detach(), dim=1).T
    for i, target in enumerate(batch.target_Q.tolist()):
        over = [max(0.0, float(cos[i, n]) - 0.1) for n in negative if n != target]
        expected = 1 - float(cos[i, target]) + 3.0 * sum(over) / len(over)
        assert float(loss[i].detach()) == pytest.approx(expected, rel=1e-4)
