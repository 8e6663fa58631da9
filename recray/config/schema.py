"""The typed configuration: one frozen pydantic model per TOML table.

Every key has a description, which `recray keys` prints. Reading a configuration imports neither torch nor Ray.
"""

from __future__ import annotations

import contextlib
import os
from typing import Any, Literal

from pydantic import (
    Field,
    ModelWrapValidatorHandler,
    SerializeAsAny,
    ValidationInfo,
    field_validator,
    model_validator,
)

from recray import credentials, metrics, registry
from recray.config import losses
from recray.config.baselines import RecentCountsOptions
from recray.config.data import DataConfig, check_duration
from recray.config.evaluation import EvaluationConfig, PromotionConfig, ReportConfig
from recray.config.losses import LossOptions
from recray.config.models import Family, ModelOptions
from recray.config.plugins import typed
from recray.config.section import Section
from recray.config.trackers import TrackingConfig
from recray.config.tune import TuneConfig
from recray.errors import ConfigError

_LONGEST_NAME = 255
_JOB_FOLDER = "/runtime_resources/working_dir_files/"  # where Ray unpacks a job's --working-dir


def _has_control(text: str) -> bool:
    """Whether it holds characters that no path has: control characters and halves of surrogate pairs."""
    return any(ord(one) < 32 or ord(one) == 127 or 0xD800 <= ord(one) < 0xE000 for one in text)


def absolute(path: str) -> str:
    """A worker has another working directory, in which a relative path means another folder."""
    return path if "://" in path else os.path.abspath(os.path.expanduser(path))


class RunConfig(Section):
    name: str = Field("run", min_length=1, description="name of the run; its artefacts are written to <output>/<name>/")
    output: str = Field("runs", description="folder or URI (local, s3://, gs://) that runs are written to")
    seed: int = Field(1, ge=0, description="seed of all random choices")
    dataset: str | None = Field(
        None,
        description="folder of prepared datasets, or one dataset's own folder, possibly shared by several runs; unset: <output>/<name>/dataset",
    )
    keep: int = Field(
        3,
        ge=0,
        description="number of newest artefacts per stage that `recray prune` keeps in addition to those in use",
    )
    plugins: str | None = Field(
        None,
        description="folder with your own plug-ins, one file <name>.py each; unset: the folder of the TOML file if it has Python files",
    )

    @field_validator("name")
    @classmethod
    def _one_folder(cls, value: str) -> str:
        if value in (".", "..") or not set(value).isdisjoint("/\\") or _has_control(value):
            raise ValueError(
                "must be the name of one folder: without '/', '\\' and control characters, not '.' or '..'"
            )
        if len(value.encode()) > _LONGEST_NAME:
            raise ValueError(f"must have at most {_LONGEST_NAME} bytes in UTF-8, as file systems want it")
        return value

    @field_validator("output", "dataset", "plugins")
    @classmethod
    def _absolute(cls, value: str | None) -> str | None:
        if value is not None and (not value or _has_control(value)):
            raise ValueError("must be a path or URI without control characters")
        return value if value is None else absolute(value)


class OptimConfig(Section):
    name: Literal["adamw", "adam", "sgd"] = Field("adamw", description="optimizer of all weights")
    learning_rate: float = Field(1e-3, gt=0, description="learning rate after warm-up")
    weight_decay: float = Field(0.0, ge=0, description="weight decay of dense weights")
    warmup_steps: int = Field(0, ge=0, description="steps over which the learning rate rises linearly from 0")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="learning rate after warm-up: constant, or falling to 0 by the last step"
    )
    clip_norm: float = Field(0.0, ge=0, description="largest global gradient norm; 0 = no clipping")
    embedding_decay: float = Field(
        0.0,
        ge=0,
        description="weight decay of embedding tables (sparse tables: only rows in the batch); 0 = weight_decay, no decay for sparse tables",
    )
    table_optimizer: Literal["same", "adagrad"] = Field(
        "same",
        description="optimizer of sparse tables: optim.name, or row-wise Adagrad, which stores 4 bytes per row instead of 8 per weight",
    )
    table_learning_rate: float | None = Field(
        None, gt=0, description="learning rate of sparse tables, 0.01 to 0.1 for Adagrad; unset: learning_rate"
    )
    start_learning_rate: float | None = Field(
        None,
        gt=0,
        description="with training.start_from: learning rate, constant and without warm-up, of a training that starts from a checkpoint; unset: a quarter of learning_rate",
    )
    ema_decay: float = Field(0.0, ge=0, lt=1, description="decay of the moving average of the weights; 0 = off")


class TrainingConfig(Section):
    epochs: int = Field(10, ge=1, description="number of passes over the training data")
    global_batch_size: int = Field(
        1024, ge=1, description="training rows per optimizer step, over all workers and accumulation steps"
    )
    accumulation_steps: int = Field(1, ge=1, description="number of smaller batches that form one optimizer step")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="precision of matrix products; auto: fp32 on a CPU; on a GPU bf16, or fp16 if it lacks bf16"
    )
    compile: bool = Field(False, description="compile the model with torch.compile; pays on a GPU only")
    half_life: str | None = Field(
        None,
        description="age before validation at which an event is sampled half as often, e.g. 12h; for items that age fast. An "
        "epoch has fewer examples: set more epochs",
    )
    refit: bool = Field(
        False,
        description="retrain on train and validation events, and the items that those add, for the best number of epochs, and keep that model",
    )
    metric: str = Field(
        "ndcg@10",
        description="validation metric that selects the best checkpoint: <name>@<K> for a retriever, e.g. recall@20; a click metric for a ranker (default auc)",
    )
    patience: int = Field(0, ge=0, description="validations without improvement before training stops; 0 = never stop")
    validate_every: int = Field(1, ge=1, description="epochs between validations")
    max_valid_queries: int | None = Field(
        None,
        ge=1,
        description="validate a retriever on about so many queries, of users drawn once by run.seed; unset: all queries",
    )
    save_every: str = Field(
        "10m",
        pattern=r"^(\d+(\.\d+)?[dhms]|[1-9]\d* steps|)$",
        description="time or steps between saves inside an epoch, from which training resumes: 10m, 500 steps; empty = only at the end of epochs; a save needs host memory for a copy of the training state",
    )
    start_from: str | None = Field(
        None,
        description="start from the weights of a checkpoint: previous = the one that the run serves, or its last one, of the same [model] on another dataset (from scratch if there is none); or the folder of another run or of a checkpoint; unset: from scratch",
    )
    replay: float = Field(
        0.2,
        ge=0,
        le=1,
        description="with start_from: share of the events that the checkpoint was trained on that an epoch samples, next to all newer ones; 1 where splits are not by time",
    )
    start_epochs: int | None = Field(
        None, ge=1, description="number of epochs of a training that starts from a checkpoint; unset: epochs"
    )
    resume: bool = Field(True, description="resume from the run's last checkpoint if there is one")

    @field_validator("start_from")
    @classmethod
    def _absolute(cls, value: str | None) -> str | None:
        return value if value in (None, "previous") else absolute(str(value))

    @field_validator("half_life")
    @classmethod
    def _duration(cls, value: str | None) -> str | None:
        return check_duration(value)


class ScalingConfig(Section):
    num_workers: int = Field(
        1,
        ge=0,
        description="training workers; 1 without a cluster trains in this process; 0 trains in this process on a cluster, too",
    )
    min_workers: int | None = Field(
        None,
        ge=1,
        description="on a cluster: fewest training workers, which train on after others were lost, or where there are no nodes "
        "for all within wait_seconds; unset: num_workers",
    )
    use_gpu: bool = Field(False, description="one GPU per training worker")
    cpus_per_worker: int = Field(1, ge=1, description="CPUs that Ray reserves per training worker")
    threads_per_worker: int = Field(
        0, ge=0, description="threads of torch per worker; 0 = cores of the machine divided by its workers"
    )
    fsdp: bool = Field(
        False,
        description="shard dense weights, gradients and optimizer state over the workers (FSDP2), for wide models",
    )
    reader: Literal["auto", "ray_data", "worker"] = Field(
        "auto",
        description="who reads shards during training: Ray Data tasks on any node, or each worker; auto: ray_data with several nodes or remote storage",
    )
    max_failures: int = Field(
        3,
        ge=0,
        description="with Ray workers: restarts after a worker or node was lost, without progress since the last one",
    )
    collective_timeout: float = Field(
        120,
        gt=0,
        description="with Ray workers: seconds after which a worker that hangs in a step, or does not answer, counts as lost",
    )
    wait_seconds: float = Field(
        900, ge=0, description="on a cluster: seconds to wait for nodes of the autoscaler or for resources in use"
    )


class RecencyConfig(RecentCountsOptions):
    """Order the lists by what is chosen right now, too (recray.retrieval.recency)."""

    enabled: bool = Field(
        False,
        description="order candidates by recent counts as of each query's time and by the model; adds popular items and latest choices after the user's last ones to the candidates; needs timestamps",
    )
    model_weight: float | None = Field(
        None,
        ge=0,
        description="weight of the model's score next to the log of the recent counts; unset: learned on the validation split by the index stage",
    )


class RetrievalConfig(Section):
    index: str = Field("auto", description="faiss factory string, or auto: chosen by the number of items")
    k: int = Field(100, ge=1, description="number of items retrieved per query")
    ranker: str | None = Field(
        None,
        description="folder <output>/<name> of a ranker's run on the same dataset: it re-ranks the k retrieved items",
    )
    item_knn_weight: float = Field(
        0.0,
        ge=0,
        description="blend with the item-item baseline: weight of the log of its share, added to the model's score / loss.temperature; 0 = model only; choose on `recray evaluate --split valid`",
    )
    recency: RecencyConfig = Field(RecencyConfig(), description="order lists by recent counts, too")
    recall_target: float = Field(
        0.95, gt=0, le=1, description="recall@k against exact search that the index must reach"
    )
    sweep_users: int = Field(2_000, ge=2, description="real queries for tuning the index: half to tune, half to report")
    use_gpu: Literal["auto", "never", "always"] = Field("auto", description="build and search the index on a GPU")

    @model_validator(mode="after")
    def _one_order(self) -> RetrievalConfig:
        if self.recency.enabled and self.item_knn_weight:
            raise ValueError(
                "recency.enabled and item_knn_weight order the same lists: set item_knn_weight = 0, or disable recency"
            )
        return self


class Config(Section):
    """The whole configuration of a run; every stage takes one."""

    run: RunConfig = Field(RunConfig(), description="the run: name, folder, seed")
    data: DataConfig = Field(DataConfig(), description="the event log and how it is prepared")
    model: SerializeAsAny[ModelOptions] = Field(description="the model; its keys depend on model.name")
    loss: SerializeAsAny[LossOptions] = Field(description="the training loss; its keys depend on loss.name")
    optim: OptimConfig = Field(OptimConfig(), description="optimizer and learning rate")
    training: TrainingConfig = Field(TrainingConfig(), description="epochs, batches, validation")
    scaling: ScalingConfig = Field(ScalingConfig(), description="workers, CPUs, GPUs")
    retrieval: RetrievalConfig = Field(RetrievalConfig(), description="index, blending and re-ranking")
    evaluation: EvaluationConfig = Field(EvaluationConfig(), description="metrics and baselines of the report")
    promotion: PromotionConfig = Field(PromotionConfig(), description="checks of `recray promote`")
    report: ReportConfig = Field(ReportConfig(), description="the page of a report")
    tracking: TrackingConfig = Field(TrackingConfig(), description="TensorBoard, MLflow and other trackers")
    tune: TuneConfig = Field(TuneConfig(), description="hyperparameter search")

    @model_validator(mode="wrap")
    @classmethod
    def _with_plugins(cls, value: Any, handler: ModelWrapValidatorHandler[Config]) -> Config:
        """Validates with run.plugins as the folder in which nested tables look plug-ins up."""
        if isinstance(value, dict):
            credentials.refuse(value, "")
        run = value.get("run", {}) if isinstance(value, dict) else getattr(value, "run", {})
        folder = run.get("plugins") if isinstance(run, dict) else getattr(run, "plugins", None)
        with registry.searching(folder if isinstance(folder, str) else None):
            config = handler(value)
        if isinstance(value, dict):
            # What `_defaults` filled in is not set: with_values() chooses it again if another model is given.
            for section, key in (("model", "name"), ("loss", "name"), ("training", "metric")):
                if section not in value:
                    config.model_fields_set.discard(section)
                elif isinstance(value[section], dict) and key not in value[section]:
                    getattr(config, section).model_fields_set.discard(key)
        return config

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, value: Any) -> Any:
        """The default model, and the loss and metric that follow from the model's family."""
        if not isinstance(value, dict):
            return value
        value = dict(value)
        _default(value, "model", "name", "two_tower")
        model = value["model"]
        family: Family = "retriever"
        with contextlib.suppress(ConfigError, AttributeError):  # reported by the validator of `model`
            family = registry.options("model", model["name"]).family if isinstance(model, dict) else model.family
        _default(value, "loss", "name", losses.DEFAULT[family])
        if family == "ranker":
            _default(value, "training", "metric", "auc")
        return value

    @field_validator("model", "loss", mode="before")
    @classmethod
    def _typed(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, Section):
            return value
        if not isinstance(value, dict):
            raise ValueError(f"must be a table: write [{info.field_name}] and name = ... below it")
        return typed("model" if info.field_name == "model" else "loss", str(value["name"]), value)

    @model_validator(mode="after")
    def _family(self) -> Config:
        """Loss and metrics must fit the model's family."""
        name, family = self.model.name, self.model.family
        if self.loss.family != family:
            allowed = ", ".join(loss for loss, options in losses.SHIPPED.items() if options.family == family)
            raise ValueError(
                f"loss.name = '{self.loss.name}' does not fit model.name = '{name}', a {family}: use {allowed}"
            )
        for key, metric in [
            ("training.metric", self.training.metric),
            *(("evaluation.metrics", m) for m in self.evaluation.metrics),
        ]:
            try:
                metrics.check(metric, family, at_k=key == "training.metric", folder=self.run.plugins)
            except ConfigError as error:
                raise ValueError(f"{key} = '{metric}': {error}") from error
        return self

    @model_validator(mode="after")
    def _sharded(self) -> Config:
        """What reads or writes all rows of a table at every step does not work if no worker holds all rows."""
        if self.model.embedding.mode != "row_sharded":
            return self
        if self.loss.scores_all_items:
            raise ValueError(
                f"loss.name = '{self.loss.name}' scores every item at every step, and with model.embedding.mode = "
                f"'row_sharded' no worker holds every item: use loss.name = 'sampled_softmax' (or gbce, "
                f"cosine_contrastive, bpr), or mode = 'dense'"
            )
        if self.optim.ema_decay:
            raise ValueError(
                "optim.ema_decay averages every row at every step, which model.embedding.mode = 'row_sharded' avoids: "
                "set optim.ema_decay = 0, or mode = 'dense'"
            )
        return self

    @model_validator(mode="after")
    def _kept(self) -> Config:
        if _JOB_FOLDER in self.run.output:
            raise ValueError(
                f"run.output = '{self.run.output}' is inside the Ray job's temporary working directory and will be "
                f"deleted with it: give s3://, gs://, or the absolute path of a folder that all nodes share"
            )
        return self

    @model_validator(mode="after")
    def _half_precision(self) -> Config:
        if self.training.precision == "fp16" and not self.scaling.use_gpu:
            raise ValueError(
                "training.precision = 'fp16' needs a GPU: set scaling.use_gpu = true, or use 'auto', 'fp32' or 'bf16'"
            )
        if self.training.precision == "fp16" and self.scaling.fsdp and self.scaling.num_workers > 1:
            raise ValueError("scaling.fsdp = true does not support fp16: set training.precision = 'bf16' or 'fp32'")
        return self

    @model_validator(mode="after")
    def _arithmetic(self) -> Config:
        workers = max(1, self.scaling.num_workers)
        least = self.scaling.min_workers
        if least is not None and least > workers:
            raise ValueError(f"scaling.min_workers = {least} exceeds scaling.num_workers = {workers}: lower it")
        parts = workers * self.training.accumulation_steps
        if self.training.global_batch_size % parts:
            size = self.training.global_batch_size
            raise ValueError(
                f"training.global_batch_size = {size} is not divisible by scaling.num_workers ({workers}) x "
                f"training.accumulation_steps ({self.training.accumulation_steps}) = {parts}: the remainder is "
                f"{size % parts}; use {size // parts * parts or parts} or {(size // parts + 1) * parts}"
            )
        return self

    @property
    def run_uri(self) -> str:
        """<output>/<name>: where the run's stages write."""
        return f"{self.run.output.rstrip('/')}/{self.run.name}"


def _default(value: dict[str, Any], section: str, key: str, default: str) -> None:
    """Sets a key of a section that leaves it out; whatever is no table is left to the section's own validation."""
    given = value.get(section, {})
    value[section] = {key: default, **given} if isinstance(given, dict) else given
