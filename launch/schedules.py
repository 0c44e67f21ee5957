"""The schedule that the settings name: one of the engine's own, or a table in a CSV file."""

from weft.launch.sections import ParallelSettings
from weft.parallel.pipeline.check import check_schedule
from weft.parallel.pipeline.schedules import build_schedule
from weft.parallel.pipeline.table import Schedule, ScheduleError


def load_schedule(parallel: ParallelSettings, microbatches: int) -> Schedule:
    """Build or read `parallel.schedule` for the sizes of the layout; a table of the user's own is proved first.

    Raises:
        ScheduleError: there is no such schedule or file, the file is no schedule or one that cannot run, or it was made
            for other sizes.
    """
    if not parallel.schedule.endswith(".csv"):
        return build_schedule(parallel.schedule, parallel.pipeline, microbatches, parallel.stages_per_rank)
    from weft.parallel.pipeline.text import read_schedule

    try:
        schedule = read_schedule(parallel.schedule)
    except OSError as error:
        raise ScheduleError(f"the file cannot be read ({error.strerror})") from None
    check_schedule(schedule)
    for what, own, wanted in (
        ("ranks", schedule.ranks, parallel.pipeline),
        ("microbatches", schedule.microbatches, microbatches),
    ):
        if own != wanted:
            raise ScheduleError(f"the table is for {own} {what}, but the layout has {wanted}")
    return schedule
