"""`weft train` as a user runs it: files of a run, the same losses in every layout, stopping, going on, bad input."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

STEPS = 4
SETTINGS: dict[str, Any] = {
    "name": "tiny",
    "model": {
        "model_type": "llama",
        "vocab_size": 320,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32,
    },
    "parallel": {"tensor": 2, "pipeline": 2},
    "batch": {"global_size": 8, "micro_size": 2},
    "train": {"steps": STEPS, "evaluate_every": 2, "evaluate_sequences": 11},
    "corpus": {"path": "text.txt", "sequence_length": 16},
    "checkpoint": {"every": 2},
    "cluster": {"device": "cpu"},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with settings and a corpus."""
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(SETTINGS))
    (tmp_path / "text.txt").write_text("".join(f"{n} times {n} is {n * n}, and that is all.\n" for n in range(400)))
    return tmp_path


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "weft", "train", *arguments]


def environment(folder: Path) -> dict[str, str]:
    return os.environ | {"XDG_CACHE_HOME": str(folder / "cache"), "OMP_NUM_THREADS": "1"}


def train(folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command("tiny.yaml", *overrides),
        cwd=folder,
        env=environment(folder),
        text=True,
        capture_output=True,
        timeout=120,
        check=False,
    )


def losses(directory: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_what_it_promises_and_any_layout_goes_on_from_it(folder: Path) -> None:
    run = folder / "runs" / "tiny"
    first = train(folder)
    assert first.returncode == 0, first.stderr
    assert re.search(
        r"held-out loss \d\.\d+ → \d\.\d+ nats per token \(\d\.\d+ → \d\.\d+ bits per byte\)", first.stdout
    )
    assert str(Path("runs/tiny/report.html")) in first.stdout
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    promised = {"step", "loss", "grad_norm", "learning_rate", "tokens_per_second", "tflops", "mfu", "memory_bytes"}
    assert all(promised | {"bubble"} <= record.keys() for record in records)
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert [record["step"] for record in records if "held_out_loss" in record] == [2, 4]
    assert all(0.0 < record["bubble"] < 1.0 for record in records)
    assert list((run / "tensorboard").glob("events*"))
    report = (run / "report.html").read_text()
    assert "<svg" in report
    assert "Memory by kind" in report
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == ["step-00000002", "step-00000004"]

    other = train(folder, "name=other", "parallel.tensor=1", "parallel.pipeline=1", "parallel.data=2")
    assert other.returncode == 0, other.stderr
    assert losses(folder / "runs" / "other") == pytest.approx(losses(run), abs=1e-5)

    longer = train(folder, "train.steps=6", "parallel.tensor=1")
    assert longer.returncode == 0, longer.stderr
    assert "going on from runs/tiny/checkpoints/step-00000004" in longer.stderr
    assert losses(run)[:STEPS] == [record["loss"] for record in records]
    assert len(losses(run)) == 6


def test_sigterm_saves_the_step_and_the_same_command_goes_on(folder: Path) -> None:
    metrics = folder / "runs" / "tiny" / "metrics.jsonl"
    process = subprocess.Popen(
        command("tiny.yaml", "train.steps=100000", "checkpoint.every=0"),
        cwd=folder,
        env=environment(folder),
        text=True,
        stderr=subprocess.PIPE,
    )
    deadline = time.monotonic() + 100
    while not (metrics.exists() and len(losses(metrics.parent)) >= 3):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.stderr and process.stderr.read()
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM
    assert "Stopped by SIGTERM after saving this step" in said
    saved = [int(path.name.removeprefix("step-")) for path in (folder / "runs" / "tiny" / "checkpoints").iterdir()]
    assert saved == [len(losses(metrics.parent))]


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("model.num_attention_heads=3", "4 attention|hidden_size 32 does not divide into 3"),
        ("parallel.tensor=3", "4 attention heads do not divide over tensor 3; choose 1, 2 or 4"),
        ("model.intermediate_size=49", "model.intermediate_size 49 does not divide over tensor 2"),
        ("model.hiden_size=32", "model.hiden_size is not a known key; did you mean hidden_size"),
        ("corpus.path=nowhere.txt", "nowhere.txt"),
        ("corpus.path=empty.txt", "empty.txt"),
        ("corpus.path=binary.txt", "binary.txt"),
        ("batch.global_size=9", "batch.global_size is 9"),
        ("train.stepz=3", "train.stepz is not a setting; did you mean train.steps?"),
        ("report.directory=text.txt/run", "text.txt is a file"),
    ],
)
def test_bad_input_is_one_sentence_before_anything_starts(folder: Path, override: str, sentence: str) -> None:
    (folder / "empty.txt").write_text("")
    (folder / "binary.txt").write_bytes(bytes(range(256)) * 64)
    before = sorted(folder.rglob("*"))
    result = train(folder, override)
    assert result.returncode == 2
    assert re.search(sentence, result.stderr), result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert result.stdout == ""
    assert sorted(folder.rglob("*")) == before
