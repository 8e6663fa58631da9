"""DIN's attention over jagged histories: an MLP of the candidate q and a history item k gives each entry's weight.

    out = sum over the history of a(q, k) k,     a(q, k) = w3 dice(W2 dice(W1 [q, k, q - k, q * k] + b1) + b2) + b3

The weights are not normalised (Zhou et al., KDD 2018). W1 acts on four vectors, but two of the products need q or k
alone, so they are computed once per candidate and once per distinct item instead of once per entry:

    W1 [q, k, q - k, q * k] = (Wq + Wd) q + (Wk - Wd) k + Wp (q * k)

This module holds the three matrices `query` = Wq + Wd, `key` = Wk - Wd and `product` = Wp: the same functions with a
quarter of the arithmetic.

Shape legend: B rows, U distinct items, I item width, C channels of the first layer (in `shared`, where C are candidates of
a row, F), T history entries of all rows, L entries of one row, H channels of the second layer.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from recray.kernels.target_attention_cpu import Gates, Parameters, attend
from recray.layers.dice import Dice
from recray.loading.jagged import Jagged, Padded


class TargetAttention(nn.Module):
    def __init__(self, width: int, first: int, second: int) -> None:
        """width: of q and k. first, second: channels of the MLP's hidden layers."""
        super().__init__()
        self.query = nn.Linear(width, first)
        self.key = nn.Linear(width, first, bias=False)
        self.product = nn.Linear(width, first, bias=False)
        self.dice_1, self.dice_2 = Dice(first), Dice(second)
        self.second = nn.Linear(first, second)
        self.out = nn.Linear(second, 1)
        # Every entry has weight 1 at first: attention starts as a sum, and learns where to depart from it.
        nn.init.zeros_(self.out.weight)
        nn.init.ones_(self.out.bias)

    def forward(self, q_BI: Tensor, v_UI: Tensor, history: Jagged) -> Tensor:
        """(B, I). v_UI: vectors of items. history: indices into v_UI, oldest first; an empty history gives zeros."""
        if isinstance(history, Padded):
            return self.padded(q_BI, v_UI, history)
        return self.chunked(q_BI, v_UI, history) if q_BI.device.type == "cpu" else self.plain(q_BI, v_UI, history)

    def plain(self, q_BI: Tensor, v_UI: Tensor, history: Jagged) -> Tensor:
        """All entries at once, for devices with the memory and the bandwidth; the reference of the kernel."""
        row_T = history.row_index()
        k_TI = v_UI[history.values]
        x_TC = self.query(q_BI)[row_T] + self.key(v_UI)[history.values] + self.product(q_BI[row_T] * k_TI)
        w_T1 = self.out(self.dice_2(self.second(self.dice_1(x_TC))))
        return torch.zeros_like(q_BI).index_add(0, row_T, (w_T1 * k_TI).to(q_BI.dtype))

    def padded(self, q_BI: Tensor, v_UI: Tensor, history: Padded) -> Tensor:
        """The same with an entry for every place of a row, for `torch.export`."""
        k_BLI = v_UI[history.values].view(*history.real_BL.shape, -1)
        x_BLC = self.query(q_BI)[:, None] + self.key(k_BLI) + self.product(q_BI[:, None] * k_BLI)
        w_BL1 = self.out(self.dice_2(self.second(self.dice_1(x_BLC))))
        out_BI: Tensor = (w_BL1 * history.real_BL[:, :, None] * k_BLI).sum(1)
        return out_BI

    def shared(self, q_BCI: Tensor, v_UI: Tensor, history: Jagged) -> Tensor:
        """(B, C, I): C candidates for each history, for inference on a CPU.

        (Wq + Wd) q + (Wk - Wd) k + Wp (q * k) is, for one k, linear in q with the matrix (Wq + Wd) + Wp diag(k): one matrix
        per entry, and one product for all entries of a history and all candidates. Rows are computed one after the other,
        so that what is between the layers stays in the cache.
        """
        curve_1, curve_2 = self.dice_1.curve(), self.dice_2.curve()
        constant_UF = self.key(v_UI) + self.query.bias
        out_BCI = torch.zeros_like(q_BCI)
        offsets, w3_H = history.offsets.tolist(), self.out.weight[0]
        for row, (start, stop) in enumerate(pairwise(offsets)):
            if start == stop:
                continue
            index_L = history.values[start:stop]
            k_LI = v_UI[index_L]
            m_LFI = torch.addcmul(self.query.weight, k_LI[:, None], self.product.weight)
            x = torch.addmm(constant_UF[index_L].view(-1), q_BCI[row], m_LFI.view(-1, m_LFI.shape[2]).T)
            x = x.view(-1, m_LFI.shape[1])
            x = torch.addmm(self.second.bias, curve_1.value(x, curve_1.gate(x)), self.second.weight.T)
            w = torch.addmv(self.out.bias, curve_2.value(x, curve_2.gate(x)), w3_H)
            torch.mm(w.view(-1, stop - start), k_LI, out=out_BCI[row])
        return out_BCI

    def chunked(self, q_BI: Tensor, v_UI: Tensor, history: Jagged) -> Tensor:
        """The same by the CPU kernel, which also samples what the Dices learn their averages from."""
        dtype = self.query.weight.dtype  # under autocast the vectors may be narrower
        parameters = Parameters(
            self.key.weight,
            self.product.weight,
            self.dice_1.alpha,
            self.second.weight,
            self.second.bias,
            self.dice_2.alpha,
            self.out.weight,
            self.out.bias,
        )
        gates = Gates(*self.dice_1.gate(), *self.dice_2.gate())
        found = attend(q_BI.to(dtype), v_UI.to(dtype), self.query(q_BI).to(dtype), history, parameters, gates)
        if self.training:
            self.dice_1.see(found.sums_1, found.sampled)
            self.dice_2.see(found.sums_2, found.sampled)
        return found.out_BI
