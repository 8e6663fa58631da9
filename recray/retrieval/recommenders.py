"""The recommenders of a run, and the one place that assembles them.

Each stage takes what the stage before it finds and orders it again:

    exact search ("model")  or  index  ->  blended with the item-item baseline, or ordered by recent counts, too  ->  reranked

The last stage that is configured is what a run recommends with (`Recommenders.final`). Baselines are in
recray.retrieval.baselines, the blend is in recray.retrieval.blend.

Shape legend: B queries, C candidates, N items, D width, K places.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import Tensor

from recray.artifacts import CHECKPOINT, INDEX, Artifact, Run, in_use
from recray.config import Config, RetrievalLossOptions
from recray.config.baselines import ItemKNNOptions
from recray.data.dataset import PreparedDataset
from recray.data.split import before
from recray.errors import ConfigError
from recray.ids import FIRST_ITEM, PAD, SPLITS, UNKNOWN
from recray.loading.batch import Batch, select
from recray.loading.collate import EvalQuery
from recray.loading.jagged import Jagged
from recray.models import Ranker, Retriever
from recray.records import CheckpointRecord, DatasetRecord, IndexRecord
from recray.retrieval import Recommender, embed
from recray.retrieval.baselines.item_knn import ItemKNN
from recray.retrieval.blend import Blended, check_blend
from recray.retrieval.events import Steps
from recray.retrieval.exact import ExactSearch, query_vectors
from recray.retrieval.faiss_index import ItemIndex
from recray.retrieval.recency import WithRecency, check_recency, open_recency
from recray.retrieval.recent_counts import RecentCounts
from recray.training import checkpoint

_ROWS = 8192  # candidates that a ranker scores at a time


@dataclass(frozen=True)
class IndexSearch:
    """Answers from the index, which may miss some of what exact search finds."""

    model: Retriever
    index: ItemIndex

    def recommend(self, query: EvalQuery, k: int, exclude_seen: bool) -> tuple[np.ndarray, np.ndarray]:
        exclude = (query.seen.values.numpy(), query.seen.offsets.numpy()) if exclude_seen else None
        return self.index.search(query_vectors(self.model, query).numpy(), k, exclude)


@dataclass(frozen=True)
class Reranked:
    """The first `candidates` items of another recommender in the order of a ranker; scores are the ranker's logits."""

    search: Recommender
    ranker: Ranker
    candidates: int
    history_length: int  # of the ranker
    # What the ranker was trained on: it may know fewer items than `search`, or more. None if it sees to that itself.
    known: DatasetRecord | None
    # Score the candidates of a query together if the ranker can: less work on a CPU, and other roundings.
    together: bool = False

    @torch.inference_mode()
    def recommend(self, query: EvalQuery, k: int, exclude_seen: bool) -> tuple[np.ndarray, np.ndarray]:
        found = torch.from_numpy(self.search.recommend(query, self.candidates, exclude_seen)[0])
        history = query.seen.last(self.history_length)
        scores_BC = self._together(query.batch, history, found) if self.together else None
        if scores_BC is None:
            scores_BC = torch.full(found.shape, -torch.inf)
            row, place = (found >= FIRST_ITEM).nonzero(as_tuple=True)
            for at in range(0, len(row), _ROWS):
                part = slice(at, at + _ROWS)
                batch = _candidates(query.batch, history, row[part], found[row[part], place[part]], self.known)
                scores_BC[row[part], place[part]] = self.ranker.logits(batch).float()
        best, order = scores_BC.sort(dim=1, descending=True, stable=True)
        best, order = best[:, :k], order[:, :k]
        ids = torch.where(best == -torch.inf, PAD, found.gather(1, order))
        short = (0, k - ids.shape[1])
        return F.pad(ids, short, value=PAD).numpy(), F.pad(best, short, value=-torch.inf).numpy()

    def _together(self, batch: Batch, history: Jagged, found_BC: Tensor) -> Tensor | None:
        rows = torch.arange(len(found_BC))
        queries = _candidates(batch, history, rows, rows, self.known)  # rows in place of items, which follow
        items_BC = found_BC if self.known is None else _clamped(found_BC, self.known.num_items)
        scores_BC = self.ranker.candidate_logits(replace(queries, target_Q=None), items_BC)
        return None if scores_BC is None else scores_BC.float().masked_fill(found_BC < FIRST_ITEM, -torch.inf)


def _candidates(batch: Batch, history: Jagged, rows: Tensor, items: Tensor, known: DatasetRecord | None) -> Batch:
    """One row per candidate: the row of its query, repeated, and the item; UNKNOWN in place of what is not `known`."""
    history, context = history.take(rows), {name: select(feature, rows) for name, feature in batch.context.items()}
    for one in known.features if known is not None else ():
        if one.role == "context" and one.kind != "numeric":
            ids = context[one.name]
            context[one.name] = (
                Jagged(_clamped(ids.values, one.cardinality), ids.offsets)
                if isinstance(ids, Jagged)
                else _clamped(ids, one.cardinality)
            )
    if known is not None:
        history, items = (
            history.with_values(_clamped(history.values, known.num_items)),
            _clamped(items, known.num_items),
        )
    return Batch(
        user_B=batch.user_B[rows],
        history=history,
        target_Q=items,
        user_features={name: select(feature, rows) for name, feature in batch.user_features.items()},
        context=context,
    )


def _clamped(ids: Tensor, size: int) -> Tensor:
    return torch.where(ids < size, ids, UNKNOWN)


@dataclass(frozen=True)
class RunArtifacts:
    """The artefacts that a run recommends with. Found once, then passed to worker processes."""

    dataset: PreparedDataset
    checkpoint: Artifact[CheckpointRecord]
    index: Artifact[IndexRecord] | None
    ranker: Artifact[CheckpointRecord] | None

    @staticmethod
    def of(run: Run) -> RunArtifacts:
        """Raises LineageError if the checkpoint does not exist, or if the ranker was trained on another dataset; ConfigError
        if `retrieval.ranker` is the run of a retriever."""
        source = run.checkpoint()
        dataset = PreparedDataset.of(run).known_to(source.record)
        return RunArtifacts(dataset, source, run.index(), _ranker(run.config, dataset))

    @staticmethod
    def of_checkpoint(run: Run, source: Artifact[CheckpointRecord]) -> RunArtifacts:
        """Those of a checkpoint of the run, which may be an older one, with the dataset that it was trained on.

        Raises as `of`.
        """
        found = run.dataset_of(source.record)
        dataset = PreparedDataset.at(found).known_to(source.record)
        index = run.artifact(INDEX, [source.record.id, dataset.record.id])
        return RunArtifacts(dataset, source, index if index.complete() else None, _ranker(run.config, dataset))

    @property
    def models(self) -> list[CheckpointRecord]:
        return [one.record for one in (self.checkpoint, self.ranker) if one is not None]

    @property
    def inputs(self) -> list[str]:
        """Ids of the records that recommendations depend on."""
        optional = [one.record.id for one in (self.index, self.ranker) if one is not None]
        return [self.checkpoint.record.id, self.dataset.record.id, *optional]


def _ranker(config: Config, dataset: PreparedDataset) -> Artifact[CheckpointRecord] | None:
    if config.retrieval.ranker is None:
        return None
    found = in_use(config.retrieval.ranker, CHECKPOINT)
    # Its item ids mean other items if it was trained on another dataset.
    model = Config.model_validate(checkpoint.record_of(found.uri, dataset).config).model
    if model.family != "ranker":
        raise ConfigError(
            f"retrieval.ranker = '{config.retrieval.ranker}' holds '{model.name}', which is a {model.family}: name the run "
            f"of a ranker (din, dlrm, dcn_v2, wide_deep)"
        )
    return found


@dataclass(frozen=True)
class Recommenders:
    """The stages of a run's recommendations that are configured."""

    exact: ExactSearch | None
    index: IndexSearch | ExactSearch | None
    blended: Blended | None = None
    recency: WithRecency | None = None
    reranked: Reranked | None = None

    def by_name(self) -> dict[str, Recommender]:
        """Name in a report -> recommender, in order of the stages."""
        stages = (
            ("model", self.exact),
            ("index", self.index),
            ("blended", self.blended),
            ("recency", self.recency),
            ("reranked", self.reranked),
        )
        return {name: stage for name, stage in stages if stage is not None}

    @property
    def final(self) -> Recommender:
        """What the run recommends with."""
        return list(self.by_name().values())[-1]


def open_recommenders(
    artifacts: RunArtifacts,
    config: Config,
    splits: Sequence[str],
    always_exact: bool = False,
    steps: Steps | None = None,
) -> Recommenders:
    """Load the model, the index and the ranker of a run. The item-item baseline is built from the events of `splits`.

    steps: events that retrieval.recency counts, each query those before it; without them those of the split after `splits`, and
    after all splits those of the index.
    always_exact: exact search even if there is an index, which without a blend needs no item vectors in memory.
    """
    options, dataset = config.retrieval, artifacts.dataset
    check_blend(config, dataset, splits)
    check_recency(config, dataset)
    model, _ = checkpoint.load_model(artifacts.checkpoint.uri)
    assert isinstance(model, Retriever)
    exact: ExactSearch | None = None
    index: IndexSearch | ExactSearch | None = None
    flat = artifacts.index is not None and artifacts.index.record.factory == "Flat"
    if always_exact or flat or artifacts.index is None or options.item_knn_weight or options.recency.enabled:
        exact = ExactSearch(model, torch.from_numpy(_item_vectors(artifacts, model)))
    if artifacts.index is not None:
        # faiss's Flat is exact search, too, at a third of the speed.
        index = exact if flat else IndexSearch(model, ItemIndex.open(artifacts.index.uri))
    found = Recommenders(exact, index)
    if options.item_knn_weight:
        assert exact is not None and isinstance(config.loss, RetrievalLossOptions)
        kept = config.evaluation.baseline_options.get("item_knn") or ItemKNNOptions()
        assert isinstance(kept, ItemKNNOptions)
        item_knn, weight = ItemKNN(dataset, splits, kept.neighbours), options.item_knn_weight
        blended = Blended(found.final, exact, item_knn, weight, config.loss.temperature, options.k)
        found = replace(found, blended=blended)
    if options.recency.enabled:
        assert exact is not None
        asked = next((one for one in SPLITS if before(one) == tuple(splits)), None)
        if steps is None and asked is not None:
            steps = RecentCounts.steps_of(options.recency, dataset, (*splits, asked))
        found = replace(found, recency=open_recency(config, artifacts.index, found.final, exact, steps))
    if artifacts.ranker is not None:
        ranker, record = checkpoint.load_model(artifacts.ranker.uri)
        assert isinstance(ranker, Ranker)
        history_length = int(record.config["model"]["history_length"])
        known = DatasetRecord.read(artifacts.ranker.uri, copy=True)
        found = replace(found, reranked=Reranked(found.final, ranker, options.k, history_length, known))
    return found


def _item_vectors(artifacts: RunArtifacts, model: Retriever) -> np.ndarray:
    """(N, D) vectors of all items: those that the index stage wrote, or computed."""
    num_items = artifacts.dataset.record.num_items
    if artifacts.index is not None:
        digest = artifacts.index.record.files.get("vectors.parquet")
        return embed.load_vectors(artifacts.index.uri, num_items, digest)
    return embed.item_vectors(artifacts.checkpoint, model, num_items)


def list_table(
    users: pa.Array,
    ids_BK: np.ndarray,
    scores_BK: np.ndarray | None,
    items: pa.Array,
    unscored_B: np.ndarray | None = None,
) -> pa.Table:
    """Lists of B users as rows user, item, rank (from 1), score: one row for each place that is filled.

    items: (N,) keys by id. unscored_B: rows whose scores are null; all of them without scores_BK.
    """
    row, place = np.nonzero(ids_BK >= FIRST_ITEM)
    scores = np.zeros(len(row), np.float32) if scores_BK is None else scores_BK[row, place].astype(np.float32)
    if unscored_B is None:
        unscored_B = np.full(len(ids_BK), scores_BK is None)
    return pa.table(
        {
            "user": users.take(pa.array(row)),
            "item": items.take(pa.array(ids_BK[row, place])),
            "rank": pa.array((place + 1).astype(np.int32)),
            "score": pa.array(scores, mask=unscored_B[row]),
        }
    )
