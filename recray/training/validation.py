"""The metric that steers training, on the validation split and over all workers: full ranking, or of clicks."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import torch
from torch import nn

from recray.batches import impressions, questions
from recray.config import EvaluationConfig
from recray.data.prepared import PreparedDataset
from recray.errors import DataError
from recray.metrics import ranked
from recray.metrics.clicks import Clicks
from recray.models import Ranker, Retriever
from recray.models.scoring import top_k
from recray.training.context import Context

_QUERIES = 512
_IMPRESSIONS = 8192


@torch.inference_mode()
def validate(
    model: nn.Module,
    dataset: PreparedDataset,
    context: Context,
    metric: str,
    history_length: int,
    evaluation: EvaluationConfig,
) -> float:
    """Mean of `metric` ('ndcg@10') over queries of the validation split whose user has a history."""
    assert isinstance(model, Retriever)
    name, _, k = metric.partition("@")
    model.eval()  # type: ignore[attr-defined]
    v_ND = model.item_vectors(torch.arange(dataset.record.num_items, device=context.device)).float()
    total = torch.zeros(2, dtype=torch.float64)
    for table in dataset.iter_tables("valid"):
        # Worker r takes every world_size-th row of every shard.
        mine = table.take(pa.array(range(context.rank, len(table), context.world_size)))
        for question in questions(mine, _QUERIES, history_length, evaluation.queries) if len(mine) else ():
            q_BD = model.query_vectors(question.batch.to(context.device)).float()
            exclude = question.seen.to(context.device) if evaluation.filter_seen else None
            ids, _ = top_k(q_BD, v_ND, int(k), exclude)
            targets = question.targets
            has_history = (question.seen.lengths() > 0).numpy()
            count = ranked.num_distinct(targets.values.numpy(), targets.offsets.numpy())
            hit = ranked.hits(ids.cpu().numpy(), targets.values.numpy(), targets.offsets.numpy())
            values = ranked.per_user(hit, count, [int(k)], [name])[metric][has_history]
            total += torch.tensor([values.sum(), len(values)], dtype=torch.float64)
    model.train()  # type: ignore[attr-defined]
    total = context.sum(total)
    return float(total[0] / total[1].clamp(min=1))


@torch.inference_mode()
def validate_clicks(
    model: nn.Module, dataset: PreparedDataset, context: Context, metric: str, history_length: int
) -> float:
    """`metric` of every impression of the validation split, exact: all workers' scores are brought together."""
    assert isinstance(model, Ranker)
    model.eval()  # type: ignore[attr-defined]
    scored = [torch.zeros(0, 4, dtype=torch.float64)]
    for table in dataset.iter_tables("valid"):
        mine = table.take(pa.array(range(context.rank, len(table), context.world_size)))
        for batch in impressions(mine, _IMPRESSIONS, history_length) if len(mine) else ():
            assert batch.label_Q is not None and batch.weight_Q is not None
            logit_B = model.logits(batch.to(context.device)).double().cpu()
            columns = (batch.user_B.double(), logit_B, batch.label_Q.double(), batch.weight_Q.double())
            scored.append(torch.stack(columns, dim=1))
    model.train()  # type: ignore[attr-defined]
    gathered = context.all_gather(torch.cat(scored).to(context.device))
    user, logit, label, weight = np.asarray(gathered.cpu()).T
    value = Clicks(user, logit, label, weight).metrics()[metric]
    if not np.isfinite(value):
        raise DataError(
            f"{metric} needs clicks and non-clicks, and the validation split has {int((label > 0).sum()):,} clicks in "
            f"{len(label):,} impressions{' and no user with both' if metric.startswith('gauc') else ''}: "
            f"set training.metric = 'log_loss', or check data.columns.label and data.split"
        )
    return value
