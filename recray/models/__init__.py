"""Models, one file each: recray/models/<name>.py is the model `<name>`.

A model file holds a docstring (paper, formula, shape legend), `Options` (its configuration), the torch module, and
`build(options, dataset, items) -> module`. The module extends one of two families:

    Retriever   finds items for a query: two vectors, whose inner product is the score
    Ranker      predicts for a user and one candidate item the probability that the user chooses it

`Options.family` says which, so that a configuration is checked without importing torch; `build_model` checks that
the module is of that family. Code that has a module asks `isinstance(model, Ranker)`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from recray import registry
from recray.config import Config
from recray.errors import ConfigError
from recray.loading.batch import Batch, ItemTable
from recray.loading.examples import Examples as Examples
from recray.records import DatasetRecord


class Retriever(nn.Module, ABC):
    """Scores a query against an item by an inner product, so that training, exact search and faiss agree.

    `examples` says how training examples are made of a user's events:
    "events": one row per training event, its history the events before it;
    "others": the same with all other events of the user as history, for logs without order;
    "sequences": one row per user, every position a query (Batch.position_Q).
    """

    examples: Examples

    @abstractmethod
    def query_vectors(self, batch: Batch) -> Tensor:
        """(Q, D): one vector per query of the batch."""

    @abstractmethod
    def item_vectors(self, item_ids: Tensor) -> Tensor:
        """(N, D): vectors of the items with these ids (N,)."""


class Ranker(nn.Module, ABC):
    """Scores one candidate item (Batch.target_Q) per row."""

    examples: Examples = "impressions"

    @abstractmethod
    def logits(self, batch: Batch) -> Tensor:
        """(B,): log p / (1 - p), p the probability that the user chooses the candidate."""

    def candidate_logits(self, batch: Batch, item_BC: Tensor) -> Tensor | None:
        """(B, C): `logits` of C items for each row of a batch without targets, up to rounding, at less cost than for rows
        that are repeated C times. None where a model has no such way."""
        return None


def build_model(config: Config, dataset: DatasetRecord, items: ItemTable) -> Retriever | Ranker:
    """The model of `config.model`. Raises ConfigError if the plug-in's `build` returns a module of another kind."""
    options = config.model
    model = registry.load("model", options.name, config.run.plugins).build(options, dataset, items)
    family = Ranker if options.family == "ranker" else Retriever
    if not isinstance(model, family):
        raise ConfigError(
            f"model '{options.name}': build() returned a {type(model).__name__}, but Options.family is '{options.family}': "
            f"return a module that extends recray.models.{family.__name__}, or change Options.family"
        )
    return model
