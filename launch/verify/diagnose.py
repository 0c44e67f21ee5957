"""Where a wrong layout goes wrong first, and the likely cause."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import log

from torch import Tensor

from weft.launch.verify.causes import (
    EXPLANATIONS,
    Kind,
    cause_of_initial,
    cause_of_shards,
    cause_of_value,
    is_partial,
)
from weft.launch.verify.compare import Comparison, Part, enclosing
from weft.launch.verify.measure import distance, largest
from weft.launch.verify.trace import BACKWARD, FORWARD, Key, Trace

Chunks = dict[str, tuple[int, ...]]
Retrace = Callable[[Chunks], Sequence[Trace]]

MOST_TRIALS = 8  # traces of a step to find how a fused weight should be cut
NAMED = 4


@dataclass(frozen=True)
class Finding:
    """One mistake.

    Attributes:
        where: name of the module or parameter, empty for the whole model.
        value: which value of it is the first wrong one.
        detail: what else is known, as a sentence.
    """

    kind: Kind
    where: str
    value: str
    detail: str = ""

    @property
    def explanation(self) -> str:
        return " ".join(filter(None, (EXPLANATIONS[self.kind], self.detail)))


def diagnose(plain: Trace, ranks: Sequence[Trace], retrace: Retrace, *, tolerance: float) -> list[Finding]:
    """The mistakes found by one traced step: those of the initial weights, and the first one of what follows.

    `retrace` traces the step again with parameters cut in other chunks. `tolerance`: what rounding may do.
    """
    comparison = Comparison(plain, ranks, tolerance)
    findings = list(_missing_parameters(comparison)) or list(_initial_weights(comparison))
    for search in (_forward(comparison, retrace), _loss(comparison), _backward(comparison), _gradients(comparison)):
        found = next(search, None)
        if found is not None:
            return [*findings, found]
    return [*findings, *_norm(comparison)]


def _missing_parameters(comparison: Comparison) -> Iterator[Finding]:
    held = {name for trace in comparison.ranks for name in trace.parameters}
    missing = [name for name in comparison.plain.parameters if name not in held]
    if missing:
        yield Finding(Kind.MISSING, missing[0], "on no rank", f"Missing: {_listed(missing)}.")


def _initial_weights(comparison: Comparison) -> Iterator[Finding]:
    """The first parameter that is not the plain model's at the start, of those with a known mistake if there are any.

    A draw that is wrong puts torch's generator into another state, and the draws after it are wrong too.
    """
    causes: dict[str, Kind] = {}
    for name, plain in comparison.plain.parameters.items():
        parts = [
            Part(trace.place, value.cut.of_local(value.initial), value.cut.of_full(plain.initial))
            for trace in comparison.ranks
            if (value := trace.parameters.get(name)) is not None
        ]
        if all(map(comparison.close, parts)):
            continue
        group = comparison.wrong_group(parts, lambda place: (place.data, place.pipeline))
        causes[name] = cause_of_initial(comparison.weigh(group, plain.initial))
    if causes:
        known = [name for name, kind in causes.items() if kind != Kind.INITIAL]
        first = next(iter(known or causes))
        detail = f"{len(causes)} parameters start wrong: {_listed(list(causes))}." if len(causes) > 1 else ""
        yield Finding(causes[first], first, "initial value", detail)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


def _forward(comparison: Comparison, retrace: Retrace) -> Iterator[Finding]:
    key = comparison.first_wrong(FORWARD)
    if key is not None:
        kind, detail = cause_of_value(comparison.evidence(key)), ""
        if kind is None:
            detail = _wrong_chunks(comparison, key, retrace)
            kind = Kind.CHUNKS if detail else Kind.UNKNOWN
        yield Finding(kind, key.module, f"{key.what} (forward)", detail)


def _backward(comparison: Comparison) -> Iterator[Finding]:
    key = comparison.first_wrong(BACKWARD)
    if key is not None:
        kind = cause_of_value(comparison.evidence(key), backward=True)
        if kind is None and _scaled(comparison, key):
            kind = Kind.LOSS_SCALED
        yield Finding(kind or Kind.UNKNOWN, key.module, f"{key.what} (backward)")


def _scaled(comparison: Comparison, key: Key) -> bool:
    """Whether all ranks hold the value times or divided by the number of data ranks."""
    parts = comparison.parts(key)
    size = parts[0].place.data_size
    evidence = comparison.weigh(parts, comparison.plain.values[key].tensor)
    return any(evidence.is_scaled(factor) for factor in (size, 1 / size))


def _wrong_chunks(comparison: Comparison, key: Key, retrace: Retrace) -> str:
    """Whether cutting a weight near by in chunks, or not in chunks, makes the value right; says which."""
    near = key.module if key.what == "output" else next(enclosing(key.module), "")
    for _, chunks in zip(range(MOST_TRIALS), _chunk_trials(comparison, near), strict=False):
        if Comparison(comparison.plain, retrace(chunks), comparison.tolerance).right.get(key):
            name, sizes = next(iter(chunks.items()))
            return f"{name} is right when cut as {' + '.join(map(str, sizes))}."
    return ""


def _chunk_trials(comparison: Comparison, near: str) -> Iterator[Chunks]:
    """The cuts that fused q, k, v, gate and up projections would need, for each split weight in the layer."""
    tensor = comparison.ranks[0].place.tensor_size
    for name, value in comparison.ranks[0].parameters.items():
        full = comparison.plain.parameters[name].initial
        if value.cut.dim is None or full.dim() != 2 or (near and not name.startswith(f"{near}.")):
            continue
        size, other = full.shape[value.cut.dim], full.shape[1 - value.cut.dim]
        trials = [(size // 3,) * 3, (size // 2,) * 2, (other, (size - other) // 2, (size - other) // 2)]
        if len(value.cut.slices) > 1:
            trials = [(size,)]
        for sizes in trials:
            if sum(sizes) == size and min(sizes) > 0 and not any(part % tensor for part in sizes):
                bias = f"{name.rpartition('.')[0]}.bias"
                held = comparison.ranks[0].parameters.get(bias)
                yield {name: sizes} | ({bias: sizes} if held is not None and held.cut.dim == 0 else {})


def _loss(comparison: Comparison) -> Iterator[Finding]:
    plain, losses = comparison.plain.loss, [trace.loss for trace in comparison.ranks]
    if not all(comparison.agree(loss, plain) for loss in losses):
        yield Finding(_cause_of_loss(comparison, losses[0]), "", "loss", f"It is {losses[0]:.6g}, not {plain:.6g}.")


def _cause_of_loss(comparison: Comparison, loss: float) -> Kind:
    plain, place = comparison.plain.loss, comparison.ranks[0].place
    if place.tensor_size > 1 and comparison.agree(loss, plain + log(place.tensor_size)):
        return Kind.GATHERED_LOGITS
    if place.data_size > 1 and _right_when_weighted(comparison):
        return Kind.LOSS_PER_RANK
    sizes = {place.data_size, place.tensor_size} - {1}
    if any(comparison.agree(loss, plain * factor) for size in sizes for factor in (size, 1 / size)):
        return Kind.LOSS_SCALED
    return Kind.UNKNOWN


def _right_when_weighted(comparison: Comparison) -> bool:
    """Whether the data ranks' own losses give the plain one when weighted by their number of targets."""
    firsts = [trace for trace in comparison.ranks if trace.place.tensor == 0]
    for number in range(len(firsts[0].targets)):
        pairs = [(trace.targets[number], trace.own_loss or 0.0) for trace in firsts]
        total = sum(count for count, _ in pairs)
        if total and comparison.agree(sum(n * loss for n, loss in pairs) / total, comparison.plain.loss):
            return True
    return False


def _gradients(comparison: Comparison) -> Iterator[Finding]:
    """The first wrong gradient of a parameter, though all that it is computed from is right."""
    scale = max(largest(value.gradient) for value in comparison.plain.parameters.values())
    for name, plain in comparison.plain.parameters.items():
        parts, cuts = [], []
        for trace in comparison.ranks:
            if (value := trace.parameters.get(name)) is not None:
                held, expected = value.cut.of_local(value.gradient), value.cut.of_full(plain.gradient)
                parts.append(Part(trace.place, held=held, expected=expected))
                cuts.append(value.cut)
        if any(distance(part.held, part.expected) > comparison.tolerance * scale for part in parts):
            yield Finding(_cause_of_gradient(comparison, parts, plain.gradient, cuts[0].replicas), name, "gradient")


def _cause_of_gradient(comparison: Comparison, parts: Sequence[Part], full: Tensor, replicas: int) -> Kind:
    """By which axis the ranks' gradients add up to the plain one."""
    axes: list[tuple[Callable[[Part], object], Kind]] = [
        (lambda part: (part.place.data, part.place.pipeline, part.place.tensor // replicas), Kind.REPLICATED_GRADIENT),
        (lambda part: (part.place.data, part.place.pipeline), Kind.REPLICATED_GRADIENT),
        (lambda part: (part.place.tensor, part.place.pipeline), Kind.DATA_GRADIENT),
        (lambda part: (part.place.tensor, part.place.data), Kind.TIED_GRADIENT),
    ]
    for group_of, kind in axes:
        wrong = next(part for part in parts if not comparison.close(part))
        group = [part for part in parts if group_of(part) == group_of(wrong)]
        evidence = comparison.weigh(group, full)
        if evidence.ranks == 1:
            continue
        if evidence.is_scaled(1 / evidence.ranks):
            return Kind.AVERAGED
        if is_partial(evidence):
            return kind
        if evidence.is_scaled(evidence.ranks):
            return Kind.GRADIENT_SUM_REPEATED
        if not evidence.replicated and cause_of_shards(evidence) == Kind.SHARD_REPLICATED:
            return Kind.SHARD_REPLICATED
    return Kind.UNKNOWN


def _norm(comparison: Comparison) -> Iterator[Finding]:
    plain, norm = comparison.plain.gradient_norm, comparison.ranks[0].gradient_norm
    if all(comparison.agree(trace.gradient_norm, plain) for trace in comparison.ranks):
        return
    kind, names = _cause_of_norm(comparison, norm**2)
    where = names[0] if len(names) == 1 else ""
    counted = f" Those are {_listed(names)}." if len(names) > 1 else ""
    yield Finding(kind, where, "gradient norm", f"It is {norm:.6g}, not {plain:.6g}.{counted}")


def _cause_of_norm(comparison: Comparison, square: float) -> tuple[Kind, list[str]]:
    """Which parameters, counted once per rank or on rank 0 alone, give the square that is seen."""
    own = comparison.ranks[0]
    squares = {name: float(value.gradient.square().sum()) for name, value in comparison.plain.parameters.items()}
    exact, ranks = sum(squares.values()), own.place.tensor_size
    parts = {name: float(value.cut.of_local(value.gradient).square().sum()) for name, value in own.parameters.items()}
    replicated = [name for name, value in own.parameters.items() if value.cut.dim is None]
    sharded = [name for name, value in own.parameters.items() if value.cut.dim is not None]
    for names in [replicated, *([name] for name in squares)]:
        if names and comparison.agree(square, exact + (ranks - 1) * sum(squares[name] for name in names)):
            return Kind.NORM_TWICE, names
    for names in [sharded, *([name] for name in sharded)]:
        if names and comparison.agree(square, exact + sum(parts[name] - squares[name] for name in names)):
            return Kind.NORM_NEVER, names
    for name, part in squares.items():
        if comparison.agree(square, exact - part):
            return Kind.NORM_NEVER, [name]
    if comparison.agree(square, sum(parts.values())):
        return Kind.NORM_NEVER, sharded or list(squares)
    return Kind.UNKNOWN, []
