"""Matrix products of float32 on a CPU by oneDNN instead of MKL.

torch brings both libraries and asks MKL, which runs code for older machines on AMD; oneDNN generates code for the
CPU it runs on. Measured for the products of a softmax over 3,416 items (EPYC with AVX-512, two threads, torch 2.13):
MKL 166 GFLOP/s, oneDNN 210. The operator is the one that torch.compile uses for linear layers.

oneDNN keeps the code that it generates for every shape, about a megabyte each, until the process ends. Use it for
products whose shapes recur, never for products over all tokens of a batch, whose number differs from batch to batch.
"""

from __future__ import annotations

import platform

import torch
from torch import Tensor

# Bytes of a result. The operator always allocates it, and glibc returns larger blocks to the kernel after each use.
_LARGEST = 1 << 25
_AVAILABLE = (
    torch.backends.mkldnn.is_available()
    and platform.machine() in ("x86_64", "AMD64")
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)


def product(a_RK: Tensor, b_NK: Tensor, out: Tensor | None = None) -> Tensor:
    """(R, N): a b'. `out` is memory for the result that may be used or not. No autograd."""
    if not fits(a_RK, b_NK):
        return reference(a_RK, b_NK, out)
    result: Tensor = torch.ops.mkldnn._linear_pointwise(a_RK, b_NK, None, "none", [], "")
    return result


def reference(a_RK: Tensor, b_NK: Tensor, out: Tensor | None = None) -> Tensor:
    return torch.mm(a_RK, b_NK.T, out=out)


def fits(a_RK: Tensor, b_NK: Tensor) -> bool:
    """Whether oneDNN computes a b': float32 on an x86 CPU, with a result that is neither empty nor large."""
    return (
        _AVAILABLE
        and a_RK.device.type == "cpu"
        and a_RK.dtype == b_NK.dtype == torch.float32
        and 0 < 4 * len(a_RK) * len(b_NK) < _LARGEST
        and a_RK.shape[1] > 0
        and not torch.compiler.is_compiling()  # the compiler takes this operator for constant weights only
    )
