"""What each stage leaves behind: a small typed JSON file, written last.

A record's existence means that its stage is complete. It names its parents by
id, so that a later stage can refuse what does not belong together.
"""

from __future__ import annotations

import math
import re
from datetime import UTC, datetime
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

import recray
from recray import provenance, sealed, storage
from recray.digests import Digests, Inside
from recray.errors import LineageError
from recray.provenance import Provenance

# Fields that are not part of a record's id: the same work at another time, on another machine, in another folder or on a
# copy of the input has the same id. What decided the result of `config` is in `keys`.
_NO_CONTENT = {"id", "created", "made_by", "inputs", "log_files", "config", "dataset_uri", "checkpoint_uri"}
# Measured times, at any depth, among them those of a checkpoint's history (recray.training.console.Progress.end_epoch).
_TIMES = re.compile(r"(.+_)?seconds|milliseconds|cpu_hours|events_per_second|waiting_share|first_step_at|at")


class Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str = ""
    created: str = ""
    recray_version: str = ""
    identity: str = ""  # of the artefact: the name of its folder (recray.artifacts)
    keys: dict[str, Any] = {}  # dotted configuration key -> value, of those that decided the result
    parents: list[str] = []  # ids of the records that it was made from
    seconds: float = 0.0  # wall time of the stage
    config: dict[str, Any] = {}  # the whole resolved configuration
    made_by: Provenance = Provenance()  # code, packages and machine
    files: Digests = {}  # all others of the artefact

    @classmethod
    def file_name(cls) -> str:
        return f"{cls.__name__.removesuffix('Record').lower()}.json"

    @classmethod
    def read(cls, folder: str, copy: bool = False) -> Self:
        """The record of this kind in `folder`.

        copy: it is not the artefact's own, and may differ in its sizes (DatasetRecord.refitted).

        Raises LineageError when the stage never completed there, or if the file is damaged.
        """
        uri = storage.join(folder, cls.file_name())
        if not storage.exists(uri):
            stage = cls.file_name().removesuffix(".json")
            raise LineageError(
                f"no {cls.file_name()} in {folder}: the stage that writes the {stage} has not completed there"
            )
        body = sealed.read(uri, f"run its stage again (this is recray {recray.__version__})")
        try:
            record = cls.model_validate(body)
        except ValidationError as error:
            first = error.errors()[0]
            raise LineageError(
                f"{uri} was written by recray {body.get('recray_version', '?')} and this is {recray.__version__}: "
                f"{'.'.join(map(str, first['loc']))}: {first['msg'].lower()}; run its stage again"
            ) from None
        if not copy and record.id != cls._id_of(body):
            raise LineageError(f"{uri} does not have the id of its content: run its stage again")
        return record

    def write(self, folder: str) -> Self:
        """Stamp id, time and version, write the record, and return it as written."""
        stamped = self.model_copy(
            update={
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
                "recray_version": recray.__version__,
                "made_by": provenance.here(),
            }
        )
        body = stamped.model_dump(mode="json")
        id_ = self._id_of(body)
        storage.sync(folder, self.files)
        sealed.write(storage.join(folder, self.file_name()), body | {"id": id_})
        return stamped.model_copy(update={"id": id_})

    @classmethod
    def _id_of(cls, body: dict[str, Any]) -> str:
        """Of the content, whenever and however fast it was made."""
        content = {key: value for key, value in body.items() if key not in _NO_CONTENT}
        # A copy of another stage's record holds times, and `parents` has its id.
        if isinstance(files := body.get("files"), dict):
            content["files"] = {name: digest for name, digest in files.items() if not name.endswith(".json")}
        return f"{cls.file_name().removesuffix('.json').lstrip('_')}-{sealed.hash_of(_timeless(content))[:12]}"


def _timeless(value: Any) -> Any:
    """A JSON value without the fields that hold measured times."""
    if isinstance(value, dict):
        return {key: _timeless(field) for key, field in value.items() if not _TIMES.fullmatch(key)}
    return [_timeless(entry) for entry in value] if isinstance(value, list) else value


# A value that may be undefined: NaN here, null in a file.
Number = Annotated[float, BeforeValidator(lambda value: math.nan if value is None else value)]


class Part(BaseModel):
    """A plain typed piece of a record."""

    model_config = ConfigDict(frozen=True, extra="forbid")


Role = Literal["user", "item", "context"]


def feature_column(role: Role, name: str) -> str:
    """The column of a feature. The prefix keeps the user's names apart from recray's own: `item`, `count`, `label`, ..."""
    return f"{role}_{name}"


class Feature(Part):
    """One encoded feature column of a prepared dataset."""

    name: str
    role: Role
    kind: Literal["categorical", "list", "numeric"]  # what a model sees; numbers between quantiles are categories
    cardinality: int = 0  # categorical, list: embedding rows incl. 0 (missing) and 1 (unknown)
    new_values: int = 0  # ids from `cardinality` on: values that only the validation split adds, for a refit
    mean: float = 0.0  # numeric: fitted on train, applied; missing becomes 0 = the mean
    std: float = 1.0
    log: bool = False  # numeric: sign(x) log(1 + |x|) first
    vocabulary: list[str] | list[int] | None = None  # value of id 2, 3, ...
    hash_buckets: int = 0  # ids are 2 + hash modulo this
    collisions: float = 0.0  # hashed: share of distinct values that share their id with another, estimated
    edges: list[float] | None = None  # quantiles: id is 2 + how many edges are <= x

    @property
    def column(self) -> str:
        """Its column in items.parquet or in the shards."""
        return feature_column(self.role, self.name)


class InputFile(Part):
    """A file that a dataset was prepared from, or, of very many files, all those of one folder."""

    uri: str
    bytes: int
    files: int = 1
    known_by: str  # what `state` is: the hash of the content, the ETag, ...
    state: str


class Shard(Part):
    """One Parquet file of a split; `file` is relative to the dataset's folder."""

    file: Inside
    rows: int  # users
    events: int  # targets that were chosen, over all rows (training examples of a retriever of events)
    impressions: int  # all targets, chosen or not (training examples of a ranker)


class DatasetRecord(Record):
    """A prepared dataset (layout: recray.data.prepare)."""

    fingerprint: str  # of the input files
    inputs: list[InputFile] = []  # the input files; none of generated data
    num_items: int  # rows of the item table: real items + NUM_RESERVED
    new_items: int = 0  # ids from `num_items` on: items that only the validation split adds, for a refit
    num_users: int  # largest user id + 1: real users + NUM_RESERVED
    counts: dict[str, int]  # events and users read, dropped (by reason), and in each split
    features: list[Feature] = []
    columns: dict[str, str] = {}  # of every shard: name -> Arrow type
    shards: dict[str, list[Shard]]  # "train", "valid", "test"
    early: dict[str, list[Inside]] = {}  # split -> files of events that data.min_history keeps from being targets
    seed: int
    split: dict[str, Any] = {}  # boundaries in microseconds: "valid_start", "test_start", "end"
    has_time: bool = True
    log_files: list[InputFile] = []  # data.append: the files of the log, in the order in which they are read
    buckets: int = 0  # data.append: number of buckets of users, whose events are kept in events/

    def refitted(self) -> DatasetRecord:
        """The record as a refit sees it: items and values that the validation split adds are among the others."""
        features = [
            f.model_copy(update={"cardinality": f.cardinality + f.new_values, "new_values": 0}) for f in self.features
        ]
        update = {"num_items": self.num_items + self.new_items, "new_items": 0, "features": features}
        return self.model_copy(update=update)

    @property
    def labelled(self) -> bool:
        """Whether there are items that were not chosen."""
        return "label" in self.columns

    def starts(self, split: str) -> int:
        """When a split begins, in microseconds (or positions); the last event's time where splits are not by time."""
        return int(self.split.get(f"{split}_start", self.split["last"]))


class CheckpointRecord(Record):
    """Trained weights and all that is needed to rebuild and resume them."""

    epoch: int  # epochs completed
    step: int  # optimizer steps, those of an epoch that is not complete included
    rows: int  # training rows consumed over all workers since the start
    metric: str
    value: float  # validation value of `metric`, reduced over all workers
    best_epoch: int = 0  # the one with the best validation value so far; 0 before the first validation
    history: list[dict[str, float]] = []  # one entry per epoch trained, later ones than the best among them
    dataset_uri: str
    pieces: int = 0  # files that row_sharded tables lie in, one a training worker


class SweepPoint(Part):
    """One setting of the index, measured on real user vectors."""

    setting: dict[str, int]  # e.g. {"nprobe": 32}
    recall: float  # recall@k on the tuning half
    recall_at_10: float
    milliseconds: float  # per query
    missing_share: float  # results the index could not fill (-1)


class RecencyFit(Part):
    """How `retrieval.recency` orders the lists of a checkpoint."""

    weight: float  # of the model's part of the score
    targets: int = 0  # of the validation split that it was learned from; 0: given in the configuration
    mean_query: list[float]  # (D,) mean query vector of the latest users


class IndexRecord(Record):
    """A faiss index over a checkpoint's item vectors."""

    factory: str
    dim: int
    num_items: int
    k: int
    setting: dict[str, int]
    recall: float  # recall@k of the chosen setting on the reporting half
    recall_target: float
    device: str
    build_seconds: float
    bytes: int
    curve: list[SweepPoint]
    recency: RecencyFit | None = None  # with retrieval.recency
    dataset_uri: str
    checkpoint_uri: str


class Interval(Part):
    """A mean over users and its bootstrap 95 % interval."""

    value: Number  # undefined: a click metric where there are only clicks, for example
    low: float | None = None
    high: float | None = None


class ReliabilityBin(Part):
    """Impressions of about the same predicted probability."""

    predicted: float  # mean probability
    observed: float  # share of clicks
    impressions: int


class Comparison(Part):
    """How much better a recommender is than another one on the same queries, with a paired 95 % interval over users."""

    system: str
    other: str  # a baseline, or the stage before it
    metric: str
    gain: Number  # difference of the means; above 0: the system is better, also where lower values are
    low: float | None = None
    high: float | None = None


class Slice(Part):
    """Metrics of one group: of queries by the user's history, or of targets by their item."""

    # history: events known of the user; popularity: training events of the item; age: since its first; or a feature of
    # evaluation.slices, such as "user country" or "item genre".
    by: str
    group: str  # "5 to 9"
    metric: str  # found@K: the share of targets that are among the first K items
    size: int  # queries, targets, or impressions
    values: dict[str, Interval]  # by system
    gains: dict[str, Interval]  # system -> how much better the model is, paired; above 0: better


class Example(Part):
    """A user of the split; "" stands for an item that the model does not know."""

    user: str
    events: int  # known before the query
    history: list[str]  # keys of the latest items, oldest first
    targets: list[str]  # what the user chose then
    lists: dict[str, list[str]]  # system -> keys
    hit: bool  # whether the model's list has a target


class ReportRecord(Record):
    """Metrics of the model, its index and the baselines on one split."""

    kind: Literal["lists", "clicks"] = "lists"  # of a retriever or of a ranker
    split: str
    metrics: dict[str, dict[str, Interval]]  # system ("model", "index", "popularity", ...) -> metric -> value
    counts: dict[str, int]  # queries and targets, those that cannot be answered or hit by reason, short lists
    reachable: dict[str, Number] = {}  # lists: metric -> value of lists that hit every target that can be hit
    comparisons: list[Comparison] = []
    new_users: dict[str, dict[str, Number]] = {}  # lists: as `metrics`, of the queries of users without a history
    left_out: dict[str, str] = {}  # baseline -> why this log does not allow it
    verdict: list[str] = []  # what the figures say, in words
    index: dict[str, Number] = {}  # what the index loses against exact search
    rerank: dict[str, Number] = {}  # what a ranker adds to the lists, and what its candidates cost
    slices: list[Slice] = []
    examples: list[Example] = []  # lists: some users
    reliability: list[ReliabilityBin] = []  # clicks: by falling probability; none where negatives were drawn


class ListsRecord(Record):
    """Recommendation lists: part-*.parquet with columns user, item, rank (from 1), score."""

    k: int
    counts: dict[str, int]  # users asked for, with a list of their own, with popular items

    @classmethod
    def file_name(cls) -> str:
        return "_lists.json"  # readers of a folder of Parquet skip names that begin with '_'


class TrialEpoch(Part):
    """What a trial reported after one epoch."""

    epoch: int
    value: float  # validation value of the sweep's metric
    loss: float
    seconds: float  # training and validation time of the trial up to here
    at: float  # when it was reported, in seconds since 1970


class Trial(Part):
    """One training run of a sweep."""

    number: int
    values: dict[str, Any]  # dotted key -> value; with pbt the latest ones
    seed: int
    # paused: waiting at a rung of ASHA; pruned: stopped early; interrupted: the next start of the sweep resumes it
    status: Literal["done", "paused", "pruned", "failed", "interrupted"]
    reason: str = ""  # why it failed
    best: float | None = None  # best value over its epochs; None before the first validation
    epochs: int = 0
    seconds: float = 0.0
    curve: list[TrialEpoch] = []
    switches: list[dict[str, Any]] = []  # pbt: {"epoch": ..., key: value} whenever it copied another member

    @property
    def finished(self) -> bool:
        """Whether it will never train again."""
        return self.status not in ("paused", "interrupted")


class TrialRecord(Record):
    """A trial that stopped, next to its checkpoint; `config` is the complete configuration that it trained with."""

    trial: Trial


class Finalist(Part):
    """One of the best trials, trained again on other seeds."""

    number: int
    values: dict[str, Any]
    seeds: list[int]
    results: list[float]  # best value of each seed
    mean: float
    std: float  # sample standard deviation (n - 1) of the results


class TuneRecord(Record):
    """A completed sweep: its trials, its finalists and the winner."""

    metric: str
    mode: Literal["max", "min"]
    trials: list[Trial]
    retrained: list[Trial] = []  # the finalists on other seeds
    finalists: list[Finalist] = []  # best first
    winner: int | None  # number of a trial
    importance: dict[str, float] = {}  # key -> share of the variance of the trials' ranks that it explains alone
    cpu_hours: float  # of all training runs, including those on other seeds
    dataset_uri: str
