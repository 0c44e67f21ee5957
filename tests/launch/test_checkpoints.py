"""A run goes on from its checkpoint: to the bit in the same layout, to rounding in any other."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from tests.pool import Pool
from weft.launch.checkpoints import Checkpoints, find_checkpoints
from weft.launch.engine import Engine
from weft.launch.errors import UserError
from weft.launch.saved_state import EngineState
from weft.launch.settings import build_settings
from weft.launch.signals import StopRequest
from weft.launch.trainer import Trainer
from weft.model.config import model_config
from weft.parallel import build_mesh

Axes = tuple[int, int, int]
LAYOUTS: dict[Axes, dict[str, Any]] = {
    (1, 1, 1): {},
    (1, 1, 2): {"sequence_parallel": True},
    (1, 1, 4): {"sequence_parallel": False},
    (1, 2, 1): {},
    (2, 1, 1): {"schedule": "interleaved", "stages_per_rank": 2},
    (2, 1, 2): {"split": [3, 1]},
    (4, 1, 1): {},
    (2, 2, 1): {},
    (1, 4, 1): {},
}
SAVED_AFTER, STEPS = 2, 5


def build(axes: Axes, directory: Path, *, tied: bool = False, layers: int = 4) -> tuple[Engine, Checkpoints]:
    """An engine whose vocabulary is padded and whose key-value heads are replicated under tensor 4."""
    pipeline, data, tensor = axes
    model = {
        "model_type": "llama",
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 8,
        "tie_word_embeddings": tied,
    }
    settings = build_settings(
        {
            "name": "saved",
            "model": model,
            "parallel": {"pipeline": pipeline, "data": data, "tensor": tensor, **LAYOUTS[axes]},
            "batch": {"global_size": 8, "micro_size": 2 if data > 1 else 4},
            "train": {"steps": STEPS},
            "corpus": {"sequence_length": 8},
            "checkpoint": {"directory": str(directory), "keep": 2},
        }
    )
    engine = Engine(model_config(model), settings, build_mesh(pipeline=pipeline, data=data, tensor=tensor))
    return engine, Checkpoints(settings.checkpoint, EngineState(engine))


def train(engine: Engine, steps: range) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step."""
    replica, replicas = engine.data.get_local_rank(), engine.data.size()
    results = []
    for step in steps:
        rows = torch.randint(0, 61, (8, 9), generator=torch.Generator().manual_seed(step)).chunk(replicas)[replica]
        outcome = engine.step(step, rows[:, :-1], rows[:, 1:])
        results.append((outcome.loss, outcome.gradient_norm))
    return results


def save_and_go_on(axes: Axes, directory: Path, tied: bool) -> list[tuple[float, float]]:
    engine, checkpoints = build(axes, directory, tied=tied)
    train(engine, range(SAVED_AFTER))
    checkpoints.save(SAVED_AFTER, {"samples": 16})
    results = train(engine, range(SAVED_AFTER, STEPS))  # while the save is written
    checkpoints.finish()
    return results


def restore_and_go_on(layouts: list[Axes], axes: Axes, root: Path, tied: bool) -> list[list[tuple[float, float]]]:
    results = []
    engine, checkpoints = build(axes, root, tied=tied)
    for saved in layouts:
        checkpoints.directory = root / name(saved)
        checkpoints.settings = checkpoints.settings.model_copy(update={"directory": str(checkpoints.directory)})
        resumed = checkpoints.resume()
        assert resumed is not None
        assert (resumed[1].step, resumed[1].samples) == (SAVED_AFTER, 16)
        results.append(train(engine, range(SAVED_AFTER, STEPS)))
    return results


def name(axes: Axes) -> str:
    return "-".join(map(str, axes))


def ranks(axes: Axes) -> int:
    return axes[0] * axes[1] * axes[2]


ONE, PIPELINED, BOTH = (1, 1, 1), (2, 1, 1), (2, 1, 2)


@pytest.mark.parametrize(
    ("layouts", "tied"), [(list(LAYOUTS), False), ([ONE, PIPELINED, BOTH], True)], ids=["untied", "tied"]
)
def test_every_layout_goes_on_from_every_other(pool: Pool, tmp_path: Path, layouts: list[Axes], tied: bool) -> None:
    uninterrupted = {
        axes: pool.run(ranks(axes), save_and_go_on, axes, tmp_path / name(axes), tied)[0] for axes in layouts
    }
    for axes in layouts:
        resumed = pool.run(ranks(axes), restore_and_go_on, layouts, axes, tmp_path, tied, timeout=200)[0]
        for saved, results in zip(layouts, resumed, strict=True):
            if saved == axes:
                assert results == uninterrupted[axes], f"{axes} does not go on to the bit"
            torch.testing.assert_close(torch.tensor(results), torch.tensor(uninterrupted[saved]), rtol=1e-5, atol=1e-5)


def save_often(directory: Path) -> list[str]:
    engine, checkpoints = build((1, 1, 2), directory)
    for step in (1, 2, 3):
        train(engine, range(step - 1, step))
        checkpoints.save(step, {})
    checkpoints.finish()
    dist.barrier()
    return [path.name for path in find_checkpoints(directory)]


def test_the_newest_are_kept_and_half_written_ones_never_count(pool: Pool, tmp_path: Path) -> None:
    (tmp_path / "step-00000009").mkdir()
    (tmp_path / ".step-00000002.part").mkdir()
    (tmp_path / ".step-00000002.part" / "rank-00000.safetensors").write_bytes(b"half")
    (tmp_path / ".step-00000004.part").mkdir()  # as of another rank that is ahead
    assert pool.run(2, save_often, tmp_path)[0] == ["step-00000002", "step-00000003"]
    assert [path.name for path in tmp_path.glob(".*.part")] == [".step-00000004.part"]


def told_and_saved(directory: Path) -> list[str]:
    """What a run does whose saves are on disk before it goes on, in order."""
    engine, checkpoints = build((1, 1, 1), directory)
    checkpoints.settings = checkpoints.settings.model_copy(update={"asynchronous": False, "every": 2})
    settings = engine.settings.model_copy(update={"checkpoint": checkpoints.settings})
    text = np.arange(1000, dtype=np.uint16) % 61
    tokens: Any = SimpleNamespace(train=text, held_out=text, bits_per_byte=lambda *_, **__: 0.0)
    trainer = Trainer(settings, engine, tokens, checkpoints, StopRequest())
    events: list[str] = []
    for metrics in trainer.steps():
        saved = [f"saved {path.name[-1]}" for path in find_checkpoints(directory)]
        events += [event for event in saved if event not in events] + [f"told {metrics.step}"]
    return events


def test_a_step_is_told_before_its_checkpoint_counts(pool: Pool, tmp_path: Path) -> None:
    """Else a run that is killed between the two goes on behind a step of which its metrics lack the line."""
    (events,) = pool.run(1, told_and_saved, tmp_path)
    assert events == ["told 0", "told 1", "told 2", "saved 2", "told 3", "told 4", "saved 4", "told 5"]
    assert find_checkpoints(tmp_path)[-1].name == "step-00000005"


def restore(directory: Path, layers: int = 4) -> str:
    _, checkpoints = build((1, 1, 1), directory, layers=layers)
    said: list[str] = []
    checkpoints.say = said.append
    with pytest.raises(UserError) as caught:
        checkpoints.resume()
    return "\n".join([*said, str(caught.value)])


def test_a_damaged_checkpoint_is_named_and_not_loaded(pool: Pool, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    pool.run(1, save_and_go_on, (1, 1, 1), whole, False)
    file = "step-00000002/rank-00000.safetensors"

    flipped = shutil.copytree(whole, tmp_path / "flipped")
    data = bytearray((flipped / file).read_bytes())
    data[len(data) // 2] ^= 1
    (flipped / file).write_bytes(data)
    (truncated := shutil.copytree(whole, tmp_path / "truncated") / file).write_bytes(data[:1000])
    (missing := shutil.copytree(whole, tmp_path / "missing") / file).unlink()
    for damaged in (flipped / file, truncated, missing):
        assert str(damaged) in pool.run(1, restore, damaged.parents[1])[0]


def test_a_checkpoint_of_another_model_is_refused(pool: Pool, tmp_path: Path) -> None:
    pool.run(1, save_and_go_on, (1, 1, 1), tmp_path, False)
    assert "it lacks exp_avg/layers.4.input_layernorm.weight, " in pool.run(1, restore, tmp_path, 5)[0]


def test_the_manifest_is_plain_json_that_says_what_lies_where(pool: Pool, tmp_path: Path) -> None:
    pool.run(2, save_and_go_on, (1, 1, 2), tmp_path, False)
    manifest = json.loads((tmp_path / "step-00000002" / "manifest.json").read_text())
    embedding = manifest["tensors"]["model/embed_tokens.weight"]
    assert embedding["shape"] == [61, 32]
    blocks = [(piece["offset"], piece["shape"], piece["file"]) for piece in embedding["pieces"]]
    assert blocks == [([0, 0], [31, 32], "rank-00000.safetensors"), ([31, 0], [30, 32], "rank-00001.safetensors")]
    assert [piece["shape"] for piece in manifest["tensors"]["model/norm.weight"]["pieces"]] == [[32]]
