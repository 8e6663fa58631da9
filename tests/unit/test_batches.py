"""Batches: every example once, histories without the future, shares that are equal."""

import itertools
import subprocess
import sys
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
import torch

from recray.loading.batch import Jagged
from recray.loading.collate import eval_queries, impressions, iter_batches, padding_like
from recray.loading.examples import Decay, Examples, example_table
from recray.loading.jagged import Column
from recray.loading.sampler import ShardGroup, ShardSlice, epoch_order, num_batches, share


def _table(lengths: list[int], num_targets: list[int] | None = None, first_user: int = 2) -> pa.Table:
    """The items of row u are 100 u + 2, 100 u + 3, ..."""
    items = [[100 * u + 2 + i for i in range(n)] for u, n in enumerate(lengths)]
    return pa.table(
        {
            "user": pa.array(np.arange(first_user, first_user + len(lengths)), pa.int32()),
            "item": pa.array(items, pa.list_(pa.int32())),
            "time": pa.array([list(range(n)) for n in lengths], pa.list_(pa.int64())),
            "num_targets": pa.array(num_targets or lengths, pa.int32()),
            "context_hour": pa.array([[i % 7 for i in range(n)] for n in lengths], pa.list_(pa.int32())),
        }
    )


def _events(table: pa.Table) -> list[tuple[int, int]]:
    """(user, item) of every event; no two of a table are the same."""
    return [(row["user"], item) for row in table.to_pylist() for item in row["item"]]


def _timed(table: pa.Table) -> list[tuple[int, int, int]]:
    """(user, item, time) of every event."""
    return [(row["user"], *event) for row in table.to_pylist() for event in zip(row["item"], row["time"], strict=True)]


def _shard(table: pa.Table) -> ShardGroup:
    events = int(np.sum(table["num_targets"].to_numpy()))
    return ShardGroup(("x",), rows=len(table), events=events, impressions=events)


def test_the_sampler_gives_what_its_docstring_says() -> None:
    shards = [_shard(_table([5])), _shard(_table([3]))]
    epoch = next(e for e in range(20) if np.random.default_rng([0, e, 1]).permutation(2).tolist() == [1, 0])
    plans = [share(epoch_order(shards, 0, epoch, "events"), rank, 2) for rank in range(2)]
    assert [[(s.shard, s.start, s.stop) for s in plan] for plan in plans] == [[(1, 0, 3), (0, 0, 1)], [(0, 1, 5)]]


def test_examples_are_what_their_docstring_says() -> None:
    table = pa.table(
        {
            "user": pa.array([7], pa.int32()),
            "item": pa.array([[4, 9, 2, 5]], pa.list_(pa.int32())),
            "time": pa.array([[1, 3, 8, 9]], pa.list_(pa.int64())),
            "num_targets": pa.array([2], pa.int32()),
            "user_age": pa.array([3], pa.int32()),
            "context_hour": pa.array([[23, 1, 6, 7]], pa.list_(pa.int32())),
        }
    )

    def examples(kind: str) -> dict[int, list[int]]:
        """Target -> history."""
        (batch,) = iter_batches([(ShardSlice(0, 0, 0, 2), table)], 8, kind, 2, seed=0)  # type: ignore[arg-type]
        return {t: h[h > 0].tolist() for t, h in zip(batch.target_Q.tolist(), batch.history.padded(2), strict=True)}

    assert examples("events") == {2: [4, 9], 5: [9, 2]}
    assert examples("others") == {2: [9, 5], 5: [9, 2]}
    (batch,) = iter_batches([(ShardSlice(0, 0, 0, 1), table)], 8, "sequences", 2, seed=0)
    assert batch.history.values.tolist() == [9, 2] and batch.target_Q.tolist() == [2, 5]
    assert batch.position_Q.tolist() == [0, 1] and batch.user_features["age"].tolist() == [3]


def test_examples_and_sampler_do_not_load_torch() -> None:
    code = "import sys, recray.loading.examples, recray.loading.sampler; sys.exit('torch' in sys.modules or 'ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_rows_of_lists_are_taken_as_a_loop_takes_them() -> None:
    rng = np.random.default_rng(0)
    lists = [rng.integers(0, 100, n).tolist() for n in rng.integers(0, 6, 40)]
    values = torch.tensor([x for one in lists for x in one])
    jagged = Jagged.from_lengths(values, torch.tensor([len(one) for one in lists]))
    column = Column(values.numpy(), jagged.offsets.numpy())

    def plain(found: Jagged | Column) -> list[list[int]]:
        ends = found.offsets.tolist()
        return [found.values[a:b].tolist() for a, b in itertools.pairwise(ends)]

    index = rng.integers(0, 40, 25)
    wanted = [lists[i] for i in index]
    assert plain(column.take(index)) == plain(jagged.take(torch.from_numpy(index))) == wanted
    assert plain(jagged.take(torch.from_numpy(index), sum(map(len, wanted)))) == wanted
    assert plain(jagged.last(2)) == [one[-2:] for one in lists]
    assert plain(jagged.rows(3, 9)) == lists[3:9] and plain(jagged.rows(35, 99)) == lists[35:]
    assert jagged.row_index().tolist() == [row for row, one in enumerate(lists) for _ in one]


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("examples", ["events", "sequences"])
def test_plan_gives_every_example_to_one_worker_and_equal_shares(world_size: int, examples: str) -> None:
    shards = [_shard(_table([5, 1, 9])), _shard(_table([2])), _shard(_table([30, 1, 1, 1]))]
    plans = [share(epoch_order(shards, 3, 1, examples), rank, world_size) for rank in range(world_size)]  # type: ignore[arg-type]
    shares = [sum(s.stop - s.start for s in p) for p in plans]
    assert max(shares) - min(shares) <= 1
    taken = [(s.shard, i) for p in plans for s in p for i in range(s.start, s.stop)]
    sizes = [s.events if examples == "events" else s.rows for s in shards]
    assert sorted(taken) == [(shard, i) for shard, size in enumerate(sizes) for i in range(size)]
    assert num_batches(sum(sizes), world_size, 4) == -(-max(shares) // 4)


def test_events_see_only_what_came_before() -> None:
    table = _table([6, 1, 4])
    batches = list(iter_batches([(ShardSlice(0, 0, 0, 11), table)], 4, "events", 3, seed=5))
    assert [b.num_rows for b in batches] == [4, 4, 3]
    found = [(int(u), int(t)) for b in batches for u, t in zip(b.user_B, b.target_Q, strict=True)]  # type: ignore[arg-type]
    assert sorted(found) == _events(table)
    for batch in batches:
        assert batch.target_Q is not None
        for b in range(batch.num_rows):
            history = batch.history.values[batch.history.offsets[b] : batch.history.offsets[b + 1]].tolist()
            target = int(batch.target_Q[b])
            position = (target - 2) % 100
            assert history == list(range(target - min(position, 3), target))
            hour = batch.context["hour"]
            assert isinstance(hour, torch.Tensor) and int(hour[b]) == position % 7


def test_batches_span_shards_and_any_split_of_the_work_gives_the_same_rows() -> None:
    tables = [_table([4, 3]), _table([5], first_user=20)]
    shards = [_shard(t) for t in tables]

    def rows(world_size: int) -> list[tuple[int, int]]:
        """User and item of every example."""
        found = []
        for rank in range(world_size):
            parts = share(epoch_order(shards, 1, 0, "events"), rank, world_size)
            for batch in iter_batches(((p, tables[p.shard]) for p in parts), 5, "events", 3, seed=1):
                assert batch.target_Q is not None
                found += list(zip(batch.user_B.tolist(), batch.target_Q.tolist(), strict=True))
        return sorted(found)

    assert rows(1) == rows(2) == rows(3) == _events(tables[0]) + _events(tables[1])


def test_sequences_ask_at_every_entry_that_has_a_successor() -> None:
    table = _table([6, 1, 3])
    (batch,) = iter_batches([(ShardSlice(0, 0, 0, 3), table)], 8, "sequences", 4, seed=0)
    assert batch.position_Q is not None and batch.target_Q is not None
    assert len(batch.target_Q) == 4 + 0 + 2
    assert torch.equal(batch.history.values[batch.position_Q] + 1, batch.target_Q)


def test_questions_split_history_and_targets() -> None:
    table = _table([6, 2], num_targets=[2, 2])
    (question,) = eval_queries(table, 8, 3, "user")
    assert question.batch.history.values.tolist() == [3, 4, 5]
    assert question.seen.lengths().tolist() == [4, 0]
    assert question.targets.values.tolist() == [6, 7, 102, 103]


def test_without_order_the_history_is_everything_else() -> None:
    table = _table([4, 1])
    (batch,) = iter_batches([(ShardSlice(0, 0, 0, 5), table)], 8, "others", 2, seed=5)
    found = {t: h[h > 0].tolist() for t, h in zip(batch.target_Q.tolist(), batch.history.padded(3), strict=True)}
    assert found == {2: [4, 5], 3: [4, 5], 4: [3, 5], 5: [3, 4], 102: []}


def test_every_later_event_can_be_a_question() -> None:
    table = _table([6, 2, 3], num_targets=[2, 2, 0])
    first, second = eval_queries(table, 3, 3, "event")
    assert first.targets.offsets.tolist() == [0, 1, 2, 3] and len(second.targets.values) == 1
    assert first.targets.values.tolist() + second.targets.values.tolist() == [6, 7, 102, 103]
    assert first.seen.padded(5).tolist() == [[0, 2, 3, 4, 5], [2, 3, 4, 5, 6], [0, 0, 0, 0, 0]]
    assert first.batch.history.values.tolist() == [3, 4, 5, 4, 5, 6]
    assert second.seen.values.tolist() == [102]
    assert first.batch.context["hour"].tolist() == [4, 5, 0]


def test_what_was_shown_and_not_chosen_is_neither_history_nor_target() -> None:
    table = _table([6, 4], num_targets=[3, 2])
    labels = pa.array([[1, 0, 1, 0, 1, 1], [0, 0, 1, 0]], pa.list_(pa.float32()))
    labelled = table.append_column("label", labels)
    by_hand = pa.table(
        {
            "user": table["user"],
            "item": pa.array([[2, 4, 6, 7], [104]], pa.list_(pa.int32())),
            "time": pa.array([[0, 2, 4, 5], [2]], pa.list_(pa.int64())),
            "num_targets": pa.array([2, 1], pa.int32()),
            "context_hour": pa.array([[0, 2, 4, 5], [2]], pa.list_(pa.int32())),
        }
    )
    for examples, size in (("events", 3), ("sequences", 2)):
        part = ShardSlice(0, 0, 0, size)
        (found,), (wanted,) = (list(iter_batches([(part, t)], 8, examples, 3, seed=1)) for t in (labelled, by_hand))  # type: ignore[arg-type]
        assert found.target_Q.tolist() == wanted.target_Q.tolist()
        assert found.history.values.tolist() == wanted.history.values.tolist()
        assert found.history.offsets.tolist() == wanted.history.offsets.tolist()
        assert found.context.keys() == wanted.context.keys()
        assert all((found.context[n] == wanted.context[n]).all() for n in found.context)
    (question,) = eval_queries(labelled, 8, 3, "user")
    assert question.targets.values.tolist() == [6, 7, 104] and question.seen.values.tolist() == [2, 4]


def _sampled(
    table: pa.Table, examples: Examples, decay: Decay, epochs: int
) -> tuple[Counter[int], dict[int, float], int]:
    """How often each target is in a batch, its summed weight, and the examples of an epoch."""
    count = example_table(table, examples, 4, decay).per_epoch
    counts, weights = Counter[int](), dict[int, float]()
    for epoch in range(epochs):
        batches = list(iter_batches([(ShardSlice(epoch, 0, 0, count), table)], 64, examples, 4, seed=0, decay=decay))
        assert sum(batch.num_rows for batch in batches) == count
        for batch in batches:
            for target, weight in zip(batch.target_Q.tolist(), batch.weight_Q.tolist(), strict=True):
                counts[target] += 1
                weights[target] = weights.get(target, 0.0) + weight
    return counts, weights, count


@pytest.mark.parametrize("examples", ["events", "others", "impressions"])
def test_events_are_sampled_in_proportion_to_their_decay(examples: Examples) -> None:
    """Expected counts are 0.5 ** (age / half_life), but for rounding down to whole examples; weights stay those of the log."""
    lengths, half_life, until, epochs = [5, 1, 30, 12, 7], 6, 30, 600
    table = _table(lengths).append_column(
        "weight", pa.array([np.full(n, 3.0) for n in lengths], pa.list_(pa.float32()))
    )
    if examples == "impressions":
        table = table.append_column("label", pa.array([np.arange(n) % 2 for n in lengths], pa.list_(pa.float32())))
    counts, weights, count = _sampled(table, examples, Decay(until, half_life), epochs)
    wanted = {item: 0.5 ** ((until - time) / half_life) for _, item, time in _timed(table)}
    assert count == int(sum(wanted.values()))
    for item, chance in wanted.items():
        expected = chance * count / sum(wanted.values())
        # In a systematic sample an event is at most once in an epoch: its count is binomial.
        assert counts[item] / epochs == pytest.approx(
            expected, abs=5 * (expected * (1 - expected) / epochs) ** 0.5 + 1e-9
        )
        assert weights.get(item, 0.0) == pytest.approx(3.0 * counts[item])


def test_sequences_are_sampled_by_the_sum_of_their_decays() -> None:
    """Over epochs each target has the weight of the log times its decay, and no row has less than 1."""
    lengths, half_life, until, epochs = [5, 1, 30, 12, 7, 6], 6, 30, 600
    table = _table(lengths)
    counts, weights, count = _sampled(table, "sequences", Decay(until, half_life), epochs)
    decays = {item: 0.5 ** ((until - time) / half_life) for _, item, time in _timed(table)}
    asked = [
        [100 * u + 2 + at for at in range(max(n - 4, 1), n)] for u, n in enumerate(lengths)
    ]  # the last 4, but the first
    chances = [min(1.0, sum(decays[item] for item in row)) for row in asked]
    assert count == int(sum(chances)) and 1.0 in chances
    rounded = count / sum(chances)
    for row, chance in zip(asked, chances, strict=True):
        expected = chance * rounded
        error = 5 * (expected * (1 - expected) / epochs) ** 0.5 + 1e-9
        for item in row:
            assert counts[item] / epochs == pytest.approx(expected, abs=error)
            assert weights[item] / counts[item] == pytest.approx(decays[item] / chance, rel=1e-5)


@pytest.mark.parametrize("examples", ["events", "sequences"])
def test_unknown_items_and_events_without_weight_are_not_sampled(examples: Examples) -> None:
    table = _table([4, 4]).append_column("weight", pa.array([[1, 1, 1, 1], [1, 0, 0, 0]], pa.list_(pa.float32())))
    table = table.set_column(1, "item", pa.array([[2, 3, 1, 5], [6, 7, 8, 9]], pa.list_(pa.int32())))
    counts, _, _ = _sampled(table, examples, Decay(until=3, half_life=3), 50)
    assert set(counts) == ({2, 3, 5, 6} if examples == "events" else {3, 5})


def test_a_shard_of_old_events_has_one_example_and_one_without_any_weight_none() -> None:
    table = _table([4])
    assert example_table(table, "events", 4, Decay(until=15, half_life=1)).per_epoch == 1
    assert example_table(table, "events", 4, Decay(until=100, half_life=1)).per_epoch == 0


def test_the_decay_of_old_events_is_zero_rather_than_next_to_zero() -> None:
    assert Decay(until=100, half_life=1)(np.array([100, 99, 81, 79, -900])).tolist() == [1, 0.5, 2.0**-19, 0, 0]


def test_padding_weighs_nothing() -> None:
    (batch,) = iter_batches([(ShardSlice(0, 0, 0, 1), _table([3]))], 8, "sequences", 4, seed=0)
    padding = padding_like(batch)
    assert padding.weight_Q is not None and padding.weight_Q.sum() == 0
    assert padding.position_Q is not None


def test_padded_puts_the_last_entries_at_the_right() -> None:
    jagged = Jagged(torch.tensor([1, 2, 3, 4]), torch.tensor([0, 3, 3, 4]))
    assert jagged.padded(2).tolist() == [[2, 3], [0, 0], [0, 4]]


def _labelled(seed: int) -> tuple[pa.Table, list[tuple]]:
    """Rows with labels and equal times; and (user, item, label, what was chosen before that time) of every target."""
    rng = np.random.default_rng(seed)
    columns: dict[str, list] = {name: [] for name in ("user", "item", "time", "label", "num_targets")}
    expected = []
    for user in range(2, 12):
        size = int(rng.integers(1, 12))
        time = np.sort(rng.integers(0, 6, size))
        label = rng.integers(0, 2, size).astype(float)
        context = int(rng.integers(0, size))
        label[:context] = 1  # what comes before the targets was chosen
        item = rng.integers(1, 50, size)
        for i in range(context, size):
            before = [int(item[j]) for j in range(size) if time[j] < time[i] and label[j]]
            expected.append((user, int(item[i]), float(label[i]), before[-3:]))
        for name, value in zip(columns, (user, item, time, label, size - context), strict=True):
            columns[name].append(value)
    kinds = [pa.int32(), pa.list_(pa.int32()), pa.list_(pa.int64()), pa.list_(pa.float32()), pa.int32()]
    arrays = [pa.array(values, kind) for values, kind in zip(columns.values(), kinds, strict=True)]
    return pa.table(dict(zip(columns, arrays, strict=True))), expected


@pytest.mark.parametrize("seed", range(5))
def test_impressions_see_what_was_chosen_strictly_before(seed: int) -> None:
    table, expected = _labelled(seed)
    found = []
    for batch in impressions(table, 7, history_length=3):
        assert batch.target_Q is not None and batch.label_Q is not None
        for b in range(batch.num_rows):
            history = batch.history.values[batch.history.offsets[b] : batch.history.offsets[b + 1]].tolist()
            found.append((int(batch.user_B[b]), int(batch.target_Q[b]), float(batch.label_Q[b]), history))
    assert found == expected
    shuffled = list(iter_batches([(ShardSlice(0, 0, 0, len(expected)), table)], 4, "impressions", 3, seed=1))
    assert sum(batch.num_rows for batch in shuffled) == len(expected)
    assert sum(float(batch.label_Q.sum()) for batch in shuffled if batch.label_Q is not None) == sum(
        label for _, _, label, _ in expected
    )
    # An unknown item is scored, but not trained on.
    for batches, weight in ((shuffled, 0.0), (impressions(table, 7, history_length=3), 1.0)):
        for batch in batches:
            assert batch.target_Q is not None and batch.weight_Q is not None
            assert batch.weight_Q.tolist() == [weight if item == 1 else 1.0 for item in batch.target_Q.tolist()]
