"""sasrec against the plain implementation: torch's own encoder layers on padded rows and its cross-entropy."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recray.config import LossConfig
from recray.models import sasrec
from recray.models.batch import FIRST_ID, Batch, ItemTable, Jagged
from recray.models.losses import RetrievalObjective
from recray.models.products import Linear
from recray.records import DatasetRecord

ITEMS, DIM, LENGTH, LAYERS = 300, 32, 20, 2
RECORD = DatasetRecord(fingerprint="", num_items=ITEMS, num_users=2, counts={}, shards={}, seed=0)
TABLE = ItemTable(torch.ones(ITEMS))


class _Alone:
    def all_gather(self, x: Tensor) -> Tensor:
        return x


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
        logits = self.norm(x)[real] @ self.items[FIRST_ID:].T
        return F.cross_entropy(logits, torch.cat(targets) - FIRST_ID)


@pytest.mark.parametrize("heads", [1, 2])
def test_the_loss_curve_is_that_of_the_plain_implementation(heads: int) -> None:
    torch.manual_seed(heads)
    options = sasrec.Options(dim=DIM, history_length=LENGTH, layers=LAYERS, heads=heads, dropout=0.0)
    model = sasrec.build(options, RECORD, TABLE)
    plain = _Plain(model, heads)
    objective = RetrievalObjective(model, LossConfig(name="softmax", chunk_size=50), TABLE, _Alone())
    optimizers = [torch.optim.Adam(one.parameters(), 2e-3) for one in (model, plain)]
    curve: tuple[list[float], list[float]] = ([], [])
    for step in range(30):
        lengths = torch.randint(1, LENGTH + 1, (24,)).tolist()
        if step % 10 == 9:
            lengths = [7] * 24  # all of one length: nothing is padded
        # Something to learn: items follow one another by sevens.
        starts = [int(torch.randint(FIRST_ID, ITEMS, ())) for _ in lengths]
        walks = [
            (start + 7 * torch.arange(n + 1) - FIRST_ID) % (ITEMS - FIRST_ID) + FIRST_ID
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


@pytest.mark.parametrize("rows", [0, 1, 300])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_is_torchs_with_its_gradients(rows: int, bias: bool) -> None:
    torch.manual_seed(0)
    ours, theirs = Linear(24, 40, bias), nn.Linear(24, 40, bias).double()
    theirs.load_state_dict({name: value.double() for name, value in ours.state_dict().items()})
    x = torch.randn(rows, 24, requires_grad=True)
    y = x.detach().double().requires_grad_()
    factor = torch.randn(40, rows).T  # gradients need not be contiguous
    found, wanted = ours(x), theirs(y)
    (found * factor).sum().backward()
    (wanted * factor.double()).sum().backward()
    assert torch.allclose(found.double(), wanted, atol=1e-5)
    assert x.grad is not None and y.grad is not None
    assert torch.allclose(x.grad.double(), y.grad, atol=1e-5)
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert one.grad is not None and other.grad is not None
        assert torch.allclose(one.grad.double(), other.grad, atol=1e-4)
