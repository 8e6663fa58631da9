"""Benchmarks, every figure a ratio against something in the same run on the same machine; `table`: a row of results.

    python jobs/benchmark.py sequence --events PATH/ml-1m/events.parquet --peers build/peers
    python jobs/benchmark.py ranking --events PATH/ml-1m/events.parquet --peers build/peers

Each peer runs in an environment of its own in that folder, which `python jobs/benchmark.py peers build/peers` makes.
"""

import typer
from benchmarks import (
    append,
    busy,
    compare,
    compiling,
    embedding_table,
    evaluating,
    ingest,
    loader,
    memory,
    peers,
    ranking,
    saving,
    scaling,
    search,
    seeds,
    sequence,
    serve,
    startup,
    table,
    tune,
    wide,
)

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False)
for module in (
    append,
    ingest,
    loader,
    sequence,
    ranking,
    wide,
    search,
    table,
    startup,
    scaling,
    saving,
    memory,
    seeds,
    peers,
    compare,
    busy,
    serve,
):
    app.command(module.__name__.rpartition(".")[2])(module.run)
app.command("embedding-table")(embedding_table.run)
app.command("evaluate")(evaluating.run)
app.command("compile")(compiling.run)
app.command("tune")(tune.overhead)
app.command("tune-grid")(tune.against_grid)

if __name__ == "__main__":
    app()
