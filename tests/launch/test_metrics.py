"""Metrics: full precision, no step twice, TensorBoard that cannot stop a run; the arithmetic of FLOPs."""

import errno
import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from weft.launch import flops
from weft.launch.metrics import EVALUATIONS, FILE, MetricsWriter, StepMetrics, read_metrics

CONTRACT = {
    *("step", "loss", "grad_norm", "learning_rate", "tokens_per_second", "tflops", "mfu", "memory_bytes", "bubble"),
}


def write_steps(directory: Path, steps: range, loss: float = 1.0) -> None:
    with MetricsWriter(directory, first_step=steps.start, tensorboard=False) as writer:
        for step in steps:
            writer.write(StepMetrics(step=step, loss=loss))


def test_each_step_is_one_object_with_the_keys_promised(tmp_path: Path) -> None:
    write_steps(tmp_path, range(1, 4))
    records = [json.loads(line) for line in (tmp_path / FILE).read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3]
    assert all(set(record) >= CONTRACT for record in records)


def test_losses_keep_every_bit(tmp_path: Path) -> None:
    losses = [math.pi, 1 / 3, 7.6246189861593985, 5e-324, 1.7976931348623157e308]
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        for step, loss in enumerate(losses):
            writer.write(StepMetrics(step=step, loss=loss, held_out_loss=loss))
    assert [metrics.loss for metrics in read_metrics(tmp_path)] == losses
    assert [metrics.held_out_loss for metrics in read_metrics(tmp_path)] == losses


def test_what_is_not_finite_is_null_in_strict_json(tmp_path: Path) -> None:
    write_steps(tmp_path, range(1, 2), loss=float("nan"))
    text = (tmp_path / FILE).read_text()
    assert json.loads(text, parse_constant=pytest.fail)["loss"] is None


def test_a_step_is_in_the_file_before_the_next_begins(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write(StepMetrics(step=1))
        assert [metrics.step for metrics in read_metrics(tmp_path)] == [1]


def test_a_full_disk_is_told_once_and_leaves_out_no_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    room = [1000]

    class Disk(io.FileIO):
        def write(self, data: Any) -> int:
            if not room[0]:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            count = super().write(data[: room[0]]) or 0
            room[0] -= count
            return count

    monkeypatch.setattr(Path, "open", lambda self, mode, **_: Disk(self, mode))
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        for step in range(1, 9):
            writer.write(StepMetrics(step=step))
        assert len(read_metrics(tmp_path)) < 8
        room[0] = 10_000
    assert [metrics.step for metrics in read_metrics(tmp_path)] == list(range(1, 9))
    assert capfd.readouterr().err == (
        f"{tmp_path / FILE} cannot be written (No space left on device); its lines are kept until it can be\n"
    )


def test_a_resumed_run_leaves_each_step_once(tmp_path: Path) -> None:
    write_steps(tmp_path, range(1, 11), loss=1.0)
    with (tmp_path / FILE).open("a") as file:
        file.write('{"step": 11, "lo')
    write_steps(tmp_path, range(7, 13), loss=2.0)
    metrics = read_metrics(tmp_path)
    assert [entry.step for entry in metrics] == list(range(1, 13))
    assert [entry.loss for entry in metrics] == [1.0] * 6 + [2.0] * 6
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [EVALUATIONS, FILE]


def test_tensorboard_holds_the_same_numbers(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with MetricsWriter(tmp_path) as writer:
        for step in range(3):
            writer.write(StepMetrics(step=step, loss=step + 0.5))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss/train")] == [(0, 0.5), (1, 1.5), (2, 2.5)]


def test_tensorboard_that_fails_is_told_once_and_stops_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tensorboard").write_text("a file where the folder should be")
    with MetricsWriter(tmp_path) as writer:
        writer.write(StepMetrics(step=1))
        writer.write(StepMetrics(step=2))
    assert [metrics.step for metrics in read_metrics(tmp_path)] == [1, 2]
    assert capsys.readouterr().err.count("TensorBoard events are not written") == 1


def test_importing_the_metrics_loads_neither_torch_nor_tensorboard() -> None:
    code = "import sys, weft.launch.metrics, weft.launch.flops, weft.launch.progress\n"
    check = "print([name for name in ('torch', 'tensorboard', 'rich', 'numpy') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code + check], capture_output=True, text=True).stdout == "[]\n"


def test_flops_are_those_of_palm() -> None:
    """PaLM 540B, table of its paper: 118 layers, 48 heads of 256, sequence 2,048; 238.3k tokens/s on 6,144 chips.

    Its appendix B gives 45.7 % model FLOPs utilisation without attention and 46.2 % with it, at 275 TFLOP/s a chip.
    """
    shape = {"parameters": 540_350_000_000, "hidden_size": 48 * 256, "sequence_length": 2048}
    for layers, expected in ((0, 0.457), (118, 0.462)):
        per_token = flops.flops_per_token(layers=layers, **shape)
        rate = flops.model_tflops(tokens_per_second=238_300, flops_per_token=per_token, devices=6144)
        assert flops.utilization(rate, 275.0) == pytest.approx(expected, abs=0.0006)


def test_utilization_needs_a_peak() -> None:
    assert flops.peak_tflops("cpu", "fp32") is None
    assert flops.utilization(0.1, None) is None
    assert flops.peak_tflops("NVIDIA H200", "bf16") == flops.peak_tflops("h100-sxm", "bf16") == 989.4
    assert flops.peak_tflops("a100-80gb", "fp32") == 19.5
    assert flops.peak_tflops("NVIDIA GB200", "bf16") == 2500
    assert flops.peak_tflops("AMD Instinct MI300X", "fp16") == 1307.4
    assert flops.peak_tflops("NVIDIA A100-SXM4-80GB", "fp16") == 312


def test_what_is_evaluated_before_training_is_no_step(tmp_path: Path) -> None:
    """Every line of metrics.jsonl has a loss; the evaluation before the first step is read back before them."""
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write(StepMetrics(step=0, held_out_loss=7.5))
        writer.write(StepMetrics(step=1, loss=7.0))
    assert [json.loads(line)["loss"] for line in (tmp_path / FILE).read_text().splitlines()] == [7.0]
    assert [(entry.step, entry.held_out_loss) for entry in read_metrics(tmp_path)] == [(0, 7.5), (1, None)]
