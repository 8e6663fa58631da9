"""A bundle: one folder that scores without recray, and that `recray.load` and `recray serve` take in place of a run.

manifest.json             what it is: kind, lineage, versions, signature, configuration, and the hash of every file; last
query.pt2 item.pt2        the towers of a retriever (recray.inference.programs)
ranker.pt2                a ranker
features.json             encodings of user and context features: vocabularies, scalers, quantiles
items.parquet             item (key), count (training events); row i is item id i, 0 padding and 1 unknown items
catalog.parquet           of a retriever: item features and titles as the item table has them; rows as in items.parquet
users.parquet             user (key), id, history (item ids, oldest first), encoded features
index/                    the index artefact: index.faiss, vectors.parquet, ids.parquet, index.json
test.json                 ten requests and the answers of the training code
score.py encoding.py      a reference scorer that needs torch, faiss and pyarrow
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import torch

from recray import digests, sealed, storage
from recray.config import Config
from recray.digests import FileDigest
from recray.errors import LineageError, StorageError
from recray.inference.catalog import Catalog
from recray.inference.models import LoadedRanker, LoadedRetriever
from recray.inference.programs import ITEM, QUERY, RANKER, ExportedRanker, ExportedRetriever
from recray.inference.rows import Inputs, Rows, UserTable
from recray.records import Feature
from recray.retrieval import Recommender, embed
from recray.retrieval.exact import ExactSearch
from recray.retrieval.faiss_index import ItemIndex
from recray.retrieval.recommenders import IndexSearch, Reranked

MANIFEST, FEATURES, ITEMS, USERS, INDEX = "manifest.json", "features.json", "items.parquet", "users.parquet", "index"
CATALOG = "catalog.parquet"
FORMAT = 2


def is_bundle(folder: str) -> bool:
    return storage.exists(storage.join(folder, MANIFEST))


def read_manifest(folder: str) -> dict[str, Any]:
    """Raises LineageError if it is damaged, or of another format."""
    found = sealed.read(storage.join(folder, MANIFEST), "run `recray export` again")
    if found.get("format") != FORMAT:
        raise LineageError(f"{folder} is a bundle of format {found.get('format')}, not {FORMAT}: export it again")
    return found


def load(folder: str) -> LoadedRetriever | LoadedRanker:
    """The model of a bundle. Raises LineageError or StorageError if a file is not what was exported."""
    manifest = read_manifest(folder)
    try:
        return _load(folder, manifest)
    except (LineageError, StorageError):
        now = read_manifest(folder)
        if now == manifest:
            raise
        return _load(folder, now)  # another bundle was put in its place meanwhile


def _load(folder: str, manifest: dict[str, Any]) -> LoadedRetriever | LoadedRanker:
    files = {name: FileDigest.model_validate(one) for name, one in manifest["files"].items()}
    digests.check_present(folder, files)
    for name, digest in files.items():
        digest.check(storage.join(folder, name))
    config = Config.model_validate(manifest["config"])
    columns = {
        one.pop("column"): Feature.model_validate(one) for one in storage.read_json(storage.join(folder, FEATURES))
    }
    items = storage.read_table(storage.join(folder, ITEMS))
    keys = items["item"].combine_chunks()
    users, programs = _users(storage.read_table(storage.join(folder, USERS))), manifest["programs"]

    def inputs(program: str) -> Inputs:
        return Inputs(keys, columns, users, programs[program]["history_length"])

    ranker = None
    if "ranker" in programs:
        model = ExportedRanker(_program(folder, RANKER))
        ranker = LoadedRanker(manifest["lineage"]["ranker"]["identity"], config, inputs("ranker"), model)
    if "query" not in programs:
        assert ranker is not None
        return ranker
    retriever = ExportedRetriever(_program(folder, QUERY), _program(folder, ITEM))
    at = storage.join(folder, INDEX)
    vectors = torch.from_numpy(np.asarray(embed.load_vectors(at, len(keys))))
    final: Recommender = IndexSearch(retriever, ItemIndex.open(at))
    if ranker is not None:
        length = programs["ranker"]["history_length"]
        final = Reranked(final, model, manifest["candidates"], length, None)
    counts = np.asarray(items["count"].to_numpy())
    identity = manifest["lineage"]["checkpoint"]["identity"]
    exact, table = ExactSearch(retriever, vectors), storage.read_table(storage.join(folder, CATALOG))
    catalog = Catalog(table.remove_column(0), manifest["title"])
    return LoadedRetriever(identity, config, inputs("query"), final, exact, counts, ranker, catalog)


def user_table(users: UserTable) -> pa.Table:
    """The table of `users.parquet`."""
    rows = users.rows
    return pa.table({"user": users.keys, "id": rows.user, "history": rows.history, **rows.columns})


def _users(table: pa.Table) -> UserTable:
    found = {name: table[name].combine_chunks() for name in table.column_names}
    keys, ids, history = (found.pop(name) for name in ("user", "id", "history"))
    return UserTable(keys, Rows(ids, history, found))


def _program(folder: str, name: str) -> torch.export.ExportedProgram:
    with storage.local_file(storage.join(folder, name)) as path:
        return torch.export.load(path)
