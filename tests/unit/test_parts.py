"""Dropout by 8 random bits a number."""

import math

import pytest
import torch

from recray.layers.feature_encoder import dropout


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("shape", [(1001, 203), (67,), (0, 4)])
def test_dropout_drops_p_of_all_numbers_and_scales_the_rest(p: float, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.ones(shape, requires_grad=True)
    out = dropout(x, p, training=True)
    kept = out != 0
    n = out.numel()
    # Of p the multiple of 1/256 below it or above it.
    scales = [256 / (256 - dropped) for dropped in (math.floor(p * 256), math.ceil(p * 256))]
    assert any(torch.allclose(out[kept], torch.tensor(scale)) for scale in scales)
    if n:
        assert 0 < int(kept.sum()) < n
    if n > 1000:
        p = 1 - 1 / float(out[kept][0].detach())
        assert abs(float(kept.double().mean()) - (1 - p)) < 5 * (p * (1 - p) / n) ** 0.5
        rows = kept.double().mean(0)  # no column is kept more often than another
        assert float((rows - (1 - p)).abs().max()) < 6 * (p * (1 - p) / shape[0]) ** 0.5
    (out * 2).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, 2 * out.detach())


@pytest.mark.parametrize("p", [0.001, 0.1, 0.9])
def test_dropout_drops_p_over_many_calls_and_keeps_the_mean(p: float) -> None:
    torch.manual_seed(0)
    x, calls = torch.ones(64, 64), 500
    outs = torch.stack([dropout(x, p, training=True) for _ in range(calls)]).double()
    n = outs.numel()
    # The share itself differs by up to 1/256 from call to call.
    shares = 5 * (1 / 512) / calls**0.5
    assert abs(float((outs == 0).double().mean()) - p) < 5 * (p * (1 - p) / n) ** 0.5 + shares
    assert abs(float(outs.mean()) - 1) < 6 * (p / (1 - p) / n) ** 0.5


def test_dropout_follows_the_seed_and_is_nothing_outside_training() -> None:
    x = torch.randn(50, 3)
    torch.manual_seed(1)
    first, second = dropout(x, 0.5, True), dropout(x, 0.5, True)
    torch.manual_seed(1)
    assert torch.equal(first, dropout(x, 0.5, True)) and not torch.equal(first, second)
    assert dropout(x, 0.5, False) is x
    for p in (0.999, 1.0):  # more than eight bits can say
        torch.manual_seed(2)
        ours = dropout(x, p, True)
        torch.manual_seed(2)
        assert torch.equal(ours, torch.nn.functional.dropout(x, p, True))
    assert torch.equal(dropout(x, 0.0, True), x)
