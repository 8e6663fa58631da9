"""MLflow: one run per training with parameters, metrics by step, reports, and tags that lead back to the raw files.

pip install 'recray[mlflow]'
mlflow ui --backend-store-uri sqlite:///runs/mlflow.db
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

from recray import storage
from recray.config.trackers import MlflowOptions as Options
from recray.errors import ConfigError
from recray.tracking import Status, TrackedRun

__all__ = ["Options", "build"]
_STATUS = {"finished": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}
_LONGEST_PARAMETER, _LONGEST_TAG, _AT_A_TIME = 6_000, 5_000, 100  # what MLflow takes


class _Mlflow:
    def __init__(self, client: Any, run_id: str) -> None:
        self._client, self._id = client, run_id

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        # MLflow's names take no "@".
        found = [Metric(name.replace("@", "_at_"), float(value), now, step) for name, value in values.items()]
        for first in range(0, len(found), _AT_A_TIME):
            self._client.log_batch(self._id, metrics=found[first : first + _AT_A_TIME])

    def files(self, uris: Sequence[str]) -> None:
        for uri in uris:
            with storage.local_file(uri) as path:
                self._client.log_artifact(self._id, path)

    def close(self, status: Status) -> None:
        self._client.set_terminated(self._id, _STATUS[status])


def build(options: Options, run: TrackedRun) -> _Mlflow:
    try:
        from mlflow import MlflowClient
    except ImportError as error:
        raise ConfigError("mlflow is not installed: pip install 'recray[mlflow]'") from error
    uri = options.uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{run.output}/mlflow.db"
    client = MlflowClient(tracking_uri=uri)
    experiment = _experiment(client, options.experiment, uri)
    # The training may be resumed, or be complete and evaluated.
    known = client.search_runs([experiment], f"tags.`recray.checkpoint_uri` = '{run.folder}'", max_results=1)
    if known:
        run_id = known[0].info.run_id
        client.update_run(run_id, status="RUNNING")
        return _Mlflow(client, run_id)
    tags = {key: value[:_LONGEST_TAG] for key, value in run.tags.items()}
    if "recray.commit" in tags:
        tags["mlflow.source.git.commit"] = tags["recray.commit"]
    run_id = client.create_run(experiment, run_name=run.name, tags=tags).info.run_id
    _describe(client, run_id, run)
    return _Mlflow(client, run_id)


def _experiment(client: Any, name: str, uri: str) -> str:
    found = client.get_experiment_by_name(name)
    if found is not None:
        return str(found.experiment_id)
    # Without a server MLflow would put files in the working folder.
    local = os.path.dirname(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None
    return str(client.create_experiment(name, artifact_location=f"{local}/mlflow-artifacts" if local else None))


def _describe(client: Any, run_id: str, run: TrackedRun) -> None:
    """Parameters, and the dataset as MLflow's input."""
    from mlflow.entities import Dataset, DatasetInput, InputTag, Param

    found = [Param(key, value[:_LONGEST_PARAMETER]) for key, value in run.parameters.items()]
    for first in range(0, len(found), _AT_A_TIME):
        client.log_batch(run_id, params=found[first : first + _AT_A_TIME])
    source = json.dumps({"uri": run.tags["recray.dataset_uri"], "files": len(run.inputs)})
    dataset = Dataset(run.tags["recray.run"], run.tags["recray.fingerprint"][:36], "recray", source)
    client.log_inputs(run_id, datasets=[DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])])
