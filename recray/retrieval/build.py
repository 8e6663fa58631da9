"""The index stage: vectors of a checkpoint to a searchable bundle with a measured recall.

index.faiss       the index, row i = item id i
ids.parquet       original item keys by item id
vectors.parquet   the vectors, for exact search
index.json        IndexRecord, written last
"""

from __future__ import annotations

import time

from recray import log, storage
from recray.artifacts import Run
from recray.cluster import runtime
from recray.config import Config
from recray.data.dataset import PreparedDataset
from recray.errors import ConfigError
from recray.records import IndexRecord
from recray.retrieval import embed, faiss_index
from recray.retrieval.recall_sweep import sweep
from recray.training import checkpoint


def index(config: Config) -> IndexRecord:
    """Index the item vectors of the run's checkpoint. Raises ConfigError for a ranker, which has no vectors."""
    started = time.perf_counter()
    if config.model.family == "ranker":
        raise ConfigError(
            f"model.name = '{config.model.name}' is a ranker and has no item vectors to index: index a retriever "
            f"(two_tower, sasrec), and let the ranker order what it finds (retrieval.ranker)"
        )
    run = Run(config)
    source, artifact = run.checkpoint(), run.index_artifact()
    if not run.begin(artifact):
        return artifact.record
    dataset, target = PreparedDataset.of(run), artifact.uri
    model, _ = checkpoint.load_model(source.uri)
    parallel = config.scaling.num_workers > 0
    if parallel and dataset.record.num_items >= embed._PARALLEL_ABOVE:
        runtime.start(config.scaling)
    vectors = embed.item_vectors(source.uri, dataset.record.num_items, parallel)
    options = config.retrieval
    factory = faiss_index.choose(len(vectors)) if options.index == "auto" else options.index
    building = time.perf_counter()
    built, device = faiss_index.build(vectors, factory, options.use_gpu)
    building = time.perf_counter() - building
    queries = embed.sample_queries(
        model,
        dataset,
        config.model.history_length,
        config.evaluation.queries,
        options.sweep_users,
        config.run.seed,
    )
    chosen, recall, curve = sweep(built, vectors, queries, options.k, options.recall_target)
    data = faiss_index.serialize(built)
    storage.write_bytes(storage.join(target, "index.faiss"), data)
    storage.write_table(storage.join(target, "ids.parquet"), dataset.items().select(["item"]))
    embed.save_vectors(target, vectors)
    made = IndexRecord(
        **artifact.lineage,
        config=config.model_dump(mode="json"),
        factory=factory,
        dim=vectors.shape[1],
        num_items=len(vectors),
        k=options.k,
        setting=chosen.setting,
        recall=recall,
        recall_target=options.recall_target,
        device=device,
        build_seconds=building,
        bytes=len(data),
        curve=curve,
        dataset_uri=dataset.uri,
        checkpoint_uri=source.uri,
        seconds=time.perf_counter() - started,
    ).write(target)
    run.publish(artifact)
    note = (
        ""
        if recall >= options.recall_target
        else f"  BELOW the target {options.recall_target}: try retrieval.index = 'HNSW32' or 'Flat'"
    )
    log.info(
        "index",
        f"{factory} over {len(vectors) - 2:,} items on {device}, {chosen.setting or 'exact'}: recall@{options.k} {recall:.4f}, "
        f"{chosen.milliseconds:.3f} ms/query, {len(data) / 2**20:.1f} MB{note}",
        event="built",
        values={"factory": factory, "recall": recall, "milliseconds": chosen.milliseconds, "bytes": len(data)},
    )
    return made
