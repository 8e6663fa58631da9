"""The [loss] table: the options of every shipped loss, typed by `loss.name` (formulas: recray/losses/<name>.py).

A loss outside the package keeps its `Options` and its `loss` in one file (recray/losses/README.md).
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from recray.config.models import Family
from recray.config.section import Section


class LossOptions(Section):
    """Keys that every loss has. A loss's own `Options` extends it, or one of the classes below."""

    family: ClassVar[Family] = "retriever"  # of the models that it trains
    scores_all_items: ClassVar[bool] = False  # needs the vector of every item at every step
    name: str = Field(description="a shipped loss, a file <name>.py next to the TOML, or an import path")

    @property
    def sampled_items(self) -> int:
        """Items drawn per batch and worker in addition to the batch's own."""
        return 0

    @property
    def gathers(self) -> bool:
        """Whether the loss calls `gather`, so that its forward waits for the other workers."""
        return False


class RetrievalLossOptions(LossOptions):
    temperature: float = Field(
        1.0,
        gt=0,
        description="scores are divided by it, also in the blend of retrieval.item_knn_weight; use 0.05 to 0.2 with normalized vectors",
    )


class SampledLossOptions(RetrievalLossOptions):
    negatives: int = Field(
        512, ge=1, description="uniformly drawn negatives per batch and worker, shared by its queries"
    )

    @property
    def sampled_items(self) -> int:
        return self.negatives


class RankerLossOptions(LossOptions):
    family: ClassVar[Family] = "ranker"


class SoftmaxOptions(RetrievalLossOptions):
    scores_all_items: ClassVar[bool] = True
    name: str = "softmax"
    chunk_size: int | None = Field(
        None,
        ge=1,
        description="rows of logits in memory at a time, fewer if they exceed 256 MB; unset: 512 on a CPU, 256 MB on a GPU",
    )


class SampledSoftmaxOptions(SampledLossOptions):
    name: str = "sampled_softmax"
    in_batch: bool = Field(True, description="also use the other positives of the batch, of all workers, as negatives")
    logq: bool = Field(True, description="subtract the log of the sampling probability from the logits")

    @property
    def gathers(self) -> bool:
        return self.in_batch


class GbceOptions(SampledLossOptions):
    name: str = "gbce"
    calibration: float = Field(
        0.75, ge=0, le=1, description="calibration t: 0 = binary cross-entropy, 1 = calibrated to the full softmax"
    )


class CosineContrastiveOptions(SampledLossOptions):
    name: str = "cosine_contrastive"
    margin: float = Field(0.9, ge=-1, le=1, description="negatives with a cosine below the margin cost nothing")
    negative_weight: float = Field(150.0, gt=0, description="weight of the mean over the negatives")


class BprOptions(SampledLossOptions):
    name: str = "bpr"


class BceOptions(RankerLossOptions):
    name: str = "bce"
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="move labels this far towards 0.5")
    positive_weight: float = Field(1.0, gt=0, description="weight of clicks; non-clicks have weight 1")
    pairwise_weight: float = Field(
        0.0, ge=0, description="weight of an additional pairwise term: clicks must score above non-clicks; 0 = off"
    )


# Loss name -> options. The loss itself is recray/losses/<name>.py.
SHIPPED: dict[str, type[LossOptions]] = {
    "bce": BceOptions,
    "bpr": BprOptions,
    "cosine_contrastive": CosineContrastiveOptions,
    "gbce": GbceOptions,
    "sampled_softmax": SampledSoftmaxOptions,
    "softmax": SoftmaxOptions,
}
BASE = LossOptions
DEFAULT: dict[Family, str] = {"retriever": "sampled_softmax", "ranker": "bce"}
