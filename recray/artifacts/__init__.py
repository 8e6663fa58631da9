"""A run on disk: where its artefacts lie, which are complete, and which are in use.

    runs/news/                              <output>/<name>
        current.json                        {"dataset": "3f2a91c0", "checkpoint": "77b0e1d2", ...}: what is in use
        dataset/3f2a91c0/                   an artefact: identity.json first, then its files, its record last
        dataset/current -> 3f2a91c0         on local disks, for people and their scripts
        checkpoint/77b0e1d2/  index/...  report/...  report-valid/...  tune/...

The name of an artefact's folder is its *identity*: a hash of the values of the configuration keys
that decide its result, and of the ids of its inputs. One rule follows for all stages: an artefact
is up to date if the folder of its identity is complete. Training with `model.dim = 8` after 64 makes
a second folder and leaves the first one alone; setting 64 again finds it. An artefact never changes
once its record is written, and publishing it is one small write of current.json.

This package knows the paths below a run; no other module joins them. (It is not called `run`, since
`recray.run` is the function that runs all stages.)

stage.py: which keys decide each stage's result. artifact.py: one artefact, and finding them. run.py: a run's own.
"""

from recray.artifacts.artifact import Artifact, artifacts_of, current_of, in_use
from recray.artifacts.run import Run
from recray.artifacts.stage import (
    CHECKPOINT,
    DATASET,
    INDEX,
    NO_RESULT,
    REPORT,
    REPORT_VALID,
    STAGES,
    TUNE,
    Split,
    Stage,
    differences,
    flatten,
    identity_of,
    report_stage,
)

__all__ = [
    "CHECKPOINT",
    "DATASET",
    "INDEX",
    "NO_RESULT",
    "REPORT",
    "REPORT_VALID",
    "STAGES",
    "TUNE",
    "Artifact",
    "Run",
    "Split",
    "Stage",
    "artifacts_of",
    "current_of",
    "differences",
    "flatten",
    "identity_of",
    "in_use",
    "report_stage",
]
