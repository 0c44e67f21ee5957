"""How long it takes to build, prove and simulate the tables of large pipelines, and how much memory.

    python benchmarks/schedules.py --ranks 1024 --microbatches 4096

One process per schedule, one thread. Memory is the most that the process holds, Python included.
"""

import argparse
import resource
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from multiprocessing import get_context

from weft.parallel import build_schedule, check_schedule, simulate_schedule
from weft.parallel.pipeline.schedules import BUILDERS

TWO_STAGES = ("interleaved", "looped-bfs", "interleaved-zb", "zb-v", "v-half", "dualpipe-v")


def measure(name: str, ranks: int, microbatches: int) -> str:
    """A row of the table."""
    per_rank = 2 if name in TWO_STAGES else 1
    marks = [time.perf_counter()]
    schedule = build_schedule(name, ranks, microbatches, per_rank)
    marks.append(time.perf_counter())
    check_schedule(schedule)
    marks.append(time.perf_counter())
    bubble = simulate_schedule(schedule).bubble
    marks.append(time.perf_counter())
    actions = sum(map(len, schedule.programs))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts KiB
    seconds = " | ".join(f"{end - start:.1f} s" for start, end in pairwise(marks))
    return f"| {name} | {per_rank} | {actions / 1e6:.1f} M | {seconds} | {memory:.1f} GiB | {100 * bubble:.1f} % |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=1024, help="pipeline ranks (default 1024)")
    parser.add_argument("--microbatches", type=int, default=4096, help="microbatches (default 4096)")
    parser.add_argument("--schedules", nargs="+", default=list(BUILDERS), help="names (default all)")
    options = parser.parse_args()
    print("| schedule | stages per rank | actions | build | check | simulate | memory | bubble |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for name in options.schedules:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            print(process.submit(measure, name, options.ranks, options.microbatches).result(), flush=True)


if __name__ == "__main__":
    main()
