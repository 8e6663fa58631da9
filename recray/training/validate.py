"""The validation metric, over all workers: of full ranking for retrievers, of clicks for rankers.

Each worker takes every world_size-th user of each validation shard: worker 1 of 2 takes users 1, 3, 5, ... A forward of a
model with sharded tables exchanges rows, so that a worker that runs out of users repeats a spare one, which is not
counted, until all have run out.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from recray import metrics, progress
from recray.config import Config
from recray.data.dataset import PreparedDataset
from recray.errors import RecrayError
from recray.layers import embedding
from recray.loading.batch import Batch, Jagged
from recray.loading.collate import EvalQuery, eval_queries, impressions
from recray.loading.drawn import drawn_rows
from recray.metrics import ranking
from recray.metrics.clicks import Clicks
from recray.models import Ranker, Retriever
from recray.retrieval.exact import merge, top_k
from recray.training import optim
from recray.training.check import undefined
from recray.training.distributed import Context

_QUERIES_ON_CPU = 128  # at a time; few, so that a transformer's activations stay in cache
_QUERIES = 512
_IMPRESSIONS = 8192
_ITEMS = 65_536  # vectors computed at a time

_T = TypeVar("_T")


@torch.inference_mode()
def validate(model: Retriever | Ranker, dataset: PreparedDataset, context: Context, config: Config) -> float:
    """config.training.metric on the validation split, over all workers; the same number on each of them.

    Raises RecrayError if scores are not finite, DataError if the split cannot tell a click metric.
    """
    model.eval()
    try:
        if isinstance(model, Ranker):
            return _validate_clicks(model, dataset, context, config)
        return _validate_lists(model, dataset, context, config)
    finally:
        model.train()


def _validate_lists(model: Retriever, dataset: PreparedDataset, context: Context, config: Config) -> float:
    """Mean of the metric ('ndcg@10') over queries of users with a history, by exact search over the catalogue."""
    metric, options, exchanges = config.training.metric, config.evaluation, _exchanges(model, context)
    name, k = metrics.parse(metric)
    wanted = metrics.find(name, config.run.plugins)
    assert isinstance(wanted, metrics.ListMetric) and k is not None
    # With sharded tables each worker scores the items whose rows it holds, for the queries of all workers.
    share = (context.rank, context.world_size) if exchanges else (0, 1)
    v_ND = _item_vectors(model, dataset.record.num_items, share, context)
    bad = ~v_ND.isfinite().all()
    total = torch.zeros(3, dtype=torch.float64)  # of metric, queries, vectors that are not finite
    for query, real in _queries(dataset, context, config, exchanges):
        q_BD = model.query_vectors(query.batch.to(context.device)).float()
        bad |= ~q_BD.isfinite().all()
        seen = query.seen.to(context.device) if options.filter_seen else None
        if exchanges:
            ids = _search_shares(q_BD, v_ND, k, seen, context)
        else:
            ids, _ = top_k(q_BD, v_ND, k, seen)
        if real:
            total[:2] += _sum_of_metric(query, ids.cpu().numpy(), wanted)
    total[2] = float(bad)
    value, queries, not_finite = map(float, context.sum(total))
    _check_scores(not_finite, config, context)
    return value / max(queries, 1.0)  # check_validation has seen a query


def _queries(
    dataset: PreparedDataset, context: Context, config: Config, exchanges: bool
) -> Iterator[tuple[EvalQuery, bool]]:
    """This worker's validation queries; False marks one that only keeps the workers in step."""
    size = _QUERIES_ON_CPU if context.device.type == "cpu" else _QUERIES
    length, kind = config.model.history_length, config.evaluation.queries
    drawn = drawn_rows(dataset.record.shards["valid"], config.training.max_valid_queries, kind, config.run.seed)
    for number, whole in enumerate(_tables(dataset, context)):
        table = whole if drawn is None else whole.take(pa.array(drawn[number]))
        mine = _own_rows(table, context)
        found = eval_queries(mine, size, length, kind) if len(mine) else iter(())
        yield from _in_step(found, eval_queries(table, 1, length, kind), context, exchanges)


def _sum_of_metric(query: EvalQuery, ids: np.ndarray, metric: metrics.ListMetric) -> Tensor:
    """(2,) float64: sum of the metric over queries with a history, and their number."""
    items, offsets = query.targets.values.numpy(), query.targets.offsets.numpy()
    hits, counts = ranking.hits(ids, items, offsets), ranking.num_distinct(items, offsets)
    values = metric.compute(hits, counts)[(query.seen.lengths() > 0).numpy()]
    return torch.tensor([values.sum(), len(values)], dtype=torch.float64)


def _validate_clicks(model: Ranker, dataset: PreparedDataset, context: Context, config: Config) -> float:
    """The metric over all impressions. It is no mean over batches (AUC), so all workers gather all scores."""
    metric, exchanges = config.training.metric, _exchanges(model, context)
    scored = [torch.zeros(0, 4, dtype=torch.float64)]
    for batch, real in _impressions(dataset, context, config, exchanges):
        assert batch.label_Q is not None and batch.weight_Q is not None
        logit_B = model.logits(batch.to(context.device)).double().cpu()
        if real:
            columns = (batch.user_B.double(), logit_B, batch.label_Q.double(), batch.weight_Q.double())
            scored.append(torch.stack(columns, dim=1))
    gathered = context.all_gather(torch.cat(scored).to(context.device))
    user, logit, label, weight = np.asarray(gathered.cpu()).T
    _check_scores(float((~np.isfinite(logit)).sum()), config, context)
    wanted = metrics.find(metric, config.run.plugins)
    assert isinstance(wanted, metrics.ClickMetric)
    value = Clicks(user, logit, label, weight).metrics(metrics={metric: wanted})[metric]
    if not np.isfinite(value):
        raise undefined(metric, int((label > 0).sum()), len(label))
    return float(value)  # a numpy scalar could not be read from state.pt


def _impressions(
    dataset: PreparedDataset, context: Context, config: Config, exchanges: bool
) -> Iterator[tuple[Batch, bool]]:
    """This worker's validation impressions; False marks one that only keeps the workers in step."""
    length = config.model.history_length
    for table in _tables(dataset, context):
        mine = _own_rows(table, context)
        found = impressions(mine, _IMPRESSIONS, length) if len(mine) else iter(())
        yield from _in_step(found, impressions(table, 1, length), context, exchanges)


def _tables(dataset: PreparedDataset, context: Context) -> Iterator[pa.Table]:
    shards = len(dataset.record.shards["valid"])
    return progress.track(dataset.iter_tables("valid"), "train", "validate", shards, enabled=context.rank == 0)


def _own_rows(table: pa.Table, context: Context) -> pa.Table:
    """Every world_size-th user of a shard, from `rank` on; none where there are fewer users than workers."""
    rows = np.arange(context.rank, len(table), context.world_size, dtype=np.int64)
    return table.take(pa.array(rows))  # a typed array: Arrow cannot take by an empty one of type null


def _check_scores(not_finite: float, config: Config, context: Context) -> None:
    if not_finite:
        raise RecrayError(
            f"the model gives validation scores that are not finite, so {config.training.metric} means nothing, and the "
            f"epoch is not saved: {optim.steadier(config, context.device)}"
        )


def _exchanges(model: nn.Module, context: Context) -> bool:
    """Whether a forward fetches rows from other workers, so that all must run equally many."""
    return context.world_size > 1 and embedding.waits_in_forward(model)


def _in_step(mine: Iterator[_T], spare: Iterator[_T], context: Context, exchanges: bool) -> Iterator[tuple[_T, bool]]:
    """This worker's entries, marked True. If forwards exchange rows, the first spare one, marked False, fills in until
    every worker has run out."""
    filler: _T | None = None
    while True:
        entry = next(mine, None)
        found = entry is not None
        if not (context.sum(torch.tensor([float(found)])) if exchanges else found):
            return
        if entry is not None:
            yield entry, True
            continue
        filler = next(spare) if filler is None else filler
        yield filler, False


def _item_vectors(model: Retriever, num_items: int, share: tuple[int, int], context: Context) -> Tensor:
    """(N, D) of items first, first + step, ...; in equally many calls on every worker, since a call may exchange rows."""
    first, step = share
    mine = torch.arange(first, num_items, step, device=context.device)
    most = len(range(0, num_items, step))
    return torch.cat([model.item_vectors(mine[at : at + _ITEMS]).float() for at in range(0, most, _ITEMS)])


def _search_shares(q_BD: Tensor, v_ND: Tensor, k: int, seen: Jagged | None, context: Context) -> Tensor:
    """(B, k) ids. Every worker searches its items for the queries of all, then each merges the results for its queries."""
    sizes = context.all_gather(torch.tensor([len(q_BD)], device=context.device)).tolist()
    excluded = None
    if seen is not None:
        lengths = context.all_gather(seen.lengths())
        excluded = Jagged.from_lengths(context.all_gather(seen.values), lengths)
    share = (context.rank, context.world_size)
    ids, scores = top_k(context.all_gather(q_BD), v_ND, k, excluded, share)
    begin = sum(sizes[: context.rank])
    own = slice(begin, begin + len(q_BD))
    found = [context.all_gather(x[None])[:, own].transpose(0, 1).flatten(1) for x in (ids, scores)]
    return merge(found[0], found[1], k)[0]
