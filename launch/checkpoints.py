"""The checkpoints of a run: what is saved, under which name, which are kept, and where a run goes on from."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from weft.launch.engine import Engine
from weft.launch.errors import UserError
from weft.launch.sections import CheckpointSettings
from weft.parallel.checkpoint import MANIFEST, CheckpointError, Entry, load_checkpoint, read_metadata, save_checkpoint
from weft.parallel.sharding import sharded_parameters

MOMENTS = ("exp_avg", "exp_avg_sq")


class Checkpoints:
    """Saves and restores the engine of a run.

    Weights and AdamW's moments are stored by parameter name, so that a run may go on in another layout.
    """

    def __init__(self, settings: CheckpointSettings, engine: Engine) -> None:
        self.settings, self.engine = settings, engine
        self.directory = Path(settings.directory)

    def save(self, step: int, metadata: dict[str, Any]) -> Path:
        """Save after `step` steps, then drop all but the newest `keep`. A collective call of all ranks.

        Raises:
            UserError: the checkpoint cannot be written.
        """
        path = self.directory / f"step-{step:08d}"
        try:
            save_checkpoint(path, self._entries(), metadata | {"step": step}, self.engine.mesh)
        except OSError as error:
            raise UserError(
                f"checkpoint {path} cannot be written: {error.strerror}; free space or set checkpoint.directory"
            ) from None
        if dist.get_rank() == 0:
            for old in find_checkpoints(self.directory)[: -self.settings.keep]:
                shutil.rmtree(old, ignore_errors=True)
        return path

    def restore(self, path: Path) -> dict[str, Any]:
        """Load weights and optimiser from a checkpoint; returns its metadata, with `step`.

        Raises:
            UserError: it is damaged, or of another model.
        """
        try:
            metadata = read_metadata(path)
            self._make_optimizer_state(metadata["step"])
            load_checkpoint(path, list(self._entries()))
        except CheckpointError as error:
            raise UserError(f"{error}.") from None
        return metadata

    def _entries(self) -> Iterator[Entry]:
        state = self.engine.optimizer.state
        for stage in self.engine.stages:
            common = {id(parameter): key for key, parameter in stage.shared.items()}
            for name, parameter, sharding in sharded_parameters(stage.module):
                name = common.get(id(parameter), name)
                copied = id(parameter) in common and stage.index > 0
                yield Entry(f"model/{name}", parameter, sharding, copied)
                for moment in MOMENTS:
                    yield Entry(f"{moment}/{name}", state[parameter][moment], sharding, copied)

    def _make_optimizer_state(self, step: int) -> None:
        for parameter in self.engine.parameters:
            moments = {moment: torch.zeros_like(parameter) for moment in MOMENTS}
            count = torch.tensor(float(step), dtype=torch.float32, device=parameter.device)
            self.engine.optimizer.state[parameter] = {"step": count} | moments


def find_checkpoints(directory: Path) -> list[Path]:
    """The finished checkpoints of a directory, oldest first."""
    return sorted(path.parent for path in directory.glob(f"step-*/{MANIFEST}"))


def checkpoint_to_resume(settings: CheckpointSettings) -> Path | None:
    """The checkpoint that the settings ask to go on from; None starts anew.

    Raises:
        UserError: the path that `checkpoint.resume` names is no checkpoint.
    """
    if settings.resume == "never":
        return None
    if settings.resume == "auto":
        return next(reversed(find_checkpoints(Path(settings.directory))), None)
    path = Path(settings.resume)
    if not (path / MANIFEST).is_file():
        raise UserError(f"checkpoint.resume is {path}, which holds no {MANIFEST}; give a checkpoint, auto or never.")
    return path
