"""The [model] table: the options of every shipped model, typed by `model.name`.

They are here and not in the models' files so that a configuration is read without importing torch.
A model outside the package keeps its `Options` and its `build` in one file (recray/models/README.md).
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from recray.config.section import Section

Family = Literal["retriever", "ranker"]


class EmbeddingConfig(Section):
    """Placement of embedding tables during training (recray.layers.embedding)."""

    mode: Literal["auto", "dense", "sparse_replicated", "row_sharded"] = Field(
        "auto",
        description="dense: every worker holds and updates all rows; sparse_replicated: workers exchange and update only the rows in the batch; row_sharded: each worker holds a shard of the rows; auto: chosen per table",
    )


class ModelOptions(Section):
    """Keys that every model has. A model's own `Options` extends it."""

    family: ClassVar[Family] = "retriever"
    name: str = Field(description="a shipped model, a file <name>.py next to the TOML, or an import path")
    dim: int = Field(64, ge=1, description="width of query and item vectors")
    history_length: int = Field(50, ge=1, description="number of most recent events of a user that the model reads")
    embedding: EmbeddingConfig = Field(EmbeddingConfig(), description="placement of embedding tables")


class TwoTowerOptions(ModelOptions):
    name: str = "two_tower"
    user_embedding: bool = Field(True, description="learn a vector per user id in addition to the history's vector")
    pooling: Literal["mean", "none"] = Field("mean", description="how the history becomes one vector; none ignores it")
    history: Literal["before", "others"] = Field(
        "before",
        description="history of a training event: the events before it, or all other events of the user (for logs without order)",
    )
    hidden: list[int] = Field([], description="widths of the hidden layers of each tower")
    feature_dim: int = Field(16, ge=1, description="width of feature embeddings")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout after each hidden layer")
    item_bias: bool = Field(False, description="learn a score per item, added as one more coordinate of the vectors")
    normalize: bool = Field(
        False, description="scale vectors to length 1, so that scores are cosines (use loss.temperature of 0.05 to 0.2)"
    )


class SasrecOptions(ModelOptions):
    name: str = "sasrec"
    history_length: int = Field(200, ge=1, description="number of most recent events of a user that the model reads")
    layers: int = Field(2, ge=1, description="number of transformer blocks")
    heads: int = Field(1, ge=1, description="number of attention heads; model.dim must be divisible by it")
    dropout: float = Field(0.2, ge=0, lt=1, description="dropout of embeddings, attention output and feed-forward part")
    feed_forward: Literal["mlp", "gated"] = Field("mlp", description="GELU MLP, or a gated one (SwiGLU)")
    expansion: int = Field(4, ge=1, description="width of the feed-forward part as a multiple of model.dim")
    normalize: bool = Field(
        False, description="scale vectors to length 1, so that scores are cosines (use loss.temperature of 0.05 to 0.2)"
    )

    @model_validator(mode="after")
    def _heads_share_the_width(self) -> SasrecOptions:
        if self.dim % self.heads:
            raise ValueError(
                f"dim = {self.dim} is not divisible by heads = {self.heads}: every head has the same width"
            )
        return self


class RankerOptions(ModelOptions):
    """Keys that every ranker has."""

    family: ClassVar[Family] = "ranker"
    dim: int = Field(16, ge=1, description="width of embeddings")
    feature_dims: dict[str, int] = Field(
        {}, description="embedding width of single columns, by name; the id columns are called 'user' and 'item'"
    )
    user_embedding: bool = Field(
        False, description="learn a vector per user id in addition to user features and history"
    )
    hidden: list[int] = Field([256, 128], description="widths of the hidden layers of the final MLP")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout after each hidden layer")


class HistoryOptions(RankerOptions):
    """Keys of rankers that read the history as one more vector."""

    history: Literal["mean", "none"] = Field("mean", description="mean of the vectors of the history's items, or none")


class DinOptions(RankerOptions):
    name: str = "din"
    attention: list[int] = Field(
        [64, 32], min_length=2, max_length=2, description="widths of the two hidden layers of the attention MLP"
    )
    min_history: int = Field(1, ge=1, description="shorter histories are averaged instead of attended to")


class DlrmOptions(HistoryOptions):
    name: str = "dlrm"
    bottom: list[int] = Field([64], description="widths of the hidden layers of the MLP over numeric features")

    @field_validator("feature_dims")
    @classmethod
    def _one_width(cls, value: dict[str, int]) -> dict[str, int]:
        if value:
            raise ValueError(
                "dlrm takes inner products of embeddings: all have the width `dim`; leave feature_dims out"
            )
        return value


class DcnV2Options(HistoryOptions):
    name: str = "dcn_v2"
    cross_layers: int = Field(2, ge=1, description="number of cross layers")
    rank: int = Field(32, ge=0, description="rank of a cross layer's weight matrix; 0 = full rank")
    structure: Literal["parallel", "stacked"] = Field(
        "parallel", description="parallel: cross layers next to the MLP; stacked: the MLP on top of the cross layers"
    )


class WideDeepOptions(HistoryOptions):
    name: str = "wide_deep"


# Model name -> options. The model itself is recray/models/<name>.py.
SHIPPED: dict[str, type[ModelOptions]] = {
    "dcn_v2": DcnV2Options,
    "din": DinOptions,
    "dlrm": DlrmOptions,
    "sasrec": SasrecOptions,
    "two_tower": TwoTowerOptions,
    "wide_deep": WideDeepOptions,
}
BASE = ModelOptions
