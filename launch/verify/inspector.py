"""What each process of the pool holds: it trains a layout's share, compares it with the plain run, and traces it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard

from weft.launch.verify.cut import Cut, Place, aligned, parameter_cut
from weft.launch.verify.layout import Layout
from weft.launch.verify.measure import GRADIENT, INITIAL, LOSS, NORM, OUTPUT, WEIGHTS, Judge, Reading, Reference
from weft.launch.verify.rounding import LowestPrecision
from weft.launch.verify.subject import Run, Subject, UnfitError
from weft.launch.verify.trace import ParameterValue, Trace, tracing
from weft.parallel import build_mesh
from weft.parallel.sharding import Sharding

Chunks = Mapping[str, tuple[int, ...]]
Held = list[tuple[str, Tensor, Cut]]


@dataclass(frozen=True)
class Measurement:
    """What one rank found in one layout: a reading of each quantity in each precision.

    `missing`: parameters of the plain model that this rank does not hold.
    """

    readings: dict[str, dict[str, Reading]]
    missing: frozenset[str]


class Inspector:
    """One process's view of the subject."""

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._judges: dict[str, Judge] = {}

    def learn(self, precision: str, reference: Reference) -> None:
        """Remember what the plain run of that precision did; the one in float64 comes first."""
        self._judges[precision] = Judge(reference, precision)

    def train_plain(self, precision: str) -> Reference:
        """Train the plain model; called on one rank."""
        run = self._subject.build(Layout(), _mesh(Layout()), getattr(torch, precision))
        reference = Reference(initial=_full_parameters(run))
        with LowestPrecision() as lowest:
            reference.output = run.output()
        reference.computed_in = str(lowest.dtype).removeprefix("torch.")
        for number in range(self._subject.steps):
            loss, norm = run.step(number)
            reference.losses.append(loss)
            reference.gradient_norms.append(norm)
            if number == 0:
                reference.gradients = _copies(run.gradients())
        reference.weights = _full_parameters(run)
        return reference

    def measure(self, layout: Layout) -> Measurement | str:
        """Train in a layout and compare with every plain run; a sentence when the model refuses the layout."""
        mesh = _mesh(layout)
        readings, names = {}, set[str]()
        for precision in layout.precisions:
            try:
                run = self._subject.build(layout, mesh, getattr(torch, precision))
            except UnfitError as error:
                return str(error)
            readings[precision] = self._compare(run, mesh, self._judges[precision])
            names = {name for name, _, _ in run.parameters()}
        return Measurement(readings, frozenset(self._initial.keys() - names))

    def trace(self, layout: Layout, precision: str, chunks: Chunks) -> Trace:
        """Record one step on one microbatch, from the weights of the plain model.

        `chunks`: parameters to cut in another way than declared, to see whether that would be right.
        """
        mesh = _mesh(layout)
        run = self._subject.build(layout, mesh, getattr(torch, precision), microbatches=1)
        trace = Trace(_place(mesh))
        held = self._held(run, mesh)
        initial = _copies({name: parameter for name, parameter, _ in held})
        self._repair(run, _recut(held, mesh, chunks))
        with tracing(run.named_modules(), trace.values):
            trace.loss, trace.gradient_norm = run.step(0)
        trace.own_loss, trace.targets = run.own_loss, run.targets
        gradients = _copies(run.gradients())
        for name, _, cut in held:
            trace.parameters[name] = ParameterValue(initial[name], gradients[name], cut)
        return trace

    def _compare(self, run: Run, mesh: DeviceMesh, judge: Judge) -> dict[str, Reading]:
        plain = judge.reference
        held = self._held(run, mesh)
        readings = {INITIAL: _compare_parameters(judge, INITIAL, held, plain.initial)}
        if not readings[INITIAL].right:
            self._repair(run, held)  # whether all else is right is another question
        output = run.output()
        if output is not None and plain.output is not None:
            pair = aligned(plain.output, output, _place(mesh), None)
            if pair is not None:
                readings[OUTPUT] = judge.value(OUTPUT, pair[1], pair[0])
        losses, norms = [], []
        for number in range(self._subject.steps):
            loss, norm = run.step(number)
            losses.append(loss)
            norms.append(norm)
            if number == 0:
                found = run.gradients()
                gradients = [(name, found[name], cut) for name, _, cut in held]
                readings[GRADIENT] = _compare_parameters(judge, GRADIENT, gradients, plain.gradients)
        readings[LOSS] = judge.numbers(LOSS, losses, plain.losses)
        readings[NORM] = judge.numbers(NORM, norms, plain.gradient_norms)
        readings[WEIGHTS] = _compare_parameters(judge, WEIGHTS, self._held(run, mesh), plain.weights)
        return readings

    @property
    def _initial(self) -> dict[str, Tensor]:
        return next(iter(self._judges.values())).reference.initial

    def _held(self, run: Run, mesh: DeviceMesh) -> Held:
        """This rank's parameters that the plain model has too, and their cuts."""
        full = self._initial
        return [
            (name, parameter, parameter_cut(name, parameter.shape, full[name].shape, sharding, mesh["tensor"]))
            for name, parameter, sharding in run.parameters()
            if name in full
        ]

    @torch.no_grad()
    def _repair(self, run: Run, held: Held) -> None:
        """Give every parameter its part of the plain model's."""
        values = _copies({name: parameter for name, parameter, _ in held})
        for name, parameter, cut in held:
            cut.write(values[name], self._initial[name].to(parameter.dtype))
        run.replace_parameters(values)


def _recut(held: Held, mesh: DeviceMesh, chunks: Chunks) -> Held:
    result = []
    for name, parameter, cut in held:
        if name in chunks and cut.dim is not None:
            full_shape = (*parameter.shape[: cut.dim], sum(chunks[name]), *parameter.shape[cut.dim + 1 :])
            other = Sharding(Shard(cut.dim), mesh["tensor"], full_shape, chunks=chunks[name], replicas=cut.replicas)
            cut = Cut(cut.dim, tuple(other.slices()), cut.replicas)
        result.append((name, parameter, cut))
    return result


def _compare_parameters(
    judge: Judge, what: str, held: Iterable[tuple[str, Tensor, Cut]], full: Mapping[str, Tensor]
) -> Reading:
    pairs = {name: (cut.of_local(local.detach()), cut.of_full(full[name])) for name, local, cut in held}
    return judge.parameters(what, pairs)


def _full_parameters(run: Run) -> dict[str, Tensor]:
    return _copies({name: parameter for name, parameter, _ in run.parameters()})


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def _mesh(layout: Layout) -> DeviceMesh:
    """The layout's mesh, on all ranks; one that ended its call at once would break connections that others make."""
    mesh = build_mesh(data=layout.data, tensor=layout.tensor, pipeline=layout.pipeline)
    dist.barrier()
    return mesh


def _place(mesh: DeviceMesh) -> Place:
    data, tensor, pipeline = (mesh[axis].get_local_rank() for axis in ("data", "tensor", "pipeline"))
    return Place(data, tensor, pipeline, mesh["data"].size(), mesh["tensor"].size())
