"""A trained run in Python: raw keys and columns in, raw keys out.

    model = recray.load("runs/news")                            # a run, a checkpoint's folder or a bundle; local or any URI
    model.recommend(users=[1007, 9999], k=10)                   # lists of known users; of unknown ones popular items
    model.recommend(history=[["A-33", "B-02"]], k=10)           # of anyone, from what they chose; nothing is trained
    model.similar_items("A-33")
    ranker = recray.load("runs/news-din")
    ranker.score([{"user_id": 1007, "article_id": "A-33", "device": "phone"}])

Vocabularies, scaling and item ids are applied as in training. Lists for all users of a dataset: `recray.recommend`; a folder
that needs no recray to score: `recray export` (recray.inference.export); over HTTP: `recray serve` (recray.serving).
"""

from __future__ import annotations

from dataclasses import replace

from recray import storage
from recray.artifacts import CHECKPOINT, INDEX, REPORT, Artifact, Run, current_of, in_use
from recray.config import Config
from recray.ids import SPLITS
from recray.inference.catalog import Catalog
from recray.inference.models import LoadedRanker as LoadedRanker
from recray.inference.models import LoadedRetriever as LoadedRetriever
from recray.inference.rows import Inputs
from recray.models import Ranker
from recray.records import CheckpointRecord
from recray.retrieval.recommenders import RunArtifacts, open_recommenders
from recray.served import Served, served_of
from recray.training import checkpoint


def load(uri: str, current: bool = False, in_memory: bool = False) -> LoadedRetriever | LoadedRanker:
    """The model of a run, ready to be asked.

    uri: the folder of a run, that of a checkpoint, or a bundle of `recray export`. Of a run what it serves is loaded (`recray
    promote`), and the checkpoint and index in use if nothing was promoted. The prepared dataset that the checkpoint was
    trained on must still be there: it has the keys and the histories.
    current: load what is in use, whatever is served.
    in_memory: read all users now, so that no later call reads files.

    Raises LineageError if there is no complete checkpoint, or if its dataset has been deleted.
    """
    from recray.inference import bundle

    folder = uri.rstrip("/")
    if bundle.is_bundle(folder):
        return bundle.load(folder)
    artifacts, config = artifacts_of(folder, current)
    inputs = Inputs.of(artifacts.dataset, config.model.history_length, in_memory)
    identity = artifacts.checkpoint.identity
    if config.model.family == "ranker":
        return _ranker(artifacts.checkpoint, inputs)
    found = open_recommenders(artifacts, config, SPLITS, always_exact=True)
    assert found.exact is not None
    ranker = None if artifacts.ranker is None else _ranker(artifacts.ranker, inputs)
    final = found.final if found.reranked is None else replace(found.reranked, together=True)
    catalog = Catalog.read(config, artifacts.dataset.record.features, inputs.items)
    counts = artifacts.dataset.item_counts()
    return LoadedRetriever(identity, config, inputs, final, found.exact, counts, ranker, catalog)


def artifacts_of(folder: str, current: bool = False) -> tuple[RunArtifacts, Config]:
    """What `load` reads of a run or of a checkpoint's folder, and its configuration."""
    pointer = None if current else served_of(folder)
    source = in_use(folder if pointer is None else storage.join(folder, "checkpoint", pointer.checkpoint), CHECKPOINT)
    config = config_of(source, pointer)
    return RunArtifacts.of_checkpoint(Run(config), source), config


def _ranker(source: Artifact[CheckpointRecord], inputs: Inputs) -> LoadedRanker:
    model, record = checkpoint.load_model(source.uri)
    assert isinstance(model, Ranker)
    config = Config.model_validate(record.config)
    own = Inputs(inputs.items, inputs.features, inputs.users, config.model.history_length)
    return LoadedRanker(source.identity, config, own, model)


def config_of(source: Artifact[CheckpointRecord], pointer: Served | None = None) -> Config:
    """The configuration of a checkpoint whose run may have been moved since. How it retrieves is what was promoted, or
    what its index in use was built with, and its last report evaluated, if they are of this checkpoint."""
    run, record = source.uri.rpartition("/")[0].rpartition("/")[0], source.record
    body, named = dict(record.config), current_of(run)
    for stage in (INDEX, REPORT) if pointer is None else ():
        folder = storage.join(run, stage.name, named.get(stage.name, "none"))
        if storage.exists(storage.join(folder, stage.record.file_name())):
            found = stage.record.read(folder)
            if record.id in found.parents:
                body |= {"retrieval": found.config["retrieval"], "evaluation": found.config["evaluation"]}
    if pointer is not None:
        body |= {"retrieval": pointer.retrieval, "evaluation": pointer.evaluation}
    output, _, name = run.rpartition("/")
    body["run"] = {**body["run"], "output": output or "/", "name": name}
    return Config.model_validate(body)
