"""Messages between two ranks of one machine: over a link through shared memory, and over gloo, in turns.

    python benchmarks/messages.py

"turn" sends a message there and another back and gives half of that time; "exchange" is both ranks sending to each
other at once, as the tensor axis does. Microseconds, medians of the rounds; each rank is a process with one thread.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from ranks import on_ranks
from torch import Tensor

from weft.parallel import build_mesh
from weft.parallel.links import Link
from weft.parallel.meeting import links_of

SIZES = (2**12, 2**16, 2**20, 2**24)


def over_link(link: Link, sent: Tensor, received: Tensor, order: str) -> None:
    for step in order:
        if step == "s":
            link.send(sent)
        else:
            arrival = link.receive(received.dtype, received.shape)
            arrival.wait()
            arrival.move_into(received)


def over_gloo(peer: int, sent: Tensor, received: Tensor, order: str) -> None:
    if order == "sr*":
        works = [dist.irecv(received, peer), dist.isend(sent, peer)]
        for work in works:
            assert work is not None
            work.wait()
        return
    for step in order:
        dist.send(sent, peer) if step == "s" else dist.recv(received, peer)


def median_of(run: Callable[[], None], rounds: int) -> float:
    """Microseconds of a call."""
    found = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return statistics.median(found) * 1e6


def measure(rounds: int) -> list[tuple[int, list[float]]]:
    """For each size: a turn and an exchange over the link, then over gloo."""
    torch.set_num_threads(1)
    mesh = build_mesh(tensor=2)["tensor"]
    rank, links = mesh.get_local_rank(), links_of(mesh.get_group())
    peer, turn = 1 - rank, "sr" if rank == 0 else "rs"
    assert peer in links, "this system has no shared memory for messages: nothing to compare"
    rows = []
    for size in SIZES:
        sent, received = torch.randn(size // 4), torch.empty(size // 4)
        ways: list[Callable[[], None]] = [
            lambda sent=sent, received=received: over_link(links[peer], sent, received, turn),  # type: ignore[misc]
            lambda sent=sent, received=received: over_link(links[peer], sent, received, "sr"),  # type: ignore[misc]
            lambda sent=sent, received=received: over_gloo(peer, sent, received, turn),  # type: ignore[misc]
            lambda sent=sent, received=received: over_gloo(peer, sent, received, "sr*"),  # type: ignore[misc]
        ]
        times = []
        for way in ways:
            median_of(way, 5)
            dist.barrier()
            times.append(median_of(way, max(10, min(rounds, rounds * 2**18 // size))))
        rows.append((size, [times[0] / 2, times[1], times[2] / 2, times[3]]))
    dist.destroy_process_group()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1000, help="messages of each size (fewer of large ones)")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    print(f"{'bytes':>12}{'turn':>12}{'gloo':>12}{'ratio':>8}{'exchange':>12}{'gloo':>12}{'ratio':>8}")
    for size, (turn, exchange, gloo_turn, gloo_exchange) in on_ranks(2, measure, arguments.rounds)[0]:
        columns = f"{turn:>12,.0f}{gloo_turn:>12,.0f}{turn / gloo_turn:>8.2f}"
        print(f"{size:>12,}{columns}{exchange:>12,.0f}{gloo_exchange:>12,.0f}{exchange / gloo_exchange:>8.2f}")


if __name__ == "__main__":
    main()
