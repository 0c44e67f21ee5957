"""The checkpoints of a run: what is saved, under which name, which are kept, and where a run goes on from."""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from weft.launch.errors import RunError, UserError
from weft.launch.saved_run import SavedRun, find_checkpoints, is_readable, read_run, step_of
from weft.launch.saved_state import SavedState
from weft.launch.sections import CheckpointSettings
from weft.parallel.checkpoint import (
    MANIFEST,
    CheckpointError,
    KeptMemory,
    OtherModelError,
    Save,
    SaveError,
    load_checkpoint,
)
from weft.parallel.checkpoint.files import remove
from weft.parallel.checkpoint.load import together

_LEFTOVER = re.compile(r"\.step-([0-9]{8,18})(\.old)?\.(part|trash)")


def say_on_rank_0(text: str) -> None:
    """Print a line for the person who watches."""
    if dist.get_rank() == 0:
        print(text, file=sys.stderr, flush=True)


class Checkpoints:
    """Saves and restores what a run trains; at most one save is in flight.

    A save that fails while training goes on is told and leaves the earlier ones; the next is tried when it is due.

    Args:
        state: what is saved.
        say: shows a line to the person who watches; called on every rank.
    """

    def __init__(
        self, settings: CheckpointSettings, state: SavedState, say: Callable[[str], None] = say_on_rank_0
    ) -> None:
        self.settings, self.state, self.say = settings, state, say
        self.directory = Path(settings.directory)
        self._in_flight: Save | None = None
        self._memory = KeptMemory()
        self._damaged: set[Path] = set()
        self._readable: dict[Path, int] = {}  # by when its manifest was written, in nanoseconds

    @property
    def writing(self) -> bool:
        """Whether this rank still writes its part of a save."""
        return self._in_flight is not None and not self._in_flight.written()

    def save(self, step: int, metadata: dict[str, Any], *, last: bool = False) -> Path:
        """Save after `step` steps. A collective call of all ranks.

        Returns when the state is copied, unless this is the `last` save of the process or the settings want it on disk
        first; waits for the save before, if that is still being written.

        Raises:
            RunError: the last save cannot be written.
        """
        if self._in_flight is not None:
            if self._in_flight.writing_anywhere():
                self.say(f"checkpoint {self._in_flight.directory} is still being written; waiting for it")
            self.finish()
        wait = last or not self.settings.asynchronous
        path = self.directory / f"step-{step:08d}"
        known = {"step": step, "counters": self.state.counters()}
        memory = None if wait else self._memory
        self._in_flight = Save(path, self.state.entries(), metadata | known, self.state.mesh, memory=memory)
        if wait:
            self.finish(last=last)
        return path

    def finish(self, *, last: bool = False) -> None:
        """Make the save in flight count, if there is one, and drop those no longer kept. A collective call.

        Raises:
            RunError: it is the last one, and cannot be written.
        """
        save, self._in_flight = self._in_flight, None
        if save is None:
            return
        try:
            save.finish()
        except SaveError as error:
            problem = f"checkpoint {save.directory} cannot be written: {error}"
            if last:
                newest = next(reversed(find_checkpoints(self.directory)), None)
                raise RunError(f"{problem}; free space or set checkpoint.directory; the newest is {newest}.") from None
            self.say(f"{problem}; training goes on without it; free space or set checkpoint.directory")
            return
        if dist.get_rank() == 0:
            self._drop_old(step_of(save.directory))

    def resume(self) -> tuple[Path, SavedRun] | None:
        """Load what the settings ask to go on from: with `auto` the newest checkpoint that is whole; None starts anew.

        A collective call. Those that are damaged are named.

        Raises:
            UserError: it is of another model, or the one that was asked for, or each that there is, is damaged.
        """
        found: list[Any] = [checkpoints_to_resume(self.settings) if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(found, src=0)  # ranks on other machines may see another folder for a moment
        for path in found[0]:
            try:
                return path, self.restore(path)
            except OtherModelError as error:
                raise UserError(f"{error}; choose another checkpoint.directory or checkpoint.resume.") from None
            except CheckpointError as error:
                if self.settings.resume != "auto":
                    raise UserError(f"{error}.") from None
                self.say(f"{error}; trying the one before")
                self._damaged.add(path)
        if found[0]:
            raise UserError(
                f"none of the {len(found[0])} checkpoints in {self.directory} is whole; restore one from a backup, or "
                "start anew with checkpoint.resume=never."
            )
        return None

    def restore(self, path: Path) -> SavedRun:
        """Load a checkpoint; returns what it says of the run. A collective call.

        Raises:
            CheckpointError: it is damaged, or of another model; what is trained may then be filled in part.
        """
        run = together(lambda: read_run(path))
        together(lambda: self._prepare(path, run))
        load_checkpoint(path, self.state.entries())
        self.state.loaded()
        return run

    def _prepare(self, path: Path, run: SavedRun) -> None:
        try:
            self.state.prepare(run.counters)
        except (KeyError, TypeError, ValueError, OverflowError):
            raise CheckpointError(f"{path}: its counters are of another optimiser; choose another") from None

    def _drop_old(self, step: int) -> None:
        """Remove what is not kept: neither among the newest whole ones, nor every so many steps.

        With it goes what is left of saves up to `step`; other ranks may have begun to write a later one.
        """
        found = find_checkpoints(self.directory)
        whole = [path for path in found if path not in self._damaged and self._is_readable(path)]
        every = self.settings.keep_every
        kept = {path for path in whole if every and step_of(path) % every == 0} | set(whole[-self.settings.keep :])
        found_parts = ((path, _LEFTOVER.fullmatch(path.name)) for path in self.directory.iterdir())
        leftovers = [path for path, match in found_parts if match is not None and int(match[1]) <= step]
        for path in [*(path for path in whole if path not in kept), *leftovers]:
            try:
                remove(path)
            except OSError as error:
                self.say(f"{path} cannot be removed ({error.strerror}); it is no longer needed")

    def _is_readable(self, path: Path) -> bool:
        """Whether a checkpoint has a manifest that can be trusted: read once, for one may have thousands of pieces."""
        try:
            written = (path / MANIFEST).stat().st_mtime_ns
        except OSError:  # somebody else has removed it
            return False
        if self._readable.get(path) != written and is_readable(path):
            self._readable[path] = written
        return self._readable.get(path) == written


def checkpoints_to_resume(settings: CheckpointSettings) -> list[Path]:
    """The checkpoints that a run may go on from, the one to try first in front.

    Raises:
        UserError: the path that `checkpoint.resume` names is no checkpoint.
    """
    if settings.resume == "never":
        return []
    if settings.resume == "auto":
        return find_checkpoints(Path(settings.directory))[::-1]
    path = Path(settings.resume)
    if not (path / MANIFEST).is_file():
        raise UserError(f"checkpoint.resume is {path}, which holds no {MANIFEST}; give a checkpoint, auto or never.")
    return [path]
