"""Relative positions as a learned bias of attention's scores (Raffel et al. 2020, §2.1), its heads split over ranks."""

from math import log

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard

from weft.parallel.sharding import Sharding
from weft.parallel.tensor.divide import check_features


class RelativePositionBias(nn.Module):
    """One number for each head and bucket of distances, added to the scores of all layers that share it.

    Near distances have a bucket each, farther ones share buckets whose width grows with the distance, up to
    `max_distance`; with `bidirectional`, half of the buckets are for what comes after.

    Shapes: weight `[buckets, heads / tensor]`, result `[1, heads / tensor, queries, keys]`. No communication.

    Raises:
        ValueError: the heads do not divide over the ranks.
    """

    def __init__(
        self,
        buckets: int,
        num_heads: int,
        *,
        mesh: DeviceMesh,
        max_distance: int = 128,
        bidirectional: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_features("attention heads", num_heads, mesh.size())
        sharding = Sharding(Shard(1), mesh, (buckets, num_heads))
        self.shardings = {"weight": sharding}
        self.buckets, self.max_distance, self.bidirectional = buckets, max_distance, bidirectional
        self.weight = nn.Parameter(torch.zeros(sharding.local_shape, device=device, dtype=dtype))

    def forward(self, queries: int, keys: int) -> Tensor:
        return self.at(torch.arange(queries, device=self.weight.device)[None], keys)

    def at(self, positions: Tensor, keys: int) -> Tensor:
        """The bias of queries at those positions `[rows, queries]`, `[rows, heads / tensor, queries, keys]`."""
        distances = torch.arange(keys, device=positions.device) - positions[..., None]
        found = F.embedding(self._bucket(distances), self.weight)  # [rows, queries, keys, heads / tensor]
        return found.permute(0, 3, 1, 2)

    def _bucket(self, distances: Tensor) -> Tensor:
        """The bucket of each distance, negative to the left."""
        buckets, first = self.buckets, torch.zeros_like(distances)
        if self.bidirectional:
            buckets //= 2
            first = (distances > 0) * buckets
            distances = distances.abs()
        else:
            distances = (-distances).clamp(min=0)
        near = buckets // 2
        share = torch.log(distances.clamp(min=1).float() / near) / log(self.max_distance / near)
        far = (near + (share * (buckets - near)).long()).clamp(max=buckets - 1)
        return first + torch.where(distances < near, distances, far)

    def extra_repr(self) -> str:
        return f"buckets={self.buckets}, local heads={self.weight.shape[1]}"
