"""All stages, one after the other.

    prepare -> dataset -> train -> checkpoint -> index -> index -> evaluate -> report

Each stage is a function of a configuration that returns a record. `recray.artifacts` decides from the
configuration and its inputs whether the stage's artefact exists already.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from recray.cluster import runtime
from recray.config import Config
from recray.data.prepare import prepare

if TYPE_CHECKING:
    from recray.records import ReportRecord


def run(config: Config) -> ReportRecord:
    """Prepare, train, index (a retriever only) and evaluate on the test split. Stages that are up to date do no work.

    Raises a RecrayError of the stage that fails; what the stages before it made stays, and the next call continues.
    """
    if config.model.family == "retriever":
        from recray.retrieval import faiss_index

        faiss_index.check(config.retrieval.index)
    prepare(config)
    runtime.stop_own()  # training often needs none, and starts another one if it does
    # Torch takes seconds to load, which an error in the log should not wait for.
    from recray.evaluation import evaluate
    from recray.retrieval.build import index
    from recray.training.launch import train

    train(config)
    if config.model.family == "retriever":
        index(config)
    return evaluate(config)
