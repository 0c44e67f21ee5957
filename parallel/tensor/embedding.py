"""Embedding and output head with the vocabulary split over ranks (Shoeybi et al. 2019, §3)."""

from math import sqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard

from weft.parallel.collectives import all_reduce, reduce_scatter
from weft.parallel.deferred import WeightGradientQueue
from weft.parallel.sharding import Sharding, take_shard
from weft.parallel.tensor.matmul import SEQUENCE_DIM, column_matmul
from weft.parallel.tensor.packed import Packable, PackedWeight
from weft.parallel.tensor.range import check_range


class VocabParallelEmbedding(nn.Embedding):
    """Rows of the table split over `mesh`: each rank looks up the tokens that it owns, the sum is the embedding.

    Forward: all-reduce. Backward: no communication.
    With `sequence_parallel`, the result is split along its sequence: forward reduce-scatter, backward all-gather.
    Equal to `nn.Embedding(num_embeddings, embedding_dim)`, seed for seed, on any number of ranks.

    Shapes: tokens `[batch, sequence]`, result `[batch, sequence, embedding_dim]`
    (`[batch, sequence / tensor, embedding_dim]`).

    A vocabulary that does not divide is padded: every rank holds `ceil(num_embeddings / tensor)` rows, the last ones
    end in zero rows that no token selects.

    Raises:
        IndexError: in the forward on a CPU, a token outside the vocabulary.
    """

    shardings: dict[str, Sharding]

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        mesh: DeviceMesh,
        sequence_parallel: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        sharding = Sharding(Shard(0), mesh, (num_embeddings, embedding_dim))
        rows, columns = sharding.local_shape
        super().__init__(rows, columns, device="meta", dtype=dtype)
        self.full_num_embeddings = num_embeddings
        self.mesh, self.sequence_parallel = mesh, sequence_parallel
        self.shardings = {"weight": sharding}
        self.weight = nn.Parameter(torch.empty(sharding.local_shape, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw what `nn.Embedding` would draw from torch's generator, and keep this rank's rows."""
        sharding = getattr(self, "shardings", {}).get("weight")
        if sharding is None or self.weight.is_meta:
            return
        full = torch.empty(sharding.full_shape, dtype=self.weight.dtype, device=self.weight.device)
        with torch.no_grad():
            self.weight.copy_(take_shard(full.normal_(), sharding))

    def forward(self, tokens: Tensor) -> Tensor:
        if self.mesh.size() == 1:
            return F.embedding(tokens, self.weight, self.padding_idx)
        check_range(tokens, self.full_num_embeddings, "token")
        local = tokens - self.mesh.get_local_rank() * self.num_embeddings
        foreign = (local < 0) | (local >= self.num_embeddings)
        found = F.embedding(local.masked_fill(foreign, 0), self.weight, self.padding_idx)
        found = found.masked_fill(foreign.unsqueeze(-1), 0.0)
        if self.sequence_parallel:
            return reduce_scatter(found, self.mesh, SEQUENCE_DIM)
        return all_reduce(found, self.mesh)

    def extra_repr(self) -> str:
        return f"{self.full_num_embeddings}, {self.embedding_dim}, local rows={self.num_embeddings}"


class VocabParallelHead(Packable):
    """Logits of a vocabulary split over `mesh`, ready for `vocab_parallel_cross_entropy`.

    `logits_r = x W_r^T`, W `[vocab_size, hidden_size]` by rows as in `VocabParallelEmbedding`, whose weight it can
    share. Where the vocabulary is padded, the padding's logits are -inf: it never wins, and the loss does not see it.

    Shapes: x `[batch, sequence, hidden]` (`[batch, sequence / tensor, hidden]` with `sequence_parallel`), result
    `[batch, sequence, ceil(vocab_size / tensor)]`.
    Forward: no communication (all-gather). Backward: all-reduce (all-gather and reduce-scatter).
    """

    shardings: dict[str, Sharding]
    weight_gradient_queue: WeightGradientQueue | None = None
    _packed: PackedWeight | None = None

    def __init__(
        self,
        hidden_size: int,
        vocab_size: int,
        *,
        mesh: DeviceMesh,
        sequence_parallel: bool = False,
        weight: nn.Parameter | None = None,
        bias: bool = False,
        **factory: Any,
    ) -> None:
        super().__init__()
        sharding = Sharding(Shard(0), mesh, (vocab_size, hidden_size))
        self.mesh, self.sequence_parallel = mesh, sequence_parallel
        self.shardings = {"weight": sharding}
        self.bias: nn.Parameter | None = None
        if bias:
            self.shardings["bias"] = Sharding(Shard(0), mesh, (vocab_size,))
            self.bias = nn.Parameter(torch.zeros(self.shardings["bias"].local_shape, **factory))
        self.weight = weight if weight is not None else nn.Parameter(torch.empty(sharding.local_shape, **factory))
        rank = mesh.get_local_rank()
        self.held_rows = sum(part.length for part in sharding.slices(rank))
        if weight is None:
            self.reset_parameters()

    def pack_weights(self, rows: int) -> None:
        self._packed = PackedWeight([self], rows=rows)

    def reset_parameters(self) -> None:
        """Draw what `nn.Linear(hidden_size, vocab_size, bias=False)` would draw, and keep this rank's rows."""
        if self.weight.is_meta:
            return
        sharding = self.shardings["weight"]
        full = torch.empty(sharding.full_shape, dtype=self.weight.dtype, device=self.weight.device)
        with torch.no_grad():
            self.weight.copy_(take_shard(nn.init.kaiming_uniform_(full, a=sqrt(5)), sharding))

    def forward(self, x: Tensor) -> Tensor:
        logits = self._product(x)
        padding = logits.shape[-1] - self.held_rows
        if padding:
            logits = F.pad(logits[..., : self.held_rows], (0, padding), value=-torch.inf)
        return logits

    def _product(self, x: Tensor) -> Tensor:
        if self._packed is not None:
            return self._packed.product(x)
        (logits,) = column_matmul(
            x,
            [self.weight],
            [self.bias],
            mesh=self.mesh,
            sequence_parallel=self.sequence_parallel,
            queue=self.weight_gradient_queue,
        )
        return logits

    def extra_repr(self) -> str:
        vocab_size, hidden_size = self.shardings["weight"].full_shape
        return f"{hidden_size}, {vocab_size}, local rows={self.weight.shape[0]}"
