"""ZeRO 3 by DeepSpeed: weights too are divided over the data axis, gathered when needed (Rajbhandari et al. 2020).

DeepSpeed flattens every parameter, gives each data rank one range of it, and hooks modules: what a block holds is
gathered before its forward and its backward, and freed after them. As in `weft.parallel.data.zero_deepspeed`, the
executor runs the model and this file hands over gradients, so that norm, clipping and loss scaling are weft's.
"""

import os
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from weft.parallel.data.buckets import BUCKET_BYTES
from weft.parallel.data.replicas import (
    MakeOptimizer,
    Named,
    ParameterGroup,
    Piece,
    Replicas,
    collect_in_float32,
    named_parameters,
)
from weft.parallel.data.zero_deepspeed import begin_communication, offload_config
from weft.parallel.pipeline.stage import PipelineStage

from deepspeed.runtime.zero.partition_parameters import (  # isort: skip  # after its settings
    GatheredParameters,
    Init,
    register_external_parameter,
)
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3  # isort: skip

from deepspeed.utils.timer import NoopTimer  # isort: skip
from deepspeed.utils.z3_leaf_module import set_z3_leaf_module  # isort: skip


class DeepSpeedShardedReplicas(Replicas):
    """Every data rank holds and updates one range of each parameter.

    Parameters of less than float32 are gathered in their own precision and updated in float32. Those of one dimension,
    such as norms, are gathered once a step and kept: they are small, and gathering them would take as long as a matrix.

    Args:
        stage: of this rank, the only one of the model; its module is changed in place.
        blocks: the submodules that are gathered one at a time, with all that is in them.
        groups, make_optimizer: as for a torch optimiser; each element's update depends on that element alone.
        mesh: the data axis.
        offload: keep float32 weights and the optimiser's states in the memory of the CPU, and update them there.

    Communication: per microbatch and module, two all-gathers of the weights and a reduce-scatter of the gradients.
    Weight gradients cannot wait for later than the backward of their module, which frees the weights. In its first
    steps DeepSpeed compares the order of the modules over all ranks of the world, so pipeline stages would wait for
    ever for each other.
    """

    def __init__(
        self,
        stage: PipelineStage,
        blocks: Sequence[nn.Module],
        groups: Sequence[ParameterGroup],
        make_optimizer: MakeOptimizer,
        mesh: DeviceMesh,
        *,
        offload: bool = False,
    ) -> None:
        begin_communication(mesh)
        self.split_over = (mesh,)
        named = named_parameters([stage])
        for found in named:
            collect_in_float32(found.parameter)
        stage.compute_weight_gradients_at_once()
        _divide(stage.module, mesh)
        _gather_together(stage.module, blocks)
        self._zero = _Zero(stage.module, make_optimizer(list(groups)), named, offload=offload, mesh=mesh)
        self.optimizer = self._zero.optimizer
        self._ranges: dict[int, tuple[int, int, int]] = {}
        self.pieces = [self._piece(found) for found in named]

    def begin(self) -> None:
        self._zero.forget_gradients()

    @property
    def gradient_bytes(self) -> int:
        return int(self._zero.grad_partitions_flat_buffer.nbytes)

    def stored_weights(self) -> list[Tensor]:
        return [self._zero.lp_param_buffer]

    def after_backward(self, stage: int) -> None:
        self._zero.end_microbatch()

    def finish(self) -> None:
        self._zero.complete_gradients()

    def gradient(self, piece: Piece) -> Tensor:
        group, place, length = self._ranges[id(piece)]
        return self._zero.gradients(group).narrow(0, place, length)

    def step(self) -> None:
        self._zero.step()

    def refresh(self) -> None:
        self._zero.refresh_weights()

    def shape(self, piece: Piece) -> tuple[int, ...]:
        return tuple(piece.parameter.ds_shape)  # type: ignore[attr-defined]

    def states(self, piece: Piece) -> dict[str, Tensor]:
        group, place, length = self._ranges[id(piece)]
        flat = self._zero.fp32_partitioned_groups_flat[group]
        found = self.optimizer.state[flat].items()
        return {name: state.narrow(0, place, length) for name, state in found if state.shape == flat.shape}

    @torch.no_grad()
    def whole_weights(self, module: nn.Module) -> dict[str, Tensor]:
        with GatheredParameters(list(module.parameters())):
            return {name: parameter.clone() for name, parameter in module.named_parameters(remove_duplicate=False)}

    def _piece(self, found: Named) -> Piece:
        name, stage, parameter, sharding, shared, copied = found
        group, place, padded = self._zero.grad_position[self._zero.get_param_id(parameter)]
        start = min(padded * self.split_over[0].get_local_rank(), parameter.ds_numel)  # type: ignore[attr-defined]
        length = min(padded, parameter.ds_numel - start)  # type: ignore[attr-defined]
        flat = self._zero.fp32_partitioned_groups_flat[group].detach()
        piece = Piece(name, stage, parameter, sharding, flat.narrow(0, place, length), start, shared, copied)
        self._ranges[id(piece)] = (group, place, length)
        return piece


class _Zero(DeepSpeedZeroOptimizer_Stage3):  # type: ignore[misc]
    """DeepSpeed's ZeRO 3 optimiser, whose gradients are summed over microbatches here and given to one plain step."""

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        named: Sequence[Named],
        *,
        offload: bool,
        mesh: DeviceMesh,
    ) -> None:
        sizes = [found.parameter.ds_numel for found in named]  # type: ignore[attr-defined]
        small = [size for found, size in zip(named, sizes, strict=True) if len(found.parameter.ds_shape) < 2]  # type: ignore[attr-defined]
        bucket = min(sum(sizes), BUCKET_BYTES // 4)
        super().__init__(
            module,
            optimizer,
            {found.parameter: found.name for found in named},
            timers=NoopTimer(),
            ds_config=None,
            # Gradients are summed by a reduce-scatter of lists, which needs no copy in one buffer.
            contiguous_gradients=False,
            reduce_bucket_size=bucket,
            prefetch_bucket_size=bucket,
            param_persistence_threshold=max(small, default=0),
            dp_process_group=mesh.get_group(),
            offload_optimizer_config=offload_config(mesh) if offload else None,
            offload_ratio=1.0,
            mpu=None,
            clip_grad=0.0,
            gradient_accumulation_dtype=torch.float32,
            communication_data_type=torch.float32,
        )
        _number(module.modules())
        self._ranks = mesh.size()
        # DeepSpeed gives the optimiser one group at a time.
        for index, flat in enumerate(self.fp32_partitioned_groups_flat):
            self.optimizer.param_groups[self.sub_group_to_group_id[index]]["params"] = [flat]
        self._gradients = self.grad_partitions_flat_buffer.split(self.fp16_partitioned_groups_flat_numel)
        # Every microbatch adds; DeepSpeed's first one would leave what parameters that it does not use had before.
        self.micro_step_id = 1

    def create_reduce_and_remove_grad_hooks(self) -> None:
        """Sum each gradient as it comes; DeepSpeed's hooks count them to find the end of a backward."""
        for group in self.fp16_groups:
            for parameter in group:
                parameter.register_post_accumulate_grad_hook(self.reduce_ready_partitions_and_remove_grads)

    def is_gradient_accumulation_boundary(self) -> bool:
        """Never: gradients are brought to the optimiser by `step`, once and all together."""
        return False

    def forget_gradients(self) -> None:
        self.grad_partitions_flat_buffer.zero_()

    def end_microbatch(self) -> None:
        """Sum the gradients that are left in the bucket, and free weights whose module had no gradient to pass on."""
        self.overlapping_partition_gradients_reduce_epilogue()
        self.parameter_offload.release_backward_leftovers()

    def complete_gradients(self) -> None:
        """The loss is divided by all that the global batch counts; DeepSpeed has divided by the data ranks besides."""
        self.grad_partitions_flat_buffer.mul_(self._ranks)

    def gradients(self, group: int) -> Tensor:
        """The summed gradients of this rank's ranges of a group's parameters, flat."""
        found: Tensor = self._gradients[group]
        return found

    def step(self, closure: Any = None) -> None:
        """Update this rank's ranges. DeepSpeed's own step would look for overflow and compute a norm first."""
        for index, flat in enumerate(self.fp32_partitioned_groups_flat):
            flat.grad = self.gradients(index)
        self.optimizer.step()
        for flat in self.fp32_partitioned_groups_flat:
            flat.grad = None
        self.refresh_weights()

    def refresh_weights(self) -> None:
        """Let what is gathered from now on be what the ranges are now."""
        self._partition_all_parameters()
        for index in range(len(self.fp16_groups)):
            self._reassign_or_swap_out_partitioned_parameters(index)
        if self.persistent_parameters:
            self.persistent_parameters[0].all_gather(self.persistent_parameters)


def _divide(module: nn.Module, mesh: DeviceMesh) -> None:
    """Leave every rank its range of each parameter."""
    # DeepSpeed asks for the device by this alone; whoever starts ranks without it has chosen the device already.
    os.environ.setdefault("LOCAL_RANK", str(torch.cuda.current_device() if mesh.device_type == "cuda" else 0))
    # Its "memory-efficient linear" would replace torch's function, for everything in the process.
    precision = next(module.parameters()).dtype
    Init(module=module, data_parallel_group=mesh.get_group(), mem_efficient_linear=False, dtype=precision)
    _number(module.parameters())


def _number(parts: Iterable[nn.Parameter] | Iterable[nn.Module]) -> None:
    """Number what DeepSpeed compares between ranks; it counts on from what the process had before, here or there."""
    for number, part in enumerate(parts):
        part.ds_id = number  # type: ignore[attr-defined]


def _gather_together(module: nn.Module, blocks: Sequence[nn.Module]) -> None:
    """Let each block be gathered as one, and the rest for the whole of the forward, and of the backward.

    By itself DeepSpeed gathers what a layer holds when that layer is called. Layers here read each other's weights.
    """
    inside = {parameter for block in blocks for parameter in block.parameters()}
    for block in blocks:
        set_z3_leaf_module(block, True)
    for parameter in module.parameters():
        if parameter not in inside:
            register_external_parameter(module, parameter)
