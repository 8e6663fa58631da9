"""The training loop on a dataset of a few users, without Ray: resuming, patience, hooks, and what must not be saved."""

import gc
import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from helpers.datasets import EVENTS, USERS, small_dataset
from recray import storage
from recray.artifacts import DATASET, Run
from recray.config import Config, parse_config
from recray.data.dataset import PreparedDataset
from recray.errors import ConfigError, DataError, LineageError, RecrayError, StorageError
from recray.layers.hooks import run_hooks, step_hooks
from recray.records import CheckpointRecord
from recray.retrieval.embed import sample_queries
from recray.training import launch, optim
from recray.training import trainer as trainers
from recray.training.check import check_validation
from recray.training.checkpoint import load_model
from recray.training.console import Progress
from recray.training.distributed import LocalContext, data_parallel, releasing_ddp
from recray.training.phase import Phase
from recray.training.trainer import Trainer
from recray.training.validate import validate

OWN_MODEL = '''
import torch
from torch import Tensor, nn

from recray.config import ModelOptions
from recray.layers.embedding import Table
from recray.models import Retriever


class Options(ModelOptions):
    pass


class Model(Retriever):
    """A retriever whose queries are centred by a running mean of its own, which a step hook moves."""

    examples = "events"

    def __init__(self, dim, num_items):
        super().__init__()
        self.items = Table(num_items, dim)
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("seen", torch.zeros(dim + 1, dtype=torch.float64), persistent=False)

    def query_vectors(self, batch):
        x = self.items(batch.user_B % 10 + 2)
        if self.training:
            rows = torch.tensor([float(len(x))], dtype=torch.float64)
            self.seen += torch.cat([x.detach().double().sum(0), rows])
        return x - self.mean

    def item_vectors(self, item_ids):
        return self.items(item_ids.flatten())

    def after_backward(self, scaled):
        return self.seen

    def after_sum(self, total):
        self.mean.lerp_((total[:-1] / total[-1]).float(), 0.5)
        self.seen.zero_()

    def discard(self):
        self.seen.zero_()


def build(options, dataset, items):
    return Model(options.dim, items.num_items)
'''


def _config(folder: Path, *overrides: str, model: str = "two_tower") -> Config:
    table = {
        "run": {"output": str(folder / "runs"), "dataset": str(folder / "data")},
        "model": {"name": model, "dim": 4, "history_length": 5},
        "training": {"epochs": 4, "global_batch_size": 16},
        "scaling": {"num_workers": 0},
    }
    return parse_config(table, overrides)


def _trainer(folder: Path, *overrides: str, model: str = "two_tower") -> Trainer:
    config = _config(folder, *overrides, model=model)
    phase = Phase("train", config.training.epochs, f"{config.run_uri}/epochs")
    return Trainer(config, PreparedDataset.open(str(config.run.dataset)), phase, LocalContext())


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The loss of every step that is trained."""
    found: list[float] = []
    step = Progress.step

    def keep(self: Progress, loss: float, events: float, waited: float) -> None:
        found.append(loss)
        step(self, loss, events, waited)

    monkeypatch.setattr(Progress, "step", keep)
    return found


def test_a_resumed_phase_takes_the_steps_of_an_uninterrupted_one(tmp_path: Path, losses: list[float]) -> None:
    small_dataset(tmp_path / "data")
    keys = (
        "model.hidden=[8]",
        "model.dropout=0.3",
        "optim.schedule=linear",
        "optim.ema_decay=0.8",
        "optim.clip_norm=0.3",
    )
    whole = _trainer(tmp_path / "a", *keys, f"run.dataset={tmp_path}/data")
    entries: list[dict[str, float]] = []
    progress = whole.fit(entries.append)
    expected, losses[:] = list(losses), []
    first = _trainer(tmp_path / "b", *keys, f"run.dataset={tmp_path}/data")
    assert first.fit(until=2).epoch == 2
    second = _trainer(tmp_path / "b", *keys, f"run.dataset={tmp_path}/data")
    second.state.load(second.phase.folder(second.phase.last_epoch()))
    again = second.fit()
    assert losses == expected and len(losses) == 4 * whole.data.steps
    assert (again.best_epoch, again.best_value, again.step) == (progress.best_epoch, progress.best_value, progress.step)
    for name, value in second.state.ema.shadow.items():
        assert torch.equal(value, whole.state.ema.shadow[name]), name
    assert [entry["epoch"] for entry in entries] == [1.0, 2.0, 3.0, 4.0]
    record = CheckpointRecord.read(whole.phase.folder(4))
    assert record.best_epoch == progress.best_epoch and record.rows == 4 * USERS * (EVENTS - 2)


def test_the_best_and_the_two_newest_epochs_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_dataset(tmp_path / "data")
    values = iter([0.4, 0.1, 0.2, 0.3])
    monkeypatch.setattr(trainers, "validate", lambda *_: next(values))
    trainer = _trainer(tmp_path)
    trainer.fit()
    assert storage.list_folders(trainer.phase.root) == ["epoch-0001", "epoch-0003", "epoch-0004"]
    assert trainer.phase.last_epoch() == 4 and Phase("train", 3, trainer.phase.root).last_epoch() == 3
    (Path(trainer.phase.folder(4)) / "checkpoint.json").unlink()
    assert trainer.phase.last_epoch() == 3, "an epoch without its record was interrupted"
    assert Phase("train", 4, f"{tmp_path}/nothing").last_epoch() == 0


@pytest.mark.parametrize(
    ("metric", "values", "epochs"),
    [("ndcg@10", [0.3, 0.2, 0.1, 0.4], 3), ("ndcg@10", [0.1, 0.2, 0.3, 0.1], 4)],
)
def test_patience(
    metric: str, values: list[float], epochs: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_dataset(tmp_path / "data")
    found = iter(values)
    monkeypatch.setattr(trainers, "validate", lambda *_: next(found))
    progress = _trainer(tmp_path, "training.patience=2", f"training.metric={metric}").fit()
    assert progress.epoch == epochs and progress.best_epoch == 1 + values.index(max(values[:epochs]))


def test_validation_every_third_epoch_and_after_the_last(tmp_path: Path) -> None:
    small_dataset(tmp_path / "data")
    history = _trainer(tmp_path, "training.validate_every=3").fit().history
    assert ["ndcg@10" in entry for entry in history] == [False, False, True, True]


def test_a_models_own_hook_ends_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_models").mkdir()
    (tmp_path / "own_models" / "centred.py").write_text(OWN_MODEL)
    monkeypatch.syspath_prepend(tmp_path)
    small_dataset(tmp_path / "data")
    trainer = _trainer(tmp_path, "training.epochs=1", "training.accumulation_steps=2", model="own_models.centred")
    model: Any = trainer.state.model
    assert trainer.hooks == step_hooks(model) and model in trainer.hooks
    moved: list[tuple[float, Tensor]] = []
    real = type(model).after_sum

    def after_sum(self: Any, total: Tensor) -> None:
        before = self.mean.clone()
        real(self, total)
        moved.append((float(total[-1]), self.mean - before))

    monkeypatch.setattr(type(model), "after_sum", after_sum)
    trainer.fit()
    assert len(moved) == trainer.data.steps, "once a step, not once a micro-batch"
    assert sum(rows for rows, _ in moved) >= USERS * (EVENTS - 2)
    assert all(bool(change.any()) for _, change in moved)
    stored = torch.equal(model.mean, trainer.state.model.state_dict()["mean"])
    assert stored and not model.seen.any()
    sys.modules.pop("own_models.centred")


class _Mean(nn.Module):
    """A running mean, as in the docstring of recray.layers.hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.mean: Tensor
        self.seen: Tensor
        self.register_buffer("mean", torch.zeros(1))
        self.register_buffer("seen", torch.zeros(2, dtype=torch.float64), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen += torch.stack([x.detach().double().sum(), torch.tensor(float(x.numel())).double()])
        return x - self.mean

    def after_backward(self, scaled: bool) -> Tensor:
        return self.seen

    def after_sum(self, total: Tensor) -> None:
        self.mean.lerp_((total[0] / total[1]).float(), 0.1)
        self.seen.zero_()

    def discard(self) -> None:
        self.seen.zero_()


def test_hooks_see_what_all_workers_saw_in_one_sum() -> None:
    workers = [nn.Sequential(_Mean(), nn.Linear(1, 1), _Mean()) for _ in range(2)]
    workers[1].load_state_dict(workers[0].state_dict())
    x = torch.arange(6.0)[:, None]
    for model, rows in zip(workers, (x[:2], x[2:]), strict=True):
        model(rows)
    seen = [torch.cat([hook.after_backward(False) for hook in step_hooks(model)]) for model in workers]
    sums: list[Tensor] = []

    def total(_: Tensor) -> Tensor:
        sums.append(seen[0] + seen[1])
        return sums[-1]

    for model in workers:
        run_hooks(step_hooks(model), total, scaled=False)
    assert len(sums) == 2, "one sum a step and worker, of both hooks"
    first, linear, last = workers[0]
    assert float(first.mean) == pytest.approx(0.1 * float(x.mean()))  # type: ignore[arg-type]
    assert float(last.mean) == pytest.approx(0.1 * float(linear(x).mean().detach()), rel=1e-5)  # type: ignore[arg-type]
    for name, value in workers[0].state_dict().items():
        assert torch.equal(value, workers[1].state_dict()[name]), name


def test_a_metric_of_clicks_is_read_from_a_state_as_it_was_saved(tmp_path: Path) -> None:
    """normalized_entropy is computed as a numpy scalar, which state.pt must not hold."""
    small_dataset(tmp_path / "data", labelled=True)
    trainer = _trainer(tmp_path, "training.metric=normalized_entropy", "training.epochs=1", model="din")
    progress = trainer.fit()
    trainer.state.load(trainer.phase.folder(1))
    assert trainer.state.progress == progress and type(progress.best_value) is float


@pytest.mark.parametrize("model", ["two_tower", "din"])
def test_a_validation_shard_with_fewer_users_than_workers(model: str, tmp_path: Path) -> None:
    """Worker 1 of 2 has no user; it must still take part, and add nothing."""
    dataset = small_dataset(tmp_path / "data", valid_users=1, labelled=model == "din")
    trainer = _trainer(tmp_path, model=model)
    context: Any = LocalContext()
    alone = validate(trainer.state.model, dataset, context, trainer.config)
    context.world_size, found = 2, []
    for rank in range(2):
        context.rank = rank
        sums: list[Tensor] = []
        context.sum = lambda values, sums=sums: sums.append(values.clone()) or values  # type: ignore[func-returns-value]
        context.all_gather = lambda rows, sums=sums: sums.append(rows.clone()) or rows  # type: ignore[func-returns-value]
        try:
            found.append(validate(trainer.state.model, dataset, context, trainer.config))
        except DataError as error:  # of no impressions there is no AUC; all workers together have one
            assert "0 clicks in 0 impressions" in str(error)
        if rank == 1:
            assert all(len(one) == 0 or not one.any() for one in sums)
    assert found[0] == alone


@pytest.mark.parametrize("where", ["weights", "averages", "exp_avg", "exp_avg_sq"])
def test_weights_that_overflow_are_neither_saved_nor_resumed_from(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_dataset(tmp_path / "data")
    trainer = _trainer(tmp_path, "optim.ema_decay=0.5")
    real, last_step = trainer.state.ema.update, 2 * trainer.data.steps

    def update() -> None:
        real()
        if trainer.state.progress.step + 1 == last_step:  # after its loss, which is finite
            held = {
                "weights": trainer.state.model.state_dict,
                "averages": lambda: trainer.state.ema.shadow,
            }.get(where, lambda: dict(trainer.state.optimizers.moments()))()
            suffix = f" ({where})" if where.startswith("exp") else ""
            held[f"item_table.weight{suffix}"][3, 1] = torch.inf

    monkeypatch.setattr(trainer.state.ema, "update", update)
    with pytest.raises(
        RecrayError, match=r"weights are not finite after epoch 2 \(item_table.weight.*\), .*not saved: lower"
    ):
        trainer.fit()
    assert trainer.phase.last_epoch() == 1 and storage.list_folders(trainer.phase.root) == ["epoch-0001"]


def test_an_epoch_on_disk_that_is_not_finite_is_not_resumed_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as an earlier version may have left."""

    def poison(self: Trainer) -> None:
        with torch.no_grad():
            next(self.state.model.parameters())[2] = torch.nan

    small_dataset(tmp_path / "data")
    monkeypatch.setattr(Trainer, "_check_weights", poison)
    monkeypatch.setattr(trainers, "validate", lambda *_: 0.5)
    _trainer(tmp_path).fit(until=1)
    other = _trainer(tmp_path)
    with pytest.raises(LineageError, match=r"epoch-0001 holds values that are not finite \(.*training.resume = false"):
        launch._resume(other.state, other.phase, LocalContext())


@pytest.mark.parametrize(
    ("model", "metric"), [("two_tower", "ndcg@10"), ("sasrec", "ndcg@10"), ("din", "auc"), ("din", "log_loss")]
)
def test_scores_that_are_not_finite_are_refused(model: str, metric: str, tmp_path: Path) -> None:
    dataset = small_dataset(tmp_path / "data", labelled=model == "din")
    trainer = _trainer(tmp_path, f"training.metric={metric}", model=model)
    with torch.no_grad():
        for parameter in trainer.state.model.parameters():
            parameter.fill_(1e38)  # finite weights, products that are not
    with pytest.raises(RecrayError, match=r"validation scores that are not finite, so .* means nothing"):
        validate(trainer.state.model, dataset, LocalContext(), trainer.config)
    assert trainer.state.model.training


def test_nothing_is_published_by_a_training_that_diverges(tmp_path: Path) -> None:
    dataset = small_dataset(tmp_path / "data")
    config = _config(tmp_path, "optim.name=sgd", "optim.learning_rate=1e30")
    dataset.record.model_copy(update={"keys": DATASET.values(config)}).write(dataset.uri)
    with pytest.raises(RecrayError, match=r"(loss is|weights are not|scores that are not) .*lower optim.learning_rate"):
        launch.train(config)
    assert "checkpoint" not in Run(config).current()
    assert not list(Path(config.run_uri).rglob("checkpoint.json"))


def test_a_ranker_without_labels_is_refused(tmp_path: Path) -> None:
    small_dataset(tmp_path / "data")
    with pytest.raises(ConfigError, match=r"is a ranker and needs click labels; .* has none: set data.columns.label"):
        _trainer(tmp_path, model="din")


def test_half_life_without_times_is_refused(tmp_path: Path) -> None:
    small_dataset(tmp_path / "data")
    with pytest.raises(ConfigError, match=r"half_life = '2d' needs timestamps, and .* has positions only"):
        _trainer(tmp_path, "training.half_life=2d").fit()


@pytest.mark.parametrize("fails", [False, True])
def test_ddp_is_gone_before_the_process_group_is_destroyed(fails: bool, tmp_path: Path) -> None:
    """Else its reducer owns the group, and gloo's destructor can deadlock with the GIL."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    alive: list[weakref.ref[nn.Module]] = []

    def work() -> None:
        ddp = data_parallel(nn.Linear(2, 1))
        alive.append(weakref.ref(ddp))
        ddp(torch.ones(3, 2)).sum().backward()
        if fails:
            raise RecrayError("as if training diverged")

    gc.disable()
    try:
        with releasing_ddp():
            work()
    except RecrayError as error:
        assert fails and alive[0]() is None, error
    finally:
        gc.enable()
        gone = alive[0]() is None
        dist.destroy_process_group()
    assert gone


def _rewrite_valid(dataset: PreparedDataset, rows: list[tuple[list[int], int]], **columns: list[list[float]]) -> None:
    """Items and number of targets of each user of the validation split."""
    table = {
        "user": pa.array(np.arange(2, 2 + len(rows), dtype=np.int32)),
        "item": pa.array([items for items, _ in rows], pa.list_(pa.int32())),
        "time": pa.array([list(range(len(items))) for items, _ in rows], pa.list_(pa.int64())),
        "num_targets": pa.array([targets for _, targets in rows], pa.int32()),
        **{name: pa.array(values, pa.list_(pa.float32())) for name, values in columns.items()},
    }
    storage.write_table(dataset.file_uri("valid/part.parquet"), pa.table(table))


NEW, UNKNOWN, SEEN = ([4, 5], 2), ([4, 5, 1, 1], 2), ([4, 5, 6, 5, 6], 2)


@pytest.mark.parametrize(
    ("rows", "overrides", "message"),
    [
        ([NEW] * 3, [], r"3 come from new users\): validate on a shorter period, or .*'leave_last'"),
        (
            [UNKNOWN, NEW, UNKNOWN],
            [],
            r"2 have unknown items only, 1 come from new users\): lower data.min_item_events",
        ),
        ([SEEN], [], r"1 have items only that the user has seen\): set evaluation.filter_seen = false"),
        ([([4], 1), ([], 0)], ["evaluation.queries=event"], r"1 come from new users"),
        ([], [], r"there is none\): check data.split"),
        ([SEEN], ["evaluation.filter_seen=false"], ""),
        ([NEW, SEEN, ([4, 5], 1)], [], ""),
        ([NEW], ["evaluation.queries=event"], ""),  # the second event has the first as its history
    ],
)
def test_a_validation_split_that_no_model_can_answer(
    rows: list[tuple[list[int], int]], overrides: list[str], message: str, tmp_path: Path, losses: list[float]
) -> None:
    dataset = small_dataset(tmp_path / "data")
    _rewrite_valid(dataset, rows)
    config = _config(tmp_path, *overrides, "training.epochs=1")
    dataset.record.model_copy(update={"keys": DATASET.values(config)}).write(dataset.uri)
    if not message:
        assert launch.train(config).epoch == 1
        return
    with pytest.raises(DataError, match=rf"no query .* can be answered, so ndcg@10 would be 0 .*{message}"):
        launch.train(config)
    assert not losses, "it was seen before the first step"


ONE, TWO = ([4, 5, 6], 2), ([4, 5, 7], 2)


@pytest.mark.parametrize(
    ("metric", "labels", "weights", "clicks"),
    [
        ("auc", [[1, 1, 1], [1, 1, 1]], None, "4 clicks in 4"),
        ("auc", [[1, 0, 0], [1, 0, 0]], None, "0 clicks in 4"),  # history is not looked at
        ("normalized_entropy", [[1, 0, 0], [1, 0, 1]], [[1, 1, 1], [1, 1, 0]], "0 clicks in 3"),
        ("gauc", [[1, 1, 1], [1, 0, 0]], None, "2 clicks in 4 impressions and no user with both"),
        ("log_loss", [[1, 1, 1], [1, 1, 1]], [[1, 0, 0], [1, 0, 0]], "0 clicks in 0"),
        ("auc", [[1, 1, 1], [1, 0, 0]], None, ""),
        ("gauc", [[1, 1, 0], [1, 0, 0]], None, ""),
        ("log_loss", [[1, 1, 1], [1, 1, 1]], None, ""),
    ],
)
def test_a_validation_split_that_tells_no_click_metric(
    metric: str, labels: list[list[float]], weights: list[list[float]] | None, clicks: str, tmp_path: Path
) -> None:
    dataset = small_dataset(tmp_path / "data", labelled=True)
    columns = {"label": labels} | ({"weight": weights} if weights else {})
    _rewrite_valid(dataset, [ONE, TWO], **columns)
    names = dict.fromkeys(columns, "list<float>")
    dataset = PreparedDataset(dataset.uri, dataset.record.model_copy(update={"columns": names}))
    config = _config(tmp_path, f"training.metric={metric}", model="din")
    if not clicks:
        check_validation(config, dataset)
        return
    with pytest.raises(DataError, match=rf"{metric} needs clicks and non-clicks, .* {clicks}"):
        check_validation(config, dataset)


def test_an_index_is_tuned_on_training_users_where_validation_has_only_new_ones(tmp_path: Path) -> None:
    dataset = small_dataset(tmp_path / "data")
    trainer = _trainer(tmp_path)
    expected = sample_queries(trainer.state.model, dataset, trainer.config)  # type: ignore[arg-type]
    assert len(expected) == USERS
    _rewrite_valid(dataset, [NEW] * 3)
    found = sample_queries(trainer.state.model, dataset, trainer.config)  # type: ignore[arg-type]
    assert found.shape == (USERS, 4) and np.isfinite(found).all() and len(np.unique(found, axis=0)) == USERS


@pytest.mark.parametrize("name", ["a b", "ü#1?", "50%:x"])
def test_a_folder_may_have_any_name(name: str, tmp_path: Path) -> None:
    dataset = small_dataset(tmp_path / name / "data")
    config = _config(tmp_path / name, "training.epochs=1")
    dataset.record.model_copy(update={"keys": DATASET.values(config)}).write(dataset.uri)
    record = launch.train(config)
    assert load_model(Run(config).checkpoint().uri)[1] == record and launch.train(config) == record


def test_two_trainings_of_one_artefact(tmp_path: Path) -> None:
    """The second one starts while the first one trains; the first one is not disturbed."""
    dataset = small_dataset(tmp_path / "data")
    config = _config(tmp_path)
    dataset.record.model_copy(update={"keys": DATASET.values(config)}).write(dataset.uri)
    refused: list[str] = []

    def second(entry: dict[str, float]) -> None:
        with pytest.raises(StorageError, match=r"is being written by process \d+ on .*another run.name") as error:
            launch.train(_config(tmp_path, "training.resume=false"))
        refused.append(str(error.value))

    assert len(launch.train(config, second).history) >= 1 and len(refused) == 4
    assert not list(tmp_path.rglob("*.lock"))


def test_training_examples_without_weight_teach_nothing(tmp_path: Path) -> None:
    dataset = small_dataset(tmp_path / "data")
    table = storage.read_table(dataset.file_uri("train/part.parquet"))
    weight = pa.array([[0.0] * EVENTS] * USERS, pa.list_(pa.float32()))
    storage.write_table(dataset.file_uri("train/part.parquet"), table.append_column("weight", weight))
    trainer = _trainer(tmp_path)
    with pytest.raises(DataError, match=r"all 72 training examples have weight 0, .*check data.columns.weight"):
        trainer.fit()
    assert not trainer.phase.last_epoch()


def test_a_warm_up_longer_than_training_is_refused_before_it(tmp_path: Path, losses: list[float]) -> None:
    small_dataset(tmp_path / "data")  # 5 steps an epoch
    _trainer(tmp_path, "optim.warmup_steps=20")
    with pytest.raises(
        ConfigError, match=r"warmup_steps = 21 is more than the 20 steps .*4 epochs of 5.* example to 2"
    ):
        _trainer(tmp_path, "optim.warmup_steps=21")
    assert not losses


@pytest.mark.parametrize(
    ("name", "precision", "clip", "advice"),
    [
        ("cpu", "auto", 0.0, "lower optim.learning_rate, or set optim.clip_norm = 1.0"),
        (
            "cuda",
            "fp16",
            0.0,
            "lower optim.learning_rate, or set optim.clip_norm = 1.0, or set training.precision = 'fp32'",
        ),
        ("cuda", "bf16", 1.0, "lower optim.learning_rate, or set training.precision = 'fp32'"),
        ("cuda", "fp32", 2.0, "lower optim.learning_rate"),
    ],
)
def test_advice_is_what_is_not_set_yet(name: str, precision: str, clip: float, advice: str) -> None:
    table = {"training": {"precision": precision}, "optim": {"clip_norm": clip}, "scaling": {"use_gpu": name == "cuda"}}
    assert optim.steadier(parse_config(table), torch.device(name)) == advice


def test_a_loss_scale_that_fp16_cannot_raise_again_ends_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients that always overflow halve it at every step, and no step is taken."""
    small_dataset(tmp_path / "data")
    trainer = _trainer(tmp_path)
    for scale, found in ((2.0**-23, []), (2.0**-25, ["the loss scale"])):
        monkeypatch.setattr(trainer.state, "scaler", torch.amp.GradScaler("cpu", init_scale=scale, enabled=True))
        assert trainer.state.non_finite() == found
