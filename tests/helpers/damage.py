"""Flip single bits of an artefact's files and use it, in a process that may crash.

    python damage.py OUTPUT KIND FLIPS SEED    one JSON line for every flip: {"file", "place", "ended"}

ended: "same" (the flip changes nothing of what is read), "refused" (a recray error that names the file), or what went wrong.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa

from helpers.small_run import small_config
from recray import inventory
from recray.artifacts import CHECKPOINT, INDEX, REPORT, Run, in_use
from recray.config import Config
from recray.data.dataset import PreparedDataset
from recray.errors import RecrayError
from recray.ids import SPLITS
from recray.report.compare import compare
from recray.report.text import render
from recray.retrieval import embed
from recray.retrieval.faiss_index import ItemIndex
from recray.training import checkpoint
from recray.verification import verify


def _hash(*values: object) -> str:
    found = hashlib.sha256()
    for value in values:
        if isinstance(value, pa.Table):
            sink = pa.BufferOutputStream()
            with pa.ipc.new_stream(sink, value.schema) as writer:
                writer.write_table(value)
            found.update(sink.getvalue())
        else:
            found.update(value.tobytes() if isinstance(value, np.ndarray) else repr(value).encode())
    return found.hexdigest()


def _dataset(config: Config) -> str:
    dataset = PreparedDataset.of(Run(config))
    tables = [table for split in SPLITS for table in (*dataset.iter_tables(split), *dataset.iter_early(split))]
    return _hash(dataset.record, dataset.items(), dataset.user_keys(), *tables)


def _checkpoint(config: Config) -> str:
    artifact = Run(config).checkpoint()
    model, record = checkpoint.load_model(artifact.uri)
    weights = [tensor.numpy() for tensor in model.state_dict().values()]
    epochs = [checkpoint.verify(str(one.parent)) for one in sorted(Path(artifact.uri).glob("epochs/*/checkpoint.json"))]
    return _hash(artifact.record, record, epochs, *weights)


def _index(config: Config) -> str:
    artifact = Run(config).index()
    assert artifact is not None
    opened = ItemIndex.open(artifact.uri)
    vectors = embed.load_vectors(artifact.uri, opened.record.num_items, opened.record.files["vectors.parquet"])
    # As a list: the text of an Arrow array holds its address.
    return _hash(opened.record, opened.keys.to_pylist(), vectors, *opened.search(vectors[:4], 5))


def _report(config: Config) -> str:
    compared = compare([config.run_uri, config.run_uri])
    return _hash(render(in_use(config.run_uri, REPORT).record), compared)


def _run(config: Config) -> str:
    entries = inventory.list_runs(config.run.output)
    used = [in_use(config.run_uri, stage).identity for stage in (CHECKPOINT, INDEX)]
    return _hash(used, [(one.stage, one.identity, one.in_use, one.summary, one.created) for one in entries])


USES: dict[str, tuple[str, Callable[[Config], str]]] = {
    "dataset": ("small/dataset/????????", _dataset),
    "checkpoint": ("small/checkpoint/????????", _checkpoint),
    "index": ("small/index/????????", _index),
    "report": ("small/report/????????", _report),
    "run": ("small", _run),
    "verify": (".", lambda config: _verify(config)),
}


def _verify(config: Config) -> str:
    found = [*verify(config.run_uri), *verify(f"{config.run.output}/lists")]
    problems = [problem for one in found for problem in one.problems]
    if problems:
        raise RecrayError("; ".join(problems))
    return "ok"


def main(output: str, kind: str, flips: int, seed: int) -> None:
    config = small_config(Path(output))
    pattern, use = USES[kind]
    root = next(Path(output).glob(pattern)) if pattern != "." else Path(output)
    if kind == "run":  # what listing reads
        files = [root / "current.json", *root.glob("*/????????/*.json")]
        files = [one for one in files if one.parent.parent.name != "checkpoint" or one.name != "dataset.json"]
    else:
        files = [
            one for one in root.rglob("*") if one.is_file() and one.name != "_begun.json" and one.suffix != ".html"
        ]
    files = sorted(one for one in files if not any(parent.is_symlink() for parent in one.parents))
    expected = use(config)
    draw = random.Random(seed)
    draw.shuffle(files)
    for number in range(flips):
        file = files[number % len(files)]
        data = file.read_bytes()
        at, bit = draw.randrange(len(data)), draw.randrange(8)
        file.write_bytes(data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :])
        try:
            ended = "same" if use(config) == expected else "used in silence"
        except RecrayError as error:
            ended = "refused" if file.name in str(error) else f"refused without the file: {error}"
        except Exception as error:
            ended = f"{type(error).__name__}: {error}"
        file.write_bytes(data)
        sys.stdout.write(json.dumps({"file": str(file), "place": f"{at}:{bit}", "ended": ended}) + "\n")
        sys.stdout.flush()
    assert use(config) == expected


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
