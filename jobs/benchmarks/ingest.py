"""From Parquet to batches: recray's path, plain Ray Data and bare pyarrow, by core-seconds per training row."""

import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from benchmarks.figures import report
from benchmarks.processes import cpu_seconds

if TYPE_CHECKING:
    import numpy as np

    from recray.data.dataset import PreparedDataset

_HISTORY = 20
_BATCH = 4096
_GLOBO = (4, 5, 10, 11, 28, 7)  # how many values each of the log's six context columns has


def run(
    events: Annotated[int, typer.Option(help="of the globo-shaped log; the wide one has a fifth")] = 2_000_000,
    epochs: Annotated[int, typer.Option(help="of each path at a time")] = 2,
    rounds: Annotated[
        int,
        typer.Option(help="all paths in turn so often, after an epoch that warms each; the cheapest of each counts"),
    ] = 4,
    out: Annotated[str | None, typer.Option(help="write the figures as JSON")] = None,
) -> None:
    """Core-seconds per training row (user and system time of all processes) and rows/s of four paths over the same
    training rows: history of 20 items, candidate, context columns.

    recray reads prepared shards by Ray Data, or in the worker, and cuts shuffled batches. pyarrow_shards reads
    the same files into numpy arrays and cuts nothing. pyarrow_rows and ray_data read the batches' rows as others store them,
    one flat row an example with its history, in files of as many rows.
    """
    figures: dict[str, object] = {"batch_size": _BATCH}
    for name, count, columns in (("globo", events, globo), ("wide", events // 5, _wide)):
        with tempfile.TemporaryDirectory() as folder:
            dataset = _prepared(folder, columns(count))
            figures |= {f"{name}_{key}": value for key, value in _measure(dataset, folder, epochs, rounds).items()}
    report(figures, out)


def _log(count: int, seed: int) -> dict[str, "np.ndarray"]:
    """Users with 4.4 events in the mean, few with many; items by Zipf's law."""
    import numpy as np

    rng = np.random.default_rng(seed)
    users = rng.permutation(np.repeat(np.arange(count), rng.geometric(1 / 4.4, count))[:count])
    return {
        "user_id": users,
        "item_id": np.minimum(rng.zipf(1.2, count), 46_000),
        "timestamp": 1_507_000_000_000 + rng.integers(0, 16 * 86_400_000, count),
    }


def globo(count: int) -> dict[str, "np.ndarray"]:
    import numpy as np

    rng = np.random.default_rng(1)
    return _log(count, 0) | {f"c{i}": np.minimum(rng.geometric(0.5, count), n) for i, n in enumerate(_GLOBO)}


def _wide(count: int) -> dict[str, "np.ndarray"]:
    """100 columns: 49 categories of 10 to 1,000 values and 48 numbers beside the three."""
    import numpy as np

    rng = np.random.default_rng(1)
    categories = {f"c{i}": rng.integers(0, int(10 ** (1 + i / 24)), count) for i in range(49)}
    return _log(count, 0) | categories | {f"x{i}": rng.standard_normal(count).astype(np.float32) for i in range(48)}


def _prepared(folder: str, columns: dict[str, "np.ndarray"]) -> "PreparedDataset":
    import pyarrow as pa
    import pyarrow.parquet as pq

    import recray
    from recray.config import parse_config
    from recray.data.dataset import PreparedDataset

    pq.write_table(pa.table(columns), f"{folder}/events.parquet")
    context = list(columns)[3:]
    kinds = {name: {"kind": "numeric" if name.startswith("x") else "categorical"} for name in context}
    table = {
        "run": {"name": "ingest", "output": folder},
        "data": {
            "path": f"{folder}/events.parquet",
            "columns": {"timestamp": "timestamp", "context": context},
            "timestamp_unit": "ms",
            "context_features": kinds,
            "split": {"kind": "temporal", "valid": 0.01, "test": 0.01},
        },
    }
    config = parse_config(table)
    recray.prepare(config)
    return PreparedDataset.open(f"{config.run_uri}/dataset/current")


def _measure(dataset: "PreparedDataset", folder: str, epochs: int, rounds: int) -> dict[str, object]:
    from recray.loading.collate import iter_batches
    from recray.loading.sampler import ShardGroup, epoch_order, num_examples
    from recray.training.distributed import read_shards, stream_shards

    shards = [ShardGroup.of(shard) for shard in dataset.record.shards["train"]]
    rows = sum(num_examples(shard, "events") for shard in shards)

    def cut_from(read: Callable[..., Iterator[Any]], epochs: int) -> Iterator[int]:
        plans = [epoch_order(shards, 1, epoch, "events") for epoch in range(epochs)]
        tables = read(dataset, shards, list(itertools.chain(*plans)))
        for parts in plans:
            for batch in iter_batches((next(tables) for _ in parts), _BATCH, "events", _HISTORY, 1):
                yield batch.num_rows
        next(tables, None)

    flat, files = _write_flat(dataset, shards, folder), [dataset.file_uri(shard.files[0]) for shard in shards]
    paths: dict[str, Callable[[int], Iterator[int]]] = {
        "pyarrow_shards": lambda epochs: _scan(files * epochs, rows * epochs),
        "pyarrow_rows": lambda epochs: _scan(flat * epochs, rows * epochs),
        "recray_direct": lambda epochs: cut_from(read_shards, epochs),
        "recray_ray_data": lambda epochs: cut_from(stream_shards, epochs),
        "ray_data": lambda epochs: itertools.chain(*(_ray_data(flat) for _ in range(epochs))),
    }
    figures: dict[str, object] = {"rows": rows}
    for path in paths.values():
        if sum(path(1)) != rows:
            raise SystemExit(f"an epoch does not have {rows} rows")
    costs = [{name: _cost(path, epochs) for name, path in paths.items()} for _ in range(rounds)]
    for name in paths:
        core, seconds = (min(values) for values in zip(*(cost[name] for cost in costs), strict=True))
        figures |= {f"{name}_core_us_per_row": core * 1e6, f"{name}_rows_per_second": 1 / seconds}
    for name in ("recray_direct", "recray_ray_data", "ray_data"):
        for floor in ("pyarrow_shards", "pyarrow_rows"):
            figures[f"{name}_over_{floor}"] = figures[f"{name}_core_us_per_row"] / figures[f"{floor}_core_us_per_row"]  # type: ignore[operator]
    return figures


def _cost(path: Callable[[int], Iterator[int]], epochs: int) -> tuple[float, float]:
    """Core-seconds and seconds per row."""
    before, started = cpu_seconds(), time.perf_counter()
    seen = sum(path(epochs))
    return (cpu_seconds() - before) / seen, (time.perf_counter() - started) / seen


def _write_flat(dataset: "PreparedDataset", shards: list[Any], folder: str) -> list[str]:
    """The examples as flat rows: history padded to its length, as a list column of fixed size."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from recray.loading.collate import iter_batches
    from recray.loading.sampler import epoch_order
    from recray.training.distributed import read_shards

    files = []
    tables = read_shards(dataset, shards, epoch_order(shards, 1, 0, "events"))
    for at, batch in enumerate(iter_batches(tables, 262_144, "events", _HISTORY, 1)):
        padded = batch.history.padded(_HISTORY).int().flatten().numpy()
        assert batch.target_Q is not None and batch.weight_Q is not None
        context = {k: v.int() if v.dtype.is_floating_point is False else v for k, v in batch.context.items()}  # type: ignore[union-attr]
        columns = {"user": batch.user_B.int(), "target": batch.target_Q.int(), "weight": batch.weight_Q, **context}
        arrays: dict[str, Any] = {name: pa.array(column.numpy()) for name, column in columns.items()}  # type: ignore[union-attr]
        kind = pa.fixed_shape_tensor(pa.int32(), [_HISTORY])
        arrays["history"] = pa.ExtensionArray.from_storage(kind, pa.FixedSizeListArray.from_arrays(padded, _HISTORY))
        files.append(f"{folder}/flat-{at:03d}.parquet")
        pq.write_table(pa.table(arrays), files[-1], compression="zstd")
    return files


def _scan(files: list[str], rows: int) -> Iterator[int]:
    """Every column of every file as numpy arrays, on one thread."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for file in files:
        table = pq.ParquetFile(file).read(use_threads=False)
        for column in table.columns:
            array = column.combine_chunks()
            array = array.storage if isinstance(array, pa.ExtensionArray) else array
            (array.flatten() if pa.types.is_nested(array.type) else array).to_numpy(zero_copy_only=False)
    yield rows


def _ray_data(files: list[str]) -> Iterator[int]:
    import ray.data

    # The faster of its two readers; the other starts processes that list the files anew each epoch.
    ray.data.DataContext.get_current().use_datasource_v2 = False
    for batch in ray.data.read_parquet(files).iter_torch_batches(batch_size=_BATCH, prefetch_batches=2):
        yield len(batch["target"])
