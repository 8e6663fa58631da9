"""Weighted softmax cross-entropy over all items, without a (Q, N) matrix of logits.

The product of 1,024 queries and 1 M items has 4 GB of logits, and autograd would keep it for the backward pass. Here rows
of queries are processed in chunks of at most 256 MB of logits, and each chunk's gradients are computed while its logits
are still in the cache. `reference` is the same loss in two lines, for tests.

Shape legend: Q queries, R queries of a chunk, N items, D width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from recray.kernels.matmul import fits, product

_LARGEST_EXPONENT = 86.0  # float32 holds 2^86 and 2^-86, and products with them
_LOGITS = 1 << 26  # in memory at a time (256 MB)
_ROWS_ON_CPU = 512  # so that a chunk stays in the CPU's caches; on a GPU every chunk costs eight kernel launches


def reference(q_QD: Tensor, v_ND: Tensor, target_Q: Tensor, weight_Q: Tensor, temperature: float) -> Tensor:
    """() sum over queries of weight * -log softmax(q . v / temperature)[target], with all logits in memory."""
    loss_Q = F.cross_entropy(q_QD @ v_ND.T / temperature, target_Q, reduction="none")
    return (loss_Q * weight_Q).sum()


def chunked_softmax(
    q_QD: Tensor, v_ND: Tensor, target_Q: Tensor, weight_Q: Tensor, temperature: float, chunk: int | None = None
) -> Tensor:
    """() float32, equal to `reference` up to rounding. chunk: rows of logits at a time; None chooses by device."""
    # Powers of 2 leave the range of half precision: autocast must not touch their products.
    with torch.autocast(q_QD.device.type, enabled=False):
        total: Tensor = _ChunkedSoftmax.apply(q_QD.float(), v_ND.float(), target_Q, weight_Q, temperature, chunk)
    return total


class _ChunkedSoftmax(torch.autograd.Function):
    """Computes the gradients in the forward pass, while a chunk's logits are in memory; backward only scales them.

    That saves computing the logits a second time. If no logit can overflow, no maximum is subtracted, which saves two
    more passes over the logits.
    """

    @staticmethod
    def forward(
        ctx: Any, q_QD: Tensor, v_ND: Tensor, target_Q: Tensor, weight_Q: Tensor, temperature: float, chunk: int | None
    ) -> Tensor:
        q_QD = q_QD / (temperature * math.log(2))  # exp2 takes a third of the time of exp
        positive_QD = v_ND[target_Q]
        # |logit| <= |q| |v|, and a row sums N of them.
        bound = q_QD.norm(dim=1).max() * v_ND.norm(dim=1).max() + math.log2(len(v_ND)) if len(q_QD) else 0.0
        bounded = float(bound) < _LARGEST_EXPONENT
        sum_Q, top_Q = torch.empty(len(q_QD), device=q_QD.device), torch.zeros(len(q_QD), device=q_QD.device)
        learns = any(ctx.needs_input_grad)
        most = _LOGITS // len(v_ND)
        chunk = max(1, min(chunk or (most if q_QD.is_cuda else _ROWS_ON_CPU), most))
        logits = q_QD.new_empty(min(chunk, len(q_QD)), len(v_ND))
        # The gradient of the items is computed transposed if that product is faster (recray.kernels.matmul). The last,
        # smaller chunk uses the plain product: every new shape would leave a compiled kernel in oneDNN's cache.
        transposed = learns and len(q_QD) >= chunk and fits(q_QD[:chunk].T, v_ND)
        v_DN, grad_q = v_ND.T.contiguous(), torch.empty_like(q_QD)
        grad_v = torch.zeros_like(v_DN).T if transposed else torch.zeros_like(v_ND)
        by_row = (torch.split(x, chunk) for x in (q_QD, weight_Q, sum_Q, top_Q, grad_q))
        for q_RD, weight_R, sum_R, top_R, grad_RD in zip(*by_row, strict=True):
            whole = transposed and len(q_RD) == chunk
            p_RN = product(q_RD, v_ND, logits) if whole else torch.mm(q_RD, v_DN, out=logits[: len(q_RD)])
            if not bounded:
                top_R.copy_(p_RN.amax(1))
                p_RN -= top_R[:, None]
            torch.sum(p_RN.exp2_(), 1, out=sum_R)
            if learns:
                share_RD = q_RD * (weight_R / sum_R)[:, None]
            if whole:
                grad_RD.copy_(product(p_RN, v_DN))
                grad_v.T.add_(product(share_RD.T.contiguous(), p_RN.T))
            elif learns:
                torch.mm(p_RN, v_ND, out=grad_RD)
                grad_v.addmm_(p_RN.T, share_RD)
            del p_RN  # the next chunk reuses its memory, which is in the cache
        loss_Q = (top_Q + sum_Q.log2() - (q_QD * positive_QD).sum(1)) * math.log(2)
        if learns:
            grad_q *= (weight_Q / sum_Q)[:, None]
            grad_q.addcmul_(positive_QD, weight_Q[:, None], value=-1)
            grad_v = grad_v.contiguous()
            grad_v.index_add_(0, target_Q, q_QD * weight_Q[:, None], alpha=-1)
            ctx.save_for_backward(grad_q.div_(temperature), grad_v.mul_(math.log(2)))
        return (loss_Q * weight_Q).sum()

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_q, grad_v = ctx.saved_tensors
        return grad_q * grad, grad_v * grad, None, None, None, None
