"""Every layout of a job on so many devices, before asking whether it fits or how fast it is."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product

from weft.launch.plan.layout import Job, Layout, Recompute
from weft.launch.plan.recipe import Recipe
from weft.launch.plan.shape import ModelShape

MOST_STAGES_PER_RANK = 12
LARGEST_MICRO_BATCH = 64
LEAST_CONTEXT_TOKENS = 8192  # of a shorter part of the sequence, attention hides too little of its exchange
MOST_TENSOR_NODES = 2  # nodes that a tensor group may span

Split = Callable[[int], tuple[int, ...]]


@dataclass(frozen=True)
class Space:
    """What the candidates are for.

    Attributes:
        split: layers of each stage, by the number of stages.
    """

    shape: ModelShape
    job: Job
    recipe: Recipe
    devices: int
    devices_per_node: int
    split: Split

    def candidates(self) -> Iterator[Layout]:
        """All layouts that use every device, each once."""
        for tensor, context in product(self._tensors(), self._contexts()):
            if self.devices % (tensor * context) == 0:
                for pipeline in self._pipelines(self.devices // (tensor * context)):
                    yield from self._of_axes(tensor, context, pipeline)

    def _of_axes(self, tensor: int, context: int, pipeline: int) -> Iterator[Layout]:
        data = self.devices // (tensor * context * pipeline)
        if self.job.global_batch % data:
            return
        for (schedule, several), micro, recompute, zero in product(
            self._schedules(pipeline),
            self._micro_batches(data),
            self._recomputes(),
            self._zero_stages(data * context, pipeline),
        ):
            yield Layout(
                data=data,
                tensor=tensor,
                pipeline=pipeline,
                context=context,
                micro_batch=micro,
                stages_per_rank=several,
                schedule=schedule,
                recompute=recompute,
                zero=zero,
                layers_of_stages=self.split(pipeline * several),
            )

    def _tensors(self) -> list[int]:
        """Sizes over which heads, features and sequence divide; keys may be replicated."""
        shape, largest = self.shape, MOST_TENSOR_NODES * self.devices_per_node
        return [
            size
            for size in divisors(shape.heads)
            if size <= min(largest, self.devices)
            and not (shape.kv_heads % size and size % shape.kv_heads)
            and shape.intermediate % size == 0
            and self.job.sequence % size == 0
        ]

    def _contexts(self) -> list[int]:
        most = max(1, self.job.sequence // LEAST_CONTEXT_TOKENS)
        return [size for size in divisors(self.job.sequence) if size <= min(most, self.devices)]

    def _pipelines(self, ranks: int) -> list[int]:
        return [size for size in divisors(ranks) if size <= self.shape.layers]

    def _micro_batches(self, data: int) -> list[int]:
        return [size for size in divisors(self.job.global_batch // data) if size <= LARGEST_MICRO_BATCH]

    def _recomputes(self) -> tuple[Recompute, ...]:
        """Selective recompute drops the scores, of which fused attention keeps none."""
        return ("none", "full") if self.recipe.attention == "fused" else ("none", "selective", "full")

    @staticmethod
    def _zero_stages(replicas: int, pipeline: int) -> tuple[int, ...]:
        """Stages 2 and 3 reduce in every microbatch, which does not go with the table of a pipeline."""
        if replicas == 1:
            return (0,)
        return (0, 1, 2, 3) if pipeline == 1 else (0, 1)

    def _schedules(self, pipeline: int) -> Iterator[tuple[str, int]]:
        """Names and stages per rank."""
        if pipeline == 1:
            yield "1f1b", 1
            return
        yield from (("1f1b", 1), ("zb-h1", 1))
        most = self.shape.layers // pipeline
        if most >= 2:
            yield from (("zb-v", 2), ("v-half", 2))
        for several in range(2, min(most, MOST_STAGES_PER_RANK) + 1):
            if several <= 4 or most % several == 0:
                yield from (("interleaved", several), ("interleaved-zb", several))


def divisors(number: int) -> list[int]:
    """All divisors, smallest first."""
    small = [size for size in range(1, int(number**0.5) + 1) if number % size == 0]
    return small + [number // size for size in reversed(small) if size * size != number]
