"""sasrec against the plain implementation: torch's own encoder layers on padded rows and its cross-entropy."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.collectives import OneProcess
from recray import registry
from recray.ids import FIRST_ITEM
from recray.layers import transformer
from recray.loading.batch import Batch, ItemTable, Jagged
from recray.losses.base import Objective
from recray.models import sasrec
from recray.records import DatasetRecord

ITEMS, DIM, LENGTH, LAYERS = 300, 32, 20, 2
RECORD = DatasetRecord(fingerprint="", num_items=ITEMS, num_users=2, counts={}, shards={}, seed=0)
TABLE = ItemTable(torch.ones(ITEMS))


class _Plain(nn.Module):
    """Rows padded at the right to one length; the whole matrix of logits."""

    def __init__(self, model: sasrec.SASRec, heads: int) -> None:
        super().__init__()
        # Parameters of its own, of the same values; torch's checker would not see through shared ones.
        self.items = nn.Parameter(model.item_table.weight.detach().clone())
        self.position = nn.Parameter(model.position.detach().clone())
        self.norm = nn.LayerNorm(DIM)
        self.norm.load_state_dict(model.norm.state_dict())
        self.layers = nn.ModuleList()
        for block in model.blocks:
            layer = nn.TransformerEncoderLayer(
                DIM, heads, 4 * DIM, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
            )
            pairs = {
                "self_attn.in_proj_": block.qkv,
                "self_attn.out_proj.": block.out,
                "linear1.": block.up,
                "linear2.": block.down,
                "norm1.": block.attention_norm,
                "norm2.": block.feed_norm,
            }
            state = {
                f"{name}{kind}": getattr(part, kind) for name, part in pairs.items() for kind in ("weight", "bias")
            }
            layer.load_state_dict(state)
            self.layers.append(layer)

    def forward(self, rows: list[Tensor], targets: list[Tensor]) -> Tensor:
        """Mean cross-entropy over every place of every row."""
        length = max(map(len, rows))
        ids = torch.stack([F.pad(row, (0, length - len(row))) for row in rows])
        from_end = torch.tensor([[max(len(row) - 1 - at, 0) for at in range(length)] for row in rows])
        x = self.items[ids] * DIM**0.5 + self.position[from_end]
        causal = nn.Transformer.generate_square_subsequent_mask(length)
        for layer in self.layers:
            x = layer(x, src_mask=causal, is_causal=True)
        real = torch.stack([torch.arange(length) < len(row) for row in rows])
        logits = self.norm(x)[real] @ self.items[FIRST_ITEM:].T
        return F.cross_entropy(logits, torch.cat(targets) - FIRST_ITEM)


@pytest.mark.parametrize(("heads", "groups"), [pytest.param(1, 4, marks=pytest.mark.slow), (2, 4), (2, 1)])
def test_the_loss_curve_is_that_of_the_plain_implementation(
    heads: int, groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformer, "_GROUPS", groups)  # 1 is what a GPU has for few tokens
    torch.manual_seed(heads)
    options = sasrec.Options(dim=DIM, history_length=LENGTH, layers=LAYERS, heads=heads, dropout=0.0)
    model = sasrec.build(options, RECORD, TABLE)
    plain = _Plain(model, heads)
    objective = Objective(model, registry.options("loss", "softmax")(chunk_size=50), TABLE, OneProcess())
    optimizers = [torch.optim.Adam(one.parameters(), 2e-3) for one in (model, plain)]
    curve: tuple[list[float], list[float]] = ([], [])
    for step in range(30):
        lengths = torch.randint(1, LENGTH + 1, (24,)).tolist()
        if step % 10 == 9:
            lengths = [7] * 24  # all of one length: nothing is padded
        # Something to learn: items follow one another by sevens.
        starts = [int(torch.randint(FIRST_ITEM, ITEMS, ())) for _ in lengths]
        walks = [
            (start + 7 * torch.arange(n + 1) - FIRST_ITEM) % (ITEMS - FIRST_ITEM) + FIRST_ITEM
            for n, start in zip(lengths, starts, strict=True)
        ]
        rows, targets = [walk[:-1] for walk in walks], [walk[1:] for walk in walks]
        offsets = torch.tensor([0, *lengths]).cumsum(0)
        history, target = Jagged(torch.cat(rows), offsets), torch.cat(targets)
        batch = Batch(
            torch.ones(len(rows), dtype=torch.int64),
            history,
            target,
            torch.ones(len(target)),
            torch.arange(len(target)),
        )
        total, weight = objective(batch)
        for at, loss in enumerate((total / weight, plain(rows, targets))):
            optimizers[at].zero_grad()
            loss.backward()
            optimizers[at].step()
            curve[at].append(float(loss.detach()))
    assert curve[0] == pytest.approx(curve[1], rel=2e-5)
    assert curve[0][-1] < 0.9 * curve[0][0]


@pytest.mark.parametrize(("layers", "feed_forward"), [(1, "mlp"), (2, "gated")])
@pytest.mark.parametrize("lengths", [[3, 0, 20, 7, 1, 20], [5, 5, 5], [0, 0]])
def test_a_query_is_the_last_position_of_training(layers: int, feed_forward: str, lengths: list[int]) -> None:
    torch.manual_seed(3)
    table = {"dim": DIM, "history_length": LENGTH, "layers": layers, "heads": 2, "feed_forward": feed_forward}
    model = sasrec.build(sasrec.Options.model_validate(table), RECORD, TABLE).eval()
    nn.init.normal_(model.norm.bias)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    history = Jagged(torch.randint(FIRST_ITEM, ITEMS, (sum(lengths),)), offsets)
    users = torch.ones(len(lengths), dtype=torch.int64)
    q_BD = model.query_vectors(Batch(users, history))
    last_B = offsets[1:] - 1
    with_history = torch.tensor(lengths) > 0
    every = model.query_vectors(Batch(users, history, position_Q=last_B[with_history]))
    torch.testing.assert_close(q_BD[with_history], every)
    torch.testing.assert_close(q_BD[~with_history], model.norm.bias.expand(int((~with_history).sum()), -1))


def test_memory_does_not_grow_with_the_number_of_shapes() -> None:
    """Every batch has another number of tokens, and oneDNN keeps code for every shape that it is given."""
    script = """
import resource, torch
from recray import registry
from recray.models import sasrec
from recray.loading.batch import Batch, ItemTable, Jagged
from recray.losses.base import Objective
from recray.records import DatasetRecord
class Alone:
    def all_gather(self, x): return x
items = ItemTable(torch.ones(300))
record = DatasetRecord(fingerprint="", num_items=300, num_users=2, counts={}, shards={}, seed=0)
model = sasrec.build(sasrec.Options(dim=32, history_length=50), record, items)
objective = Objective(model, registry.options("loss", "softmax")(chunk_size=64), items, Alone())
def peak(lengths):
    for n in lengths:
        ids = torch.randint(2, 300, (20 * n,))
        history = Jagged(ids, torch.arange(0, 20 * n + 1, n))
        total, _ = objective(Batch(torch.ones(20).long(), history, ids, torch.ones(20 * n), torch.arange(20 * n)))
        total.backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(peak([50, *range(20, 24)]), peak(range(24, 50)))
"""
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    first, second = map(float, out.split())
    assert second - first < 30, (first, second)
