"""Layouts on a cluster with troubled nodes, as text and as data; and how the troubles are asked for."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from weft.launch.errors import UserError
from weft.launch.plan.block import Model
from weft.launch.plan.report import aligned
from weft.launch.plan.search import Candidate, Plan
from weft.launch.plan.uneven import Troubles, uneven_step
from weft.launch.units import milliseconds_text


@dataclass(frozen=True)
class Uneven:
    """A layout, and the seconds of its step with the troubles."""

    candidate: Candidate
    seconds: float

    @property
    def longer(self) -> float:
        """Share by which the step is longer than with equal nodes."""
        return self.seconds / self.candidate.time.total - 1


def read_troubles(slow: Sequence[str], lost: Sequence[str], nodes: int, devices: int) -> Troubles:
    """Of `--slow-node NODE=FACTOR` and `--lost-link NODE` or `NODE=COUNT`.

    Raises:
        UserError: a node that the cluster does not have, a factor below 1, or more links than a node has.
    """
    factors, counts = {}, {}
    for text in slow:
        node, _, factor = text.partition("=")
        factors[_node("--slow-node", node, nodes)] = _number("--slow-node", text, factor)
    for text in lost:
        node, _, count = text.partition("=")
        number = _number("--lost-link", text, count or "1")
        if number >= devices or number != int(number):
            raise UserError(
                f"--lost-link {text}: a node has {devices} links to the network, one for each device, and must keep "
                f"one; choose a number from 1 to {devices - 1}."
            )
        counts[_node("--lost-link", node, nodes)] = int(number)
    return Troubles(factors, counts)


def _node(option: str, text: str, nodes: int) -> int:
    if text.isdecimal() and int(text) < nodes:
        return int(text)
    raise UserError(f"{option} {text}: choose a node by its number, from 0 to {nodes - 1}.")


def _number(option: str, text: str, number: str) -> float:
    try:
        value = float(number)
    except ValueError:
        value = 0.0
    if not 1 <= value < 1e6:
        raise UserError(f"{option} {text}: give it as NODE=NUMBER with a number of at least 1, such as 0=1.5.")
    return value


def uneven_layouts(plan: Plan, troubles: Troubles, top: int, as_set: Candidate | None) -> list[Uneven]:
    """The best layouts and that of the settings with the troubles, fastest first."""
    candidates = list(plan.fitting[:top])
    for candidate in (plan.best, as_set):
        if candidate is not None and all(candidate.layout != other.layout for other in candidates):
            candidates.append(candidate)
    space = plan.space
    models = [Model(space.shape, space.job, one.layout, space.recipe, plan.cluster) for one in candidates]
    found = [Uneven(one, uneven_step(model, troubles)) for one, model in zip(candidates, models, strict=True)]
    return sorted(found, key=lambda uneven: uneven.seconds)


def uneven_text(plan: Plan, troubles: Troubles, layouts: Sequence[Uneven]) -> str:
    """A table in the order of the times with the troubles."""
    places = {candidate.layout: place for place, candidate in enumerate(plan.fitting, 1)}
    rows = [
        (
            str(places.get(one.candidate.layout, "–")),
            milliseconds_text(one.candidate.time.total),
            milliseconds_text(one.seconds),
            f"{100 * one.longer:.1f} %",
            one.candidate.layout.label,
        )
        for one in layouts
    ]
    header = ("#", "even", "uneven", "longer", "layout")
    return f"With {_words(plan, troubles)}\n{aligned(header, rows)}"


def uneven_json(layouts: Sequence[Uneven]) -> list[dict[str, Any]]:
    """Layouts by their labels, times in seconds."""
    return [
        {
            "layout": one.candidate.layout.label,
            "even_seconds": one.candidate.time.total,
            "uneven_seconds": one.seconds,
        }
        for one in layouts
    ]


def _words(plan: Plan, troubles: Troubles) -> str:
    devices = plan.cluster.devices_per_node
    slow = [f"node {node} computing {factor:g} times longer" for node, factor in sorted(troubles.slow.items())]
    lost = [f"{count} of {devices} links of node {node} lost" for node, count in sorted(troubles.lost.items())]
    return ", ".join(slow + lost)
