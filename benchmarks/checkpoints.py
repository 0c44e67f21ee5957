"""What a save costs the steps around it, and how many bytes a load in another layout reads.

    python benchmarks/checkpoints.py                     # 1 GB of weights and optimiser state
    python benchmarks/checkpoints.py --hidden 256 --steps 4 --rounds 1

A Llama is trained on two ranks (tensor 2) over gloo, each with one thread. A block of steps with one save in it stands
between two without, whose mean it is compared with, by the clock and by the processor, which other work on the machine
disturbs less: weft in the background and at once, and torch's Distributed Checkpoint (its plain file storage) with the
same tensors, in the background and at once. Then the checkpoint is saved by tensor 4 and loaded by tensor 2 × pipeline
2; the bytes read are those that the system counts.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ranks import on_ranks

from weft.launch.engine import Engine
from weft.launch.garbage import without_old_objects
from weft.launch.saved_state import EngineState
from weft.launch.settings import build_settings
from weft.model.config import model_config
from weft.parallel import build_mesh
from weft.parallel.checkpoint import KeptMemory, Save, load_checkpoint, save_checkpoint

SEQUENCE, ROWS = 64, 4


def build(hidden: int, *, tensor: int, pipeline: int) -> Engine:
    """Eight layers; hidden 896 makes 87 million parameters, 1 GB with both moments."""
    model = {
        "model_type": "llama",
        "vocab_size": 4096,
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_hidden_layers": 8 if hidden > 800 else 4,
        "num_attention_heads": 16,
        "max_position_embeddings": SEQUENCE,
    }
    settings = build_settings(
        {
            "name": "checkpoints",
            "model": model,
            "parallel": {"pipeline": pipeline, "tensor": tensor, "data": 1},
            "batch": {"global_size": ROWS, "micro_size": 2},
            "corpus": {"sequence_length": SEQUENCE},
        }
    )
    return Engine(model_config(model), settings, build_mesh(pipeline=pipeline, tensor=tensor))


def train(engine: Engine, steps: int, after: Callable[[], None] | None = None) -> float:
    """Seconds of so many steps; `after` each of them, as a training loop does."""
    tokens = torch.randint(0, 4096, (ROWS, SEQUENCE + 1), generator=torch.Generator().manual_seed(0))
    dist.barrier()
    start = time.perf_counter()
    for step in range(steps):
        engine.step(step, tokens[:, :-1], tokens[:, 1:])
        if after is not None:
            after()
    dist.barrier()
    return time.perf_counter() - start


class Blocks:
    """Blocks of steps, one kind of save at the start of each."""

    def __init__(self, engine: Engine, steps: int, folder: Path) -> None:
        self.engine, self.steps, self.folder = engine, steps, folder
        self.state, self.memory = EngineState(engine), KeptMemory()
        self.group = dist.new_group()  # Distributed Checkpoint communicates in its thread, while training does
        self.kinds: dict[str, Callable[[], float]] = {
            "weft, in the background": self._background,
            "weft, at once": lambda: self._at_once(self._save),
            "Distributed Checkpoint, in the background": self._dcp_background,
            "Distributed Checkpoint, at once": lambda: self._at_once(self._dcp_save),
        }

    def _background(self) -> float:
        start = time.perf_counter()
        save = Save(self.folder / "weft", self.state.entries(), {}, self.engine.mesh, memory=self.memory)
        begun = time.perf_counter() - start
        left = [save]

        def look() -> None:
            if left and not save.writing_anywhere():
                left.pop().finish()

        seconds = begun + train(self.engine, self.steps, look)
        assert not left, "the block ended before the write; take more --steps"
        return seconds

    def _at_once(self, save: Callable[[], None]) -> float:
        dist.barrier()
        start = time.perf_counter()
        save()
        return time.perf_counter() - start + train(self.engine, self.steps)

    def _save(self) -> None:
        save_checkpoint(self.folder / "weft", self.state.entries(), {}, self.engine.mesh)

    def _tensors(self) -> dict[str, Any]:
        """What this rank holds, under names of its own, so that each rank writes its part."""
        return {f"{entry.name}@{dist.get_rank()}": entry.tensor.detach() for entry in self.state.entries()}

    def _dcp_save(self) -> None:
        dcp.save(self._tensors(), checkpoint_id=self.folder / "dcp")

    def _dcp_background(self) -> float:
        start = time.perf_counter()
        future = dcp.async_save(self._tensors(), checkpoint_id=self.folder / "dcp", process_group=self.group)
        seconds = time.perf_counter() - start + train(self.engine, self.steps)
        start = time.perf_counter()
        future.result()  # type: ignore[union-attr]
        return seconds + time.perf_counter() - start


class Times(NamedTuple):
    """Seconds of a block: by the clock, and of the processor for this rank and its threads, whatever else runs."""

    clock: float
    processor: float


class Comparison(NamedTuple):
    """A block with a save, and the mean of the ones before and after it without."""

    saving: Times
    plain: Times


def time_saves(hidden: int, steps: int, rounds: int, folder: str) -> tuple[dict[str, list[Comparison]], int]:
    """The times of the blocks of each kind, one a round, and the bytes of the checkpoint."""
    torch.set_num_threads(1)
    engine = build(hidden, tensor=2, pipeline=1)
    train(engine, 2)
    blocks = Blocks(engine, steps, Path(folder))
    found: dict[str, list[Comparison]] = {kind: [] for kind in blocks.kinds}
    with without_old_objects():  # as in training
        before = time_block(lambda: train(engine, steps))
        for kind, run in list(blocks.kinds.items()) * rounds:
            saving = time_block(run)
            shutil.rmtree(folder, ignore_errors=True)
            after = time_block(lambda: train(engine, steps))
            mean = Times(*(statistics.mean(pair) for pair in zip(before, after, strict=True)))
            found[kind].append(Comparison(saving, mean))
            before = after
    own = sum(entry.tensor.numel() * entry.tensor.element_size() for entry in blocks.state.entries())
    dist.destroy_process_group()
    return found, 2 * own


def time_block(run: Callable[[], float]) -> Times:
    dist.barrier()
    start = time.process_time()
    clock = run()
    return Times(clock, time.process_time() - start)


def save_by_tensor_4(hidden: int, folder: str) -> None:
    torch.set_num_threads(1)
    engine = build(hidden, tensor=4, pipeline=1)
    state = EngineState(engine)
    state.prepare({"optimizer_steps": 1})
    save_checkpoint(Path(folder) / "saved", state.entries(), {}, engine.mesh)
    dist.destroy_process_group()


def load_by_tensor_2_pipeline_2(hidden: int, folder: str) -> tuple[int, int]:
    """Bytes that this rank needs, and bytes that it has read."""
    torch.set_num_threads(1)
    state = EngineState(build(hidden, tensor=2, pipeline=2))
    state.prepare({"optimizer_steps": 1})
    entries = list(state.entries())
    needed = sum(box.size * view.element_size() for entry in entries for box, view in entry.blocks())
    before = bytes_read()
    load_checkpoint(Path(folder) / "saved", entries)
    read = bytes_read() - before
    dist.destroy_process_group()
    return needed, read


def bytes_read() -> int:
    """What this process has read so far, by the system's own count."""
    return int(Path("/proc/self/io").read_text().split()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=896)
    parser.add_argument("--steps", type=int, default=16, help="steps of a block")
    parser.add_argument("--rounds", type=int, default=5, help="blocks of each kind")
    parser.add_argument("--only", choices=("saves", "bytes"))
    arguments = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    with tempfile.TemporaryDirectory() as folder:
        if arguments.only != "bytes":
            given = (arguments.hidden, arguments.steps, arguments.rounds, f"{folder}/saves")
            show_saves(*on_ranks(2, time_saves, *given)[0], arguments.steps)
        if arguments.only != "saves":
            on_ranks(4, save_by_tensor_4, arguments.hidden, folder)
            counts = on_ranks(4, load_by_tensor_2_pipeline_2, arguments.hidden, folder).values()
            needed, read = (sum(column) for column in zip(*counts, strict=True))
            print(f"tensor 4 to tensor 2 × pipeline 2: {needed:,} bytes needed, {read:,} read, {read / needed:.4f} ×")


def show_saves(found: dict[str, list[Comparison]], size: int, steps: int) -> None:
    plain = [comparison.plain for comparisons in found.values() for comparison in comparisons]
    clock, processor = (statistics.median(column) for column in zip(*plain, strict=True))
    print(f"{size / 1e9:.2f} GB; {steps} steps without a save take {clock:.2f} s, a rank {processor:.2f} s of its core")
    print(f"median of {len(plain) // len(found)} rounds (least … most)")
    for kind, comparisons in found.items():
        times = [saving.clock / plain.clock - 1 for saving, plain in comparisons]
        cores = [saving.processor - plain.processor for saving, plain in comparisons]
        print(
            f"{kind:<44}{statistics.median(times):+7.1%} ({min(times):+.1%} … {max(times):+.1%}); "
            f"its core {statistics.median(cores):+.2f} s ({min(cores):+.2f} … {max(cores):+.2f})"
        )


if __name__ == "__main__":
    main()
