"""The evaluate stage: full ranking over the whole catalogue, the index's loss, and honest baselines.

Every user of the split with a history is one query, asked at the split; their items
of the split are the targets. Exact search ranks first; then the index answers the
same queries. Unknown targets (items that training never saw) stay in the
denominator as misses. No metric on sampled negatives exists here.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from recray import checkpoint, storage
from recray.batches import Question, questions
from recray.config import Config
from recray.data.prepared import PreparedDataset
from recray.data.sources.simulated import SimulatedOracle
from recray.data.split import duration
from recray.errors import LineageError
from recray.metrics import ranked
from recray.metrics.lists import ListCounts
from recray.models.scoring import top_k
from recray.records import CheckpointRecord, IndexRecord, Interval, ReportRecord
from recray.retrieval import baselines, embed
from recray.retrieval.faiss_index import ItemIndex

Ranking = Callable[[Question], np.ndarray]  # a question -> (B, K) item ids, best first, 0 where nothing is left


@dataclass
class _System:
    """One thing that ranks, and what its users' metrics were."""

    rank: Ranking
    lists: ListCounts
    values: list[dict[str, np.ndarray]] = field(default_factory=list)
    short_lists: int = 0
    seconds: float = 0.0


def evaluate(config: Config, split: str = "test") -> ReportRecord:
    """Evaluate <run>/checkpoint and <run>/index on a split; writes <run>/report/report.json.

    Raises LineageError when the index was built from another checkpoint.
    """
    started = time.perf_counter()
    dataset = PreparedDataset.open(storage.join(config.run_uri, "dataset"))
    model_uri, index_uri = storage.join(config.run_uri, "checkpoint"), storage.join(config.run_uri, "index")
    model, record = checkpoint.load_model(model_uri)
    index = _index(index_uri, record) if storage.exists(storage.join(index_uri, "index.json")) else None
    if index is None:
        print(f"evaluate: there is no index in {index_uri}; exact search only", flush=True)
    systems, vectors_ND = _systems(config, dataset, model, index, split)
    ks, k = config.evaluation.k, max(config.evaluation.k)
    dropped = {"users_without_history": 0, "users": 0, "targets": 0, "unknown_targets": 0}
    for table in dataset.iter_tables(split):
        for question in questions(table, config.evaluation.batch_size, config.model.history_length):
            _score(question, systems, ks, k, vectors_ND, dropped)
    if not dropped["users"]:
        raise LineageError(f"no user of the {split} split has a history: check data.split, or train on more of the log")
    metrics = {name: _summary(system, config, dataset) for name, system in systems.items()}
    parents = [record.id, dataset.record.id] + ([index.record.id] if index else [])
    report = ReportRecord(
        parents=parents,
        config=config.model_dump(mode="json"),
        split=split,
        metrics=metrics,
        counts={**dropped, "short_lists": systems["model"].short_lists, "catalogue": dataset.record.num_items - 2},
        index=_index_loss(index, metrics, k) if index else {},
        seconds=time.perf_counter() - started,
    )
    return report.write(storage.join(config.run_uri, "report"))


def _index(uri: str, record: CheckpointRecord) -> ItemIndex:
    index = IndexRecord.read(uri)
    if record.id not in index.parents:
        raise LineageError(
            f"the index in {uri} was built from {index.parents[0]}, not from {record.id}: run `recray index` on this checkpoint first"
        )
    return ItemIndex.open(uri)


def _systems(
    config: Config, dataset: PreparedDataset, model: torch.nn.Module, index: ItemIndex | None, split: str
) -> tuple[dict[str, _System], np.ndarray]:
    """The model by exact search, its index, and the baselines that apply."""
    n, k, seen = dataset.record.num_items, max(config.evaluation.k), config.evaluation.filter_seen
    vectors_ND = embed.item_vectors(storage.join(config.run_uri, "checkpoint"), n, parallel=False)
    vectors = torch.from_numpy(vectors_ND)

    def queries(question: Question) -> torch.Tensor:
        with torch.inference_mode():
            return model.query_vectors(question.batch).float()  # type: ignore[operator, no-any-return]

    def by_model(question: Question) -> np.ndarray:
        return top_k(queries(question), vectors, k, question.seen if seen else None)[0].numpy()

    ranks: dict[str, Ranking] = {"model": by_model}
    if index is not None:

        def by_index(question: Question) -> np.ndarray:
            exclude = (question.seen.values.numpy(), question.seen.offsets.numpy()) if seen else None
            return index.search(queries(question).numpy(), k, exclude)[0]

        ranks["index"] = by_index

    def by_scores(scorer: baselines.Popularity | baselines.RecentPopularity | baselines.ItemFilter) -> Ranking:
        def rank(question: Question) -> np.ndarray:
            # A score matrix is a product of the users' rows and the identity's: the same masked top-k serves.
            return _top_of_scores(scorer.scores(question), k, question, seen)

        return rank

    for name in config.evaluation.baselines:
        if name == "popularity":
            ranks[name] = by_scores(baselines.Popularity(n))
        elif name == "recent_popularity" and dataset.record.has_time:
            until = dataset.record.split.get(f"{split}_start", dataset.record.split["last"])
            window = duration(config.evaluation.recent_window)
            ranks[name] = by_scores(baselines.RecentPopularity(dataset, split, window, until))
        elif name == "item_filter":
            if n <= baselines.MAX_ITEMS:
                ranks[name] = by_scores(baselines.ItemFilter(dataset))
            else:
                print(
                    f"evaluate: item_filter is left out: {n:,} items are more than {baselines.MAX_ITEMS:,}", flush=True
                )
        elif name == "oracle" and config.data.source == "simulated":
            ranks[name] = _oracle(config, dataset, split, k)
    return {name: _System(rank, ListCounts(np.zeros(n, np.int64))) for name, rank in ranks.items()}, vectors_ND


def _top_of_scores(scores_BN: torch.Tensor, k: int, question: Question, filter_seen: bool) -> np.ndarray:
    scores_BN[:, :2] = -torch.inf
    if filter_seen:
        row = torch.repeat_interleave(torch.arange(len(scores_BN)), question.seen.lengths())
        scores_BN[row, question.seen.values] = -torch.inf
    best, found = scores_BN.topk(min(k, scores_BN.shape[1]), dim=1)
    found = torch.where(best == -torch.inf, 0, found)
    return torch.nn.functional.pad(found, (0, k - found.shape[1])).numpy()


def _oracle(config: Config, dataset: PreparedDataset, split: str, k: int) -> Ranking:
    """The simulator's own answer; items that training never saw are in it, the oracle knows them."""
    oracle = SimulatedOracle(config.data.simulated, config.run.seed)
    keys = dataset.items()["item"].to_numpy(zero_copy_only=False)
    id_of_key = np.ones(config.data.simulated.items, np.int64)
    id_of_key[keys[2:].astype(np.int64)] = np.arange(2, len(keys))
    users = dataset.user_keys()
    key_of_user = np.zeros(dataset.record.num_users, np.int64)
    key_of_user[users["user_id"].to_numpy()] = users["user"].to_numpy()
    until = int(dataset.record.split.get(f"{split}_start", dataset.record.split["last"]))

    def rank(question: Question) -> np.ndarray:
        offsets = question.seen.offsets.tolist()
        seen = question.seen.values.numpy()
        exclude = []
        for begin, end in itertools.pairwise(offsets):
            mine = seen[begin:end]
            exclude.append(keys[mine[mine >= 2]].astype(np.int64))
        if not config.evaluation.filter_seen:
            exclude = [one[:0] for one in exclude]
        answers = oracle(key_of_user[question.batch.user_B.numpy()].tolist(), until, k, exclude)
        return np.stack([id_of_key[answer] for answer in answers])

    return rank


def _score(
    question: Question,
    systems: dict[str, _System],
    ks: list[int],
    k: int,
    vectors_ND: np.ndarray,
    counts: dict[str, int],
) -> None:
    """Rank one batch of users by every system and keep their metrics."""
    rows = (question.seen.lengths() > 0).numpy()
    values, offsets = question.targets.values.numpy(), question.targets.offsets.numpy()
    wanted = ranked.num_distinct(values, offsets)[rows]
    target_row = np.repeat(rows, np.diff(offsets))
    counts["users"] += int(rows.sum())
    counts["users_without_history"] += int((~rows).sum())
    counts["targets"] += int(target_row.sum())
    counts["unknown_targets"] += int(((values == 1) & target_row).sum())
    for system in systems.values():
        started = time.perf_counter()
        ids = system.rank(question)
        system.seconds += time.perf_counter() - started
        hit = ranked.hits(ids, values, offsets)[rows]
        system.values.append(ranked.per_user(hit, wanted, ks))
        system.lists.add(ids[rows], vectors_ND)
        system.short_lists += int((ids[rows] == 0).any(axis=1).sum())


def _summary(system: _System, config: Config, dataset: PreparedDataset) -> dict[str, Interval]:
    out: dict[str, Interval] = {}
    for name in system.values[0]:
        values = np.concatenate([part[name] for part in system.values])
        low, high = (None, None)
        if config.evaluation.bootstrap:
            low, high = ranked.bootstrap(values, config.evaluation.bootstrap, config.run.seed)
        out[name] = Interval(value=float(values.mean()), low=low, high=high)
    lists = system.lists.metrics(max(config.evaluation.k), dataset.item_counts(), dataset.record.counts["users_train"])
    return out | {name: Interval(value=value) for name, value in lists.items()}


def _index_loss(index: ItemIndex, metrics: dict[str, dict[str, Interval]], k: int) -> dict[str, float]:
    lost = {n: metrics["index"][n].value - metrics["model"][n].value for n in (f"ndcg@{k}", f"recall@{k}")}
    return {f"recall@{index.record.k}_against_exact": index.record.recall, **{f"{n}_lost": v for n, v in lost.items()}}
