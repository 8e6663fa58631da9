"""A training that starts from the checkpoint of another dataset: rows found by key, new ones at a mean, nights in a chain."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from torch import Tensor

import recray
from helpers.growing_log import growing_config, write_day
from helpers.inline_tasks import inline_prepare
from helpers.ranks import RankContext, run_ranks
from recray import inventory
from recray.artifacts import CHECKPOINT, Run, artifacts_of
from recray.config import Config, with_values
from recray.data.dataset import PreparedDataset
from recray.errors import ConfigError, LineageError
from recray.ids import FIRST_ITEM
from recray.layers.embedding import TablePlan, use_plan
from recray.lineage import lineage
from recray.loading.batch import ItemTable
from recray.loading.collate import item_table
from recray.loading.examples import Decay
from recray.models import build_model
from recray.records import CheckpointRecord
from recray.training import checkpoint, embedding_plan, launch, trainer, warm_start
from recray.training.launch import Work
from recray.training.sharded_tables import ShardedTables
from recray.training.warm_start import WarmStart
from recray.verification import verify

_NIGHTLY = ("training.start_from=previous", "training.start_epochs=1", "optim.warmup_steps=20")


@pytest.fixture(scope="module")
def nights(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, list[CheckpointRecord]]:
    """Three nights, of which the second one is a refit."""
    folder = tmp_path_factory.mktemp("nights")
    write_day(folder / "clicks", 0)
    records = []
    for day in range(1, 4):
        write_day(folder / "clicks", day)
        config = growing_config(folder, *_NIGHTLY, f"training.refit={str(day == 2).lower()}")
        inline_prepare(config)
        records.append(recray.train(config))
    return config, records


def test_nights_follow_one_another(nights: tuple[Config, list[CheckpointRecord]], tmp_path: Path) -> None:
    config, (first, second, third) = nights
    assert len(first.parents) == 1 and first.epoch == 3  # from scratch
    assert second.parents[1:] == [first.id] and third.parents[1:] == [second.id] and second.epoch == 1
    assert recray.train(config).id == third.id  # the log has not grown
    node = lineage(Run(config).checkpoint().uri)
    assert {first.id, second.id, third.id} < {one.id for one in node.chain()} and node.complete
    assert third.config["optim"]["learning_rate"] == 0.02  # as given, so that the run finds it again
    recray.index(config)
    assert recray.evaluate(config).metrics["model"]["ndcg@10"].value > 0.1
    # Without the checkpoints that it came from the last one is found and used as before.
    copied = with_values(config, {"run.output": str(tmp_path)})
    shutil.copytree(config.run_uri, copied.run_uri, symlinks=True)
    pruned = {entry.identity for entry in inventory.prune(copied.run_uri, 1)}
    assert {first.identity, second.identity} <= pruned
    # Their records are left, and so is the chain to the raw files.
    left = lineage(Run(copied).checkpoint().uri)
    assert left.complete and {one.id for one in left.chain()} == {one.id for one in node.chain()}
    assert {one.id for one in left.chain() if one.pruned} >= {first.id, second.id}
    assert not any(one.problems for one in verify(copied.run_uri))
    assert recray.train(copied).id == Run(copied).checkpoint().record.id == third.id


def test_an_epoch_samples_new_events_and_a_share_of_the_old(
    nights: tuple[Config, list[CheckpointRecord]],
) -> None:
    config, (first, second, third) = nights
    run = Run(config)
    train, seen = (PreparedDataset.at(run.dataset_of(one)).record for one in (third, second))
    until = seen.starts("test")  # after a refit
    rows = pa.concat_tables(PreparedDataset.at(run.dataset_of(third)).iter_tables("train"))
    times = rows["time"].combine_chunks().flatten().to_numpy()
    old = int((times < until).sum())
    assert 0 < old < len(times) == train.counts["events_train"]
    # Per shard the number is rounded down.
    assert third.rows == pytest.approx(len(times) - old + 0.2 * old, abs=len(train.shards["train"]))
    decay = Decay(until=100, half_life=None, new_from=50, replay=0.25)
    assert decay(torch.tensor([10, 49, 50, 99]).numpy()).tolist() == [0.25, 0.25, 1, 1]
    assert first.rows == 3 * PreparedDataset.at(run.dataset_of(first)).record.counts["events_train"]


def _starts(config: Config, old: CheckpointRecord, new: CheckpointRecord) -> tuple[WarmStart, PreparedDataset]:
    """From the checkpoint `old`, on the dataset of `new`."""
    run = Run(config)
    start = WarmStart.of(f"{run.uri}/checkpoint/{old.identity}", PreparedDataset.at(run.dataset_of(old)))
    return start, PreparedDataset.at(run.dataset_of(new))


def _expected(start: WarmStart, new: PreparedDataset, source: Tensor) -> Tensor:
    """Item rows by key, in a plain loop: those of new items are the mean of all that are known."""
    old = PreparedDataset.open(start.dataset_uri)
    keys, known = (one.items()["item"].to_pylist() for one in (new, old))
    common = [key for key in keys[FIRST_ITEM:] if key in known]
    assert 20 < len(common) < len(keys) - FIRST_ITEM
    mean = torch.stack([source[known.index(key)] for key in common]).mean(0)
    return torch.stack([source[known.index(key)] if key in known else mean for key in keys[FIRST_ITEM:]])


def test_rows_are_found_by_key(nights: tuple[Config, list[CheckpointRecord]]) -> None:
    config, (first, _, third) = nights
    start, new = _starts(config, first, third)
    items = item_table(new)
    model = build_model(config, new.record, items)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    matched = warm_start.apply(start, model, new, items)
    assert 0.3 < matched["items"] < 1 and 0.3 < matched["users"] < 1 and matched["context_device"] < 1
    weights, after = checkpoint.load_weights(start.checkpoint_uri), model.state_dict()
    torch.testing.assert_close(
        after["item_table.weight"][FIRST_ITEM:], _expected(start, new, weights["item_table.weight"])
    )
    assert not after["item_table.weight"][0].any()
    for name in weights.keys() - {n for n in weights if "table" in n}:
        assert torch.equal(after[name], weights[name])
        assert name.endswith("bias") or not torch.equal(after[name], before[name])


def test_a_new_item_starts_at_the_mean_of_the_items_that_share_its_attributes(
    nights: tuple[Config, list[CheckpointRecord]],
) -> None:
    config, (first, _, third) = nights
    start, new = _starts(config, first, third)
    found = item_table(new)
    shelf = torch.arange(len(found.counts_N)) % 3 + 2
    items = ItemTable(found.counts_N, {"shelf": shelf})
    model = build_model(config, new.record, found)
    warm_start.apply(start, model, new, items)
    old = PreparedDataset.open(start.dataset_uri)
    keys, known = (one.items()["item"].to_pylist() for one in (new, old))
    table = model.state_dict()["item_table.weight"]
    for number in (n for n, key in enumerate(keys) if n >= FIRST_ITEM and key not in known):
        same = [n for n, key in enumerate(keys) if n >= FIRST_ITEM and key in known and shelf[n] == shelf[number]]
        torch.testing.assert_close(table[number], table[same].mean(0))


def _two_ranks(rank: int, world_size: int, work: Work) -> None:
    """Train on this rank; small tables are sharded, too."""

    def plan(config: Config, context: Any, num_items: int) -> TablePlan:
        return dataclasses.replace(embedding_plan.table_plan(config, context, num_items), small=0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "table_plan", plan)
        launch.fit(work, RankContext(rank, world_size))


@pytest.mark.parametrize("mode", ["row_sharded", pytest.param("sparse_replicated", marks=pytest.mark.slow)])
def test_two_workers_and_sharded_tables(
    mode: str, nights: tuple[Config, list[CheckpointRecord]], tmp_path: Path
) -> None:
    """A checkpoint in two pieces is continued by two workers: rows are read from the pieces, each worker its own."""
    config, (first, second, _) = nights
    run = Run(config)
    config = with_values(
        config,
        {"model.embedding.mode": mode, "run.output": str(tmp_path), "training.epochs": 1, "optim.warmup_steps": 0},
    )
    begun = f"{tmp_path}/begun"
    run_ranks(_two_ranks, 2, Work(config, run.dataset_of(first).uri, begun, None))
    folder = launch.selection(config, begun).folder(1)
    start = WarmStart.of(folder, PreparedDataset.at(run.dataset_of(first)))
    new = PreparedDataset.at(run.dataset_of(second))
    items = item_table(new)
    pieces = CheckpointRecord.read(folder).pieces
    assert pieces == (2 if mode == "row_sharded" else 0)
    whole = torch.arange(len(item_table(PreparedDataset.open(start.dataset_uri)).counts_N))
    name = "item_table.weight"
    source = ShardedTables(folder, "tables", 2).rows(name, whole) if pieces else checkpoint.load_weights(folder)[name]
    expected = _expected(start, new, source)
    known = PreparedDataset.open(start.dataset_uri).items()["item"].to_pylist()
    is_known = torch.tensor([key in known for key in new.items()["item"].to_pylist()[FIRST_ITEM:]])
    for rank in range(2):
        with use_plan(TablePlan(mode, rank, 2, small=0)):  # type: ignore[arg-type]
            model = build_model(config, new.record, items)
        warm_start.apply(start, model, new, items)
        sharded = mode == "row_sharded"
        mine = slice(rank, None, 2) if sharded else slice(None)  # ids 2 + rank, 4 + rank, ...
        rows = model.state_dict()[name][1 if sharded else FIRST_ITEM :]
        torch.testing.assert_close(rows[is_known[mine]], expected[mine][is_known[mine]])
    continued = launch.continued(with_values(config, {"training.start_epochs": 1}))
    run_ranks(_two_ranks, 2, Work(continued, new.uri, f"{tmp_path}/continued", None, start))
    record = CheckpointRecord.read(launch.selection(continued, f"{tmp_path}/continued").folder(1))
    assert record.pieces == pieces and 0 < record.rows < new.record.counts["events_train"] * 0.8
    assert record.value > 0.1


def test_a_checkpoint_that_has_seen_the_test_events_is_refused(nights: tuple[Config, list[CheckpointRecord]]) -> None:
    config, (first, _, third) = nights
    start, old = _starts(config, third, first)
    with pytest.raises(LineageError, match=r"was trained on events up to 2023-11-1.*name an older checkpoint"):
        warm_start.check(start, old)
    with pytest.raises(LineageError, match="is the run itself: write 'previous'"):
        recray.train(with_values(config, {"training.start_from": config.run_uri}))
    with pytest.raises(LineageError, match="holds no checkpoint"):
        recray.train(with_values(config, {"training.start_from": f"{config.run_uri}/nothing"}))


def test_starts_that_are_chosen(nights: tuple[Config, list[CheckpointRecord]], tmp_path: Path) -> None:
    given, (first, second, third) = nights
    config = with_values(given, {"run.output": str(tmp_path)})
    shutil.copytree(given.run_uri, config.run_uri, symlinks=True)
    dataset = third.parents[0]

    def parent(**values: object) -> list[str]:
        return Run(with_values(config, values)).checkpoint_inputs(dataset)[1:]

    # Another learning rate is another training on the same dataset: it starts where the first one did.
    shutil.rmtree(f"{config.run_uri}/checkpoint/{third.identity}")
    assert parent(**{"optim.learning_rate": 0.5}) in ([first.id], [second.id])
    assert parent(**{"model.dim": 16}) == []  # another model starts from scratch
    assert parent(**{"training.start_from": f"{config.run_uri}/checkpoint/{first.identity}"}) == [first.id]
    for one in artifacts_of(f"{config.run_uri}/checkpoint", CHECKPOINT):
        assert one.complete()
    with pytest.raises(
        ConfigError, match=r"training.replay = 0: .* has no train event that the checkpoint has not seen"
    ):
        start, new = _starts(given, second, first)
        launch.fit(
            Work(
                with_values(given, {"training.replay": 0.0}),
                new.uri,
                str(tmp_path / "none"),
                None,
                dataclasses.replace(start, seen_until=2**60),
            ),
            launch.LocalContext(False),
        )
    assert json.loads(Path(config.run_uri, "current.json").read_text())
