"""Tensor parallelism for a model that somebody else wrote."""

from collections import defaultdict
from collections.abc import Iterable

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from weft.parallel.tensor.heads import find_heads
from weft.parallel.tensor.linear import ColumnParallelLinear, ParallelLinear
from weft.parallel.tensor.plans import Plan, Style, find_plan, matches
from weft.parallel.tensor.region import Region
from weft.parallel.tensor.sequence import split_sequence
from weft.parallel.tensor.swap import Swap

Match = tuple[str, nn.Module, Style]


def parallelize(
    module: nn.Module, plan: Plan | None, mesh: DeviceMesh, *, sequence_parallel: bool = False
) -> nn.Module:
    """Split `module` over the ranks of `mesh`, in place, and return it.

        parallelize(model, {"layers.*.mlp.up_proj": "column", "layers.*.mlp.down_proj": "row"}, mesh["tensor"])

    Every rank must hold the same full weights, or all be on the meta device (`load_shards` then reads them). Outputs,
    losses and gradients are those of the model before; every parameter becomes this rank's shard and declares it.

    `plan` maps module names, in which `*` stands for one component, to styles: "column" and "row" for the linear layers
    at the two ends of a region whose features are split, "embedding" for a table split by the vocabulary,
    "column_gather_output" for an output layer, "column_fused_3" for three projections in one, and what else
    `weft.parallel.tensor.plans` lists. None takes the plan of a Hugging Face model (`_tp_plan`) or weft's for its
    family.

    Attention keeps whole heads: attributes that count heads are made to count this rank's, and key-value heads that
    are fewer than ranks are replicated. Column layers of one module share the reduction of their input's gradient.
    Parameters that were shared stay so. Dropout between a column layer and its row layer differs between the ranks,
    elsewhere it is the same: seed torch's generators alike on all ranks.

    `sequence_parallel`: between the first and the last block of the model each rank holds a part of the sequence, which
    must divide over the ranks. Cut a model into pipeline stages before, and parallelise the stages' `model`.

    Raises:
        ValueError: a pattern fits nothing, a style is unknown or does not suit its module, heads or features do not
            divide, or a shared parameter is split in two ways; each names the module. The module is not to be used
            after that.
    """
    found = list(matches(module, find_plan(module) if plan is None else plan, complete=plan is not None))
    _refuse_fused_attention(module, found)
    replicas = _arrange_heads(module, found, mesh)
    before = _owners(module)
    swap = Swap(mesh)
    for name, child, style in found:
        swap(name, child, style, replicas.get(name, 1))
    _keep_shared(module, before, swap)
    if sequence_parallel and mesh.size() > 1:
        split_sequence(module, swap)
    elif mesh.size() > 1:
        for parent, children in _by_parent(module, found):
            _make_region(parent, [child for _, child, _ in children], mesh)
    return module


def _refuse_fused_attention(module: nn.Module, found: list[Match]) -> None:
    for parent, children in _by_parent(module, found):
        if isinstance(parent, nn.MultiheadAttention):
            raise ValueError(
                f"{children[0][0]} belongs to an nn.MultiheadAttention, which uses its weights without calling it; "
                "write the attention with four linear layers, or take ParallelSelfAttention"
            )


def _arrange_heads(module: nn.Module, found: list[Match], mesh: DeviceMesh) -> dict[str, int]:
    """Set the head counts of attention modules; the number of replicas of the projections that have several."""
    replicas: dict[str, int] = {}
    for parent, children in _by_parent(module, found):
        columns = {n: _features(child) for n, child, style in children if style == Style("column")}
        fused = {n: _features(child) // 3 for n, child, style in children if style == Style("column", chunks=3)}
        if not columns and not fused:
            continue
        try:
            heads = find_heads(parent, columns or fused, mesh.size())
        except ValueError as error:
            raise ValueError(f"{next(iter(columns or fused)).rpartition('.')[0]}: {error}") from None
        if heads is not None:
            replicas |= {name: heads.replicas(features) for name, features in columns.items()}
            heads.localise(parent)
    return replicas


def _features(linear: nn.Module) -> int:
    """Output features, of a Conv1D too."""
    features: int = getattr(linear, "out_features", None) or linear.get_parameter("weight").shape[-1]
    return features


def _by_parent(module: nn.Module, found: Iterable[Match]) -> Iterable[tuple[nn.Module, list[Match]]]:
    groups: dict[str, list[Match]] = defaultdict(list)
    for match in found:
        groups[match[0].rpartition(".")[0]].append(match)
    return [(module.get_submodule(name), children) for name, children in groups.items()]


def _make_region(parent: nn.Module, children: Iterable[nn.Module], mesh: DeviceMesh) -> None:
    linears = [child for child in children if isinstance(child, ParallelLinear)]
    columns = [child for child in linears if isinstance(child, ColumnParallelLinear)]
    if len(columns) > 1 or any(not column.gather_output for column in columns):
        # a single layer overlaps the reduction with its weight gradient
        region = Region(mesh, shares_input=len(columns) > 1)
        region.attach(parent)
        for linear in linears:
            linear.region = region


def _owners(module: nn.Module) -> list[tuple[str, nn.Module, str, nn.Parameter]]:
    """Every place that holds a parameter: the module's name, the module, the parameter's name and the parameter."""
    return [
        (prefix, child, name, parameter)
        for prefix, child in module.named_modules()
        for name, parameter in child._parameters.items()
        if parameter is not None
    ]


def _keep_shared(module: nn.Module, before: Iterable[tuple[str, nn.Module, str, nn.Parameter]], swap: Swap) -> None:
    """Give the shard to other holders of a parameter that was split.

    Only a module that holds it for its child's sake can go on with a shard; one that computes with it would be wrong.
    """
    for prefix, holder, name, full in before:
        if id(full) not in swap.swapped or holder._parameters[name] is not full:
            continue
        shard = swap.swapped[id(full)][1]
        if not any(child._parameters.get(name) is shard for child in holder.children()):
            raise ValueError(
                f"{prefix}.{name} is shared with a parameter that the plan splits; add {prefix} to the plan"
            )
        holder._parameters[name] = shard
