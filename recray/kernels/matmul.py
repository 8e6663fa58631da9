"""Matrix products of float32 on a CPU, by the faster of the two libraries that torch brings.

torch asks MKL, which runs kernels for older machines on AMD; oneDNN makes its own for
the CPU at hand. Measured for the products of a softmax over 3,416 items (EPYC with
AVX-512, two threads, torch 2.13): 166 against 210 GFLOP/s. The operator is the one that
torch.compile uses; elsewhere, and where it is missing, torch's own product.

oneDNN keeps the code that it makes for every shape, a megabyte or so each, for ever: only
for products whose shapes come again and again, never for all tokens of a batch.
"""

from __future__ import annotations

import platform

import torch
from torch import Tensor

_LARGEST = 1 << 25  # bytes: oneDNN's operator always makes a new tensor, and memory that large is not kept for it
_ONEDNN = (
    torch.ops.mkldnn._linear_pointwise
    if torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    and platform.machine() in ("x86_64", "AMD64")
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    else None
)


def product(a_RK: Tensor, b_NK: Tensor, out: Tensor | None = None) -> Tensor:
    """(R, N): a b'. Where memory is dear it is written to `out`. No autograd."""
    if fits(a_RK, b_NK):
        return _ONEDNN(a_RK, b_NK, None, "none", [], "")  # type: ignore[no-any-return, misc]
    return torch.mm(a_RK, b_NK.T, out=out)


def fits(a_RK: Tensor, b_NK: Tensor) -> bool:
    """Whether oneDNN makes a b'."""
    return (
        _ONEDNN is not None
        and a_RK.device.type == "cpu"
        and a_RK.dtype == b_NK.dtype == torch.float32
        and 0 < 4 * len(a_RK) * len(b_NK) < _LARGEST
        and a_RK.shape[1] > 0
        and not torch.compiler.is_compiling()  # the compiler takes this operator for constant weights only
    )
