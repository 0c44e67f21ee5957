"""The best layouts of a job: memory and closed-form time of every candidate, then the event simulation of the best.

The two steps are what keeps it quick: a closed form is within a few percent of its simulation, so the best by
simulation is among the best hundred without.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from heapq import nsmallest

from weft.launch.plan.block import Model
from weft.launch.plan.breakdown import Memory, StepTime
from weft.launch.plan.candidates import Space
from weft.launch.plan.cluster import Cluster
from weft.launch.plan.layout import Layout
from weft.launch.plan.memory import worst_memory
from weft.launch.plan.stages import Pieces, StageTimes, pieces_of, stage_times
from weft.launch.plan.step import step_of

SIMULATED = 100
REJECTED = 100
TIE = 0.035  # share of a step's time that predictions do not tell apart


def preferred(times: Sequence[float], microbatches: Sequence[int]) -> int:
    """Which layout to take: of all whose time is within `TIE` of the shortest, the one with fewest microbatches.

    What a simulation leaves out, launching and jitter, comes with every microbatch. Of equals, the fastest.
    """
    limit = (1 + TIE) * min(times)
    near = [index for index, time in enumerate(times) if time <= limit]
    return min(near, key=lambda index: (microbatches[index], times[index]))


@dataclass(frozen=True)
class Candidate:
    """A layout with what the planner says of it; `memory`: of the rank that holds most."""

    layout: Layout
    memory: Memory
    time: StepTime

    def fits(self, cluster: Cluster) -> bool:
        return self.memory.total <= cluster.memory_bytes


@dataclass(frozen=True)
class Plan:
    """The result of a search.

    Attributes:
        fitting: layouts that fit, fastest first, as simulated.
        rejected: layouts that would be fast but do not fit, fastest first; when none fits, those that lack least.
        trivial: plain data parallelism, ZeRO-3 and one node per tensor group, as far as there are such layouts.
        considered: candidates in all.
        fit_count: how many of them fit.
    """

    space: Space
    cluster: Cluster
    fitting: tuple[Candidate, ...]
    rejected: tuple[Candidate, ...]
    trivial: tuple[tuple[str, Candidate], ...]
    considered: int
    fit_count: int

    @property
    def best(self) -> Candidate:
        """The layout to take, of those that fit."""
        index = preferred(
            [candidate.time.total for candidate in self.fitting],
            [candidate.layout.microbatches(self.space.job) for candidate in self.fitting],
        )
        return self.fitting[index]


class Planner:
    """Prices layouts of one job on one cluster; what candidates have in common is computed once."""

    def __init__(self, space: Space, cluster: Cluster) -> None:
        self.space, self.cluster = space, cluster
        self._pieces: dict[Layout, Pieces] = {}

    def price(self, layout: Layout, *, simulate: bool) -> Candidate:
        """Memory and time of a layout; with `simulate` both are read off its schedule's table."""
        space = self.space
        model = self._model_of(layout)
        memory = worst_memory(space.shape, space.job, layout, space.recipe, read_table=simulate)
        return Candidate(layout, memory, step_of(model, self.times_of(layout), simulate=simulate))

    def times_of(self, layout: Layout) -> StageTimes:
        """Seconds of each stage of a layout for one microbatch."""
        model = self._model_of(layout)
        return stage_times(model, self._pieces_of(model))

    def _model_of(self, layout: Layout) -> Model:
        space = self.space
        return Model(space.shape, space.job, layout, space.recipe, self.cluster)

    def _pieces_of(self, model: Model) -> Pieces:
        layout = model.layout
        key = Layout(
            tensor=layout.tensor,
            context=layout.context,
            expert=layout.expert,
            micro_batch=layout.micro_batch,
            recompute=layout.recompute,
            sequence_parallel=layout.sequence_parallel,
        )
        if key not in self._pieces:
            self._pieces[key] = pieces_of(replace(model, layout=key))
        return self._pieces[key]

    def search(self) -> Plan:
        """Price every candidate; simulate the best that fit and the trivial ones."""
        priced = [self.price(layout, simulate=False) for layout in self.space.candidates()]
        fits = [candidate for candidate in priced if candidate.fits(self.cluster)]
        others = [candidate for candidate in priced if not candidate.fits(self.cluster)]
        best = nsmallest(SIMULATED, fits, key=lambda candidate: candidate.time.total)
        simulated = [self.price(candidate.layout, simulate=True) for candidate in best]
        simulated = [candidate for candidate in simulated if candidate.fits(self.cluster)]
        simulated.sort(key=lambda candidate: candidate.time.total)
        if simulated:
            rejected = nsmallest(REJECTED, others, key=lambda candidate: candidate.time.total)
        else:
            rejected = nsmallest(REJECTED, others, key=lambda candidate: candidate.memory.total)
        trivial = tuple(self._trivial(priced))
        return Plan(self.space, self.cluster, tuple(simulated), tuple(rejected), trivial, len(priced), len(fits))

    def _trivial(self, priced: list[Candidate]) -> list[tuple[str, Candidate]]:
        """The best of each kind of layout that one tries without a plan, of those that fit if there are any."""
        one_node = self.space.devices_per_node
        kinds = {
            "plain data parallelism": lambda layout: layout.data == layout.ranks and layout.zero == 0,
            "ZeRO-3": lambda layout: layout.data == layout.ranks and layout.zero == 3,
            "tensor over one node": lambda layout: layout.tensor == one_node and layout.pipeline == layout.context == 1,
        }
        found = []
        for name, is_of_kind in kinds.items():
            own = [candidate for candidate in priced if is_of_kind(candidate.layout)]
            if own:
                best = min(own, key=lambda one: (not one.fits(self.cluster), one.time.total))
                found.append((name, best))
        return found
