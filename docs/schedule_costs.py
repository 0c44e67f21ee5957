"""What each pipeline schedule costs: the table and the pictures of docs/pipeline.md.

    python docs/schedule_costs.py                 # prints the table
    python docs/schedule_costs.py docs/images     # and draws the pictures into that folder

Every number is read off the tables that the executor runs.
"""

import sys
from pathlib import Path

from weft.parallel.pipeline.check import check_schedule
from weft.parallel.pipeline.draw import draw_timeline
from weft.parallel.pipeline.schedules import BUILDERS, build_schedule
from weft.parallel.pipeline.simulate import simulate_schedule
from weft.parallel.pipeline.table import Schedule

SIZES = ((4, 8), (8, 32), (8, 64))
PICTURED = ("1f1b", "zb-v")


def usual(name: str, ranks: int, microbatches: int) -> Schedule:
    """The schedule with as few stages per rank as show what it is for."""
    return build_schedule(name, ranks, microbatches, 2 if name.startswith(("interleaved", "looped")) else 1)


def row(name: str) -> str:
    cells = []
    for ranks, microbatches in SIZES:
        schedule = usual(name, ranks, microbatches)
        per_rank = schedule.stages // ranks
        facts = check_schedule(schedule)
        bubble = 100 * simulate_schedule(schedule).bubble
        cells.append(f"{bubble:.1f} % / {max(facts.peak_activations) / per_rank:g}")
    messages = max(facts.messages) / microbatches
    split = any(action.kind == "W" for program in schedule.programs for action in program)
    return f"| `{name}` | {per_rank} | {'yes' if split else 'no'} | {' | '.join(cells)} | {messages:g} |"


def table() -> str:
    heads = [f"{ranks} ranks, {microbatches} microbatches" for ranks, microbatches in SIZES]
    lines = [
        f"| schedule | stages per rank | split backward | {' | '.join(heads)} | messages |",
        "|---|---|---|" + "---|" * 4,
    ]
    return "\n".join(lines + [row(name) for name in BUILDERS])


def draw(folder: Path) -> None:
    for name in PICTURED:
        timeline = simulate_schedule(usual(name, 4, 8))
        draw_timeline(timeline, folder / f"{name}.svg", title=f"{name}, 4 ranks, 8 microbatches")


if __name__ == "__main__":
    print(table())
    if len(sys.argv) > 1:
        draw(Path(sys.argv[1]))
