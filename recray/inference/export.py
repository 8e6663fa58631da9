"""The export stage: a run as a bundle (recray.inference.bundle says what is in it)."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from recray import digests, folders, layout, log, provenance, sealed, storage
from recray.artifacts import Artifact
from recray.config import Config
from recray.errors import LineageError
from recray.ids import FIRST_ITEM, SPLITS
from recray.inference import artifacts_of, bundle
from recray.inference.catalog import Catalog
from recray.inference.models import LoadedRanker, LoadedRetriever
from recray.inference.programs import export_ranker, export_retriever
from recray.inference.rows import Inputs, UserTable, raw_type
from recray.models import Ranker, Retriever
from recray.records import CheckpointRecord, DatasetRecord, Feature, IndexRecord, Record
from recray.retrieval.recommenders import RunArtifacts, open_recommenders
from recray.training import checkpoint

_BEGUN = "_begun.json"
_CASES, _K = 10, 10


def export(uri: str, output: str, current: bool = False) -> dict[str, Any]:
    """Write the model of a run, or of a checkpoint's folder, as a bundle into the folder `output`; returns its manifest.

    An earlier bundle at `output` is there until the new one is whole; on an object store, which cannot rename a folder, it
    is deleted first.

    uri, current: as for `recray.load`. Raises LineageError if a retriever has no index, StorageError if `output` holds
    anything but an earlier bundle.
    """
    artifacts, config = artifacts_of(uri.rstrip("/"), current)
    left_out = []
    if config.model.family == "retriever":
        if artifacts.index is None:
            raise LineageError(f"{uri} has no index of this checkpoint: run `recray index` first")
        if config.retrieval.item_knn_weight:
            left_out.append("retrieval.item_knn_weight: its scores need all events")
            log.warning(
                "export", "the bundle's lists are those without the item-item blend, whose scores need all events"
            )
            config = config.model_copy(
                update={"retrieval": config.retrieval.model_copy(update={"item_knn_weight": 0.0})}
            )
        if config.retrieval.recency.enabled:
            left_out.append("retrieval.recency: its counts move with the log")
            log.warning("export", "the bundle's lists are those without recent counts, which move with the log")
            off = config.retrieval.recency.model_copy(update={"enabled": False})
            config = config.model_copy(update={"retrieval": config.retrieval.model_copy(update={"recency": off})})
    _check(output)
    remote = storage.is_remote(output)
    target = output if remote else f"{storage.local_path(output)}.new"
    _clear(target)
    writer = _Writer(artifacts, config, target)
    programs = writer.programs()
    writer.tables()
    storage.write_json(storage.join(target, "test.json"), writer.cases())
    for name in ("score.py", "encoding.py"):
        source = Path(__file__).with_name("reference") / name
        storage.write_bytes(storage.join(target, name), source.read_bytes())
    manifest = writer.manifest(programs) | {"left_out": left_out}
    sealed.write(storage.join(target, bundle.MANIFEST), manifest)
    storage.delete_file(storage.join(target, _BEGUN))
    if not remote:
        folders.put_in_place(target, output)
        layout.clear(target, layout.BUNDLE)  # what was there before
    log.info("export", f"{', '.join(programs)} of {manifest['lineage']['checkpoint']['identity']}: {output}")
    return manifest


def _check(output: str) -> None:
    """Raises StorageError if the folder holds anything but an earlier bundle, complete or not."""
    earlier = storage.exists(storage.join(output, _BEGUN)) or bundle.is_bundle(output)
    layout.refuse_foreign(output, layout.BUNDLE if earlier else layout.NOTHING)


def _clear(target: str) -> None:
    """Delete an earlier bundle, and mark the folder as one that is being written."""
    _check(target)
    layout.clear(target, layout.BUNDLE)
    storage.write_json(storage.join(target, _BEGUN), {"stage": "export"})


class _Writer:
    def __init__(self, artifacts: RunArtifacts, config: Config, output: str) -> None:
        self.artifacts, self.config, self.output = artifacts, config, output
        self.retrieves = config.model.family == "retriever"
        self.ranker: Artifact[CheckpointRecord] | None = artifacts.ranker if self.retrieves else artifacts.checkpoint
        self.inputs = Inputs.of(artifacts.dataset, config.model.history_length, in_memory=True)
        self.catalog = Catalog.read(config, artifacts.dataset.record.features, self.inputs.items)

    def programs(self) -> dict[str, Any]:
        """Write the programs; their part of the manifest."""
        columns = self.inputs.features
        found: dict[str, Any] = {}
        made: dict[str, torch.export.ExportedProgram] = {}
        if self.retrieves:
            model, record = checkpoint.load_model(self.artifacts.checkpoint.uri)
            assert isinstance(model, Retriever)
            made |= export_retriever(model, columns, self.config.model.history_length)
            width = model.item_vectors(torch.tensor([FIRST_ITEM])).shape[1]
            vector = {"type": "float32", "shape": ["rows", width]}
            found["query"] = self._signature(record, ("user", "history"), vector)
            item = {"type": "int64", "shape": ["rows"]}
            found["item"] = {"history_length": 0, "inputs": {"item": item}, "output": vector}
        if self.ranker is not None:
            ranker, record = checkpoint.load_model(self.ranker.uri)
            assert isinstance(ranker, Ranker)
            known = DatasetRecord.read(self.ranker.uri, copy=True)
            made |= export_ranker(ranker, columns, int(record.config["model"]["history_length"]), known)
            logit = {"type": "float32", "shape": ["rows"], "meaning": "log p / (1 - p)"}
            found["ranker"] = self._signature(record, ("user", "history", "item"), logit)
        with TemporaryDirectory() as folder:
            for name, program in made.items():
                torch.export.save(program, Path(folder) / name)
                storage.copy_file(str(Path(folder) / name), storage.join(self.output, name))
        return found

    def _signature(self, record: CheckpointRecord, ids: tuple[str, ...], output: dict[str, Any]) -> dict[str, Any]:
        inputs: dict[str, Any] = {
            name: {"type": "int64", "shape": ["rows", "history"] if name == "history" else ["rows"]} for name in ids
        }
        inputs["features"] = {
            name: {
                "type": "float32" if one.kind == "numeric" else "int64",
                "shape": ["rows", "entries"] if one.kind == "list" else ["rows"],
            }
            for name, one in sorted(self.inputs.features.items())
        }
        return {"history_length": record.config["model"]["history_length"], "inputs": inputs, "output": output}

    def tables(self) -> None:
        dataset, at = self.artifacts.dataset, self.output
        features = [
            one.model_dump(mode="json") | {"column": name} for name, one in sorted(self.inputs.features.items())
        ]
        storage.write_json(storage.join(at, bundle.FEATURES), features)
        storage.write_table(storage.join(at, bundle.ITEMS), dataset.items().select(["item", "count"]))
        assert isinstance(self.inputs.users, UserTable)
        storage.write_table(storage.join(at, bundle.USERS), bundle.user_table(self.inputs.users))
        if self.retrieves and self.artifacts.index is not None:
            catalog = self.catalog.table.add_column(0, "item", self.inputs.items)
            storage.write_table(storage.join(at, bundle.CATALOG), catalog)
            source = self.artifacts.index
            for name in (*source.record.files, source.record.file_name()):
                storage.copy_file(storage.join(source.uri, name), storage.join(at, bundle.INDEX, name))

    def cases(self) -> list[dict[str, Any]]:
        """Requests in raw keys and values, and what the training code answers."""
        requests = [self._request(number) for number in range(_CASES)]
        if not self.retrieves:
            ranker, _ = checkpoint.load_model(self.artifacts.checkpoint.uri)
            assert isinstance(ranker, Ranker)
            loaded = LoadedRanker("", self.config, self.inputs, ranker)
            return [{"request": one, "scores": [self._probability(loaded, one)]} for one in requests]
        found = open_recommenders(self.artifacts, self.config, SPLITS, always_exact=True)
        assert found.exact is not None
        counts = self.artifacts.dataset.item_counts()
        model = LoadedRetriever("", self.config, self.inputs, found.final, found.exact, counts)
        cases = []
        for request in requests:
            by_user: dict[str, Any] = (
                {"users": [request["user"]]} if "user" in request else {"history": [request["history"]]}
            )
            context, own = ({n: [v] for n, v in request[role].items()} for role in ("context", "user_features"))
            table = model.recommend(**by_user, context=context, user_features=own, k=_K)
            cases.append({"request": request, "items": table["item"].to_pylist(), "scores": table["score"].to_pylist()})
        return cases

    def _request(self, number: int) -> dict[str, Any]:
        """Every second request is a known user, the others are a history with values of all features."""
        users, items = self.inputs.users, self.inputs.items
        assert isinstance(users, UserTable)
        at = number * max(len(users.keys) - 1, 0) // (_CASES - 1)
        history = users.rows.history[at].as_py() if len(users.keys) else [FIRST_ITEM]
        request: dict[str, Any] = {"context": {}, "user_features": {}}
        if number % 2 == 0 and len(users.keys):
            request["user"] = users.keys[at].as_py()
        else:
            request["history"] = [items[one].as_py() for one in history[-20:] if one >= FIRST_ITEM]
            for one in self.inputs.features.values():
                request["user_features" if one.role == "user" else "context"][one.name] = _value(one, number)
        if not self.retrieves:
            request["item"] = items[FIRST_ITEM + number % (len(items) - FIRST_ITEM)].as_py()
        return request

    def _probability(self, ranker: LoadedRanker, request: dict[str, Any]) -> float:
        names = self.config.data.columns
        row = {names.item: request["item"], **request["context"], **request["user_features"]}
        row |= {names.user: request["user"]} if "user" in request else {"history": request["history"]}
        return float(ranker.score([row])[0])

    def manifest(self, programs: dict[str, Any]) -> dict[str, Any]:
        artifacts, dataset = self.artifacts, self.artifacts.dataset.record
        ranker = self.ranker
        made: dict[str, Record] = {"checkpoint": artifacts.checkpoint.record, "dataset": dataset}
        made |= {"index": artifacts.index.record} if self.retrieves and artifacts.index is not None else {}
        made |= {"ranker": ranker.record} if ranker is not None else {}
        index = made.get("index")
        names = [name for name in folders.everything(self.output) if not name.endswith(("/", _BEGUN))]
        return {
            "format": bundle.FORMAT,
            "kind": self.config.model.family,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": provenance.here().versions,
            "lineage": {name: {"id": one.id, "identity": one.identity} for name, one in made.items()},
            "columns": self._columns(),
            "programs": programs,
            "index_setting": index.setting if isinstance(index, IndexRecord) else {},
            "candidates": self.config.retrieval.k,
            "title": self.catalog.title,
            "exclude_seen": self.config.evaluation.filter_seen,
            "config": self.config.model_dump(mode="json"),
            "files": {name: one.model_dump() for name, one in digests.of_files(self.output, sorted(names)).items()},
        }

    def _columns(self) -> list[dict[str, str]]:
        """Raw values that a request may hold."""
        names, inputs = self.config.data.columns, self.inputs
        return [
            {"name": names.user, "role": "user key", "type": str(inputs.users.keys.type)},
            {"name": names.item, "role": "item key", "type": str(inputs.items.type)},
            *({"name": one.name, "role": one.role, "type": str(raw_type(one))} for one in inputs.features.values()),
        ]


def _value(feature: Feature, number: int) -> Any:
    """Some raw value; missing once in ten."""
    if number == _CASES - 1:
        return None
    if feature.kind == "list":
        one = feature.model_copy(update={"kind": "categorical"})
        return [_value(one, number), _value(one, number + 1)]
    if feature.edges is not None:
        return feature.edges[number % len(feature.edges)] + 0.25 if feature.edges else float(number)
    if feature.kind == "numeric":
        x = feature.mean + feature.std * (number / 2 - 2)
        return float(np.copysign(np.expm1(abs(x)), x)) if feature.log else x
    return f"value {number}" if not feature.vocabulary else feature.vocabulary[number % len(feature.vocabulary)]
