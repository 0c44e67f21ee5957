"""Weights laid out for inference: of layers that read the same input beside each other, in the processor's own layout.

pack_weights(model, rows=8)     # once its weights are loaded; it computes the same, faster, and trains no more
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weft.parallel.product import has_onednn, onednn_product


class PackedWeight:
    """`x W_i^T + b_i` of several layers as one product, for inference.

    On a CPU, float32 weights are kept in the blocked layout of oneDNN and the layers' own are let go of, so that
    nothing is held twice; else the layers' weights become views of the common one.

    Shapes: x `[…, in]`, results `[…, out_i]`.
    """

    def __init__(self, layers: Sequence[nn.Module], *, rows: int, bias: bool = True) -> None:
        weights: list[Tensor] = [layer.get_parameter("weight") for layer in layers]
        self.sizes = [weight.shape[0] for weight in weights]
        with torch.no_grad():
            self.weight = torch.cat(weights) if len(weights) > 1 else weights[0].detach()
            self.bias = _common_bias(layers, self.sizes) if bias else None
            self.is_blocked = rows > 1 and _can_block(self.weight)
            if self.is_blocked:
                self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight, rows)
        for layer, weight, part in zip(layers, weights, self._parts(weights), strict=True):
            layer.weight = nn.Parameter(part, requires_grad=weight.requires_grad)

    def _parts(self, weights: Sequence[Tensor]) -> Sequence[Tensor]:
        if self.is_blocked:
            return [weight.to("meta") for weight in weights]
        return torch.split(self.weight, self.sizes)

    def product(self, x: Tensor) -> Tensor:
        """The results beside each other, `[…, sum of out_i]`."""
        if self.is_blocked:
            return onednn_product(x, self.weight, self.bias)
        return F.linear(x, self.weight, self.bias)

    def __call__(self, x: Tensor) -> Sequence[Tensor]:
        return torch.split(self.product(x), self.sizes, -1)


class Packable(nn.Module):
    """A module that knows which of its weights to lay out together."""

    def pack_weights(self, rows: int) -> None:
        """Compute with weights in a layout for inputs of about so many rows from now on."""
        raise NotImplementedError


def pack_weights(module: nn.Module, *, rows: int) -> None:
    """Lay out the weights of a model for inference, a layer at a time; it can neither train nor be saved afterwards.

    `rows`: of the inputs that are to be fast, such as the texts that are computed at a time.
    """
    for child in module.modules():
        if isinstance(child, Packable):
            child.pack_weights(rows)


def _common_bias(layers: Sequence[nn.Module], sizes: Sequence[int]) -> Tensor | None:
    biases = [layer.bias for layer in layers]
    if all(bias is None for bias in biases):
        return None
    like = next(bias for bias in biases if bias is not None)
    assert isinstance(like, Tensor)
    parts = [like.new_zeros(size) if bias is None else bias for bias, size in zip(biases, sizes, strict=True)]
    return torch.cat([part for part in parts if isinstance(part, Tensor)])


def _can_block(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and has_onednn()
