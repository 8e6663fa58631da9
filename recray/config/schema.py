"""The typed configuration: one frozen pydantic model per TOML table.

A field's docstring-like description is what `recray init` writes as a comment
and what an error quotes. Nothing here touches a file, Ray or torch.
"""

from __future__ import annotations

import os
from typing import Any, ClassVar, Literal

from pydantic import Field, SerializeAsAny, field_validator, model_validator

from recray import registry
from recray.config.data import DataConfig
from recray.config.section import Section
from recray.config.tune import TuneConfig
from recray.metrics import clicks, ranking

_JOB_FOLDER = "/runtime_resources/working_dir_files/"  # where Ray unpacks a job's --working-dir


class RunConfig(Section):
    name: str = Field("run", description="name of the run; its artefacts live in <output>/<name>/")
    output: str = Field("runs", description="folder or URI (local, s3://, gs://) under which runs are written")
    seed: int = Field(1, ge=0, description="seed of every random choice")
    dataset: str | None = Field(
        None,
        description="folder of prepared datasets to use, or one dataset's own folder; <output>/<name>/dataset when unset; several runs may share one",
    )

    keep: int = Field(
        3, ge=0, description="artefacts of each stage that `recray prune` keeps besides those in use, newest first"
    )

    @field_validator("output", "dataset")
    @classmethod
    def _absolute(cls, value: str | None) -> str | None:
        # A worker starts in a folder of its own, where a relative path means another place.
        return value if value is None or "://" in value else os.path.abspath(value)


class EmbeddingConfig(Section):
    """Where the rows of embedding tables live while a model trains (recray.layers.embedding)."""

    mode: Literal["auto", "dense", "sparse_replicated", "row_sharded"] = Field(
        "auto",
        description="auto picks by table; dense: all rows on every worker, all updated; sparse_replicated: only rows that a batch touched are exchanged and updated; row_sharded: each worker holds its share of the rows",
    )


class ModelOptions(Section):
    """What every model has; a model's own `Options` extends it in its own file."""

    family: ClassVar[Literal["retriever", "ranker"]] = "retriever"
    name: str
    dim: int = Field(64, ge=1, description="width of query and item vectors")
    history_length: int = Field(50, ge=1, description="most recent events of a user that the model sees")
    embedding: EmbeddingConfig = EmbeddingConfig()


class LossConfig(Section):
    name: Literal["softmax", "sampled_softmax", "gbce", "cosine_contrastive", "bpr", "bce"] = Field(
        "sampled_softmax", description="bce is for rankers and their default, the others are for retrievers"
    )
    negatives: int = Field(
        512, ge=1, description="shared uniform negatives per batch and worker; softmax uses all items"
    )
    in_batch: bool = Field(
        True, description="sampled_softmax: the other positives of the batch, from all workers, are negatives too"
    )
    logq: bool = Field(True, description="sampled_softmax: subtract log sampling probability (Yi et al. 2019)")
    temperature: float = Field(
        1.0, gt=0, description="scores are divided by it; use about 0.05 to 0.2 with normalised vectors"
    )
    calibration: float = Field(0.75, ge=0, le=1, description="gbce: t of gSASRec")
    margin: float = Field(
        0.9, ge=-1, le=1, description="cosine_contrastive: cosine below which a negative costs nothing"
    )
    negative_weight: float = Field(150.0, gt=0, description="cosine_contrastive: weight of the mean negative term")
    chunk_size: int | None = Field(
        None,
        ge=1,
        description="softmax: rows of logits alive at a time, fewer where they take more than 256 MB; unset: 512 on a CPU, as many as 256 MB hold on a GPU",
    )
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="bce: labels are moved so far towards one half")
    positive_weight: float = Field(1.0, gt=0, description="bce: weight of clicks against non-clicks")
    pairwise_weight: float = Field(
        0.0, ge=0, description="bce: weight of a second term, that clicks score above non-clicks"
    )


class OptimConfig(Section):
    name: Literal["adamw", "adam", "sgd"] = "adamw"
    learning_rate: float = Field(1e-3, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    warmup_steps: int = Field(0, ge=0)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    clip_norm: float = Field(0.0, ge=0, description="largest global gradient norm; 0 = no clipping")
    embedding_decay: float = Field(
        0.0,
        ge=0,
        description="weight decay of embedding tables, of large ones the rows a batch touches; 0 = as weight_decay, none for large ones",
    )
    table_optimizer: Literal["same", "adagrad"] = Field(
        "same",
        description="of tables of which only touched rows are updated: as `name`, or row-wise Adagrad, which keeps 4 bytes a row instead of 8 a number",
    )
    table_learning_rate: float | None = Field(
        None, gt=0, description="of the same tables, where it is another; Adagrad wants about 0.01 to 0.1"
    )
    ema_decay: float = Field(0.0, ge=0, lt=1, description="exponential moving average of the weights; 0 = off")


class TrainingConfig(Section):
    epochs: int = Field(10, ge=1)
    global_batch_size: int = Field(
        1024, ge=1, description="training rows per optimizer step over all workers and accumulation steps"
    )
    accumulation_steps: int = Field(1, ge=1)
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    compile: bool = False
    half_life: str | None = Field(
        None,
        description="an event's weight in the loss halves with every such time before validation, e.g. '12h'; for items that age fast",
    )
    refit: bool = Field(
        False,
        description="after the best epoch is known, train anew on train and validation events together for as many epochs, and keep that",
    )
    metric: str = Field(
        "ndcg@10",
        description="validation metric that selects the best checkpoint: ndcg@K, recall@K, hr@K, mrr@K, map@K; of a ranker auc (the default), gauc, gauc_impressions, log_loss, normalized_entropy",
    )
    patience: int = Field(0, ge=0, description="validations without improvement before stopping; 0 = never stop early")
    validate_every: int = Field(1, ge=1, description="epochs between validations")
    resume: bool = Field(True, description="go on from the run's last checkpoint when there is one")


class ScalingConfig(Section):
    num_workers: int = Field(
        1,
        ge=0,
        description="training workers; a single one without a cluster is this process; 0 = this process on a cluster, too",
    )
    use_gpu: bool = False
    cpus_per_worker: int = Field(1, ge=1)
    threads_per_worker: int = Field(
        0, ge=0, description="threads of a worker's arithmetic; 0 = this machine's cores divided by the workers"
    )
    fsdp: bool = Field(
        False,
        description="several workers share out dense weights, gradients and optimizer state instead of each holding all of them: for wide models",
    )
    reader: Literal["auto", "ray_data", "worker"] = Field(
        "auto",
        description="what reads shards while training: tasks of Ray Data on any node, or each worker itself, which costs less where disk and cores are its own; auto: ray_data for several nodes or a dataset that is not local",
    )
    wait_seconds: float = Field(
        900,
        ge=0,
        description="on a cluster: how long to wait for nodes that its autoscaler adds, or for other work to end",
    )


class RetrievalConfig(Section):
    index: str = Field("auto", description="'auto' by catalogue size, or any faiss factory string")
    k: int = Field(100, ge=1, description="how many items are served per query")
    ranker: str | None = Field(
        None, description="folder of a ranker's run on the same dataset, <output>/<name>: it orders the k items found"
    )
    filter_weight: float = Field(
        0.0,
        ge=0,
        description="weight of the item filter beside the model: what both find is ordered by the model's score over loss.temperature plus this times the log of the filter's share; 0 = the model alone; choose it by `recray evaluate --split valid`",
    )
    recall_target: float = Field(
        0.95, gt=0, le=1, description="recall@k against exact search that the index must reach"
    )
    sweep_users: int = Field(2_000, ge=2, description="real user vectors for the sweep: half tune, half report")
    use_gpu: Literal["auto", "never", "always"] = "auto"


class EvaluationConfig(Section):
    k: list[int] = [10, 20, 50]
    queries: Literal["user", "event"] = Field(
        "user",
        description="user: each user is asked once, at the split, for all later items; event: before every later event, for that event",
    )
    filter_seen: bool = Field(True, description="items in a user's history are not recommended again")
    batch_size: int = Field(512, ge=1, description="users scored at a time")
    bootstrap: int = Field(500, ge=0, description="resamples for the intervals; 0 = none")
    baselines: list[Literal["popularity", "recent_popularity", "hindsight", "item_filter", "oracle"]] = Field(
        ["popularity", "item_filter", "oracle"],
        description="hindsight: the split's own popularity, about the most that one list for everybody could reach; oracle: of a simulated log",
    )
    recent_window: str = Field("1h", description="recent_popularity: how long before the split events count")

    @field_validator("k")
    @classmethod
    def _k_sorted(cls, value: list[int]) -> list[int]:
        if not value or min(value) < 1:
            raise ValueError("needs at least one k >= 1")
        return sorted(set(value))


def _is_list_metric(metric: str) -> bool:
    name, _, k = metric.partition("@")
    return name in ranking.NAMES and k.isdigit() and int(k) > 0


class Config(Section):
    """The whole configuration of a run; every stage takes one."""

    run: RunConfig = RunConfig()
    data: DataConfig = DataConfig()
    model: SerializeAsAny[ModelOptions]
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    training: TrainingConfig = TrainingConfig()
    scaling: ScalingConfig = ScalingConfig()
    retrieval: RetrievalConfig = RetrievalConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    tune: TuneConfig = TuneConfig()

    @field_validator("model", mode="before")
    @classmethod
    def _typed_model(cls, value: Any) -> Any:
        if isinstance(value, ModelOptions):
            return value
        table = dict(value)
        module = registry.load("model", str(table.setdefault("name", "two_tower")))
        return module.Options.model_validate(table)

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, value: Any) -> Any:
        """The model, and what follows from its family: a ranker's loss and metric are others."""
        if not isinstance(value, dict):
            return value
        model = value.get("model", {})
        value = {**value, "model": model}
        name = model.name if isinstance(model, ModelOptions) else dict(model).get("name", "two_tower")
        if registry.load("model", str(name)).Options.family == "ranker":
            for section, key, default in (("loss", "name", "bce"), ("training", "metric", "auc")):
                given = value.get(section, {})
                value[section] = {key: default, **given} if isinstance(given, dict) else given
        return value

    @model_validator(mode="after")
    def _family(self) -> Config:
        """Loss and metric must be of the model's family."""
        name, metric = self.model.name, self.training.metric
        if (self.loss.name == "bce") != (self.model.family == "ranker"):
            allowed = (
                "bce" if self.model.family == "ranker" else "softmax, sampled_softmax, gbce, cosine_contrastive, bpr"
            )
            raise ValueError(
                f"loss.name = '{self.loss.name}' does not fit model.name = '{name}', a {self.model.family}: use {allowed}"
            )
        if metric not in clicks.NAMES if self.model.family == "ranker" else not _is_list_metric(metric):
            allowed = ", ".join(clicks.NAMES if self.model.family == "ranker" else (f"{n}@K" for n in ranking.NAMES))
            raise ValueError(f"training.metric = '{metric}' does not fit a {self.model.family}: use one of {allowed}")
        return self

    @model_validator(mode="after")
    def _sharded(self) -> Config:
        """What needs every row of a table at every step does not go with tables of which no worker has every row."""
        if self.model.embedding.mode != "row_sharded":
            return self
        if self.loss.name == "softmax":
            raise ValueError(
                "loss.name = 'softmax' scores every item at every step, and with model.embedding.mode = 'row_sharded' no "
                "worker holds every item: use loss.name = 'sampled_softmax' (or gbce, cosine_contrastive, bpr), or mode = 'dense'"
            )
        if self.optim.ema_decay:
            raise ValueError(
                "optim.ema_decay averages every row at every step, which model.embedding.mode = 'row_sharded' is there to "
                "avoid: set optim.ema_decay = 0, or mode = 'dense'"
            )
        return self

    @model_validator(mode="after")
    def _kept(self) -> Config:
        if _JOB_FOLDER in self.run.output:
            raise ValueError(
                f"run.output = '{self.run.output}' goes with the Ray job whose working folder it is in: give s3://, gs://, "
                f"or the absolute path of a folder that all nodes share"
            )
        return self

    @model_validator(mode="after")
    def _arithmetic(self) -> Config:
        workers = max(1, self.scaling.num_workers)
        parts = workers * self.training.accumulation_steps
        if self.training.global_batch_size % parts:
            size = self.training.global_batch_size
            raise ValueError(
                f"training.global_batch_size = {size} does not divide by scaling.num_workers ({workers}) x "
                f"training.accumulation_steps ({self.training.accumulation_steps}) = {parts}: the remainder is "
                f"{size % parts}; use {size // parts * parts or parts} or {(size // parts + 1) * parts}"
            )
        return self

    @property
    def run_uri(self) -> str:
        """<output>/<name>: where the run's stages write."""
        return f"{self.run.output.rstrip('/')}/{self.run.name}"

    @property
    def dataset_uri(self) -> str:
        """Where `prepare` writes, and what the other stages read."""
        return self.run.dataset or f"{self.run_uri}/dataset"
