"""The index stage: vectors of a checkpoint to a searchable bundle with a measured recall.

index.faiss       the index, row i = item id i
ids.parquet       original item keys by item id
vectors.parquet   the vectors, for exact search
index.json        IndexRecord, written last
"""

from __future__ import annotations

import time
from typing import Any

from recray import storage
from recray.cluster import runtime
from recray.config import Config
from recray.data.dataset import PreparedDataset
from recray.errors import ConfigError, LineageError
from recray.records import CheckpointRecord, IndexRecord
from recray.retrieval import embed, faiss_index
from recray.retrieval.recall_sweep import sweep
from recray.training import checkpoint


def index(config: Config) -> IndexRecord:
    """Index the vectors of <run>/checkpoint into <run>/index. Raises ConfigError for a ranker, which has no vectors."""
    started = time.perf_counter()
    if config.model.family == "ranker":
        raise ConfigError(
            f"model.name = '{config.model.name}' is a ranker and has no item vectors to index: index a retriever "
            f"(two_tower, sasrec), and let the ranker order what it finds (retrieval.ranker)"
        )
    source, target = storage.join(config.run_uri, "checkpoint"), storage.join(config.run_uri, "index")
    dataset = PreparedDataset.open(config.dataset_uri)
    record = checkpoint.record_of(source, dataset)
    model, _ = checkpoint.load_model(source)
    if storage.exists(storage.join(target, "index.json")):
        old = IndexRecord.read(target)
        same = _of_index(old.config) == _of_index(config.model_dump(mode="json"))
        if old.parents == [record.id, dataset.record.id] and same:
            print(f"index: {target} is there for this checkpoint and configuration ({old.id}); reused", flush=True)
            return old
    storage.delete_folder(target)
    parallel = config.scaling.num_workers > 0
    if parallel and dataset.record.num_items >= embed._PARALLEL_ABOVE:
        runtime.start(config.scaling)
    vectors = embed.item_vectors(source, dataset.record.num_items, parallel)
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
        parents=[record.id, dataset.record.id],
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
        checkpoint_uri=source,
        seconds=time.perf_counter() - started,
    ).write(target)
    note = (
        ""
        if recall >= options.recall_target
        else f"  BELOW the target {options.recall_target}: try retrieval.index = 'HNSW32' or 'Flat'"
    )
    print(
        f"index: {factory} over {len(vectors) - 2:,} items on {device}, {chosen.setting or 'exact'}: recall@{options.k} {recall:.4f}, "
        f"{chosen.milliseconds:.3f} ms/query, {len(data) / 2**20:.1f} MB{note}",
        flush=True,
    )
    return made


def _of_index(config: dict[str, Any]) -> dict[str, Any]:
    """What an index and its setting depend on: not on how the items that it finds are ordered then."""
    kept = {key: value for key, value in config["retrieval"].items() if key not in ("ranker", "item_knn_weight")}
    return kept | {"queries": config["evaluation"].get("queries")}  # a record of before may lack it


def index_of(config: Config, record: CheckpointRecord) -> IndexRecord | None:
    """The record of <run>/index, None where there is none. Raises LineageError when it is of another checkpoint."""
    uri = storage.join(config.run_uri, "index")
    if not storage.exists(storage.join(uri, "index.json")):
        return None
    index = IndexRecord.read(uri)
    if record.id not in index.parents:
        raise LineageError(
            f"the index in {uri} was built from {index.parents[0]}, not from {record.id}: run `recray index` on this checkpoint first"
        )
    return index
