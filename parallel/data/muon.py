"""Muon for matrices inside the blocks, AdamW for the rest (Jordan et al. 2024; Liu et al. 2025, arXiv:2502.16982).

Muon's update of a matrix is its averaged gradient made orthogonal, which no part of the matrix can be for itself: where
tensor ranks share a matrix, the averages are gathered, every rank computes the whole update and takes its own part.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from weft.parallel.data.replicas import ParameterGroup
from weft.parallel.sharding import Sharding, gather_full, take_shard

# Updates of the size that AdamW's have, so that one learning rate serves both (Liu et al. 2025, §2.2).
_SIZE = "match_rms_adamw"


class Muon(torch.optim.Optimizer):
    """torch's Muon for the groups whose `orthogonal` is true, its AdamW for the others.

    Args:
        groups: parameter groups with `orthogonal`; those where it is true hold matrices only.
        lr: learning rate of all groups that do not say another.
        momentum: decay per step of the average of a matrix's gradient.
        betas: of AdamW.
        shardings: of the matrices that a rank holds a part of.

    Communication: an all-gather of each such matrix per step.
    """

    def __init__(
        self,
        groups: Sequence[ParameterGroup],
        *,
        lr: float,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        fused: bool = False,
        shardings: Mapping[Tensor, Sharding] | None = None,
    ) -> None:
        super().__init__(list(groups), {"lr": lr})
        divided = {p: sharding for p, sharding in (shardings or {}).items() if sharding.dim is not None}
        self._shardings = {p: sharding for p, sharding in divided.items() if sharding.mesh.size() > 1}
        # Both have the very groups and states of this optimiser, so that learning rates and checkpoints reach them.
        self._matrices = [group for group in self.param_groups if group["orthogonal"]]
        others = [group for group in self.param_groups if not group["orthogonal"]]
        self._parts: list[torch.optim.Optimizer] = []
        if self._matrices:
            self._parts.append(torch.optim.Muon(self._matrices, lr=lr, momentum=momentum, adjust_lr_fn=_SIZE))
        if others:
            self._parts.append(torch.optim.AdamW(others, lr=lr, betas=betas, fused=fused, foreach=False))
        for part in self._parts:
            part.state = self.state

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient."""
        gradients = self._update_divided()
        for part in self._parts:
            part.step()
        for weight, gradient in gradients.items():
            weight.grad = gradient

    def _update_divided(self) -> dict[Tensor, Tensor]:
        """Update the matrices of which this rank holds a part, and take their gradients away."""
        gradients = {}
        for group in self._matrices:
            for weight in group["params"]:
                sharding = self._shardings.get(weight)
                if sharding is not None and weight.grad is not None:
                    update = self._update(weight, group, sharding)
                    weight.mul_(1 - group["lr"] * group["weight_decay"]).add_(update)
                    gradients[weight], weight.grad = weight.grad, None
        return gradients

    def _update(self, weight: Tensor, group: ParameterGroup, sharding: Sharding) -> Tensor:
        """This rank's part of what torch's Muon adds to the whole matrix, without decay."""
        state, momentum = self.state[weight], group["momentum"]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(weight)
        average = state["momentum_buffer"].lerp_(weight.grad, 1 - momentum)
        assert weight.grad is not None
        whole = torch.zeros(sharding.full_shape, dtype=weight.dtype, device=weight.device)
        # Nesterov's average is elementwise, and so is done by parts; without momentum torch's Muon does the rest.
        whole.grad = gather_full(weight.grad.lerp(average, momentum), sharding)
        torch.optim.Muon([whole], lr=group["lr"], weight_decay=0.0, momentum=0.0, adjust_lr_fn=_SIZE).step()
        return take_shard(whole, sharding)
