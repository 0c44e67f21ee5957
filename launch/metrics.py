"""What each step measured: one line of `metrics.jsonl`, and TensorBoard's curves of the same numbers."""

import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

FILE = "metrics.jsonl"
EVALUATIONS = "evaluations.jsonl"


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """The numbers of one optimiser step; None where one was not measured.

    Losses are nats per token. `tokens_per_second` is of the whole job, `tflops` and `mfu` are per device,
    `memory_bytes` is of the rank that holds most, `bubble` the share of the step that pipeline ranks wait.
    `grad_norms` are those of each stage and kind of layer; `skipped` is whether a gradient was not finite, so that the
    weights were left as they were; `loss_scale` is the factor of the loss in fp16.
    """

    step: int
    loss: float | None = None
    grad_norm: float | None = None
    grad_norms: Mapping[str, float] | None = None
    learning_rate: float | None = None
    skipped: bool | None = None
    loss_scale: float | None = None
    step_seconds: float | None = None
    tokens_per_second: float | None = None
    tflops: float | None = None
    mfu: float | None = None
    memory_bytes: int | None = None
    bubble: float | None = None
    held_out_loss: float | None = None
    bits_per_byte: float | None = None


class MetricsWriter:
    """Writes the steps of a run into its directory; on rank 0 alone.

    A resumed run goes on in the same file: the lines of `first_step` and later are cut off first, so that no step
    stands there twice, and a line that a killed run left unfinished goes too.

    Args:
        directory: of the run.
        first_step: the first that will be written.
        tensorboard: write TensorBoard events too; a failure there is told once and never stops the run.
    """

    def __init__(self, directory: Path, *, first_step: int = 0, tensorboard: bool = True) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._steps, self._evaluations = (_Lines(directory / name, first_step) for name in (FILE, EVALUATIONS))
        self._events = _start_events(directory, first_step) if tensorboard else None

    def write(self, metrics: StepMetrics) -> None:
        """Write one step, at once: a line that was written outlives a killed process.

        A step with a held-out loss stands in the evaluations too; what was evaluated before any step stands only there.
        """
        line = json.dumps(_record(metrics), allow_nan=False) + "\n"
        if metrics.step > 0:
            self._steps.write(line)
        if metrics.held_out_loss is not None:
            self._evaluations.write(line)
        if self._events is not None:
            self._events = _write_events(self._events, metrics)

    def close(self) -> None:
        """Write out and close all files."""
        self._steps.close()
        self._evaluations.close()
        if self._events is not None:
            _without_failing(self._events.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def read_metrics(directory: Path) -> list[StepMetrics]:
    """The steps of a run so far, in order, after what was evaluated before; an unfinished last line is left out."""
    before = [record for record in _records(directory / EVALUATIONS) if record["step"] == 0]
    return [StepMetrics(**record) for record in [*before, *_records(directory / FILE)]]


def _record(metrics: StepMetrics) -> dict[str, Any]:
    """Contract keys always; held-out ones in the steps that have them. JSON has no NaN: what is not finite is null."""
    values = asdict(metrics)
    only_if_measured = ("held_out_loss", "bits_per_byte", "grad_norms", "skipped", "loss_scale")
    kept = {key: value for key, value in values.items() if value is not None or key not in only_if_measured}
    return {key: _finite(value) for key, value in kept.items()}


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(part) for key, part in value.items()}
    return value if value is None or math.isfinite(value) else None


def _records(file: Path) -> Iterator[dict[str, Any]]:
    if not file.exists():
        return
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            return


class _Lines:
    """A file without its lines from `first_step` on, to which lines are added at once.

    What a full disk does not take is kept, told once, and written as soon as it does: training goes on.
    """

    def __init__(self, file: Path, first_step: int) -> None:
        _keep_steps_before(file, first_step)
        self._name, self._file = file, file.open("ab", buffering=0)
        self._left = b""
        self._told = False

    def write(self, line: str) -> None:
        self._left += line.encode()
        try:
            while self._left:
                self._left = self._left[self._file.write(self._left) :]
        except OSError as error:
            if not self._told:
                _say(f"{self._name} cannot be written ({error.strerror}); its lines are kept until it can be")
            self._told = True

    def close(self) -> None:
        self.write("")
        self._file.close()


def _keep_steps_before(file: Path, first_step: int) -> None:
    if not file.exists():
        return
    lines = [json.dumps(record) + "\n" for record in _records(file) if record["step"] < first_step]
    work = file.with_suffix(".jsonl.part")
    with work.open("w", encoding="utf-8") as opened:
        opened.writelines(lines)
        opened.flush()
        os.fsync(opened.fileno())
    work.replace(file)


# ---------------------------------------------------------------- TensorBoard

_TAGS = {
    "loss": "loss/train",
    "held_out_loss": "loss/held_out",
    "bits_per_byte": "loss/held_out_bits_per_byte",
    "grad_norm": "optimizer/grad_norm",
    "learning_rate": "optimizer/learning_rate",
    "loss_scale": "optimizer/loss_scale",
    "step_seconds": "speed/step_seconds",
    "tokens_per_second": "speed/tokens_per_second",
    "tflops": "speed/tflops",
    "mfu": "speed/mfu",
    "bubble": "speed/bubble",
    "memory_bytes": "memory/bytes",
}


def _start_events(directory: Path, first_step: int) -> "SummaryWriter | None":
    try:
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and only rank 0 needs it

        return SummaryWriter(str(directory / "tensorboard"), purge_step=first_step)  # type: ignore[no-untyped-call]
    except Exception as error:
        _tell(error)
        return None


def _write_events(events: "SummaryWriter", metrics: StepMetrics) -> "SummaryWriter | None":
    try:
        for key, tag in _TAGS.items():
            value = getattr(metrics, key)
            if value is not None:
                events.add_scalar(tag, value, metrics.step)  # type: ignore[no-untyped-call]
        for name, norm in (metrics.grad_norms or {}).items():
            events.add_scalar(f"grad_norm/{name}", norm, metrics.step)  # type: ignore[no-untyped-call]
        return events
    except Exception as error:
        _tell(error)
        return None


def _without_failing(close: Any) -> None:
    try:
        close()
    except Exception as error:
        _tell(error)


def _tell(error: Exception) -> None:
    _say(f"TensorBoard events are not written: {error or type(error).__name__}")


def _say(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)
