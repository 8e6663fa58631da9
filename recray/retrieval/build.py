"""The index stage: item vectors of a checkpoint to a searchable index with a measured recall.

index.faiss       the index, row i = item id i
ids.parquet       original item keys by item id
vectors.parquet   the vectors, which evaluation and the blend score with
recent.parquet    with retrieval.recency: the events at the end of the log
index.json        IndexRecord, written last
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from recray import digests, log, progress, storage
from recray.artifacts import Artifact, Run
from recray.cluster.stage_task import on_cluster
from recray.config import Config
from recray.data.dataset import PreparedDataset
from recray.errors import ConfigError
from recray.ids import NUM_RESERVED
from recray.models import Retriever
from recray.records import CheckpointRecord, IndexRecord, SweepPoint
from recray.retrieval import embed, faiss_index, recency
from recray.retrieval.recall_sweep import sweep
from recray.training import checkpoint

FILES = ("index.faiss", "ids.parquet", "vectors.parquet")


def index(config: Config) -> IndexRecord:
    """Index the item vectors of the run's checkpoint. Raises ConfigError for a ranker, which has no vectors."""
    if config.model.family == "ranker":
        raise ConfigError(
            f"model.name = '{config.model.name}' is a ranker and has no item vectors to index: index a retriever "
            f"(two_tower, sasrec), and let the ranker reorder what it finds (retrieval.ranker)"
        )
    faiss_index.check(config.retrieval.index)
    return on_cluster("index", config.scaling, _index, config)


def _index(config: Config) -> IndexRecord:
    started, run = time.perf_counter(), Run(config)
    source, artifact = run.checkpoint(), run.index_artifact()
    with run.making(artifact) as needed:
        return _build(run, source, artifact, started) if needed else artifact.record


def _build(
    run: Run, source: Artifact[CheckpointRecord], artifact: Artifact[IndexRecord], started: float
) -> IndexRecord:
    config = run.config
    dataset, options = PreparedDataset.of(run).known_to(source.record), config.retrieval
    recency.check_recency(config, dataset)
    model, _ = checkpoint.load_model(source.uri)
    assert isinstance(model, Retriever)
    scaling = config.scaling if config.scaling.num_workers > 0 else None
    vectors_ND = embed.item_vectors(source, model, dataset.record.num_items, scaling)
    factory = faiss_index.choose(len(vectors_ND)) if options.index == "auto" else options.index
    building = time.perf_counter()
    try:
        with progress.task("index", f"build {factory}"):
            built, device = faiss_index.build(vectors_ND, factory, options.use_gpu)
    except ConfigError:
        run.discard(artifact)  # no half-written index stays; the one in use is another folder
        raise
    building = time.perf_counter() - building
    queries_QD = embed.sample_queries(model, dataset, config)
    recent, fitted = options.recency.enabled, None
    if recent:
        fitted = recency.fit(source, model, vectors_ND, dataset, config)
        recency.save_steps(artifact.uri, dataset, config)
    chosen, recall, curve = sweep(built, vectors_ND, queries_QD, options.k, options.recall_target)
    size = _write(artifact, dataset, built, vectors_ND)
    record = IndexRecord(
        **artifact.lineage,
        config=config.model_dump(mode="json"),
        factory=factory,
        dim=vectors_ND.shape[1],
        num_items=len(vectors_ND),
        k=options.k,
        setting=chosen.setting,
        recall=recall,
        recall_target=options.recall_target,
        device=device,
        build_seconds=building,
        bytes=size,
        curve=curve,
        recency=fitted,
        dataset_uri=dataset.uri,
        checkpoint_uri=source.uri,
        files=digests.of_files(artifact.uri, (*FILES, recency.FILE) if recent else FILES),
        seconds=time.perf_counter() - started,
    ).write(artifact.uri)
    run.publish(artifact)
    _report(record, chosen)
    return record


def _write(artifact: Artifact[IndexRecord], dataset: PreparedDataset, built: Any, vectors_ND: np.ndarray) -> int:
    """Write the files of the index; returns the bytes of the faiss index."""
    data = faiss_index.serialize(built)
    storage.write_bytes(storage.join(artifact.uri, "index.faiss"), data)
    storage.write_table(storage.join(artifact.uri, "ids.parquet"), dataset.items().select(["item"]))
    embed.save_vectors(artifact.uri, vectors_ND)
    return len(data)


def _report(record: IndexRecord, chosen: SweepPoint) -> None:
    log.info(
        "index",
        f"{record.factory} over {record.num_items - NUM_RESERVED:,} items on {record.device}, "
        f"{chosen.setting or 'exact'}: recall@{record.k} {record.recall:.4f}, {chosen.milliseconds:.3f} ms/query, "
        f"{record.bytes / 2**20:.1f} MB",
        event="built",
        values={
            "factory": record.factory,
            "recall": record.recall,
            "milliseconds": chosen.milliseconds,
            "bytes": record.bytes,
        },
    )
    if record.recall < record.recall_target:
        log.warning(
            "index",
            f"recall@{record.k} {record.recall:.4f} is below retrieval.recall_target = {record.recall_target}: "
            f"try retrieval.index = 'HNSW32' or 'Flat'",
        )
