"""Turning a module that others wrote into its parallel self, in place.

The module stays the same object and becomes an instance of the parallel class: what else refers to it (other parents,
hooks, names) stays right. A subclass of nn.Linear or nn.Embedding that does something around the plain forward, such as
scaling its result, goes on doing it.
"""

from functools import cache
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard

from weft.parallel.collectives import gather
from weft.parallel.sharding import Sharding, replicated, take_shard
from weft.parallel.tensor.divide import check_features
from weft.parallel.tensor.embedding import VocabParallelEmbedding
from weft.parallel.tensor.linear import ColumnParallelLinear, RowParallelLinear
from weft.parallel.tensor.partial import ShardedModule
from weft.parallel.tensor.plans import Style


class ColumnParallelConv1D(ColumnParallelLinear):
    """`ColumnParallelLinear` whose weight is stored transposed, `[in, out]`, as GPT-2's `Conv1D` has it."""

    def matrix(self) -> Tensor:
        return super().matrix().t()


class RowParallelConv1D(RowParallelLinear):
    """`RowParallelLinear` whose weight is stored transposed, `[in, out]`, as GPT-2's `Conv1D` has it."""

    def matrix(self) -> Tensor:
        return super().matrix().t()


class ColumnParallelEmbedding(ShardedModule, nn.Embedding):
    """Columns of the table split over `mesh`: each rank looks up its part of every vector.

    Shapes: tokens `[…]`, result `[…, embedding_dim / tensor]` (`[…, embedding_dim]` with `gather_output`).
    Communication: none (forward all-gather).
    """

    mesh: DeviceMesh
    gather_output: bool

    def forward(self, tokens: Tensor) -> Tensor:
        found = F.embedding(tokens, self.weight, self.padding_idx)
        return gather(found, self.mesh, -1) if self.gather_output else found

    def extra_repr(self) -> str:
        rows, columns = self.shardings["weight"].full_shape
        return f"{rows}, {columns}, local columns={self.weight.shape[1]}"


class PartialGradientModule(ShardedModule):
    """A module of any kind that every rank applies to a part of the features: its gradients are summed over the ranks.

    To be mixed with the module's own class, whose forward then sees the parameters through `used`.
    """

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        parameters = dict(self._parameters)
        self._parameters.update({name: self.used(name) for name in self.shardings})
        try:
            return super().forward(*arguments, **keywords)
        finally:
            self._parameters.update(parameters)

    def extra_repr(self) -> str:
        own = super().extra_repr()
        return f"{own}{', ' if own else ''}gradient summed over {next(iter(self.shardings.values())).mesh.size()} ranks"


class Swap:
    """Swaps modules of one model; parameters that were shared before are shared afterwards."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self.mesh = mesh
        self.swapped: dict[int, tuple[nn.Parameter, nn.Parameter, Sharding]] = {}

    def __call__(self, name: str, module: nn.Module, style: Style, replicas: int = 1) -> None:
        """Make `module` what `style` says.

        Raises:
            ValueError: a module of that kind cannot be split so; its sizes do not divide; or it shares a parameter with
                one that is split otherwise.
        """
        if getattr(module, "shardings", None):
            raise ValueError(f"{name} is split already; call parallelize once")
        try:
            if style.kind == "column":
                self._swap_column(name, module, style, replicas)
            elif style.kind == "row":
                self._swap_row(name, module, style)
            elif style.kind == "embedding":
                self._swap_embedding(name, module)
            elif style.kind == "embedding_column":
                self._swap_embedding_column(name, module, style)
            elif style.kind == "partial_gradient":
                self._swap_partial(name, module)
        except ValueError as error:
            raise error if name in str(error) else ValueError(f"{name}: {error}") from None

    def _swap_column(self, name: str, module: nn.Module, style: Style, replicas: int) -> None:
        transposed, inputs, outputs = _linear_sizes(name, module)
        chunks = style.chunks if isinstance(style.chunks, tuple) else _equal_chunks(outputs, style.chunks)
        if sum(chunks or (outputs,)) != outputs:
            raise ValueError(f"chunks {list(chunks)} add up to {sum(chunks)}, not to {outputs} output features")
        if style.whole_outside and chunks:
            raise ValueError("gathering the output would mix up fused projections; gather each by itself")
        for size in () if style.whole_outside else chunks or (outputs,):
            check_features("out_features", size, self.mesh.size() // replicas)
        shared: dict[str, Any] = {"chunks": chunks, "replicas": replicas, "partial_gradient": replicas > 1}
        shape = (inputs, outputs) if transposed else (outputs, inputs)
        weight = Sharding(Shard(1 if transposed else 0), self.mesh, shape, **shared)
        shardings = {"weight": weight, "bias": Sharding(Shard(0), self.mesh, (outputs,), **shared)}
        self._become(name, module, ColumnParallelConv1D if transposed else ColumnParallelLinear, shardings)
        _set_sizes(module, inputs, outputs, transposed=transposed)
        module.gather_output, module.sequence_parallel = style.whole_outside, False  # type: ignore[assignment]

    def _swap_row(self, name: str, module: nn.Module, style: Style) -> None:
        transposed, inputs, outputs = _linear_sizes(name, module)
        check_features("in_features", inputs, self.mesh.size())
        shape = (inputs, outputs) if transposed else (outputs, inputs)
        weight = Sharding(Shard(0 if transposed else 1), self.mesh, shape)
        shardings = {"weight": weight, "bias": replicated(self.mesh, (outputs,))}
        self._become(name, module, RowParallelConv1D if transposed else RowParallelLinear, shardings)
        _set_sizes(module, inputs, outputs, transposed=transposed)
        module.input_is_parallel, module.sequence_parallel = not style.whole_outside, False  # type: ignore[assignment]

    def _swap_embedding(self, name: str, module: nn.Module) -> None:
        embedding = _checked_embedding(name, module)
        rows, columns = embedding.weight.shape
        sharding = Sharding(Shard(0), self.mesh, (rows, columns))
        self._become(name, embedding, VocabParallelEmbedding, {"weight": sharding})
        embedding.full_num_embeddings = rows  # type: ignore[assignment]
        embedding.num_embeddings = sharding.local_shape[0]
        embedding.padding_idx = _local_row(embedding.padding_idx, sharding)
        embedding.mesh, embedding.sequence_parallel = self.mesh, False  # type: ignore[assignment]

    def _swap_embedding_column(self, name: str, module: nn.Module, style: Style) -> None:
        embedding = _checked_embedding(name, module)
        rows, columns = embedding.weight.shape
        check_features("embedding_dim", columns, self.mesh.size())
        sharding = Sharding(Shard(1), self.mesh, (rows, columns))
        self._become(name, embedding, ColumnParallelEmbedding, {"weight": sharding})
        embedding.embedding_dim = sharding.local_shape[1]
        embedding.mesh, embedding.gather_output = self.mesh, style.whole_outside  # type: ignore[assignment]

    def _swap_partial(self, name: str, module: nn.Module) -> None:
        held = dict(module.named_parameters(recurse=False))
        shardings = {key: replicated(self.mesh, p.shape, partial_gradient=True) for key, p in held.items()}
        self._become(name, module, PartialGradientModule, shardings)

    def _become(self, name: str, module: nn.Module, parallel: type[nn.Module], shardings: dict[str, Sharding]) -> None:
        """Give `module` the class and its shards of the parameters."""
        held = {key: s for key, s in shardings.items() if module._parameters.get(key) is not None}
        for key, sharding in held.items():
            module._parameters[key] = self._shard(f"{name}.{key}", module.get_parameter(key), sharding)
        module.shardings = held  # type: ignore[assignment]
        module.__class__ = _mixed(type(module), parallel)  # type: ignore[arg-type]

    def _shard(self, name: str, full: nn.Parameter, sharding: Sharding) -> nn.Parameter:
        if id(full) in self.swapped:
            _, shard, other = self.swapped[id(full)]
            if other != sharding:
                raise ValueError(f"{name} is shared with a parameter that is split otherwise; give both the same style")
            return shard
        shard = nn.Parameter(take_shard(full.detach(), sharding), requires_grad=full.requires_grad)
        self.swapped[id(full)] = full, shard, sharding
        return shard


@cache
def _mixed(original: type[nn.Module], parallel: type[nn.Module]) -> type[nn.Module]:
    """`parallel`, with what a subclass does around the plain forward."""
    if original in (nn.Linear, nn.Embedding) or original.__name__ == "Conv1D":
        return parallel
    if parallel is PartialGradientModule:
        return type(original.__name__, (parallel, original), {})
    return type(original.__name__, (original, parallel), {})


def _linear_sizes(name: str, module: nn.Module) -> tuple[bool, int, int]:
    """Whether the weight is stored transposed, input and output features."""
    if isinstance(module, nn.Linear):
        return False, module.in_features, module.out_features
    if type(module).__name__ == "Conv1D" and isinstance(weight := getattr(module, "weight", None), Tensor):
        return True, weight.shape[0], weight.shape[1]
    raise ValueError(f"{name} is a {type(module).__name__}; only nn.Linear and Conv1D can be a column or row")


def _checked_embedding(name: str, module: nn.Module) -> nn.Embedding:
    if not isinstance(module, nn.Embedding):
        raise ValueError(f"{name} is a {type(module).__name__}, not an nn.Embedding; give it another style")
    if module.max_norm is not None or module.sparse or module.scale_grad_by_freq:
        raise ValueError(f"{name} uses max_norm, sparse or scale_grad_by_freq, which are not split; leave it out")
    return module


def _local_row(row: int | None, sharding: Sharding) -> int | None:
    """Where this rank holds the row that gets no gradient; None when it does not hold it."""
    if row is None:
        return None
    held = (
        part.local_start + row - part.full_start
        for part in sharding.slices()
        if 0 <= row - part.full_start < part.length
    )
    return next(held, None)


def _equal_chunks(outputs: int, count: int) -> tuple[int, ...]:
    if outputs % count:
        raise ValueError(f"{outputs} output features are not {count} equal projections")
    return (outputs // count,) * count if count > 1 else ()


def _set_sizes(module: nn.Module, inputs: int, outputs: int, *, transposed: bool) -> None:
    shape = module.get_parameter("weight").shape
    module.full_in_features, module.full_out_features = inputs, outputs  # type: ignore[assignment]
    module.in_features, module.out_features = shape if transposed else reversed(shape)  # type: ignore[assignment]
    module.mesh = module.shardings["weight"].mesh  # type: ignore[assignment, index, union-attr]
