"""Retrieval losses, from query vectors and item vectors: a sum over queries, each times its weight.

Shape legend: Q queries, N items, M shared negatives, D width.
Scores are inner products divided by `temperature`.

    softmax             -log softmax over all items, in chunks of rows (no Q x N matrix is ever made)
    sampled_softmax     the same over in-batch positives and M uniform items, each score corrected by the
                        log of how often the item is expected among the candidates
                        (Yi et al., RecSys 2019; Yang et al., WWW 2020 for the mixture)
    gbce                binary cross-entropy with the positive's probability to the power beta,
                        beta = alpha (t (1 - 1/alpha) + 1/alpha), alpha = M / (N - 1)  (Petrov & Macdonald, RecSys 2023)
    cosine_contrastive  (1 - cos+) + w mean_m max(0, cos-_m - margin)  (Mao et al., SimpleX, CIKM 2021)
    bpr                 mean_m softplus(s-_m - s+)  (Rendle et al., UAI 2009, with M negatives)

An item that is the positive of its row is never a negative of it.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from recray.config import LossConfig
from recray.kernels.matmul import fits, product
from recray.loading.batch import FIRST_ID, Batch, ItemTable
from recray.models import Retriever

_LARGEST_EXPONENT = 86.0  # 2 to the power of it and of its negative are inside of float32, and products with them
_LOGITS = 1 << 26  # alive at a time (256 MB)
_ROWS_ON_CPU = 512  # of them: what its caches hold; on a GPU every chunk costs the start of eight kernels


class Gather(Protocol):
    """How queries see the positives of other workers."""

    def all_gather(self, x: Tensor) -> Tensor:
        """Rows of all workers, this worker's part differentiable; every worker has as many rows."""
        ...


def retrieval_loss(config: LossConfig, model: Retriever, batch: Batch, items: ItemTable, gather: Gather) -> Tensor:
    """() float32 sum over the batch's queries of weight times loss. A query of weight 0 may hold anything, NaN too."""
    assert batch.target_Q is not None
    q_QD = model.query_vectors(batch)
    weight_Q = batch.weight_Q if batch.weight_Q is not None else torch.ones(len(q_QD), device=q_QD.device)
    if config.name == "softmax":
        v_ND = model.item_vectors(torch.arange(FIRST_ID, items.num_items, device=q_QD.device))
        q_QD = torch.where(weight_Q[:, None] > 0, q_QD.float(), 0.0)
        # Powers of 2 leave the range of half precision: autocast must not touch their products.
        with torch.autocast(q_QD.device.type, enabled=False):
            total: Tensor = _ChunkedSoftmax.apply(  # type: ignore[no-untyped-call]
                q_QD, v_ND.float(), batch.target_Q - FIRST_ID, weight_Q, config.temperature, config.chunk_size
            )
        return total
    loss_Q = _query_losses(config, model, q_QD, batch, items, gather)
    return (torch.where(weight_Q > 0, loss_Q, 0.0) * weight_Q).sum()


def _query_losses(
    config: LossConfig, model: Retriever, q_QD: Tensor, batch: Batch, items: ItemTable, gather: Gather
) -> Tensor:
    """(Q,) float32."""
    assert batch.target_Q is not None
    num_real = items.num_items - FIRST_ID
    negative_M = torch.randint(FIRST_ID, items.num_items, (config.negatives,), device=q_QD.device)
    if config.name == "sampled_softmax":
        return _sampled_softmax(config, model, q_QD, batch, negative_M, items, gather)
    positive_QD, negative_MD = _item_vectors(model, batch.target_Q, negative_M)
    if config.name == "cosine_contrastive":
        q_QD, positive_QD, negative_MD = (F.normalize(x, dim=-1) for x in (q_QD, positive_QD, negative_MD))
    positive_Q = (q_QD * positive_QD).sum(-1).float()
    negative_QM = (q_QD @ negative_MD.T).float()
    allowed_QM = (negative_M[None] != batch.target_Q[:, None]).float()
    share_QM = allowed_QM / allowed_QM.sum(1, keepdim=True).clamp(min=1)
    if config.name == "cosine_contrastive":
        return 1 - positive_Q + config.negative_weight * (share_QM * F.relu(negative_QM - config.margin)).sum(1)
    positive_Q, negative_QM = positive_Q / config.temperature, negative_QM / config.temperature
    if config.name == "bpr":
        return (share_QM * F.softplus(negative_QM - positive_Q[:, None])).sum(1)
    alpha = min(1.0, config.negatives / max(num_real - 1, 1))
    beta = alpha * (config.calibration * (1 - 1 / alpha) + 1 / alpha)
    return beta * F.softplus(-positive_Q) + (allowed_QM * F.softplus(negative_QM)).sum(1)


def _item_vectors(model: Retriever, target_Q: Tensor, negative_M: Tensor) -> tuple[Tensor, Tensor]:
    """(Q, D) and (M, D); an item that occurs twice is computed once."""
    unique, inverse = torch.unique(torch.cat([target_Q, negative_M]), return_inverse=True)
    v_UD = model.item_vectors(unique)
    return v_UD[inverse[: len(target_Q)]], v_UD[inverse[len(target_Q) :]]


def _sampled_softmax(
    config: LossConfig,
    model: Retriever,
    q_QD: Tensor,
    batch: Batch,
    negative_M: Tensor,
    items: ItemTable,
    gather: Gather,
) -> Tensor:
    """Candidates C of a query: the other positives of the batch on all workers, and the uniform items."""
    assert batch.target_Q is not None
    positive_QD, v_CD = _item_vectors(model, batch.target_Q, negative_M)
    positive_Q = (q_QD * positive_QD).sum(-1).float() / config.temperature
    candidate_C, present_C = negative_M, torch.ones(len(negative_M), device=q_QD.device)
    in_batch = 0.0
    if config.in_batch:
        present_Q = (
            torch.ones(len(q_QD), device=q_QD.device) if batch.weight_Q is None else (batch.weight_Q > 0).float()
        )
        present_P = gather.all_gather(present_Q)
        in_batch = float(present_P.sum())
        candidate_C = torch.cat([gather.all_gather(batch.target_Q), negative_M])
        v_CD = torch.cat([gather.all_gather(positive_QD), v_CD])
        present_C = torch.cat([present_P, present_C])
    logits_QC = (q_QD @ v_CD.T).float() / config.temperature
    if config.logq:
        # How often the item is expected among the candidates: both draws add up, whichever brought it.
        share_C = items.counts_N[candidate_C] / items.total
        uniform = len(negative_M) / max(items.num_items - FIRST_ID, 1)
        logits_QC = logits_QC - torch.log(in_batch * share_C + uniform)
    excluded_QC = (candidate_C[None] == batch.target_Q[:, None]) | (present_C[None] == 0)
    logits_QC = logits_QC.masked_fill(excluded_QC, -math.inf)
    # The positive is given, not sampled, so it stands uncorrected (Khrylchenko et al., RecSys 2025).
    return torch.logsumexp(torch.cat([positive_Q[:, None], logits_QC], dim=1), dim=1) - positive_Q


class _ChunkedSoftmax(torch.autograd.Function):
    """Weighted cross-entropy over all items with `chunk` rows of logits alive at a time, in float32.

    Forward has the logits at hand and makes the gradients there and then, which
    saves their fourth product with the items; backward only scales them.
    Logits that cannot overflow need no maximum subtracted, which saves two passes more.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, q_QD: Tensor, v_ND: Tensor, target_Q: Tensor, weight_Q: Tensor, temperature: float, chunk: int | None
    ) -> Tensor:
        q_QD = q_QD / (temperature * math.log(2))  # powers of 2 take a third of the time of those of e
        positive_QD = v_ND[target_Q]
        # |logit| <= |q| |v|, and a row sums N of them.
        bound = q_QD.norm(dim=1).max() * v_ND.norm(dim=1).max() + math.log2(len(v_ND)) if len(q_QD) else 0.0
        bounded = float(bound) < _LARGEST_EXPONENT
        sum_Q, top_Q = torch.empty(len(q_QD), device=q_QD.device), torch.zeros(len(q_QD), device=q_QD.device)
        learns = any(ctx.needs_input_grad)
        most = _LOGITS // len(v_ND)
        chunk = max(1, min(chunk or (most if q_QD.is_cuda else _ROWS_ON_CPU), most))
        logits = q_QD.new_empty(min(chunk, len(q_QD)), len(v_ND))
        # The items' gradient is made turned round where that is the faster product. A chunk of another size is not worth
        # what it would leave behind (recray.kernels.matmul).
        turned = learns and len(q_QD) >= chunk and fits(q_QD[:chunk].T, v_ND)
        v_DN, grad_q = v_ND.T.contiguous(), torch.empty_like(q_QD)
        grad_v = torch.zeros_like(v_DN).T if turned else torch.zeros_like(v_ND)
        by_row = (torch.split(x, chunk) for x in (q_QD, weight_Q, sum_Q, top_Q, grad_q))
        for q_RD, weight_R, sum_R, top_R, grad_RD in zip(*by_row, strict=True):
            whole = turned and len(q_RD) == chunk
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
            del p_RN  # so that the next one finds its memory, which is in the cache
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
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grad_q, grad_v = ctx.saved_tensors
        return grad_q * grad, grad_v * grad, None, None, None, None


class RetrievalObjective(nn.Module):
    """Model and loss as one module, so that DDP sees one forward: batch -> (weighted sum of losses, sum of weights)."""

    def __init__(self, model: nn.Module, config: LossConfig, items: ItemTable, gather: Gather) -> None:
        super().__init__()
        self.model = model
        self._config, self._items, self._gather = config, items, gather

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        assert isinstance(self.model, Retriever)
        total = retrieval_loss(self._config, self.model, batch, self._items, self._gather)
        if batch.weight_Q is None:
            assert batch.target_Q is not None
            return total, torch.tensor(float(len(batch.target_Q)), device=total.device)
        return total, batch.weight_Q.sum()
