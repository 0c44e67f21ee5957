"""Why a layout loses: the number that broke it, and what would mend it."""

from collections.abc import Iterator
from dataclasses import replace

from weft.launch.plan.breakdown import Memory
from weft.launch.plan.layout import Layout
from weft.launch.plan.search import Candidate, Planner

WORDS = {
    "tensor": "waiting for tensor collectives",
    "context": "waiting for keys and values of other context ranks",
    "pipeline": "waiting for sends between stages",
    "data": "waiting for gradients and parameters of other data ranks",
    "recompute": "computing twice",
    "compute": "computing",
    "bubble": "waiting for other stages",
    "optimizer": "the optimiser",
    "overhead": "starting microbatches",
}


def why_too_large(planner: Planner, candidate: Candidate) -> str:
    """`needs 91.3 GiB of 78.5 GiB, activations 38.2 GiB of them; recompute: full would fit`."""
    kind, size = largest_part(candidate.memory)
    needed, there = size_text(candidate.memory.total), size_text(planner.cluster.memory_bytes)
    sentence = f"needs {needed} of {there}, {kind} {size_text(size)} of them"
    remedy = _remedy(planner, candidate)
    return f"{sentence}; {remedy} would fit" if remedy else sentence


def largest_part(memory: Memory) -> tuple[str, float]:
    """What takes most, and how many bytes."""
    return max(memory.parts.items(), key=lambda part: part[1])


def why_slower(candidate: Candidate, best: Candidate) -> str:
    """`31 % slower: waiting for other stages takes 21 % of the step, 4 % in the best`."""
    slower = candidate.time.total / best.time.total - 1
    if slower <= 0:
        return f"{-100 * slower:.1f} % faster, but needs {size_text(candidate.memory.total - best.memory.total)} more"
    own, others = candidate.time.parts, best.time.parts
    part = max(own, key=lambda name: own[name] - others[name])
    share, other = own[part] / candidate.time.total, others[part] / best.time.total
    return (
        f"{100 * slower:.0f} % slower: {WORDS[part]} takes {100 * share:.0f} % of the step, "
        f"{100 * other:.0f} % in the best"
    )


def size_text(size: float) -> str:
    """A size as memory is sold: `38.2 GiB`, or `412.0 MiB` below one GiB."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def _remedy(planner: Planner, candidate: Candidate) -> str | None:
    """The first change of one setting with which the layout fits."""
    for words, layout in _changes(planner, candidate.layout):
        if planner.price(layout, simulate=False).fits(planner.cluster):
            return words
    return None


def _changes(planner: Planner, layout: Layout) -> Iterator[tuple[str, Layout]]:
    if layout.zero == 0 and layout.data * layout.context > 1:
        yield "zero: 1", replace(layout, zero=1)
    if planner.space.recipe.attention == "plain" and layout.recompute == "none":
        yield "recompute: selective", replace(layout, recompute="selective")
    if layout.micro_batch > 1:
        yield "micro_size: 1", replace(layout, micro_batch=1)
    if layout.recompute != "full":
        yield "recompute: full", replace(layout, recompute="full")
    if layout.pipeline == 1 and layout.zero < 3 and layout.data > 1:
        yield "zero: 3", replace(layout, zero=3)
