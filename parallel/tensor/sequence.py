"""Sequence parallelism in a model that somebody else wrote (Korthikanti et al. 2022, §4.2.2).

Between the first and the last block each rank holds `sequence / tensor` tokens: norms, dropout and residual additions
work on those. Attention and MLP gather the sequence before their column layers and scatter it in their row layers.
"""

from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from weft.parallel.collectives import gather, split
from weft.parallel.sharding import replicated
from weft.parallel.tensor.linear import ColumnParallelLinear, RowParallelLinear
from weft.parallel.tensor.plans import Style
from weft.parallel.tensor.region import Arguments, Region, replace_first
from weft.parallel.tensor.split_random import SplitRandom, drops
from weft.parallel.tensor.swap import Swap

_SEQUENCE_DIM = 1


def split_sequence(module: nn.Module, swap: Swap) -> None:
    """Let the layers of `module`, whose linear layers are split already, hold a part of the sequence each.

    Raises:
        ValueError: the split layers do not stand in one list of blocks.
    """
    stack, blocks = _find_blocks(module)
    regions = []
    for index, block in blocks.items():
        for name, parent in block.named_modules(prefix=f"{stack}.{index}"):
            columns = [child for child in parent.children() if isinstance(child, ColumnParallelLinear)]
            if parent is block:
                for column in columns:
                    column.sequence_parallel = True
            elif columns:
                region = Region(swap.mesh, gathers_sequence=True)
                region.attach(parent)
                regions.append(name)
                for column in columns:
                    column.region = region
            _scatter_rows(parent, swap.mesh)
    _sum_whole_gradients(module, stack, regions, swap)
    for block in blocks.values():
        _BlockRandom(swap.mesh).attach(block)
    ends = _Ends(swap.mesh)
    first, *_, last = (*blocks.values(), *blocks.values())
    first.register_forward_pre_hook(ends.begin, with_kwargs=True)
    last.register_forward_hook(ends.end)


class _BlockRandom:
    """Lets each rank drop in its own way inside a block, whose activations are all split, by token or by feature."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self._random = SplitRandom(mesh)

    def attach(self, block: nn.Module) -> None:
        block.register_forward_pre_hook(self._enter)
        block.register_forward_hook(self._leave, always_call=True)

    def _enter(self, block: nn.Module, arguments: Any) -> None:
        if block.training and any(map(drops, block.modules())):
            self._random.enter(next(block.parameters()).device)

    def _leave(self, block: nn.Module, arguments: Any, result: Any) -> None:
        self._random.leave()


class _Ends:
    """The hidden state is scattered before the first block and gathered after the last."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self.mesh = mesh

    def begin(self, block: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Arguments:
        return replace_first(arguments, keywords, lambda x: split(x, self.mesh, _SEQUENCE_DIM))

    def end(self, block: nn.Module, arguments: Any, result: Any) -> Any:
        if isinstance(result, tuple):
            return (gather(result[0], self.mesh, _SEQUENCE_DIM), *result[1:])
        return gather(result, self.mesh, _SEQUENCE_DIM)


def _find_blocks(module: nn.Module) -> tuple[str, dict[str, nn.Module]]:
    """The one list whose members hold split layers, and those members."""
    lists = {
        name: {
            index: block
            for index, block in child.named_children()
            if any(isinstance(part, RowParallelLinear) for part in block.modules())
        }
        for name, child in module.named_modules()
        if isinstance(child, nn.ModuleList)
    }
    found = {name: blocks for name, blocks in lists.items() if blocks}
    outermost = [name for name in found if not any(name.startswith(f"{other}.") for other in found)]
    if len(outermost) != 1:
        raise ValueError(
            f"sequence_parallel needs one nn.ModuleList of blocks with split layers, but there are {len(outermost)}: "
            f"{outermost}; leave it off for this model"
        )
    return outermost[0], found[outermost[0]]


def _scatter_rows(parent: nn.Module, mesh: DeviceMesh) -> None:
    for row in parent.children():
        if isinstance(row, RowParallelLinear):
            row.sequence_parallel = True
            if row.bias is not None:
                row.shardings["bias"] = replicated(mesh, row.bias.shape, partial_gradient=True)


def _sum_whole_gradients(module: nn.Module, stack: str, regions: list[str], swap: Swap) -> None:
    """Parameters outside the regions see a part of the tokens on each rank: their gradients are summed."""
    for name, child in list(module.named_modules()):
        inside = any(f"{name}.".startswith(f"{region}.") for region in regions)
        held = next(child.parameters(recurse=False), None) is not None
        if name.startswith(f"{stack}.") and held and not inside and not getattr(child, "shardings", None):
            swap(name, child, Style("partial_gradient"))
