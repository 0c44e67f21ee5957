"""Bytes of one rank of weft's own engine, tensor by tensor: the formulas of docs/memory.md.

Model states follow ZeRO (Rajbhandari et al. 2020, arXiv:1910.02054, fig. 1). Activations are counted as Korthikanti et
al. 2022 (arXiv:2205.05198, §4) count them, for the operations that weft's layers are made of; how many microbatches a
rank holds is read off the schedule's table, and how many messages off the rank's plan of communication.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from weft.launch.plan.breakdown import Memory
from weft.launch.plan.layout import Job, Layout
from weft.launch.plan.parameters import rank_parameters, stage_layers
from weft.launch.plan.recipe import Recipe
from weft.launch.plan.shape import ModelShape
from weft.parallel.pipeline.plan import plan_rank
from weft.parallel.pipeline.table import Schedule, traffic

SINGLE, INTEGER, FLAG, HASH = 4, 8, 1, 4  # bytes of a float32, a token's number, a truth value, an int32


@dataclass(frozen=True)
class StageBytes:
    """What one microbatch takes on a stage.

    Attributes:
        kept: from its forward to its backward.
        logits: of `kept`, what belongs to the loss.
        waiting: from the input's gradient to the weights', where schedules split a backward.
        forward, backward, input_backward, weight_backward: for a moment, on top of all that is kept or waits.
    """

    kept: float
    logits: float
    waiting: float
    forward: float
    backward: float
    input_backward: float
    weight_backward: float


@dataclass(frozen=True)
class Step:
    """The sizes of a training step on one rank."""

    shape: ModelShape
    job: Job
    layout: Layout
    recipe: Recipe

    @property
    def tokens(self) -> float:
        """Tokens of a microbatch that a rank computes on."""
        return self.layout.micro_batch * self.job.sequence / self.layout.context

    @cached_property
    def hidden(self) -> float:
        """Bytes of the residual stream: `[microbatch, sequence / tensor, hidden]`."""
        parts = self.layout.tensor if self.layout.splits_sequence else 1
        return self.tokens / parts * self.shape.hidden * self.recipe.activation

    @property
    def whole_hidden(self) -> float:
        """Bytes of the same, gathered."""
        return self.tokens * self.shape.hidden * self.recipe.activation

    @property
    def intermediate(self) -> float:
        """Bytes of an MLP's features: `[microbatch, sequence, intermediate / tensor]`."""
        return self.tokens * self.shape.intermediate / self.layout.tensor * self.recipe.activation

    @property
    def probabilities(self) -> float:
        """Bytes of the softmax over a rank's part of the vocabulary, in float32."""
        return self.tokens * self.vocabulary * SINGLE

    @property
    def vocabulary(self) -> int:
        """Rows of the table on each tensor rank, padding included."""
        return -(-self.shape.vocab // self.layout.tensor)

    @property
    def norm(self) -> float:
        """A norm keeps its input and its result, an RMS norm also what it scales; beside them numbers per token."""
        kept = 3 if self.shape.norm_vectors == 1 else 2
        return kept * self.hidden + self.shape.norm_vectors * SINGLE * self.hidden / self._width

    @property
    def _width(self) -> float:
        return self.shape.hidden * self.recipe.activation

    @cached_property
    def attention(self) -> float:
        """Queries, keys, values and the heads' result."""
        shape, tensor = self.shape, self.layout.tensor
        query, keys = shape.query_features / tensor, shape.key_value_features / min(tensor, shape.kv_heads)
        several = 4 * query if shape.dropout else 2 * query + 2 * keys  # dropout repeats keys and values for each head
        return self.tokens * several * self.recipe.activation

    @cached_property
    def scores(self) -> float:
        """The logarithm of each row's sum; with dropout the scores themselves, their mask and both multiplied."""
        rows = self.tokens * self.shape.heads / self.layout.tensor
        if not self.shape.dropout:
            return rows * SINGLE
        return rows * self.job.sequence * 3 * self.recipe.activation + self.job.sequence**2 * FLAG

    @property
    def mlp(self) -> float:
        """Gate, up, the activated gate and the product; without a gate, before and after the activation."""
        return (4 if self.shape.gated else 2) * self.intermediate

    @property
    def block(self) -> float:
        """What a block keeps without recompute: of two norms, attention, MLP and the masks of two dropouts."""
        masks = 2 * self.hidden * self.shape.dropout
        return self.shape.block_norms * self.norm + self.attention + self.scores + self.mlp + masks

    @property
    def kept_of_block(self) -> float:
        """What it keeps under the layout's recompute."""
        if self.layout.recompute == "full":
            return self.hidden
        return self.block - (self.scores if self.layout.recompute == "selective" else 0.0)

    @property
    def waiting_of_block(self) -> float:
        """What its weights' gradients need: of each matrix product the input and the result's gradient, gathered."""
        shape, tensor = self.shape, self.layout.tensor
        query, keys = shape.query_features / tensor, shape.key_value_features / min(tensor, shape.kv_heads)
        projections = self.tokens * (2 * query + 2 * keys) * self.recipe.activation
        return 4 * self.whole_hidden + projections + (2 + shape.gated) * self.intermediate

    def moment_of_inputs(self, layers: int) -> float:
        """At the worst of the input's gradient of so many blocks, in each of which what waits replaces what is kept."""
        growth = self.waiting_of_block - self.kept_of_block
        return max(0.0, (layers - 1) * growth) + max(self.moment_of_block + self.intermediate, growth + self.hidden)

    @property
    def weight(self) -> float:
        """The gradient of one matrix of an MLP."""
        return self.shape.hidden * self.shape.intermediate / self.layout.tensor * self.recipe.gradient

    @property
    def moment_of_block(self) -> float:
        """At the worst of a block's backward, with what is computed again for it."""
        if self.layout.recompute != "full":
            return self.hidden + max(self._moment_of_mlp, self._moment_of_attention)
        again = self.block - self.hidden + max(self._moment_of_mlp, self._moment_of_attention)
        return self.hidden + max(again, self.norm + self.attention + self._drawing)

    @property
    def _moment_of_mlp(self) -> float:
        """Gradients of its features, its output's gathered, and one of its weights'."""
        gathered = self.whole_hidden if self.layout.splits_sequence else 0.0
        return max((1 + self.shape.gated) * self.intermediate, self.intermediate + self.weight + gathered)

    @property
    def _moment_of_attention(self) -> float:
        """One gradient of the scores where they are kept; what the MLP and its norm have kept is gone by then."""
        rows = self.tokens * self.shape.heads / self.layout.tensor
        gradient = rows * self.job.sequence * self.recipe.activation * self.shape.dropout
        if self.layout.recompute == "selective":
            gradient = max(self.scores + gradient, self._drawing)
        return gradient - self.mlp - self.norm

    @property
    def _drawing(self) -> float:
        """While a mask is drawn for scores that are computed again.

        Scores, queries, keys and their result's gradient, and of int32 the place of each score in a sequence and three
        tensors of the hash.
        """
        if not self.shape.dropout:
            return 0.0
        places = self.job.sequence**2 * self.shape.heads / self.layout.tensor
        each = self.recipe.activation + 3 * HASH
        query = self.tokens * self.shape.query_features / self.layout.tensor * self.recipe.activation
        return places * (HASH + self.layout.micro_batch / self.layout.context * each) + 3 * query


def ledger_of_rank(
    shape: ModelShape, job: Job, layout: Layout, recipe: Recipe, schedule: Schedule, rank: int
) -> Memory:
    """What the pipeline rank `rank` holds at its worst moment."""
    step = Step(shape, job, layout, recipe)
    stages = schedule.stages_of(rank)
    parameters = rank_parameters(shape, layout, stages).total
    replicas = layout.data * layout.context
    messages = [count * step.hidden for count in messages_of(schedule, rank)]
    sizes = {stage: stage_bytes(step, stage) for stage in stages}
    kept, logits, moment = _peak(schedule.programs[rank], messages, sizes)
    return Memory(
        parameters=parameters * recipe.parameter / (replicas if layout.zero >= 3 else 1),
        gradients=parameters * recipe.gradient / (replicas if layout.zero >= 2 else 1),
        optimizer=parameters * recipe.optimizer / (replicas if layout.zero >= 1 else 1),
        activations=kept - logits,
        logits=logits,
        buffers=moment,
        workspace=recipe.workspace,
    )


def stage_bytes(step: Step, stage: int) -> StageBytes:
    """Of the blocks of a stage, the embedding on the first, and norm, head and loss on the last."""
    shape, layout = step.shape, step.layout
    layers = len(stage_layers(shape, layout, stage))
    kept = layers * step.kept_of_block
    if not shape.positions and layers:
        kept += 2 * step.job.sequence * shape.head_dim * step.recipe.activation  # cosines and sines
    if stage == 0:
        kept += step.hidden * shape.dropout + (step.tokens * (INTEGER + FLAG) if layout.tensor > 1 else 0.0)
    backward = step.moment_of_block if layers else 0.0
    input_backward = step.moment_of_inputs(layers) if layers else 0.0
    weight_backward = step.weight if layers else 0.0
    forward = 3 * step.intermediate + step.whole_hidden if layout.recompute == "full" and layers else step.hidden
    logits, waiting = 0.0, layers * step.waiting_of_block
    if stage == layout.stages - 1:
        kept += step.norm
        logits = step.probabilities + step.tokens * (INTEGER + 2 * FLAG)
        gathered = step.whole_hidden if layout.splits_sequence else 0.0
        table = step.vocabulary * shape.hidden * step.recipe.gradient
        of_head = step.tokens * step.vocabulary * step.recipe.activation
        forward = max(forward, of_head + gathered)
        backward = max(step.probabilities, table + gathered, backward - logits - step.norm)
        waiting_of_head = of_head + step.whole_hidden
        waiting += waiting_of_head
        input_backward = max(step.probabilities + gathered, input_backward + waiting_of_head - logits - step.norm)
        weight_backward = max(weight_backward, table)
    return StageBytes(kept + logits, logits, waiting, forward, backward, input_backward, weight_backward)


def messages_of(schedule: Schedule, rank: int) -> list[int]:
    """How many messages there are while each action of a rank computes.

    Receives that are posted, and what it has sent and does not know to be taken. What it has itself taken is counted
    elsewhere: an activation as the input of a block, a gradient as that of the stage's last block.
    """
    plan = plan_rank(schedule, rank, traffic(schedule, rank))
    waiting = sum(count for _, count in plan.first)
    sent = 0
    counts = []
    for planned in plan.actions:
        waiting += sum(count for _, count in planned.post) - sum(source is not None for _, source in planned.takes)
        sent -= sum(count for _, count in planned.release)
        counts.append(waiting + sent)
        sent += len(planned.destinations)
    return counts


def _peak(
    program: Sequence[tuple[str, int, int]], messages: Sequence[float], stages: Mapping[int, StageBytes]
) -> tuple[float, float, float]:
    """At the worst moment of a program: what is kept, of that what belongs to losses, and what is there for the moment.

    A forward keeps its stage's bytes until its B; an I leaves of them what waits for its W.
    """
    held = logits = 0.0
    worst = (0.0, 0.0, 0.0)
    for (kind, index, _), moment in zip(program, messages, strict=True):
        stage = stages[index]
        if kind == "F":
            held, logits = held + stage.kept, logits + stage.logits
        moments = {"F": stage.forward, "B": stage.backward, "I": stage.input_backward, "W": stage.weight_backward}
        moment += moments[kind]
        if held + moment > worst[0] + worst[2]:
            worst = (held, logits, moment)
        if kind in "BI":
            held, logits = held - stage.kept, logits - stage.logits
        held += {"I": stage.waiting, "W": -stage.waiting}.get(kind, 0.0)
    return worst
