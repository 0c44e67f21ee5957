"""What the field's known mistakes would make of a value: each rule knows one and says whether this is it."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from math import log

import torch
from torch import Tensor

from weft.launch.verify.measure import distance, largest


class Kind(StrEnum):
    """A mistake by its name."""

    SHARD_REPLICATED = "shard replicated"
    SEED_SHARED = "seed shared between shards"
    INITIAL = "initial weights depend on the layout"
    CHUNKS = "chunks of a fused projection cut wrongly"
    SUM_MISSING = "sum missing"
    SUM_REPEATED = "summed twice"
    AVERAGED = "averaged instead of summed"
    BIAS_REPEATED = "bias counted once per rank"
    GATHERED_LOGITS = "gathered logits given to a vocabulary-parallel loss"
    LOSS_PER_RANK = "loss scaled per rank"
    LOSS_SCALED = "loss scaled by a number of ranks"
    GRADIENT_SUM_MISSING = "sum missing in the backward"
    GRADIENT_SUM_REPEATED = "summed twice in the backward"
    REPLICATED_GRADIENT = "replicated parameter's gradient not summed"
    DATA_GRADIENT = "gradient not summed over the data axis"
    TIED_GRADIENT = "tied copies' gradients not summed"
    NORM_TWICE = "gradient norm counts a parameter twice"
    NORM_NEVER = "gradient norm leaves a shard out"
    DIVISION = "divided wrongly by ZeRO"
    MISSING = "parameters missing"
    UNKNOWN = "unknown"


EXPLANATIONS = {
    Kind.SHARD_REPLICATED: "Every rank holds the shard of rank 0: the shards are cut with the same index, or drawn "
    "from one seed (a shorter draw from the same seed begins alike). Cut shard r on rank r.",
    Kind.SEED_SHARED: "All ranks start with equal shards, none of them a part of the plain model's weight: each draws "
    "its shard from the same seed, so that the layer is as narrow as one shard. Draw the full weight and cut it.",
    Kind.INITIAL: "The weights drawn are not the plain model's. Draw the full weight on every rank and cut it, or load "
    "the same weights into both.",
    Kind.CHUNKS: "The projections fused in this weight are cut as if they were one, so that a rank gets a part of one "
    "instead of a part of each. Cut each chunk by itself.",
    Kind.SUM_MISSING: "Each rank holds only its term; the ranks' values add up to the plain one. All-reduce (or "
    "reduce-scatter) the output.",
    Kind.SUM_REPEATED: "The value is the plain one times the number of ranks: something that every rank already has "
    "whole is summed over them. Leave out the all-reduce, or give each rank its part of the input.",
    Kind.AVERAGED: "The value is the plain one divided by the number of ranks: use a sum, not an average.",
    Kind.BIAS_REPEATED: "The value is too large by (ranks - 1) times the bias: each rank adds the bias before the sum. "
    "Add it once, after the sum.",
    Kind.GATHERED_LOGITS: "The loss is too large by log(tensor ranks): every rank's logits are whole, and the loss "
    "takes them for its part of the vocabulary. Give it the logits before they are gathered.",
    Kind.LOSS_PER_RANK: "Weighted by its number of targets, the data ranks' losses give the plain one; averaged, they "
    "do not: each rank divides by its own count. Divide by the count of the whole batch.",
    Kind.LOSS_SCALED: "The value is the plain one times or divided by a number of ranks. Divide the loss by the count "
    "of the whole batch, once.",
    Kind.GRADIENT_SUM_MISSING: "Each rank holds only its term of this gradient; the ranks' terms add up to the plain "
    "one. Let the layer that uses a replicated input on each rank all-reduce its gradient (weft.parallel.copy).",
    Kind.GRADIENT_SUM_REPEATED: "The gradient is the plain one times the number of ranks: a backward sums what every "
    "rank already has whole. An all-reduce of the forward is the identity in the backward (weft.parallel.all_reduce).",
    Kind.REPLICATED_GRADIENT: "Each rank holds only its term of the gradient of a parameter that they share; the terms "
    "add up to the plain one. Declare `partial_gradient`, or all-reduce it over the tensor ranks before the step.",
    Kind.DATA_GRADIENT: "The data ranks' gradients add up to the plain one, and were not added up.",
    Kind.TIED_GRADIENT: "The copies of a tied parameter on two stages each have only their term of the gradient. Sum "
    "them over the stages.",
    Kind.NORM_TWICE: "The norm is the one in which this counts once on every rank that holds it. Count what is "
    "replicated on one rank only.",
    Kind.NORM_NEVER: "The norm is the one without this. Declare how the parameter is sharded, and add the squares of "
    "all ranks before the root.",
    Kind.DIVISION: "Where each data rank keeps and updates everything (ZeRO 0), the same layout is right: in what the "
    "data ranks divide, a range is not summed over them, is updated by none or by two, or is not gathered again.",
    Kind.MISSING: "Every parameter of the plain model must be on at least one rank, by the same name.",
    Kind.UNKNOWN: "None of the known mistakes would give this value.",
}


@dataclass(frozen=True)
class Evidence:
    """One wrong value as the ranks of one group hold it.

    Attributes:
        held, expected: by rank; the part that it holds of the value, and what that should be.
        full: the plain model's value.
        offsets: the plain model's biases and values near by, which may be a term of the value.
        tolerance: what rounding may do, relative to the largest entry.
    """

    held: Sequence[Tensor]
    expected: Sequence[Tensor]
    full: Tensor
    offsets: Sequence[Tensor] = ()
    tolerance: float = 1e-9

    def close(self, seen: Tensor, expected: Tensor) -> bool:
        """Whether they are equal but for rounding."""
        return close(seen, expected, self.tolerance)

    @property
    def ranks(self) -> int:
        return len(self.held)

    @property
    def replicated(self) -> bool:
        """Whether all ranks should hold the same."""
        return all(self.close(part, self.expected[0]) for part in self.expected)

    def is_scaled(self, factor: float, term: Tensor | float = 0.0) -> bool:
        """Whether every rank holds `factor` times what it should, but for a term that is there once."""
        pairs = zip(self.held, self.expected, strict=True)
        return all(self.close(held, factor * (part - term) + term) for held, part in pairs)

    def is_beyond(self, offset: Tensor | float) -> bool:
        """Whether every rank holds this much more than it should."""
        return all(self.close(held, part + offset) for held, part in zip(self.held, self.expected, strict=True))

    @property
    def terms(self) -> list[Tensor]:
        """What may be in the value beside a sum over ranks: nothing, a bias, or a residual."""
        shape = self.expected[0].shape
        fitting = [x for x in self.offsets if x.shape == shape or (x.dim() == 1 and shape[-1:] == x.shape)]
        return [torch.zeros((), dtype=torch.float64), *(x for x in fitting if bool(x.any()))]


def close(seen: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Of one shape, and equal relative to the largest entry."""
    return seen.shape == expected.shape and distance(seen, expected) <= tolerance * (largest(expected) or 1e-300)


def is_partial(evidence: Evidence) -> bool:
    """Whether the ranks' values add up to the one that each should hold."""
    if evidence.ranks == 1 or not evidence.replicated:
        return False
    total = torch.stack(list(evidence.held)).sum(0)
    return any(evidence.close(total - (evidence.ranks - 1) * term, evidence.expected[0]) for term in evidence.terms)


def cause_of_value(evidence: Evidence, *, backward: bool = False) -> Kind | None:
    """The mistake that would give this activation, or gradient of one."""
    if evidence.ranks == 1:
        return None
    if not evidence.replicated:
        found = cause_of_shards(evidence)
        return Kind.GRADIENT_SUM_REPEATED if backward and found == Kind.SUM_REPEATED else found
    ranks, terms = evidence.ranks, evidence.terms
    if any(evidence.is_scaled(1 / ranks, term) for term in terms):
        return Kind.AVERAGED
    if is_partial(evidence):
        return Kind.GRADIENT_SUM_MISSING if backward else Kind.SUM_MISSING
    if not backward and any(evidence.is_beyond((ranks - 1) * term) for term in terms[1:]):
        return Kind.BIAS_REPEATED
    if any(evidence.is_scaled(ranks, term) for term in terms):
        return Kind.GRADIENT_SUM_REPEATED if backward else Kind.SUM_REPEATED
    if evidence.full.numel() == 1 and evidence.is_beyond(log(ranks)):
        return Kind.GATHERED_LOGITS
    return None


def cause_of_shards(evidence: Evidence) -> Kind | None:
    """The mistake that would give each rank this part."""
    first = evidence.expected[0]
    if all(evidence.close(held, first) for held in evidence.held):
        return Kind.SHARD_REPLICATED
    if evidence.is_scaled(evidence.ranks):
        return Kind.SUM_REPEATED
    dims = [dim for dim in range(first.dim()) if first.shape[dim] != evidence.full.shape[dim]]
    if len(dims) == 1 and all(stand_elsewhere(held, evidence.full, dims[0]) for held in evidence.held):
        return Kind.CHUNKS
    return None


def cause_of_initial(evidence: Evidence) -> Kind:
    """The mistake that would draw this parameter."""
    if evidence.replicated:
        return Kind.INITIAL
    found = cause_of_shards(evidence)
    if found in (Kind.SHARD_REPLICATED, Kind.CHUNKS):
        return found
    first = evidence.held[0]
    equal = all(evidence.close(held, first) for held in evidence.held)
    return Kind.SEED_SHARED if equal and bool(first.any()) else Kind.INITIAL


def stand_elsewhere(held: Tensor, full: Tensor, dim: int) -> bool:
    """Whether every slice of `held` along `dim` is one of the full tensor's, to the bit."""
    known = {row.numpy().tobytes() for row in full.movedim(dim, 0).contiguous()}
    return all(row.numpy().tobytes() in known for row in held.movedim(dim, 0).contiguous())
