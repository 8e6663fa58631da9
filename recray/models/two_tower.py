"""Two towers: a query vector from the user, an item vector from the item, score = inner product.

    u = user_table[user] + mean of item_table over the history      q = u + MLP([u, user features, context])
    i = item_table[item]                                            v = i + MLP([i, item features])

A tower without features and hidden layers has no MLP, so that with `pooling = "none"` the model is matrix
factorisation. (Covington et al., RecSys 2016; Yi et al., RecSys 2019.)

Shape legend: B rows, N items, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recray.config.models import TwoTowerOptions as Options
from recray.layers.embedding import Table
from recray.layers.feature_encoder import FeatureEncoder, ItemFeatures, mean_pool, mlp
from recray.loading.batch import Batch, ItemTable
from recray.models import Examples, Retriever
from recray.records import DatasetRecord


class TwoTower(Retriever):
    def __init__(self, options: Options, dataset: DatasetRecord, items: ItemTable) -> None:
        super().__init__()
        self.options = options
        self.examples: Examples = "others" if options.history == "others" else "events"
        dim = options.dim
        self.item_table = Table(dataset.num_items, dim, ids="item")
        self.user_table = Table(dataset.num_users, dim, ids="user") if options.user_embedding else None
        self.bias = Table(dataset.num_items, 1, std=0.0, ids="item") if options.item_bias else None
        by_role = {role: [f for f in dataset.features if f.role == role] for role in ("user", "context", "item")}
        self.user_features = FeatureEncoder(by_role["user"], options.feature_dim)
        self.context_features = FeatureEncoder(by_role["context"], options.feature_dim)
        self.item_features = FeatureEncoder(by_role["item"], options.feature_dim)
        self.query_mlp = self._mlp(self.user_features.width + self.context_features.width)
        self.item_mlp = self._mlp(self.item_features.width)
        self.item_rows = ItemFeatures(items)

    def query_vectors(self, batch: Batch) -> Tensor:
        q_BD = torch.zeros(batch.num_rows, self.options.dim, device=batch.user_B.device)
        if self.user_table is not None:
            q_BD = q_BD + self.user_table(batch.user_B)
        if self.options.pooling == "mean":
            q_BD = q_BD + mean_pool(self.item_table, batch.history)
        if self.query_mlp is not None:
            features = self.user_features(batch.user_features) + self.context_features(batch.context)
            q_BD = q_BD + self.query_mlp(torch.cat([q_BD, *features], dim=1))
        q_BD = F.normalize(q_BD, dim=-1) if self.options.normalize else q_BD
        # q . v + bias of the item as one inner product: q gets a coordinate 1, v a coordinate bias.
        return q_BD if self.bias is None else torch.cat([q_BD, torch.ones_like(q_BD[:, :1])], dim=1)

    def item_vectors(self, item_ids: Tensor) -> Tensor:
        v_ND = self.item_table(item_ids)
        if self.item_mlp is not None:
            features = self.item_features(self.item_rows(item_ids))
            v_ND = v_ND + self.item_mlp(torch.cat([v_ND, *features], dim=1))
        v_ND = F.normalize(v_ND, dim=-1) if self.options.normalize else v_ND
        return v_ND if self.bias is None else torch.cat([v_ND, self.bias(item_ids)], dim=1)

    def _mlp(self, features: int) -> nn.Sequential | None:
        """Of the sum of embeddings and features of this width; None if it has nothing to add."""
        dim, hidden = self.options.dim, self.options.hidden
        return mlp(dim + features, hidden, dim, self.options.dropout) if features or hidden else None


build = TwoTower
