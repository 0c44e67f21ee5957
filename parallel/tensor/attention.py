"""Self-attention with its heads split over ranks (Shoeybi et al. 2019, §3)."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from weft.parallel.fused import Fusing
from weft.parallel.recompute import recomputed
from weft.parallel.tensor.cache import CachedLayer
from weft.parallel.tensor.divide import check_heads
from weft.parallel.tensor.dropout import Dropout, DropoutKey
from weft.parallel.tensor.linear import ColumnParallelLinear, RowParallelLinear
from weft.parallel.tensor.matmul import column_matmul
from weft.parallel.tensor.norm import RMSNorm, SplitRMSNorm
from weft.parallel.tensor.packed import Packable, PackedWeight

QueryKeyNorm = Literal["none", "head", "projection"]


class ParallelSelfAttention(Fusing, Packable):
    """Multi-head or grouped-query self-attention: each rank of `mesh` computes `num_heads / tensor` heads.

    `o_proj(softmax(q kᵀ · scale) v)` with q, k, v from column-parallel projections that share one input reduction, and
    a row-parallel output projection; `scale` is `1 / sqrt(head_dim)` unless given.

    Key-value heads fewer than ranks are replicated on neighbouring ranks; their gradients are summed.

    `window`: a position attends to itself and the `window - 1` before it (Beltagy et al. 2020).
    `qk_norm`: "head" normalises each head of q and k, "projection" all heads together, by root mean square (Dehghani et
    al. 2023); the latter costs one small all-reduce for q and one for k.

    Shapes: x and result `[batch, sequence, hidden]` (`[batch, sequence / tensor, hidden]` with `sequence_parallel`).
    Communication: forward one all-reduce (one all-gather, one reduce-scatter), backward one all-reduce (two
    all-gathers, one reduce-scatter).

    Raises:
        ValueError: the heads do not divide over the ranks, or the key-value heads neither divide nor are divided.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        mesh: DeviceMesh,
        bias: bool = False,
        output_bias: bool | None = None,
        dropout: float = 0.0,
        place: str = "attention",
        sequence_parallel: bool = False,
        is_causal: bool = True,
        scale: float | None = None,
        window: int | None = None,
        qk_norm: QueryKeyNorm = "none",
        norm_eps: float = 1e-6,
        norm_offset: float = 0.0,
        recompute_core: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        num_kv_heads = num_kv_heads or num_heads
        head_dim = head_dim or hidden_size // num_heads
        check_heads(num_heads, num_kv_heads, mesh.size())
        replicas = max(1, mesh.size() // num_kv_heads)
        self.mesh, self.head_dim, self.is_causal, self.window = mesh, head_dim, is_causal, window
        self.scale = head_dim**-0.5 if scale is None else scale
        self.num_heads, self.local_heads = num_heads, num_heads // mesh.size()
        self.num_kv_heads, self.local_kv_heads = num_kv_heads, num_kv_heads * replicas // mesh.size()
        self.sequence_parallel, self.recompute_core = sequence_parallel, recompute_core
        options: dict[str, Any] = {
            "mesh": mesh,
            "sequence_parallel": sequence_parallel,
            "device": device,
            "dtype": dtype,
        }
        kv_features = num_kv_heads * head_dim
        self.q_proj = ColumnParallelLinear(hidden_size, num_heads * head_dim, bias, **options)
        self.k_proj = ColumnParallelLinear(hidden_size, kv_features, bias, replicas=replicas, **options)
        self.v_proj = ColumnParallelLinear(hidden_size, kv_features, bias, replicas=replicas, **options)
        output_bias = bias if output_bias is None else output_bias
        self.o_proj = RowParallelLinear(num_heads * head_dim, hidden_size, output_bias, **options)
        self.dropout = Dropout(dropout, f"{place}.dropout")
        self.qk_norm = qk_norm
        self._packed: dict[tuple[ColumnParallelLinear, ...], PackedWeight] = {}
        if qk_norm != "none":
            norm = {"eps": norm_eps, "offset": norm_offset, "mesh": mesh, "device": device, "dtype": dtype}
            self._add_norms(norm, replicas)

    def pack_weights(self, rows: int) -> None:
        for layers in self._common_inputs():
            self._packed[layers] = PackedWeight(layers, rows=rows)

    def _common_inputs(self) -> list[tuple[ColumnParallelLinear, ...]]:
        """The projections that read the same input."""
        return [(self.q_proj, self.k_proj, self.v_proj)]

    def _add_norms(self, options: dict[str, Any], replicas: int) -> None:
        if self.qk_norm == "head":
            # every rank normalises heads of its own with the same weight, as it would positions of its own
            options |= {"sequence_parallel": self.mesh.size() > 1}
            self.q_norm: nn.Module = RMSNorm(self.head_dim, **options)
            self.k_norm: nn.Module = RMSNorm(self.head_dim, **options)
        else:
            self.q_norm = SplitRMSNorm(self.num_heads * self.head_dim, **options)
            self.k_norm = SplitRMSNorm(self.num_kv_heads * self.head_dim, replicas=replicas, **options)

    def forward(
        self,
        x: Tensor,
        *,
        rotary: tuple[Tensor, Tensor] | None = None,
        mask: Tensor | None = None,
        dropout_key: DropoutKey | None = None,
        cache: CachedLayer | None = None,
    ) -> Tensor:
        """Attend within x and, with a cache, to the tokens before it.

        `rotary`: cosines and sines of the first `rotated` dims of a head, each `[sequence, rotated]` or, where rows
        differ in their positions, `[batch, 1, sequence, rotated]`. `mask`: added to the scores or boolean (True:
        attend), broadcast to `[batch, heads / tensor, sequence, sequence]`; it replaces the causal mask and the window.
        With a `cache`, its own mask holds where none is given.
        """
        q, k, v = self._project_rotated(x, rotary)
        if cache is not None:
            k, v = cache.extend(k, v)
            mask = cache.tokens.mask_within(self.window) if mask is None else mask
        if self.recompute_core and torch.is_grad_enabled():
            heads = recomputed(self._attend, q, k, v, mask, dropout_key)
        else:
            heads = self._attend(q, k, v, mask, dropout_key)
        merged: Tensor = self.o_proj(heads.transpose(1, 2).flatten(2))  # [batch, sequence, heads / tensor · head_dim]
        return merged

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q `[batch, heads / tensor, sequence, head_dim]`, k and v `[batch, kv_heads / tensor, sequence, head_dim]`."""
        return self._into_heads(*self._matmul(x, self.q_proj, self.k_proj, self.v_proj))

    def _project_rotated(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        packed = self._packed.get((self.q_proj, self.k_proj, self.v_proj))
        if packed is None or self.qk_norm != "none" or rotary is None:
            q, k, v = self._project(x)
            if rotary is None:
                return q, k, v
            return self.fused(rotate, q, *rotary), self.fused(rotate, k, *rotary), v
        heads = packed.product(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        turning, v = heads.split((self.local_heads + self.local_kv_heads, self.local_kv_heads), 1)
        q, k = rotate(turning, *rotary).split((self.local_heads, self.local_kv_heads), 1)
        return q, k, v

    def _matmul(self, x: Tensor, *layers: ColumnParallelLinear) -> tuple[Tensor, ...]:
        """What each of the layers makes of x, whose gradients share one reduction."""
        if layers in self._packed:
            return tuple(self._packed[layers](x))
        return column_matmul(
            x,
            [layer.used("weight") for layer in layers],
            [layer.used("bias") for layer in layers],
            mesh=self.mesh,
            sequence_parallel=self.sequence_parallel,
            queue=self.q_proj.weight_gradient_queue,
        )

    def _into_heads(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        norms = (None, None) if self.qk_norm == "none" else (self.q_norm, self.k_norm)
        return self._heads(q, norms[0]), self._heads(k, norms[1]), self._heads(v, None)

    def _heads(self, x: Tensor, norm: nn.Module | None) -> Tensor:
        if norm is not None and self.qk_norm == "projection":
            x = norm(x)
        x = x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        return norm(x) if norm is not None and self.qk_norm == "head" else x

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout_key: DropoutKey | None) -> Tensor:
        mask = self._within_window(q, k, mask)
        if self.training and self.dropout.p:
            return self._attend_with_dropout(q, k, v, mask, dropout_key)
        return F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=self.is_causal and mask is None and q.shape[2] > 1,  # one query looks at all that is cached
            scale=self.scale,
            enable_gqa=k.shape[1] != q.shape[1],
        )

    def _attend_with_dropout(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, key: DropoutKey | None
    ) -> Tensor:
        """Attention with its probabilities dropped by place, which torch's fused attention cannot do."""
        first = self.mesh.get_local_rank() * self.local_heads
        probabilities = self._probabilities(q, k, mask)
        probabilities = self.dropout(probabilities, key, offset=first, dim=1, full_size=self.num_heads)
        return torch.matmul(probabilities, v.repeat_interleave(q.shape[1] // v.shape[1], 1))

    def probabilities(self, x: Tensor, *, rotary: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """How much each position attends to each other, `[batch, heads / tensor, sequence, sequence]`, for looking at.

        Shapes: as for `forward`. No communication but that of the projections.
        """
        q, k, _ = self._project(x)
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        return self._probabilities(q, k, self._within_window(q, k, None))

    def _within_window(self, q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor | None:
        """The mask of the window, where there is no other and the keys reach beyond it."""
        if mask is None and self.window is not None and self.window < k.shape[2] and q.shape[2] > 1:
            return window_mask(k.shape[2], self.window, causal=self.is_causal, device=k.device)
        return mask

    def _probabilities(self, q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        scores = q @ k.transpose(-1, -2) * self.scale  # [batch, heads / tensor, sequence, sequence]
        if mask is None and self.is_causal:
            mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        return scores.softmax(-1)

    def extra_repr(self) -> str:
        return (
            f"heads={self.num_heads} (local {self.local_heads}), "
            f"key-value heads={self.num_kv_heads} (local {self.local_kv_heads})"
        )


class ParallelCrossAttention(ParallelSelfAttention):
    """Attention of one sequence to another: q from x, k and v from `context`, such as an encoder's output.

    Shapes: x and result `[batch, sequence, hidden]`, context `[batch, context sequence, hidden]` (each `sequence /
    tensor` with `sequence_parallel`).
    Communication: as `ParallelSelfAttention`, and in the backward an all-reduce (forward an all-gather, backward an
    all-gather and a reduce-scatter) for the context.
    """

    def _common_inputs(self) -> list[tuple[ColumnParallelLinear, ...]]:
        return [(self.q_proj,), (self.k_proj, self.v_proj)]

    def keys_and_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """What the context is to every x, each `[batch, kv_heads / tensor, context sequence, head_dim]`."""
        k, v = self._matmul(context, self.k_proj, self.v_proj)
        return self._heads(k, None), self._heads(v, None)

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        context: Tensor | tuple[Tensor, Tensor],
        *,
        mask: Tensor | None = None,
        dropout_key: DropoutKey | None = None,
    ) -> Tensor:
        """`context`: or what `keys_and_values` made of it. `mask`: added to the scores or boolean (True: attend),
        broadcast to `[batch, heads / tensor, sequence, context sequence]`."""
        (q,) = self._matmul(x, self.q_proj)
        k, v = context if isinstance(context, tuple) else self.keys_and_values(context)
        q = self._heads(q, None)
        if self.recompute_core and torch.is_grad_enabled():
            heads = recomputed(self._attend, q, k, v, mask, dropout_key)
        else:
            heads = self._attend(q, k, v, mask, dropout_key)
        merged: Tensor = self.o_proj(heads.transpose(1, 2).flatten(2))
        return merged


def rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotary position embedding (Su et al. 2021) with the halves of the head paired, as Hugging Face stores them.

    Shapes: x `[batch, heads, sequence, head_dim]`, cosines and sines `[sequence, rotated]` or `[batch, 1, sequence,
    rotated]`: the first `rotated` dims of a head are rotated.
    """
    rotated = cosines.shape[-1]
    if rotated < x.shape[-1]:
        return torch.cat((rotate(x[..., :rotated], cosines, sines), x[..., rotated:]), -1)
    first, second = x.chunk(2, -1)
    return x * cosines + torch.cat((-second, first), -1) * sines


def window_mask(length: int, window: int, *, causal: bool, device: torch.device) -> Tensor:
    """Boolean `[length, length]`: whether the position of the row attends to that of the column."""
    mask = torch.ones(length, length, dtype=torch.bool, device=device).triu(1 - window)
    return mask.tril(0 if causal else window - 1)
