"""`weft checkpoint`: lists, checks, shows, and writes what another layout would have written."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.launch.test_checkpoints import BOTH, ONE, build, train
from tests.parallel.checkpoint.small import SHARD, alone
from tests.pool import Pool
from weft.launch.cli import run
from weft.launch.engine import Engine
from weft.launch.saved_run import find_checkpoints, read_run
from weft.parallel.checkpoint import Entry, Manifest, load_checkpoint, read_manifest

STEP = "step-00000002"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one checkpoint of one process."""
    directory = tmp_path_factory.mktemp("checkpoints")
    with alone():
        engine, checkpoints = build(ONE, directory)
        train(engine, range(2))
        checkpoints.save(2, metadata(engine), last=True)
    return directory


def metadata(engine: Engine) -> dict[str, Any]:
    return {"samples": 16, "tokens": 128, "seed": 1234, "settings": engine.settings.model_dump(mode="json")}


def save_in_both(directory: Path) -> None:
    engine, checkpoints = build(BOTH, directory)
    train(engine, range(2))
    checkpoints.save(2, metadata(engine), last=True)


def content(path: Path, manifest: Manifest) -> dict[str, torch.Tensor]:
    held = [Entry(key, torch.zeros(record.shape)) for key, record in manifest.tensors.items()]
    load_checkpoint(path, held)
    return {entry.name: entry.tensor for entry in held}


def test_list_and_inspect_tell_what_is_saved(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["checkpoint", "list", str(saved)]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[:3] == [STEP, "2", "128"]
    assert run(["checkpoint", "inspect", str(saved)]) == 0
    shown = capsys.readouterr().out
    assert "step 2, 16 samples, 128 tokens, seed 1234" in shown
    assert "model/norm.weight" in shown
    assert run(["checkpoint", "inspect", "--json", str(saved / STEP)]) == 0
    tensors = json.loads(capsys.readouterr().out)["tensors"]
    assert tensors["model/norm.weight"] == {"shape": [32], "dtype": "float32", "bytes": 128, "pieces": 1}


def test_verify_names_what_is_damaged(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["checkpoint", "verify", str(saved)]) == 0
    assert capsys.readouterr().out == f"{saved / STEP} is whole\n"
    damaged = tmp_path / STEP
    damaged.mkdir()
    for path in (saved / STEP).iterdir():
        data = bytearray(path.read_bytes())
        if path.name == SHARD:
            data[-3] ^= 1
        (damaged / path.name).write_bytes(data)
    assert run(["checkpoint", "verify", str(saved / STEP), str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert f"{damaged / SHARD} is damaged: its checksum is not the manifest's" in out
    assert err == "1 damaged; weft train goes on from the newest that is whole.\n"


def test_reshard_writes_what_the_ranks_of_the_other_layout_would_have_written(
    pool: Pool, saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target, back = tmp_path / "resharded" / STEP, tmp_path / "back" / STEP
    layout = ["parallel.pipeline=2", "parallel.tensor=2", "parallel.split=[3,1]"]
    assert run(["checkpoint", "reshard", str(saved / STEP), str(target), *layout]) == 0, capsys.readouterr().err
    pool.run(4, save_in_both, tmp_path)
    original, found, written = map(read_manifest, (saved / STEP, target, tmp_path / STEP))
    assert found.files.keys() == written.files.keys()
    for key, record in written.tensors.items():
        places = [(piece.file, piece.box) for piece in record.pieces]
        assert [(piece.file, piece.box) for piece in found.tensors[key].pieces] == places, key
    expected = content(saved / STEP, original)
    for key, tensor in content(target, found).items():
        assert torch.equal(tensor, expected[key]), key
    assert read_run(target).step == 2

    assert run(["checkpoint", "reshard", str(target), str(back), "pipeline=1", "tensor=1", "split=auto"]) == 0
    assert (back / SHARD).stat().st_size == (saved / STEP / SHARD).stat().st_size


@pytest.mark.parametrize(
    ("arguments", "status", "sentence"),
    [
        (["list", "{empty}"], 2, "holds no checkpoint; give a checkpoint, or a folder of checkpoints."),
        (["inspect", "{empty}"], 2, "holds no checkpoint; give a checkpoint, or a folder of checkpoints."),
        (["reshard", "{saved}", "{empty}"], 2, "exists; choose another destination."),
        (["reshard", "{saved}", "{empty}/x", "parallel.tensor=3"], 2, "attention heads do not divide over tensor 3"),
        (["reshard", "{saved}", "/proc/x/y"], 1, "/proc/x/y cannot be written (No such file or directory)"),
    ],
)
def test_mistakes_are_one_sentence(
    saved: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    status: int,
    sentence: str,
) -> None:
    filled = [argument.format(saved=saved / STEP, empty=tmp_path) for argument in arguments]
    assert run(["checkpoint", *filled]) == status
    assert sentence in capsys.readouterr().err


def test_a_replaced_checkpoint_counts_until_the_new_one_stands(tmp_path: Path) -> None:
    for folder in ("step-00000004.old", "step-00000004", "step-00000002", ".step-00000006.part", "other"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "manifest.json").touch()
    assert [path.name for path in find_checkpoints(tmp_path)] == ["step-00000002", "step-00000004.old", "step-00000004"]
