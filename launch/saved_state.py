"""What a checkpoint holds of a training engine: tensors by name in any layout, and counters."""

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from weft.launch.engine import Engine
from weft.parallel.checkpoint import Entry, FlatPart
from weft.parallel.data.replicas import Piece


class SavedState(Protocol):
    """What a checkpoint asks of whatever is trained.

    Names are `KIND/PARAMETER`, the same in every layout and precision; `model/NAME` is a weight's most precise copy.
    """

    mesh: DeviceMesh

    def entries(self) -> Iterator[Entry]:
        """The tensors of this rank."""
        ...

    def counters(self) -> dict[str, Any]:
        """JSON values beside the tensors, such as the optimiser's steps."""
        ...

    def prepare(self, counters: Mapping[str, Any]) -> None:
        """Take the counters, and make the tensors of `entries` exist, to be filled."""
        ...

    def loaded(self) -> None:
        """Go on from the tensors, which are filled now."""
        ...


class EngineState:
    """Weights, optimiser states, averages and loss scale of an engine, however precise and divided they are."""

    def __init__(self, engine: Engine) -> None:
        self.mesh = engine.mesh
        updates = engine.updates
        self._replicas, self._loss_scale, self._average = updates.replicas, updates.loss_scale, updates.average

    def entries(self) -> Iterator[Entry]:
        for piece in self._replicas.pieces:
            for kind, tensor in [("model", piece.weight), *self._replicas.states(piece).items()]:
                yield self._entry(f"{kind}/{piece.name}", tensor, piece)
            if self._average is not None:
                yield self._entry(f"average/{piece.name}", self._average.of(piece), piece)

    def counters(self) -> dict[str, Any]:
        scale = self._loss_scale
        return {
            "optimizer_steps": self._replicas.optimizer_steps,
            "loss_scale": {"scale": scale.scale, "good_steps": scale.good_steps},
        }

    def prepare(self, counters: Mapping[str, Any]) -> None:
        self._replicas.make_states(counters["optimizer_steps"])
        if self._loss_scale.patience:
            self._loss_scale.scale = counters["loss_scale"]["scale"]
            self._loss_scale.good_steps = counters["loss_scale"]["good_steps"]

    def loaded(self) -> None:
        """Compute from now on with the weights that were loaded."""
        self._replicas.refresh()

    def _entry(self, name: str, tensor: Tensor, piece: Piece) -> Entry:
        if not self._replicas.split_over:
            whole = tensor.shape != piece.weight.shape  # Adafactor's, for which no matrix is split
            return Entry(name, tensor, None if whole else piece.sharding, piece.copied)
        part = FlatPart(self._replicas.shape(piece), piece.start)
        return Entry(name, tensor.flatten(), piece.sharding, piece.copied, part)
