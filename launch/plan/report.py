"""A plan as text for the terminal, and as a mapping for JSON."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from statistics import mean
from typing import Any

from weft.launch.plan.breakdown import Memory, StepTime
from weft.launch.plan.drawing import best_timeline_text
from weft.launch.plan.flops import hardware_flops, model_flops, palm_flops
from weft.launch.plan.layout import Layout
from weft.launch.plan.reasons import largest_part, size_text, why_slower, why_too_large
from weft.launch.plan.search import TIE, Candidate, Plan, Planner
from weft.launch.units import milliseconds_text

SHOWN_LOSERS = 3


def utilization(plan: Plan, candidate: Candidate) -> dict[str, float]:
    """Shares of the peak rate by the three counts of FLOPs: of the model, of the hardware, and as PaLM counts."""
    space, sequence = plan.space, plan.space.job.sequence
    rate = space.job.tokens / candidate.time.total / candidate.layout.ranks / plan.cluster.peak(space.recipe.precision)
    return {
        "mfu": rate * model_flops(space.shape, sequence),
        "hfu": rate * hardware_flops(space.shape, sequence, candidate.layout.recompute),
        "mfu_palm": rate * palm_flops(space.shape, sequence),
    }


def plan_text(
    plan: Plan, planner: Planner, top: int, as_set: Candidate | None, *, width: int = 120, colour: bool = False
) -> str:
    """The ranked table, the winner in detail with its pipeline in `width` columns, and why others lose."""
    blocks = [_headline(plan)]
    if plan.fitting:
        blocks += [_ranked(plan, top), *_winner(plan, planner)]
        if drawn := best_timeline_text(plan, planner, width=width, colour=colour):
            blocks.append(drawn)
        blocks.append("\n".join(["Why others lose", *_losers(plan, planner, as_set)]))
    return "\n\n".join(blocks)


def plan_json(plan: Plan, planner: Planner, top: int, as_set: Candidate | None) -> dict[str, Any]:
    """The same as data: sizes in bytes, times in seconds."""
    losers = [("as set", as_set)] if as_set is not None else []
    losers += [*plan.trivial, *(("too large", candidate) for candidate in plan.rejected[:top])]
    return {
        "devices": plan.space.devices,
        "considered": plan.considered,
        "fit": plan.fit_count,
        "memory_limit_bytes": plan.cluster.memory_bytes,
        "best": candidate_json(plan, plan.best) if plan.fitting else None,
        "layouts": [candidate_json(plan, candidate) for candidate in plan.fitting[:top]],
        "others": [
            {"kind": kind, **candidate_json(plan, candidate), "reason": _reason(plan, planner, candidate)}
            for kind, candidate in losers
        ],
    }


def candidate_json(plan: Plan, candidate: Candidate) -> dict[str, Any]:
    """One layout: its axes, memory by kind, time by kind, and utilisation."""
    return {
        "layout": asdict(candidate.layout),
        "memory_bytes": {"total": candidate.memory.total, **candidate.memory.parts},
        "step_seconds": {"total": candidate.time.total, **candidate.time.parts},
        **utilization(plan, candidate),
    }


def nowhere_text(plan: Plan) -> str:
    """For a job that fits in no layout: the nearest one, and what it lacks."""
    nearest = min(plan.rejected, key=lambda candidate: candidate.memory.total)
    kind, size = largest_part(nearest.memory)
    there = plan.cluster.memory_bytes
    return (
        f"None of {plan.considered} layouts fits {_devices(plan)} of {size_text(there)}; the nearest, "
        f"{nearest.layout.label}, needs {size_text(nearest.memory.total)} ({kind} {size_text(size)}), "
        f"{size_text(nearest.memory.total - there)} more than there is on each; use more devices, or larger ones."
    )


def _devices(plan: Plan) -> str:
    return "1 device" if plan.space.devices == 1 else f"{plan.space.devices} devices"


def _headline(plan: Plan) -> str:
    job = plan.space.job
    return (
        f"{plan.space.shape.parameters / 1e9:.3g} billion parameters, {job.global_batch} sequences of {job.sequence} "
        f"tokens per step, on {_devices(plan)} of {size_text(plan.cluster.memory_bytes)} free: "
        f"{plan.fit_count} of {plan.considered} layouts fit."
    )


def _ranked(plan: Plan, top: int) -> str:
    best = plan.best
    header = ("#  ", "step", "MFU", "memory", "bubble", "layout")
    rows = [
        (
            f"{place} *" if candidate is best else f"{place}  ",
            milliseconds_text(candidate.time.total),
            f"{100 * utilization(plan, candidate)['mfu']:.1f} %",
            size_text(candidate.memory.total),
            f"{100 * candidate.time.bubble / candidate.time.total:.1f} %",
            candidate.layout.label,
        )
        for place, candidate in enumerate(plan.fitting[:top], 1)
    ]
    note = f"* the one to take: of all within {100 * TIE:g} % of the fastest, it has fewest microbatches."
    return f"{aligned(header, rows)}\n{note}"


def _winner(plan: Plan, planner: Planner) -> Iterator[str]:
    best = plan.best
    yield "Time of the best\n" + _time_lines(best.time)
    yield "Memory of its fullest rank\n" + _memory_lines(best.memory)
    shares = utilization(plan, best)
    yield (
        f"It reaches {100 * shares['mfu']:.1f} % of the peak by the model's FLOPs (Korthikanti et al. 2022, eq. 7), "
        f"{100 * shares['hfu']:.1f} % with what is computed twice (eq. 8), {100 * shares['mfu_palm']:.1f} % as PaLM "
        "counts."
    )
    yield _rank_map(plan, best)
    if best.layout.pipeline > 1:
        yield f"Its timeline in full, in milliseconds:  {_drawing(plan, planner, best.layout)}"


def _drawing(plan: Plan, planner: Planner, layout: Layout) -> str:
    """The command that draws the schedule of a layout with the mean times of its stages."""
    times = planner.times_of(layout)
    kinds = (times.forward, times.input_gradient, times.weight_gradient, [times.send])
    costs = ",".join(f"{1e3 * mean(seconds):.4g}" for seconds in kinds)
    several = f" --stages-per-rank {layout.stages_per_rank}" if layout.stages_per_rank > 1 else ""
    count = layout.microbatches(plan.space.job)
    return f"weft schedule {layout.schedule} --ranks {layout.pipeline} --microbatches {count}{several} --costs {costs}"


def _time_lines(time: StepTime) -> str:
    rows = [
        (name, milliseconds_text(value), f"{100 * value / time.total:.1f} %") for name, value in _present(time.parts)
    ]
    return aligned(("", "time", "share"), rows)


def _memory_lines(memory: Memory) -> str:
    rows = [(name, size_text(value), f"{100 * value / memory.total:.1f} %") for name, value in _present(memory.parts)]
    return aligned(("", "size", "share"), rows)


def _present(parts: dict[str, float]) -> list[tuple[str, float]]:
    whole = sum(parts.values())
    return [(name, value) for name, value in parts.items() if value > 0.0005 * whole]


def _rank_map(plan: Plan, best: Candidate) -> str:
    layout, per_node = best.layout, plan.space.devices_per_node
    of_stage = layout.ranks // layout.pipeline
    lines = [f"Ranks, {per_node} on a node: each tensor group is {_neighbours(layout.tensor, 1)}"]
    if layout.context > 1:
        lines.append(f"each context group {_neighbours(layout.context, layout.tensor)}")
    if layout.data > 1:
        lines.append(f"each data group {_neighbours(layout.data, layout.tensor * layout.context)}")
    if layout.pipeline > 1:
        lines.append(f"each pipeline rank is {_neighbours(of_stage, 1)}, in order")
    return ", ".join(lines) + "."


def _neighbours(size: int, stride: int) -> str:
    if size == 1:
        return "one rank"
    return f"{size} neighbours" if stride == 1 else f"{size} ranks {stride} apart"


def _losers(plan: Plan, planner: Planner, as_set: Candidate | None) -> Iterator[str]:
    best = plan.best
    named = [("the layout of the settings", as_set)] if as_set is not None else []
    for name, candidate in [*named, *plan.trivial]:
        if candidate.layout != best.layout:
            yield f"  {name} ({candidate.layout.label}): {_reason(plan, planner, candidate)}"
    for candidate in plan.rejected[:SHOWN_LOSERS]:
        if candidate.time.total < best.time.total:
            faster = 100 * (1 - candidate.time.total / best.time.total)
            reason = why_too_large(planner, candidate)
            yield f"  {candidate.layout.label}: would be {faster:.0f} % faster, but {reason}"
    slower = [candidate for candidate in plan.fitting if candidate.time.total > best.time.total]
    for candidate in slower[:SHOWN_LOSERS]:
        yield f"  {candidate.layout.label}: {why_slower(candidate, best)}"


def _reason(plan: Plan, planner: Planner, candidate: Candidate) -> str:
    if not candidate.fits(plan.cluster):
        return why_too_large(planner, candidate)
    if not plan.fitting or candidate.layout == plan.best.layout:
        return "the best"
    return why_slower(candidate, plan.best)


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Right-aligned columns below the header; the last one, of words, is left-aligned where it is long."""
    cells = [header, *rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    wordy = widths[-1] > 20
    lines = []
    for row in cells:
        padded = [value.rjust(width) for value, width in zip(row, widths, strict=True)]
        if wordy:
            padded[-1] = row[-1]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)
