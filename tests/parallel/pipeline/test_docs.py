"""docs/pipeline.md: its table is what the script prints, its commands and its code run."""

import re
import runpy
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.parallel.pipeline.serial import (
    Block,
    Outcome,
    assert_equal,
    gradients,
    mean_square,
    microbatches,
    run_serial,
)
from tests.pool import Pool
from weft.launch.cli import run
from weft.parallel import ScheduleCosts, build_mesh, build_schedule, simulate_schedule

DOCS = Path(__file__).parents[3] / "docs"
TEXT = (DOCS / "pipeline.md").read_text()
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL) for line in block.splitlines()]
CODE = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


def test_the_table_is_what_the_schedules_cost() -> None:
    assert runpy.run_path(str(DOCS / "schedule_costs.py"))["table"]() in TEXT


def test_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    for command in COMMANDS:
        assert run(shlex.split(command.removeprefix("weft "))) == 0, command
    assert {path.name for path in tmp_path.iterdir()} == {"picture.svg", "trace.json", "table.csv"}


def test_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    run(["schedule", "zb-v", "--ranks", "2", "--microbatches", "4", "--output", "table.csv"])
    capsys.readouterr()
    exec(CODE[0], {})
    peaks, bubble = capsys.readouterr().out.splitlines()
    assert peaks == "[7, 5, 3, 1]"
    usual = simulate_schedule(build_schedule("1f1b", 4, 16), ScheduleCosts(send=1.0)).bubble
    assert float(bubble) < 0.7 * usual
    exec(CODE[1], {})


def torch_step(count: int) -> Outcome:
    """torch's zero-bubble schedule over its own stages, with deferred weight gradients as the page shows."""
    from torch.distributed.pipelining.schedules import ScheduleZBVZeroBubble

    rank = build_mesh(pipeline=2)["pipeline"].get_local_rank()
    namespace: dict[str, Any] = {"torch": torch}
    exec(CODE[-1], namespace)
    modules: list[nn.Module] = [Block(seed) for seed in range(4)]
    mine = (rank, 3 - rank)
    stages = [namespace["torch_stage"](modules[index], index, 4, torch.device("cpu")) for index in mine]
    schedule = ScheduleZBVZeroBubble(stages, count, loss_fn=mean_square)
    batch, targets = torch.cat(microbatches(count, seed=1)), torch.cat(microbatches(count, seed=2))
    arguments = (batch,) if rank == 0 else ()
    losses: list[torch.Tensor] = []
    for _ in range(2):
        for module in modules:
            module.zero_grad()
        schedule.step(*arguments, target=targets, losses=losses, return_outputs=False)
    kept = {key: value for key, value in gradients(modules).items() if int(key.split(".")[0]) in mine}
    return Outcome([torch.stack(losses).mean().item()] if losses else [], kept)


def test_torchs_stages_can_defer_too(pool: Pool) -> None:
    serial = run_serial([Block(seed) for seed in range(4)], [(microbatches(4, seed=1), microbatches(4, seed=2))])
    outcomes = pool.run(2, torch_step, 4)
    outcomes[1].losses = outcomes[0].losses  # torch keeps them on one rank
    assert_equal(outcomes, serial)
