"""Contracts that every ranker keeps, found by name; and what is true of one model."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.collectives import OneProcess
from recray import registry
from recray.config import OptimConfig, parse_config
from recray.errors import ConfigError
from recray.layers.dice import Dice
from recray.layers.embedding import Mode, Table, TablePlan, use_plan
from recray.layers.hooks import run_hooks, step_hooks
from recray.loading.batch import Batch, ItemTable, Jagged, select
from recray.losses.base import Objective
from recray.losses.bce import per_impression
from recray.models import Ranker
from recray.records import CheckpointRecord, DatasetRecord, Feature
from recray.training import checkpoint
from recray.training.optim import Optimizers

ITEMS, USERS = 40, 20
MODELS = [name for name in registry.names("model") if registry.load("model", name).Options.family == "ranker"]
FEATURES = [
    Feature(name="country", role="user", kind="categorical", cardinality=5),
    Feature(name="age", role="user", kind="numeric"),
    Feature(name="tags", role="user", kind="list", cardinality=9),
    Feature(name="hour", role="context", kind="categorical", cardinality=26),
    Feature(name="temperature", role="context", kind="numeric"),
    Feature(name="brand", role="item", kind="categorical", cardinality=7),
    Feature(name="price", role="item", kind="numeric"),
    Feature(name="genres", role="item", kind="list", cardinality=6),
]


def _record(features: list[Feature]) -> DatasetRecord:
    return DatasetRecord(
        fingerprint="", num_items=ITEMS, num_users=USERS, counts={}, shards={}, seed=0, features=features
    )


def _lists(lengths: list[int], high: int, generator: torch.Generator) -> Jagged:
    offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    return Jagged(torch.randint(0, high, (int(offsets[-1]),), generator=generator), offsets)


def _items(features: bool) -> ItemTable:
    generator = torch.Generator().manual_seed(3)
    counts = torch.cat([torch.zeros(2), torch.arange(ITEMS - 2, 0, -1).float()])
    if not features:
        return ItemTable(counts)
    lengths = torch.randint(0, 4, (ITEMS,), generator=generator).tolist()
    return ItemTable(
        counts,
        {
            "brand": torch.randint(0, 7, (ITEMS,), generator=generator),
            "price": torch.randn(ITEMS, generator=generator),
            "genres": _lists(lengths, 6, generator),
        },
    )


def _batch(features: bool, lengths: tuple[int, ...] = (3, 0, 8, 1, 5, 2)) -> Batch:
    generator = torch.Generator().manual_seed(1)
    n = len(lengths)
    user, context = {}, {}
    if features:
        user = {
            "country": torch.randint(0, 5, (n,), generator=generator),
            "age": torch.randn(n, generator=generator),
            "tags": _lists([2, 0] + [1] * (n - 2), 9, generator),
        }
        context = {
            "hour": torch.randint(0, 26, (n,), generator=generator),
            "temperature": torch.randn(n, generator=generator),
        }
    history = _lists(list(lengths), ITEMS, generator)
    target = torch.randint(1, ITEMS, (n,), generator=generator)
    label = torch.tensor([i % 2 for i in range(n)]).float()
    return Batch(
        torch.arange(2, 2 + n),
        history,
        target,
        torch.ones(n),
        label_Q=label,
        user_features=user,
        context=context,
    )


def _model(name: str, features: bool = True, mode: Mode = "dense", **options: object) -> torch.nn.Module:
    """Tables of more than 4 rows live as `mode` says."""
    torch.manual_seed(0)
    module = registry.load("model", name)
    chosen = module.Options(**{"dim": 8, "history_length": 8, "hidden": [16, 8], **options})
    with use_plan(TablePlan(mode, small=4)):
        return module.build(chosen, _record(FEATURES if features else []), _items(features))


def _sync(model: torch.nn.Module) -> None:
    """The end of a step on a single worker."""
    run_hooks(step_hooks(model), lambda total: total, False)


def _objective(model: torch.nn.Module) -> Objective:
    return Objective(model, registry.options("loss", "bce")(), ItemTable(torch.ones(ITEMS)), OneProcess())


@pytest.mark.parametrize("features", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_shapes_and_protocol(name: str, features: bool) -> None:
    model = _model(name, features).eval()
    assert isinstance(model, Ranker) and model.examples == "impressions"
    logits = model.logits(_batch(features))
    assert logits.shape == (6,) and torch.isfinite(logits).all()
    nobody = model.logits(_batch(features, (0, 0)))
    assert nobody.shape == (2,) and torch.isfinite(nobody).all()


@torch.no_grad()
@pytest.mark.parametrize("min_history", [1, 3])
@pytest.mark.parametrize("name", MODELS)
def test_candidates_of_one_history_score_as_repeated_rows(name: str, min_history: int) -> None:
    model = _model(name, **({"min_history": min_history} if name == "din" else {})).eval()
    assert isinstance(model, Ranker)
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    batch, item_BC = (
        replace(_batch(True), label_Q=None, weight_Q=None),
        torch.randint(1, ITEMS, (6, 7), generator=generator),
    )
    rows = torch.arange(6).repeat_interleave(7)
    repeated = Batch(
        batch.user_B[rows],
        batch.history.take(rows),
        item_BC.view(-1),
        user_features={name: select(one, rows) for name, one in batch.user_features.items()},
        context={name: select(one, rows) for name, one in batch.context.items()},
    )
    found = model.candidate_logits(replace(batch, target_Q=None), item_BC)
    assert (found is None) == (name != "din")
    if found is not None:
        torch.testing.assert_close(found, model.logits(repeated).view(6, 7), atol=1e-5, rtol=1e-5)


# Names that are attributes of modules, that torch refuses, or that recray uses itself.
ODD = {"country": "user", "age": "type", "tags": "price.usd", "hour": "items", "temperature": "", "brand": "item"} | {
    "price": "two\nlines",
    "genres": "颜色",
}


@pytest.mark.parametrize("name", [*MODELS, "two_tower"])
def test_names_of_columns_make_no_difference(name: str) -> None:
    def renamed(features: dict[str, Any]) -> dict[str, Any]:
        return {ODD[column]: feature for column, feature in features.items()}

    module, batch, items = registry.load("model", name), _batch(True), _items(True)
    odd = replace(batch, user_features=renamed(batch.user_features), context=renamed(batch.context))
    record = _record([feature.model_copy(update={"name": ODD[feature.name]}) for feature in FEATURES])
    options = module.Options(dim=8, hidden=[8], user_embedding=True)
    torch.manual_seed(0)
    plain = module.build(options, _record(FEATURES), items).eval()
    torch.manual_seed(0)
    model = module.build(options, record, ItemTable(items.counts_N, renamed(items.features))).eval()
    if name == "two_tower":
        assert torch.equal(model.query_vectors(odd), plain.query_vectors(batch))
        assert torch.equal(model.item_vectors(torch.arange(ITEMS)), plain.item_vectors(torch.arange(ITEMS)))
    else:
        assert torch.equal(model.logits(odd), plain.logits(batch))


@pytest.mark.parametrize("mode", ["dense", "sparse_replicated", "row_sharded"])
@pytest.mark.parametrize("name", MODELS)
def test_overfits_a_small_set(name: str, mode: Mode) -> None:
    model = _model(name, mode=mode, user_embedding=True)
    objective, batch = _objective(model), _batch(True)
    optimizer = Optimizers(OptimConfig(learning_rate=0.02), model)
    optimizer.set_learning_rate(0.02)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    losses = []
    for _ in range(150):
        total, weight = objective(batch)
        (total / weight).backward()
        _sync(model)
        optimizer.step(scaler)
        losses.append(float((total / weight).detach()))
    assert sum(losses[-5:]) < 0.2 * sum(losses[:5])


@pytest.mark.parametrize("name", MODELS)
def test_rows_do_not_depend_on_each_other(name: str) -> None:
    """Nor on the way items are embedded: a large batch embeds the catalogue, a row the items it names."""
    model, batch = _model(name).eval(), _batch(True, (3, 0, 8, 1, 5, 2) * 4)
    assert batch.target_Q is not None and len(batch.target_Q) + len(batch.history.values) > ITEMS
    together = model.logits(batch)  # type: ignore[operator]
    for row in range(batch.num_rows):
        assert torch.allclose(model.logits(_row(batch, row))[0], together[row], atol=1e-5)  # type: ignore[operator]


def _row(batch: Batch, row: int) -> Batch:
    rows = torch.tensor([row])
    history = select(batch.history, rows)
    assert isinstance(history, Jagged) and batch.target_Q is not None
    return Batch(
        batch.user_B[rows],
        history,
        batch.target_Q[rows],
        torch.ones(1),
        label_Q=torch.ones(1),
        user_features={n: select(f, rows) for n, f in batch.user_features.items()},
        context={n: select(f, rows) for n, f in batch.context.items()},
    )


@pytest.mark.parametrize("name", MODELS)
def test_a_checkpoint_keeps_scores(name: str, tmp_path: Path) -> None:
    model = _model(name)
    model.logits(_batch(True))  # in training, where Dice learns its averages
    _sync(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    options = {"name": name, "dim": 8, "history_length": 8, "hidden": [16, 8]}
    config = parse_config({"model": options}).model_dump(mode="json")
    record = CheckpointRecord(config=config, epoch=1, step=1, rows=6, metric="auc", value=0.5, dataset_uri="")
    files = checkpoint.save_weights(str(tmp_path), model.state_dict())
    checkpoint.save_record(str(tmp_path), record, _record(FEATURES), _items(True), files)
    other, _ = checkpoint.load_model(str(tmp_path))
    assert torch.equal(model.eval().logits(_batch(True)), other.logits(_batch(True)))  # type: ignore[operator]


def test_dice_averages_what_it_saw() -> None:
    dice, x = Dice(3), torch.randn(1000, 3) * 2 + 5
    fresh = dice(x)
    assert torch.equal(fresh, dice(x)), "averages are those of the batches before"
    _sync(torch.nn.Sequential(dice))
    assert torch.allclose(dice.mean, x.mean(0), atol=1e-4)
    assert torch.allclose(dice.var, x.var(0, unbiased=False), rtol=1e-3)
    dice(x[:0])
    _sync(dice)
    dice(x + 1)
    dice.discard()
    _sync(dice)
    assert torch.allclose(dice.mean, x.mean(0), atol=1e-4)


def test_din_averages_short_histories() -> None:
    models = [_model("din", min_history=n).eval() for n in (4, 100, 1)]
    batch = _batch(True)
    fresh = [model.logits(batch) for model in models]  # type: ignore[operator]
    assert torch.allclose(fresh[0], fresh[1], atol=1e-4), "attention begins as mean pooling"
    for model in models:
        model.attention.out.weight.data.fill_(0.5)  # type: ignore[union-attr, operator]
    both = [model.logits(batch) for model in models]  # type: ignore[operator]
    long = batch.history.lengths() >= 4
    assert torch.allclose(both[0][~long], both[1][~long], atol=1e-6)
    assert torch.allclose(both[0][long], both[2][long], atol=1e-6)
    assert not torch.allclose(both[0][long], both[1][long], atol=1e-4)


def test_dlrm_refuses_widths_of_its_own() -> None:
    with pytest.raises(ValueError, match="inner products"):
        registry.load("model", "dlrm").Options(feature_dims={"brand": 4})
    with pytest.raises(ConfigError, match=r"feature_dims names 'colour', which is not a column; allowed: age, brand"):
        _model("dcn_v2", feature_dims={"colour": 4})
    assert _model("dcn_v2", feature_dims={"brand": 4, "item": 12}).logits(_batch(True)).shape == (6,)  # type: ignore[operator]


@pytest.mark.parametrize("mode", ["sparse_replicated", "row_sharded"])
def test_only_touched_rows_move(mode: Mode) -> None:
    model = _model("dcn_v2", mode=mode, history="none")
    table = model.inputs.item.ids  # type: ignore[union-attr]
    assert isinstance(table, Table) and table.mode == mode
    before, batch = table.weight.detach().clone(), _batch(True)
    optimizer = Optimizers(OptimConfig(embedding_decay=0.1), model)
    optimizer.set_learning_rate(0.1)
    loss, _ = _objective(model)(batch)
    loss.backward()
    _sync(model)
    optimizer.step(torch.amp.GradScaler("cpu", enabled=False))
    moved = (table.weight.detach() != before).any(dim=1).nonzero()[:, 0].tolist()
    assert batch.target_Q is not None and moved == sorted(set(batch.target_Q.tolist()))


def test_click_loss_by_hand() -> None:
    z, y, one = torch.tensor([0.3, -1.0]), torch.tensor([1.0, 0.0]), torch.ones(2)
    plain = per_impression(registry.options("loss", "bce")(), z, y, one)
    assert plain.tolist() == pytest.approx([0.5543552, 0.3132617], rel=1e-6)
    smooth = per_impression(registry.options("loss", "bce")(label_smoothing=0.2, positive_weight=3.0), z, y, one)
    assert smooth.tolist() == pytest.approx([3 * (0.5543552 + 0.1 * 0.3), 0.3132617 + 0.1 * 1.0], rel=1e-5)
    torch.manual_seed(0)
    pairs = [per_impression(registry.options("loss", "bce")(pairwise_weight=2.0), z, y, one) - plain for _ in range(20)]
    for pair in pairs:  # the rows are paired with each other or with themselves
        assert pair.tolist() == pytest.approx([2 * 0.2410084] * 2, rel=1e-4) or not pair.any()
    assert any(pair.any() for pair in pairs)


@pytest.mark.parametrize("mode", ["dense", "sparse_replicated", "row_sharded"])
def test_clipping_equals_torchs_on_dense_gradients(mode: Mode) -> None:
    model, batch = _model("dcn_v2", mode=mode), _batch(True)
    loss, _ = _objective(model)(batch)
    loss.backward()
    _sync(model)
    dense = [parameter.grad.to_dense().clone() for parameter in model.parameters() if parameter.grad is not None]
    holders = [torch.nn.Parameter(torch.zeros_like(gradient)) for gradient in dense]
    for holder, gradient in zip(holders, dense, strict=True):
        holder.grad = gradient
    torch.nn.utils.clip_grad_norm_(holders, 0.01)
    Optimizers(OptimConfig(), model).clip(torch.amp.GradScaler("cpu", enabled=False), 0.01)
    mine = [parameter.grad.to_dense() for parameter in model.parameters() if parameter.grad is not None]
    for found, holder in zip(mine, holders, strict=True):
        assert holder.grad is not None and torch.allclose(found, holder.grad, atol=1e-7)
