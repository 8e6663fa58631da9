"""Parts that several models are made of."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recray.layers.embedding import Table
from recray.loading.batch import Feature, ItemTable, Jagged
from recray.loading.batch import select as select
from recray.records import Feature as FeatureRecord


def mean_pool(vectors: Tensor | Table, history: Jagged) -> Tensor:
    """(B, D): mean of each row's vectors; zero for an empty row."""
    sparse = isinstance(vectors, Table) and vectors.sparse
    rows, index = vectors.look_up(history.values) if isinstance(vectors, Table) else (vectors, history.values)
    if not len(index):
        nothing = rows.new_zeros(1, rows.shape[1])
        if len(rows) and not sparse:
            # Still a function of the weight: DDP waits for every parameter's gradient.
            nothing = F.embedding(history.offsets[:1], rows) * 0
        return nothing.expand(len(history.offsets) - 1, -1)
    return F.embedding_bag(index, rows, history.offsets[:-1], mode="mean", sparse=sparse)


class _Dropout(torch.autograd.Function):
    """8 random bits decide about each number: eight to a draw of the generator, which `F.dropout` makes for each.

    They can drop multiples of 1/256: a call takes the one below p or the one above, so that over calls it is p.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:  # type: ignore[override]
        ctx.dropped = int(p * 256 + torch.rand(()).item())
        bits = torch.empty(-(-x.numel() // 8), dtype=torch.int64).random_(-(2**63), None).view(torch.uint8)
        bits = bits[: x.numel()].view(x.shape)
        ctx.save_for_backward(bits)
        return _kept(x, bits, ctx.dropped)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (bits,) = ctx.saved_tensors
        return _kept(grad, bits, ctx.dropped), None


def _kept(x: Tensor, bits: Tensor, dropped: int) -> Tensor:
    """x where its bits say so, as much larger as fewer are left. Products with a float mask take a third of those with a
    boolean one."""
    mask = torch.ge(bits, dropped, out=torch.empty_like(x, memory_format=torch.contiguous_format))
    return mask.mul_(x).mul_(256 / (256 - dropped))


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """`F.dropout`, on a CPU in a quarter of its time (p up to 255/256)."""
    if not training or not 0 < p <= 255 / 256 or x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, p, training)
    out: Tensor = _Dropout.apply(x, p)  # type: ignore[no-untyped-call]
    return out


class Dropout(nn.Dropout):
    def forward(self, x: Tensor) -> Tensor:
        return dropout(x, self.p, self.training)


class FeatureEncoder(nn.Module):
    """Features to one vector: embeddings of categories (mean over a list), numbers as they are. Output (B, self.width)."""

    def __init__(self, records: list[FeatureRecord], dim: int) -> None:
        super().__init__()
        self._records = records
        self.tables = nn.ModuleDict(
            {f.name: Table(f.cardinality, dim) for f in records if f.kind in ("categorical", "list")}
        )
        self.width = sum(dim if f.kind != "numeric" else 1 for f in records)

    def forward(self, features: dict[str, Feature]) -> Tensor:
        parts = []
        for record in self._records:
            value = features[record.name]
            if isinstance(value, Jagged):
                parts.append(mean_pool(self.tables[record.name], value))  # type: ignore[arg-type]
            elif record.kind == "numeric":
                parts.append(value.float()[:, None])
            else:
                parts.append(self.tables[record.name](value))
        return torch.cat(parts, dim=1)


class ItemFeatures(nn.Module):
    """The features of the item table as buffers on the model's device; ids -> their rows.

    A checkpoint holds the item table itself (recray.training.checkpoint), so they are no part of the model's state.
    """

    def __init__(self, items: ItemTable) -> None:
        super().__init__()
        self._names = list(items.features)
        for name, feature in items.features.items():
            if isinstance(feature, Jagged):
                self.register_buffer(f"{name}_values", feature.values, persistent=False)
                self.register_buffer(f"{name}_offsets", feature.offsets, persistent=False)
            else:
                self.register_buffer(f"{name}_column", feature, persistent=False)

    def forward(self, item_ids: Tensor) -> dict[str, Feature]:
        return {name: select(self._feature(name), item_ids) for name in self._names}

    def _feature(self, name: str) -> Feature:
        if f"{name}_column" in self._buffers:
            return self.get_buffer(f"{name}_column")
        return Jagged(self.get_buffer(f"{name}_values"), self.get_buffer(f"{name}_offsets"))


def mlp(width: int, hidden: list[int], out: int, dropout: float) -> nn.Sequential:
    """Linear, GELU, dropout for each hidden width, then a linear layer to `out`."""
    layers: list[nn.Module] = []
    for inner in hidden:
        layers += [nn.Linear(width, inner), nn.GELU(), Dropout(dropout)]
        width = inner
    return nn.Sequential(*layers, nn.Linear(width, out))
