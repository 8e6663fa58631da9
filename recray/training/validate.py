"""The metric that steers training, on the validation split and over all workers: full ranking, or of clicks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from recray import metrics
from recray.config import EvaluationConfig
from recray.data.dataset import PreparedDataset
from recray.errors import DataError
from recray.layers import embedding
from recray.loading.batch import Jagged
from recray.loading.collate import eval_queries, impressions
from recray.metrics import ranking
from recray.metrics.clicks import Clicks
from recray.models import Ranker, Retriever
from recray.retrieval.exact import merge, top_k
from recray.training.distributed import Context

_QUERIES_ON_CPU = 128  # at a time: few enough that a transformer's activations stay near the cache
_QUERIES = 512
_IMPRESSIONS = 8192
_ITEMS = 65_536  # whose vectors are made at a time

_T = TypeVar("_T")


@torch.inference_mode()
def validate(
    model: nn.Module,
    dataset: PreparedDataset,
    context: Context,
    metric: str,
    history_length: int,
    evaluation: EvaluationConfig,
    plugins: str | None = None,
) -> float:
    """Mean of `metric` ('ndcg@10') over queries of the validation split whose user has a history."""
    assert isinstance(model, Retriever)
    name, k = metrics.parse(metric)
    wanted = metrics.find(name, plugins)
    assert isinstance(wanted, metrics.ListMetric) and k is not None
    model.eval()  # type: ignore[attr-defined]
    shared = _exchanges(model, context)
    at_once = _QUERIES_ON_CPU if context.device.type == "cpu" else _QUERIES
    # Of sharded tables each worker scores the items whose rows it has, for the queries of all.
    share = (context.rank, context.world_size) if shared else (0, 1)
    v_ND = _item_vectors(model, dataset.record.num_items, share, context)
    total = torch.zeros(2, dtype=torch.float64)
    for table in dataset.iter_tables("valid"):
        # Worker r takes every world_size-th row of every shard.
        mine = table.take(pa.array(range(context.rank, len(table), context.world_size)))
        found = eval_queries(mine, at_once, history_length, evaluation.queries) if len(mine) else iter(())
        spare = eval_queries(table, 1, history_length, evaluation.queries)
        for question, real in _in_step(found, spare, context, shared):
            q_BD = model.query_vectors(question.batch.to(context.device)).float()
            exclude = question.seen.to(context.device) if evaluation.filter_seen else None
            if shared:
                ids = _search_shares(q_BD, v_ND, k, exclude, share, context)
            else:
                ids, _ = top_k(q_BD, v_ND, k, exclude)
            if not real:
                continue
            targets = question.targets
            has_history = (question.seen.lengths() > 0).numpy()
            count = ranking.num_distinct(targets.values.numpy(), targets.offsets.numpy())
            hit = ranking.hits(ids.cpu().numpy(), targets.values.numpy(), targets.offsets.numpy())
            values = ranking.per_user(hit, count, [k], {name: wanted})[metric][has_history]
            total += torch.tensor([values.sum(), len(values)], dtype=torch.float64)
    model.train()  # type: ignore[attr-defined]
    total = context.sum(total)
    return float(total[0] / total[1].clamp(min=1))


@torch.inference_mode()
def validate_clicks(
    model: nn.Module,
    dataset: PreparedDataset,
    context: Context,
    metric: str,
    history_length: int,
    plugins: str | None = None,
) -> float:
    """`metric` of every impression of the validation split, exact: all workers' scores are brought together."""
    assert isinstance(model, Ranker)
    model.eval()  # type: ignore[attr-defined]
    scored = [torch.zeros(0, 4, dtype=torch.float64)]
    for table in dataset.iter_tables("valid"):
        mine = table.take(pa.array(range(context.rank, len(table), context.world_size)))
        found = impressions(mine, _IMPRESSIONS, history_length) if len(mine) else iter(())
        spare = impressions(table, 1, history_length)
        for batch, real in _in_step(found, spare, context, _exchanges(model, context)):
            assert batch.label_Q is not None and batch.weight_Q is not None
            logit_B = model.logits(batch.to(context.device)).double().cpu()
            if not real:
                continue
            columns = (batch.user_B.double(), logit_B, batch.label_Q.double(), batch.weight_Q.double())
            scored.append(torch.stack(columns, dim=1))
    model.train()  # type: ignore[attr-defined]
    gathered = context.all_gather(torch.cat(scored).to(context.device))
    user, logit, label, weight = np.asarray(gathered.cpu()).T
    wanted = metrics.find(metric, plugins)
    assert isinstance(wanted, metrics.ClickMetric)
    value = Clicks(user, logit, label, weight).metrics(metrics={metric: wanted})[metric]
    if not np.isfinite(value):
        raise DataError(
            f"{metric} needs clicks and non-clicks, and the validation split has {int((label > 0).sum()):,} clicks in "
            f"{len(label):,} impressions{' and no user with both' if metric.startswith('gauc') else ''}: "
            f"set training.metric = 'log_loss', or check data.columns.label and data.split"
        )
    return value


def _exchanges(model: nn.Module, context: Context) -> bool:
    """Whether a forward fetches rows from other workers, so that all must take as many."""
    return context.world_size > 1 and bool(embedding.sharded(model))


def _in_step(mine: Iterator[_T], spare: Iterator[_T], context: Context, shared: bool) -> Iterator[tuple[_T, bool]]:
    """What this worker has; where workers exchange rows, with the spare one (False) until none has any more."""
    filler: _T | None = None
    while True:
        one = next(mine, None)
        there = one is not None
        if not (context.sum(torch.tensor([float(there)])) if shared else there):
            return
        if one is not None:
            yield one, True
            continue
        filler = next(spare) if filler is None else filler
        yield filler, False


def _item_vectors(model: nn.Module, num_items: int, share: tuple[int, int], context: Context) -> Tensor:
    """(N, D) of a worker's share of items, in as many parts on every worker."""
    first, step = share
    mine = torch.arange(first, num_items, step, device=context.device)
    most = len(range(0, num_items, step))
    parts = [model.item_vectors(mine[at : at + _ITEMS]).float() for at in range(0, most, _ITEMS)]  # type: ignore[operator]
    return torch.cat(parts)


def _search_shares(
    q_BD: Tensor, v_ND: Tensor, k: int, exclude: Jagged | None, share: tuple[int, int], context: Context
) -> Tensor:
    """(B, k) ids: every worker searches its share for the queries of all, and each merges what was found for its own."""
    sizes = context.all_gather(torch.tensor([len(q_BD)], device=context.device)).tolist()
    seen = None
    if exclude is not None:
        lengths = context.all_gather(exclude.lengths())
        seen = Jagged(context.all_gather(exclude.values), torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]))
    ids, scores = top_k(context.all_gather(q_BD), v_ND, k, seen, share)
    begin = sum(sizes[: context.rank])
    own = slice(begin, begin + len(q_BD))
    found = [context.all_gather(x[None])[:, own].transpose(0, 1).flatten(1) for x in (ids, scores)]
    return merge(found[0], found[1], k)[0]
