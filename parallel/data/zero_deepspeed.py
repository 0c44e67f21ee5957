"""ZeRO 1 and 2 by DeepSpeed: optimiser states, and gradients, divided over the data axis (Rajbhandari et al. 2020).

DeepSpeed's ZeRO optimiser flattens the parameters of each group and gives every data rank one range of them to keep
and to update. It is driven here without DeepSpeed's engine, whose pipelines know one schedule: the parallel executor
runs the model, and this file hands over gradients. Norm, clipping and loss scaling are the same as without ZeRO.

Everything of weft that imports DeepSpeed is in this file and, for ZeRO 3, in `zero_deepspeed_weights.py`, which takes
the settings of the import from here. Importing it takes 0.2 s.
"""

import logging
import os
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

# Otherwise DeepSpeed looks for every kind of device it knows, and says on stderr what it found.
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
warnings.filterwarnings(
    "ignore", "`torch.distributed.(all_gather_into|reduce_scatter)_tensor` is deprecated", FutureWarning
)

try:
    import deepspeed
    from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
    from deepspeed.utils.timer import NoopTimer
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"DeepSpeed is missing ({error}); pip install 'weft[deepspeed]'") from None

from weft.parallel.data.buckets import BUCKET_BYTES, GradientBuckets  # noqa: E402
from weft.parallel.data.replicas import (  # noqa: E402
    MakeOptimizer,
    Named,
    ParameterGroup,
    Piece,
    Replicas,
    collect_in_float32,
    named_parameters,
)
from weft.parallel.pipeline.stage import PipelineStage  # noqa: E402


class DeepSpeedReplicas(Replicas):
    """Every data rank updates one range of each group of parameters, and gathers what the others have updated.

    Args:
        stages: of this rank, their parameters all of one precision.
        groups: parameter groups of a torch optimiser; those in them that stages share get groups of their own, so that
            the same ranges of them lie on the same data rank in all stages.
        make_optimizer: makes an optimiser whose update of each element depends on that element alone.
        mesh: the data axis.
        partition_gradients: ZeRO 2. Gradients are summed after each backward and only this rank's range is kept;
            otherwise (ZeRO 1) they are kept whole and summed once per step, while its last backward runs.
        offload: keep float32 weights and the optimiser's states in the memory of the CPU, and update them there.

    Communication: ZeRO 1, an all-reduce per bucket of gradients, during the last backward of each stage; ZeRO 2, one
    per microbatch; both, an all-gather of the weights per step.
    """

    def __init__(
        self,
        stages: Sequence[PipelineStage],
        groups: Sequence[ParameterGroup],
        make_optimizer: MakeOptimizer,
        mesh: DeviceMesh,
        *,
        partition_gradients: bool,
        offload: bool = False,
    ) -> None:
        begin_communication(mesh)
        named = named_parameters(stages)
        groups = list(_with_shared_apart(groups, [found.parameter for found in named if found.shared]))
        for found in named:
            collect_in_float32(found.parameter)
        self._zero = _Zero(
            make_optimizer(groups),
            {found.parameter: found.name for found in named},
            partition_gradients=partition_gradients,
            offload=offload,
            mesh=mesh,
        )
        self.optimizer = self._zero.optimizer
        self.split_over = (mesh,)
        self._groups = {p: index for index, group in enumerate(self._zero.bit16_groups) for p in group}
        self._ranges: dict[int, tuple[int, int]] = {}
        self.pieces = [self._piece(found) for found in named]
        self._modules = {stage.index: stage.module for stage in stages}
        self._partitions = partition_gradients
        self._buckets: dict[int, GradientBuckets] = {}
        if partition_gradients:
            for parameter in self._groups:
                parameter.register_post_accumulate_grad_hook(self._zero.reduce_gradient)
        else:
            # DeepSpeed would sum them one bucket after the other when the last backward is over.
            self._buckets = {
                stage.index: GradientBuckets(stage.module.parameters(), mesh, late=stage.shared.values())
                for stage in stages
            }

    def begin(self) -> None:
        self._zero.forget_gradients()
        for buckets in self._buckets.values():
            buckets.zero()

    @property
    def gradient_bytes(self) -> int:
        if not self._partitions:
            return sum(buckets.bytes for buckets in self._buckets.values())
        return self._zero.partition_bytes

    def before_last_backward(self, stage: int) -> None:
        if self._buckets:
            self._buckets[stage].arm()

    def after_backward(self, stage: int) -> None:
        if self._partitions:
            # Weight gradients that were deferred come without a hook.
            for parameter in self._modules[stage].parameters():
                self._zero.reduce_gradient(parameter)
            self._zero.end_reduction()

    def finish(self) -> None:
        for buckets in self._buckets.values():
            buckets.finish()
        if not self._partitions:
            for piece in self.pieces:
                assert piece.parameter.grad is not None
                own = piece.parameter.grad.flatten().narrow(0, piece.start, piece.weight.numel())
                group, (place, length) = self._groups[piece.parameter], self._ranges[id(piece)]
                self._zero.partition(group).narrow(0, place, length).copy_(own)
            for buckets in self._buckets.values():
                buckets.release()  # of no use any more: the other ranges are those of other ranks
        self._zero.complete_gradients()

    def gradient(self, piece: Piece) -> Tensor:
        group = self._groups[piece.parameter]
        return self._zero.gradients(group).narrow(0, *self._ranges[id(piece)])

    def step(self) -> None:
        self._zero.step()

    def refresh(self) -> None:
        self._zero.update_lp_params()

    def states(self, piece: Piece) -> dict[str, Tensor]:
        flat = self._zero.single_partition_of_fp32_groups[self._groups[piece.parameter]]
        found = self.optimizer.state[flat].items()
        place = self._ranges[id(piece)]
        return {name: state.narrow(0, *place) for name, state in found if state.shape == flat.shape}

    def _piece(self, found: Named) -> Piece:
        name, stage, parameter, sharding, shared, copied = found
        group = self._groups[parameter]
        start, place, length = self._zero.held_range(group, parameter)
        flat = self._zero.single_partition_of_fp32_groups[group].detach()
        piece = Piece(name, stage, parameter, sharding, flat.narrow(0, place, length), start, shared, copied)
        self._ranges[id(piece)] = (place, length)
        return piece


class _Zero(DeepSpeedZeroOptimizer):  # type: ignore[misc]
    """DeepSpeed's ZeRO optimiser, given gradients one by one; it sums them and keeps float32 ones of its range only."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        names: dict[nn.Parameter, str],
        *,
        partition_gradients: bool,
        offload: bool,
        mesh: DeviceMesh,
    ) -> None:
        self._in_reduction: set[int] = set()
        elements = sum(parameter.numel() for parameter in names)
        bucket = min(max(elements, 2), BUCKET_BYTES // 4) // 2 * 2  # DeepSpeed wants it even
        super().__init__(
            optimizer,
            names,
            timers=NoopTimer(),
            optimizer_params={},
            reduce_bucket_size=bucket,
            allgather_bucket_size=bucket,
            dp_process_group=mesh.get_group(),
            offload_optimizer_config=offload_config(mesh) if offload else None,
            # Norm, clipping and the search for overflow are weft's: DeepSpeed's take key-value heads that tensor ranks
            # share for different ones, and wait forever where stages have unequal numbers of groups.
            mpu=None,
            clip_grad=0.0,
            check_grad_overflow=False,
            gradient_accumulation_dtype=torch.float32,
            communication_data_type=torch.float32,
            # The loss is divided by all that the global batch counts; DeepSpeed's division by the data size is not.
            gradient_average=False,
            partition_grads=partition_gradients,
        )

    def create_gradient_handling_hooks(self) -> None:
        """None: DeepSpeed's count backward passes of whole models, not those of one stage among several."""
        self._remaining_grad_acc_hooks = 0

    def is_gradient_accumulation_boundary(self) -> bool:
        """Never: gradients are brought to the optimiser by `complete_gradients`, once and all together."""
        return False

    def _use_compact_grad_partition_buffer(self, group_idx: int) -> bool:
        """Sum gradients straight into the range that this rank keeps, for float32 parameters too."""
        return True

    def _gradient_reduction_buffer_dtype(self) -> torch.dtype:
        """DeepSpeed's ZeRO 2 would send, and so round, gradients in the precision of the parameters."""
        return torch.float32

    def scaled_global_norm(self, norm_type: int = 2) -> Tensor:
        """Nothing clips by it; DeepSpeed's own would be computed all the same."""
        return torch.zeros(())

    def reduce_gradient(self, parameter: nn.Parameter) -> None:
        """Put the parameter's gradient into the bucket to be summed, if there is one."""
        number = self.get_param_id(parameter) if id(parameter) in self.param_id else None
        if parameter.grad is None or number is None or number in self._in_reduction:
            return
        self._in_reduction.add(number)
        self.setup_buckets()
        if self.use_grad_accum_attribute:
            parameter.grad_accum, parameter.grad = parameter.grad, None  # type: ignore[attr-defined]
        self.reduce_independent_p_g_buckets_and_remove_grads(parameter, self._get_param_group_idx(parameter))

    def end_reduction(self) -> None:
        """Sum what is left in the bucket; afterwards every parameter may have a gradient again."""
        self.overlapping_partition_gradients_reduce_epilogue()
        self._in_reduction.clear()
        for parameter in self.param_dict.values():
            parameter.grad_accum = None

    def complete_gradients(self) -> None:
        """Bring the sums to where the optimiser looks for them."""
        for index in range(len(self.bit16_groups)):
            kept = self.partition(index)
            if self.cpu_offload:
                weight = self.single_partition_of_fp32_groups[index]
                weight.grad = torch.empty_like(weight) if weight.grad is None else weight.grad
                weight.grad.copy_(kept)

    def gradients(self, group: int) -> Tensor:
        """The summed gradients of this rank's range of a group, flat."""
        if self.cpu_offload:
            result: Tensor = self.single_partition_of_fp32_groups[group].grad
            return result
        return self.partition(group)

    @property
    def partition_bytes(self) -> int:
        """What this rank's ranges of all groups' gradients take."""
        return sum(4 * int(size) for size in self.partition_size)

    def partition(self, group: int) -> Tensor:
        """Where this rank's range of a group's gradients is summed, flat, on the device."""
        flat: Tensor = self._get_compact_grad_partition_buffer(group).flat_partition
        return flat

    def forget_gradients(self) -> None:
        self.zero_grad()
        for index in range(len(self.bit16_groups)):
            self.averaged_gradients[index] = None

    def held_range(self, group: int, parameter: nn.Parameter) -> tuple[int, int, int]:
        """Where this rank's range meets a parameter: start in the parameter, start in the range, length."""
        rank = torch.distributed.get_rank(self.real_dp_process_group[group])
        number = self.get_param_id(parameter)
        if number not in self.grad_start_offset[group][rank]:
            return 0, 0, 0
        start = int(self.grad_start_offset[group][rank][number])
        place = int(self.grad_partition_insertion_offset[group][rank][number])
        return start, place, min(parameter.numel() - start, int(self.partition_size[group]) - place)


def offload_config(mesh: DeviceMesh) -> Any:
    return DeepSpeedZeroOffloadOptimizerConfig(device="cpu", pin_memory=mesh.device_type == "cuda")


def begin_communication(mesh: DeviceMesh) -> None:
    """Let DeepSpeed use the process groups that exist."""
    # On CPUs DeepSpeed would compile a library for shared memory here: up to 86 s, a crash without g++ and ninja, and
    # after an interruption a lock that the next run waits for.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("nccl" if mesh.device_type == "cuda" else "gloo", auto_mpi_discovery=False)


def _with_shared_apart(groups: Iterable[ParameterGroup], shared: Sequence[nn.Parameter]) -> Iterable[ParameterGroup]:
    """The groups without frozen parameters, without empty ones, and with every shared parameter in its own."""
    apart = {id(parameter) for parameter in shared}
    for group in groups:
        trained = [parameter for parameter in group["params"] if parameter.requires_grad]
        parts = [[p for p in trained if id(p) not in apart], *([p] for p in trained if id(p) in apart)]
        yield from (group | {"params": part} for part in parts if part)
