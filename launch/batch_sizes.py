"""How many sequences each optimiser step trains on: fewer at first, where `batch.initial_size` says so."""

from weft.launch.sections import BatchSettings


def batch_size(step: int, batch: BatchSettings) -> int:
    """Sequences of the step numbered from 0: multiples of the initial size, each for about as many steps."""
    if not batch.initial_size or step >= batch.growth_steps:
        return batch.global_size
    steps_up = batch.global_size // batch.initial_size - 1
    return batch.initial_size * (1 + step * steps_up // batch.growth_steps)


def samples_before(step: int, batch: BatchSettings) -> int:
    """Sequences of all steps before the one numbered so."""
    growing = min(step, batch.growth_steps if batch.initial_size else 0)
    return sum(batch_size(number, batch) for number in range(growing)) + (step - growing) * batch.global_size


def batch_sizes(batch: BatchSettings) -> list[int]:
    """All sizes that steps have, the last first."""
    growing = range(batch.growth_steps if batch.initial_size else 0)
    return sorted({batch.global_size, *(batch_size(step, batch) for step in growing)}, reverse=True)
