"""Each fast path against the plain form in its file: values and gradients, in float64 where the kernel allows it."""

import math

import pytest
import torch
from torch import Tensor

from recray.kernels import dice, matmul, target_attention_cpu
from recray.kernels import dropout as dropouts
from recray.kernels.dropout import dropout
from recray.layers.dice import Dice
from recray.layers.target_attention import TargetAttention
from recray.loading.jagged import Jagged


def _assert_same(mine: Tensor, wanted: Tensor, inputs: list[Tensor], **tolerance: float) -> None:
    """Values and gradients of two forms of one function, for a gradient that differs from element to element."""
    torch.testing.assert_close(mine, wanted, **tolerance)
    grad = torch.linspace(-1, 2, max(mine.numel(), 1), dtype=mine.dtype)[: mine.numel()].view_as(mine)
    found, expected = (torch.autograd.grad(x, inputs, grad) for x in (mine, wanted))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **tolerance)


@pytest.mark.parametrize("shape", [(50, 7), (1, 1), (0, 7)])
def test_dice(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    alpha, scale, shift = (torch.randn(shape[1], dtype=torch.float64) for _ in range(3))
    alpha.requires_grad_()
    _assert_same(dice.dice(x, alpha, scale, shift), dice.reference(x, alpha, scale, shift), [x, alpha])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1001, 3), (67,), (0, 4)])
def test_dropout_is_its_plain_form(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    torch.manual_seed(1)
    mine = dropout(x, 0.3, training=True)
    torch.manual_seed(1)
    _assert_same(mine, dropouts.reference(x, *dropouts.draw(x, 0.3)), [x])


@pytest.mark.parametrize("shape", [(1, 5, 3), (64, 300, 8), (300, 64, 500), (0, 5, 3), (5, 0, 3), (5, 3, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_product(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    rows, columns, width = shape
    a, b = torch.randn(rows, width, dtype=dtype), torch.randn(width, columns, dtype=dtype).T  # b is not contiguous
    for left, right in ((a, b), (b, a)):
        torch.testing.assert_close(matmul.product(left, right), matmul.reference(left, right), rtol=1e-5, atol=1e-4)
        assert matmul.fits(left, right) <= (dtype is torch.float32 and rows * columns * width > 0)


def _history(lengths: list[int], items: int) -> Jagged:
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    return Jagged(torch.randint(0, items, (sum(lengths),), generator=torch.Generator().manual_seed(0)), offsets)


def _textbook(layer: TargetAttention, q_BI: Tensor, v_UI: Tensor, history: Jagged) -> Tensor:
    """The paper's form, row by row: one first layer on [q, k, q - k, q * k], whose matrices add up to the module's."""
    w_d = torch.linspace(-1, 1, layer.query.weight.numel(), dtype=q_BI.dtype).view_as(layer.query.weight)
    first = torch.cat([layer.query.weight - w_d, layer.key.weight + w_d, w_d, layer.product.weight], dim=1)

    def activation(x: Tensor, module: Dice) -> Tensor:
        p = torch.sigmoid((x - module.mean) / torch.sqrt(module.var + 1e-6))
        return p * x + (1 - p) * module.alpha * x

    out = []
    for row in range(len(q_BI)):
        k = v_UI[history.values[history.offsets[row] : history.offsets[row + 1]]]
        q = q_BI[row].expand_as(k)
        x = torch.cat([q, k, q - k, q * k], dim=1) @ first.T + layer.query.bias
        weight = layer.out(activation(layer.second(activation(x, layer.dice_1)), layer.dice_2))
        out.append((weight * k).sum(0))
    return torch.stack(out)


@pytest.mark.parametrize("lengths", [[3, 0, 8, 1, 9], [4, 4, 4], [1], [0, 0]], ids=str)
def test_target_attention(lengths: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    # Small enough for chunks of one row and of several, and for rows that are kept and rows that are computed again.
    monkeypatch.setattr(target_attention_cpu, "_ONE_THREAD", 4)
    monkeypatch.setattr(target_attention_cpu, "_PER_THREAD", 5)
    monkeypatch.setattr(target_attention_cpu, "_KEPT", 8)
    torch.manual_seed(0)
    layer = TargetAttention(6, 10, 5).double().eval()
    torch.nn.init.normal_(layer.out.weight)  # zero at first
    for module in (layer.dice_1, layer.dice_2):
        module.mean.normal_()
        module.var.uniform_(0.5, 2)
    history = _history(lengths, 30)
    q, v = (torch.randn(n, 6, dtype=torch.float64, requires_grad=True) for n in (len(lengths), 30))
    inputs = [q, v, *layer.parameters()]
    wanted = _textbook(layer, q, v, history)
    _assert_same(layer.plain(q, v, history), wanted, inputs, rtol=1e-10, atol=1e-12)
    _assert_same(layer.chunked(q, v, history), layer.plain(q, v, history), inputs, rtol=1e-10, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(layer.chunked(q, v, history), wanted, rtol=1e-10, atol=1e-12)


def test_target_attention_samples_what_dice_sees() -> None:
    """Few entries are all sampled: both ways then move the averages alike."""
    layers = [TargetAttention(6, 10, 5) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    history = _history([3, 0, 8, 1, 9], 30)
    q, v = torch.randn(5, 6), torch.randn(30, 6)
    for layer, forward in zip(layers, (layers[0].plain, layers[1].chunked), strict=True):
        forward(q, v, history)
        for module in (layer.dice_1, layer.dice_2):
            assert module.seen[-1] == 21
    for one, other in zip(layers[0].buffers(), layers[1].buffers(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


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
