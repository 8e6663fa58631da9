"""The metric that steers training: full ranking on the validation split, reduced over all workers."""

from __future__ import annotations

import pyarrow as pa
import torch
from torch import nn

from recray.batches import questions
from recray.config import EvaluationConfig
from recray.data.prepared import PreparedDataset
from recray.metrics import ranked
from recray.models import Retriever
from recray.models.scoring import top_k
from recray.training.context import Context

_QUERIES = 512


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
