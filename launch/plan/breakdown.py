"""What a plan says of one rank's memory and of one step's time, by kind."""

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Breakdown:
    """An amount by kind: each field of a subclass is one kind."""

    @property
    def total(self) -> float:
        return float(sum(self.parts.values()))

    @property
    def parts(self) -> dict[str, float]:
        """The amounts by kind, in the order of the fields."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True)
class Memory(Breakdown):
    """Bytes that a rank holds at its worst moment.

    Attributes:
        parameters, gradients, optimizer: of this rank's stages, divided as tensor and ZeRO sharding do.
        activations: kept for the backward, of as many microbatches as the schedule's table has in flight.
        logits: of the loss, on the rank of the last stage.
        buffers: of communication: gathered inputs, ZeRO-3 layers that are whole for a moment.
        workspace: what the libraries hold whatever is computed.
    """

    parameters: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    activations: float = 0.0
    logits: float = 0.0
    buffers: float = 0.0
    workspace: float = 0.0


@dataclass(frozen=True)
class StepTime(Breakdown):
    """Seconds of one optimiser step on the rank that takes longest.

    Attributes:
        compute: forward and backward of all microbatches of a rank.
        recompute: of what is computed a second time.
        tensor, context: collectives of those axes that nothing hides.
        pipeline: sends that nothing hides.
        bubble: waiting for other stages.
        data: reduction of gradients and gathering of parameters that nothing hides.
        optimizer: the update.
        overhead: of launching, per microbatch.
    """

    compute: float = 0.0
    recompute: float = 0.0
    tensor: float = 0.0
    context: float = 0.0
    pipeline: float = 0.0
    bubble: float = 0.0
    data: float = 0.0
    optimizer: float = 0.0
    overhead: float = 0.0
