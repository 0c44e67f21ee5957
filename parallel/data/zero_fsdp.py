"""ZeRO 3 by torch's FSDP2: parameters, gradients and optimiser states divided over the data axis (Zhao et al. 2023).

`fully_shard` gathers the parameters of a block before it computes and frees them afterwards. weft's layers hold plain
tensors, so it composes with tensor parallelism, and with pipelines: each microbatch gathers the stage's blocks anew.
"""

import warnings
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from weft.parallel.data.replicas import (
    MakeOptimizer,
    ParameterGroup,
    Piece,
    Replicas,
    named_parameters,
    tensor_states,
)
from weft.parallel.exchange import start_all_gather
from weft.parallel.pipeline.stage import PipelineStage

# Nothing writes into what a stage returns.
warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)


class FullyShardedReplicas(Replicas):
    """Every data rank holds and updates some rows of each parameter.

    Parameters of less than float32 are held in float32 and gathered in their own precision.

    Args:
        stages: of this rank; their modules are changed in place, and forget which parameters are shared.
        blocks: of each stage's module, the submodules that are gathered one at a time; the rest is gathered for the
            whole of the forward and of the backward.
        groups, make_optimizer: as for a torch optimiser; each element's update depends on that element alone.
        mesh: the data axis.

    Communication: per microbatch and block, two all-gathers of the weights and a reduce-scatter of the gradients.
    Weight gradients cannot wait for later than the backward of their block, which frees the weights.
    """

    def __init__(
        self,
        stages: Sequence[PipelineStage],
        blocks: Sequence[Sequence[nn.Module]],
        groups: Sequence[ParameterGroup],
        make_optimizer: MakeOptimizer,
        mesh: DeviceMesh,
    ) -> None:
        self.split_over = (mesh,)
        named = named_parameters(stages)
        places = {parameter: place for stage in stages for place, parameter in _places(stage.module)}
        self._precision = next(iter(places)).dtype
        for stage, parts in zip(stages, blocks, strict=True):
            _shard(stage, parts, mesh)
        # Whoever keeps one of the parameters that were before keeps its memory.
        sharded = {p: module.get_parameter(name) for p, (module, name) in places.items()}
        weights = {p: nn.Parameter(_local(new).detach()) for p, new in sharded.items()}
        self.pieces = [
            Piece(name, stage, sharded[p], sharding, weights[p], _first_element(p, mesh), shared, copied)
            for name, stage, p, sharding, shared, copied in named
        ]
        # An optimiser's fused kernels refuse empty tensors, which ranks have where there are fewer rows than ranks.
        held = [group | {"params": [weights[p] for p in group["params"] if weights[p].numel()]} for group in groups]
        self.optimizer = make_optimizer([group for group in held if group["params"]])

    def begin(self) -> None:
        for piece in self.pieces:
            piece.parameter.grad = piece.weight.grad = None

    @property
    def gradient_bytes(self) -> int:
        return sum(piece.weight.nbytes for piece in self.pieces)

    def finish(self) -> None:
        """FSDP has summed the gradients of each backward at its end."""

    def gradient(self, piece: Piece) -> Tensor:
        if piece.parameter.grad is not None:
            return _local(piece.parameter.grad)
        if piece.weight.grad is None:  # no microbatch used the parameter
            piece.weight.grad = torch.zeros_like(piece.weight)
        return piece.weight.grad

    def step(self) -> None:
        for piece in self.pieces:
            piece.weight.grad = self.gradient(piece)
        self.optimizer.step()
        self.begin()  # FSDP would keep the gradients until they are asked for again

    def refresh(self) -> None:
        """The model gathers the pieces themselves."""

    @torch.no_grad()
    def whole_weights(self, module: nn.Module) -> dict[str, Tensor]:
        named = module.named_parameters(remove_duplicate=False)
        return {name: _gathered(parameter, self.split_over[0]).to(self._precision) for name, parameter in named}

    def states(self, piece: Piece) -> dict[str, Tensor]:
        return tensor_states(self.optimizer, piece.weight)


def _local(tensor: Tensor) -> Tensor:
    return cast(DTensor, tensor).to_local()


def _gathered(parameter: Tensor, mesh: DeviceMesh) -> Tensor:
    """The whole parameter on every rank; the last ranks have fewer rows than the first, or none."""
    if mesh.size() == 1:
        return _local(parameter).clone()
    rows = -(-parameter.shape[0] // mesh.size())
    own = _local(parameter)
    padded = own.new_zeros((rows, *parameter.shape[1:]))
    padded[: own.shape[0]] = own
    return start_all_gather(padded, mesh, 0).wait()[: parameter.shape[0]]


def _places(module: nn.Module) -> list[tuple[tuple[nn.Module, str], nn.Parameter]]:
    return [((module, name), parameter) for name, parameter in module.named_parameters()]


def _shard(stage: PipelineStage, blocks: Sequence[nn.Module], mesh: DeviceMesh) -> None:
    module = stage.module
    precision = next(module.parameters()).dtype
    module.to(torch.promote_types(precision, torch.float32))
    policy = MixedPrecisionPolicy(
        param_dtype=precision, reduce_dtype=torch.promote_types(precision, torch.float32), cast_forward_inputs=False
    )
    for part in (*blocks, module):
        sharded = fully_shard(part, mesh=mesh, reshard_after_forward=True, mp_policy=policy)
        sharded.set_gradient_divide_factor(1.0)  # the loss is already divided by what the global batch counts
        sharded.set_force_sum_reduction_for_comms(True)  # gloo has no sum that scales
    stage.compute_weight_gradients_at_once()
    stage.shared = {}


def _first_element(parameter: nn.Parameter, mesh: DeviceMesh) -> int:
    """Where this rank's rows begin in the flattened parameter: all ranks have as many as the first, but the last."""
    rows = parameter.shape[0]
    return min(mesh.get_local_rank() * -(-rows // mesh.size()), rows) * (parameter.numel() // max(1, rows))
