"""Dropout by 16 random bits a number."""

import pytest
import torch

from recray.models.parts import dropout


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("shape", [(1001, 203), (7,), (0, 4)])
def test_dropout_drops_p_of_all_numbers_and_scales_the_rest(p: float, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.ones(shape, requires_grad=True)
    out = dropout(x, p, training=True)
    kept = out != 0
    n = out.numel()
    if n > 1000:
        scale = float(out[kept][0])
        assert torch.equal(out[kept], torch.full_like(out[kept], scale))
        share = 1 - 1 / scale  # the multiple of 1/256 below p or above it
        assert abs(share - p) < 1 / 256 and abs(share * 256 - round(share * 256)) < 1e-3
        p = share
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
    assert bool(dropout(x, 1 - 1e-9, True).isfinite().all())
    assert torch.equal(dropout(x, 0.0, True), x)
