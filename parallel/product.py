"""The matrix products of the layers, each by the quickest of torch's libraries.

For float32 torch calls MKL, which holds processors of other makers than Intel to AVX2. oneDNN, which torch has too,
uses AVX-512 on all of them: twice as fast on an AMD EPYC. The results differ by rounding alone.
"""

import os
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SMALLEST_FOR_ONEDNN = 3 * 2**19  # multiplications; below, preparing oneDNN's call takes longer than it saves
ROWS_AT_ONCE = 8192  # of a sum, so that the product beside it stays small
# Entries of a product with more rows than columns that oneDNN computes turned, up to a third sooner; to add a larger
# one turned takes longer than that saves
LARGEST_TURNED = 2**17


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x W^T + b`; without autograd where `is_by_onednn`.

    Shapes: x `[…, in]`, weight `[out, in]`, result `[…, out]`.
    """
    if is_by_onednn(x, weight):
        return onednn_product(x, weight, bias)
    return F.linear(x, weight, bias)


def onednn_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """oneDNN's `product`, always without autograd; the weight may be in its own blocked layout."""
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return result


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add `left right` to `total` in place, without autograd.

    Shapes: total `[rows, out]`, left `[rows, in]`, right `[in, out]`.
    """
    columns = right.t()
    if not is_by_onednn(left, columns):
        total.addmm_(left, right)
        return
    for part, rows in zip(total.split(ROWS_AT_ONCE), left.split(ROWS_AT_ONCE), strict=True):
        if len(columns) < len(rows) and part.numel() <= LARGEST_TURNED:
            part += product(columns, rows).t()
        else:
            part += product(rows, columns)


def is_by_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether `product` of the two is oneDNN's; `torch.backends.mkldnn.flags(enabled=False)` prevents it."""
    return (
        x.numel() * weight.shape[0] >= SMALLEST_FOR_ONEDNN
        and x.dtype == torch.float32 == weight.dtype
        and type(x) is Tensor
        and type(weight) in (Tensor, nn.Parameter)  # neither a DTensor nor a fake one
        and x.device.type == "cpu"
        and not torch.is_autocast_enabled("cpu")  # which decides on the precision of torch's own products
        and not torch.compiler.is_compiling()
        and _has_wide_vectors()
        and bool(torch.backends.mkldnn.enabled)
    )


@cache
def _has_wide_vectors() -> bool:
    return has_onednn() and torch.backends.cpu.get_cpu_capability() == "AVX512"


@cache
def has_onednn() -> bool:
    """Whether torch has oneDNN's product; to be asked before its first one.

    torch and oneDNN keep compiled code of each shape, 0.7 MB, for 1,024 shapes by default: where texts differ
    in length, a GB. To compile again takes 0.3 ms.
    """
    for kept in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(kept, "128")
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
