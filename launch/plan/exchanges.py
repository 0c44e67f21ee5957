"""What one rank of weft's own engine sends and receives in a step: calls and bytes by axis and operation.

Bytes are those of whole tensors: what an all-gather ends with, a reduce-scatter begins with, and an all-reduce has at
both ends. `weft train --dry-run` counts the same while the engine runs.

Tensor axis: the conjugate pairs of Korthikanti et al. 2022, §4.2 (without sequence parallelism those of Shoeybi et al.
2019, §3); with sequence parallelism a column-parallel layer gathers its input a second time for its weight's gradient.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil

from weft.launch.plan.flight import schedule_of, stages_of_rank
from weft.launch.plan.layout import Job, Layout
from weft.launch.plan.parameters import stage_layers, stage_parameters
from weft.launch.plan.recipe import Recipe
from weft.launch.plan.shape import ModelShape

SINGLE, DOUBLE = 4, 8  # bytes of a float32, and of a float64 or int64
NORMS = 6  # kinds of layers of which the norm of the gradient is told, each on every stage
LOSS_PARTS = 3  # numbers of a token that the loss over a split vocabulary needs of every rank: most, sum, target's
BUCKET = 25 * 2**20  # bytes of gradients that are summed over replicas together
LARGEST_DIRECT_GROUP = 4  # ranks on CPUs that exchange messages themselves in place of a collective

ALL_REDUCE, ALL_GATHER, REDUCE_SCATTER, SEND, RECEIVE = "all_reduce", "all_gather", "reduce_scatter", "send", "receive"


@dataclass(frozen=True)
class PlannedExchange:
    """Calls of one operation over one axis in a step, and the bytes of all their tensors."""

    axis: str
    operation: str
    calls: int
    bytes: int


def planned_exchanges(
    shape: ModelShape, job: Job, layout: Layout, recipe: Recipe, rank: int = 0, *, on_cpu: bool = False
) -> tuple[PlannedExchange, ...]:
    """What a rank of pipeline rank `rank` exchanges, by the axes from the outside in; `on_cpu`: as gloo's ranks do.

    Calls over the data axis are those of buckets that are full.

    Raises:
        ValueError: the layout has context or expert ranks, or ZeRO, whose messages are not planned.
    """
    if layout.context > 1 or layout.zero or shape.experts is not None or shape.qk_norm == "projection":
        raise ValueError(
            f"what {layout.label} exchanges is not planned: its context ranks, ZeRO, experts or norms over all heads"
        )
    step = _Step(shape, job, layout, recipe, rank)
    found: list[PlannedExchange] = []
    for axis, own in (("pipeline", step.pipeline()), ("data", step.data()), ("tensor", step.tensor())):
        size = getattr(layout, axis)
        if size > 1:
            calls = own if not on_cpu or size > LARGEST_DIRECT_GROUP else _direct(own, size)
            found += [PlannedExchange(axis, *total) for total in _summed(calls)]
    return tuple(found)


Calls = Iterable[tuple[str, int, float]]  # operation, calls, bytes of each


@dataclass(frozen=True)
class _Step:
    shape: ModelShape
    job: Job
    layout: Layout
    recipe: Recipe
    rank: int

    @property
    def stages(self) -> list[int]:
        return stages_of_rank(self.layout, self.rank)

    @property
    def layers(self) -> int:
        return sum(len(stage_layers(self.shape, self.layout, stage)) for stage in self.stages)

    @property
    def last(self) -> bool:
        return self.layout.stages - 1 in self.stages

    @property
    def count(self) -> int:
        return self.layout.microbatches(self.job)

    @property
    def hidden(self) -> int:
        """Bytes of `[microbatch, sequence, hidden]`."""
        return self.layout.micro_batch * self.job.sequence * self.shape.hidden * self.recipe.activation

    def tensor(self) -> Calls:
        """Of blocks, embedding, head and loss in every microbatch, and of the step's gradients and their norm."""
        again = 2 * (self.layout.recompute == "full")
        pairs = self.layers * (2 + again / 2)  # of collectives that one side of a block's pairs has, each way
        first, last = 0 in self.stages, self.last
        if self.layout.splits_sequence:
            learned = first and self.shape.positions > 0  # the table of positions is added to the whole sequence
            scatters = self.layers * (4 + again) + first + last - learned
            yield REDUCE_SCATTER, self.count * scatters, self.hidden
            yield ALL_GATHER, self.count * (self.layers * (6 + again) + first + 2 * last), self.hidden
            yield ALL_REDUCE, self.count * learned, self.hidden
        else:
            yield ALL_REDUCE, self.count * round(2 * pairs + first + last), self.hidden
        tokens = self.layout.micro_batch * self.job.sequence
        yield ALL_GATHER, self.count * last, self.layout.tensor * tokens * LOSS_PARTS * SINGLE
        partial = self._partial_gradients()
        yield ALL_REDUCE, int(partial > 0), partial * self.recipe.gradient
        yield ALL_REDUCE, 1, self._norm_bytes

    def pipeline(self) -> Calls:
        """Activations, their gradients, the losses of the microbatches, a tied table's gradient, and the norm."""
        layout = self.layout
        place = schedule_of(layout, self.count).placement
        size = self.hidden // (layout.tensor if layout.splits_sequence else 1)
        for stage in self.stages:
            for other in (stage - 1, stage + 1):
                if 0 <= other < layout.stages and place[other] != self.rank:
                    yield SEND, self.count, size
                    yield RECEIVE, self.count, size
        told = (self.count + 1) * DOUBLE
        teller = place[layout.stages - 1]
        yield (SEND, layout.pipeline - 1, told) if self.rank == teller else (RECEIVE, 1, told)
        if self._shares_table:
            yield SEND, 1, self._table
            yield RECEIVE, 1, self._table
        yield ALL_REDUCE, 1, self._norm_bytes

    def data(self) -> Calls:
        """Gradients in buckets, of each stage and of a table that two stages share, and what the loss needs."""
        for stage in self.stages:
            size = stage_parameters(self.shape, self.layout, stage).total * self.recipe.gradient
            if self._shares_table and stage in (0, self.layout.stages - 1):
                size -= self._table
                yield ALL_REDUCE, 1, self._table
            calls = ceil(size / BUCKET)
            yield ALL_REDUCE, calls, size / max(1, calls)
        yield ALL_REDUCE, 2, DOUBLE

    @property
    def _norm_bytes(self) -> int:
        return NORMS * self.layout.stages * DOUBLE

    @property
    def _shares_table(self) -> bool:
        """Whether this rank has the tied table, and another rank has it too."""
        ends = (0 in self.stages) + self.last
        return self.shape.tied and ends == 1

    @property
    def _table(self) -> int:
        """Bytes of this tensor rank's part of the tied table."""
        return ceil(self.shape.vocab / self.layout.tensor) * self.shape.hidden * self.recipe.gradient

    def _partial_gradients(self) -> int:
        """Parameters that tensor ranks hold alike and have a part of the gradient of.

        Those of norms and biases that see a part of the sequence, and the keys and values of heads that several hold.
        """
        shape, partial = self.shape, 0
        if self.layout.splits_sequence:
            biases = shape.hidden * (shape.output_bias + shape.mlp_bias)
            partial += self.layers * (shape.all_norm_parameters + biases) + self.last * shape.norm_parameters
        if shape.qk_norm == "head":
            partial += self.layers * shape.qk_norm_parameters
        if shape.kv_heads < self.layout.tensor:
            partial += self.layers * 2 * shape.key_value_features * (shape.hidden + shape.qkv_bias)
        return partial


def _direct(calls: Calls, size: int) -> Calls:
    """Collectives as messages to every peer; all-reduces only of two ranks."""
    for operation, count, whole in calls:
        if operation in (ALL_GATHER, REDUCE_SCATTER):
            pieces = [(count * (size - 1), whole / size)]
        elif operation == ALL_REDUCE and size == 2:
            pieces = [(count, whole)]
        else:
            yield operation, count, whole
            continue
        for number, piece in pieces:
            yield SEND, number, piece
            yield RECEIVE, number, piece


def _summed(calls: Calls) -> list[tuple[str, int, int]]:
    totals: dict[str, tuple[int, float]] = {}
    for operation, count, size in calls:
        before = totals.get(operation, (0, 0.0))
        totals[operation] = before[0] + count, before[1] + count * size
    return [(operation, count, round(size)) for operation, (count, size) in sorted(totals.items()) if count]
