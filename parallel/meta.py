"""Running a training step on the meta device, where tensors have shapes and no numbers."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten


@contextmanager
def without_numbers() -> Iterator[None]:
    """Inside the block, code that looks at a number of a meta tensor finds a one instead of an error.

    Attention takes the fused kernel that devices have, whose scores are never whole in memory; on the meta device
    torch would take its plain one.
    """
    with _Ones(), _FusedAttention():
        yield


class _Ones(TorchDispatchMode):
    """Answers what a meta tensor cannot: its number, and its copy on a device with numbers."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default and args[0].is_meta:
            return torch.ones((), dtype=args[0].dtype).item()
        if func is aten.copy_.default and args[1].is_meta and not args[0].is_meta:
            return args[0].fill_(1)
        if func is aten._to_copy.default and args[0].is_meta and _leaves_meta(kwargs):
            return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype, device=kwargs["device"])
        return func(*args, **kwargs)


def _leaves_meta(kwargs: Mapping[str, Any]) -> bool:
    device = kwargs.get("device")
    return device is not None and torch.device(device).type != "meta"


class _FusedAttention(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and args[0].is_meta:
            return _attend(*args, **kwargs)
        return func(*args, **kwargs)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    kernel = aten._scaled_dot_product_flash_attention_for_cpu
    result: Tensor = kernel(q, k, v, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]
    return result
