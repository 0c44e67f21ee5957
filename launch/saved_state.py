"""What a checkpoint holds of a training engine: tensors by name in any layout, and counters."""

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from torch.distributed.device_mesh import DeviceMesh

from weft.launch.engine import Engine
from weft.parallel.checkpoint import Entry
from weft.parallel.sharding import sharded_parameters

MOMENTS = ("exp_avg", "exp_avg_sq")


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
    """Weights and AdamW's moments of an engine."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.mesh = engine, engine.mesh

    def entries(self) -> Iterator[Entry]:
        state = self.engine.optimizer.state
        for stage in self.engine.stages:
            common = {id(parameter): key for key, parameter in stage.shared.items()}
            for name, parameter, sharding in sharded_parameters(stage.module):
                name = common.get(id(parameter), name)
                copied = id(parameter) in common and name in stage.module.copies  # type: ignore[operator]
                yield Entry(f"model/{name}", parameter, sharding, copied)
                for moment in MOMENTS:
                    yield Entry(f"{moment}/{name}", state[parameter][moment], sharding, copied)

    def counters(self) -> dict[str, Any]:
        steps = {int(state["step"]) for state in self.engine.optimizer.state.values()}
        return {"optimizer_steps": max(steps, default=0)}

    def prepare(self, counters: Mapping[str, Any]) -> None:
        for parameter in self.engine.parameters:
            moments = {moment: torch.zeros_like(parameter) for moment in MOMENTS}
            count = torch.tensor(float(counters["optimizer_steps"]), dtype=torch.float32, device=parameter.device)
            self.engine.optimizer.state[parameter] = {"step": count} | moments

    def loaded(self) -> None:
        """Nothing is derived from the tensors."""
