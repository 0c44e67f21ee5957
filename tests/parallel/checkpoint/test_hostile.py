"""A checkpoint from a stranger is refused in one sentence; nothing in it is run, followed or allocated."""

import json
import os
import pickle
import re
import resource
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.fuzz import try_configs, try_manifests, try_settings
from tests.parallel.checkpoint.small import SHARD, alone, entries, save
from weft.parallel.checkpoint import MANIFEST, CheckpointError, load_checkpoint, read_manifest
from weft.parallel.checkpoint.verify import problems_of

ROOT = Path(__file__).parents[3]


class Bomb:
    """Makes a file when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("executed",)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "step-00000001"
    with alone() as mesh:
        save(path, 1, mesh)
    return path


@pytest.fixture
def copy(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(saved, tmp_path / saved.name))


def sign(path: Path, text: str) -> None:
    """Write the manifest with the checksum of itself, as whoever made it up would."""
    blank = re.sub(r'(?<="crc32": ")[0-9a-f]{8}', "00000000", text, count=1)
    path.write_text(blank.replace("00000000", f"{zlib.crc32(blank.encode()):08x}", 1))


def change(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    manifest = json.loads((path / MANIFEST).read_text())
    edit(manifest)
    sign(path / MANIFEST, json.dumps(manifest, indent=1))


def first_piece(manifest: dict[str, Any]) -> dict[str, Any]:
    piece: dict[str, Any] = manifest["tensors"]["model/layers.0.weight"]["pieces"][0]
    return piece


def refusal(path: Path) -> str:
    """The sentence; loading must leave address space and folder as they were."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path, entries(0))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000
    assert not Path("executed").exists()
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert len(sentence) < 600
    assert list(problems_of(path))
    return sentence


PETABYTES = 10**15


def huge_file(manifest: dict[str, Any]) -> None:
    manifest["files"][SHARD]["bytes"] = PETABYTES


def huge_piece(manifest: dict[str, Any]) -> None:
    huge_file(manifest)
    tensor = manifest["tensors"]["model/layers.0.weight"]
    tensor["shape"] = [PETABYTES // 4]
    shape = {"offset": [0], "shape": [PETABYTES // 4], "bytes": PETABYTES}
    tensor["pieces"] = [first_piece(manifest) | shape | {"begin": 0}]
    manifest["tensors"] = {"model/layers.0.weight": tensor}


def cut(*pieces: tuple[int, int]) -> Callable[[dict[str, Any]], None]:
    """Say that these runs of rows, which together are as many as there are, are all of a tensor."""

    def edit(manifest: dict[str, Any]) -> None:
        whole = first_piece(manifest)
        row = whole["bytes"] // whole["shape"][0]
        places = [sum(rows for _, rows in pieces[:number]) for number in range(len(pieces))]  # side by side in the file
        manifest["tensors"]["model/layers.0.weight"]["pieces"] = [
            whole
            | {"begin": whole["begin"] + place * row, "bytes": rows * row, "offset": [offset, 0]}
            | {"shape": [rows, whole["shape"][1]]}
            for place, (offset, rows) in zip(places, pieces, strict=True)
        ]

    return edit


def share_bytes(manifest: dict[str, Any]) -> None:
    scale = manifest["tensors"]["model/scale"]["pieces"][0]
    scale["begin"] = first_piece(manifest)["begin"] + 4


def cut_everywhere(manifest: dict[str, Any]) -> None:
    """A tensor of 16 dims, of which each piece has half of each."""
    piece = first_piece(manifest) | {"bytes": 4, "shape": [1] * 16}
    pieces = [piece | {"offset": [number % 2] * 16, "begin": 8 + 4 * number} for number in range(2)]
    manifest["tensors"]["model/layers.0.weight"] = {"shape": [2] * 16, "dtype": "float32", "pieces": pieces}


WEIGHT = "tensor model/layers.0.weight"
EDITS: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda m: first_piece(m).update(file="../../etc/passwd"), "not to be trusted"),
    (lambda m: m["files"].update({"/etc/passwd": {"bytes": 1, "crc32": "0" * 8}}), "not to be trusted"),
    (huge_file, "its size is not the manifest's"),
    (huge_piece, "is of another model"),
    (lambda m: first_piece(m).update(bytes=PETABYTES), "whose bytes are not those of its shape"),
    (lambda m: first_piece(m).update(begin=PETABYTES), "beyond the end of"),
    (lambda m: first_piece(m).update(offset=[39, 0]), "beyond its shape"),
    (lambda m: first_piece(m).update(shape=[10**18, 10**18]), "beyond its shape"),
    (lambda m: m["tensors"]["model/scale"].update(shape=[1] * 1000), "not to be trusted"),
    (lambda m: m["tensors"]["model/scale"].update(shape=[-1]), "not to be trusted"),
    (lambda m: m["tensors"]["model/scale"].update(shape=[10**100]), "not to be trusted"),
    (lambda m: m["tensors"]["model/scale"].update(dtype="os.system"), "unknown dtype"),
    (
        lambda m: m["tensors"]["model/scale"].update(pieces=[]),
        "tensor model/scale has pieces that leave some of it out in every file",
    ),
    (
        lambda m: m["tensors"]["model/scale"]["pieces"].append(m["tensors"]["model/scale"]["pieces"][0]),
        f"tensor model/scale has pieces that overlap in {SHARD}",
    ),
    (cut((0, 20), (10, 20)), f"{WEIGHT} has pieces that overlap in {SHARD}"),
    (cut((0, 20), (21, 19)), f"{WEIGHT} has pieces that leave some of it out in {SHARD}"),
    (cut((0, 20), (20, 21)), f"{WEIGHT} has a piece beyond its shape in {SHARD}"),
    (share_bytes, f"has a piece in {SHARD} that overlaps another one there"),
    (cut_everywhere, f"{WEIGHT} is cut along more than 8 dims"),
    (lambda m: m["tensors"]["model/scale"].update(code="import os"), "not to be trusted"),
    (lambda m: m.update(format=99), "not to be trusted"),
    (lambda m: m["tensors"].update({"x" * 5000: m["tensors"]["model/scale"]}), "not to be trusted"),
    (lambda m: m.update(metadata=[]), "not to be trusted"),
]


@pytest.mark.parametrize(("edit", "sentence"), EDITS)
def test_a_manifest_that_cannot_be_true_is_refused(
    copy: Path, edit: Callable[[dict[str, Any]], Any], sentence: str
) -> None:
    change(copy, edit)
    assert sentence in refusal(copy)


def test_deep_json_is_refused(copy: Path) -> None:
    text = (copy / MANIFEST).read_text()
    for opening, closing in (("[", "]"), ('{"a":', "}")):
        deep = f"{opening * 100_000}1{closing * 100_000}" if closing == "}" else opening * 100_000 + closing * 100_000
        sign(copy / MANIFEST, text.replace('"metadata": {', f'"metadata": {{"deep": {deep},', 1))
        assert "not to be trusted" in refusal(copy)


@pytest.mark.parametrize("name", ["extra.pt", ".metadata", "innocent.txt"])
def test_a_pickle_is_refused_and_not_run(copy: Path, name: str) -> None:
    (copy / name).write_bytes(pickle.dumps(Bomb()))
    assert "is a pickle, which weft never writes" in refusal(copy)


def test_a_pickle_in_the_place_of_tensors_is_refused_and_not_run(copy: Path) -> None:
    payload = pickle.dumps(Bomb()).ljust((copy / SHARD).stat().st_size, b"\0")
    (copy / SHARD).write_bytes(payload)
    assert "it is not a safetensors file" in refusal(copy)
    (copy / MANIFEST).write_bytes(pickle.dumps(Bomb()))
    assert "is not a checkpoint of format" in refusal(copy)


def test_links_and_pipes_are_refused_and_not_waited_for(copy: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    (copy / SHARD).rename(elsewhere)
    (copy / SHARD).symlink_to(elsewhere)
    assert "cannot be read" in refusal(copy)
    (copy / SHARD).unlink()
    os.mkfifo(copy / SHARD)
    assert "it is not a regular file" in refusal(copy)
    (copy / MANIFEST).unlink()
    os.mkfifo(copy / MANIFEST)
    assert "it is not a regular file" in refusal(copy)


def test_a_manifest_of_a_petabyte_is_not_read(copy: Path) -> None:
    with (copy / MANIFEST).open("r+b") as file:
        file.truncate(2**40)
    assert "bytes" in refusal(copy)


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot be read \(No such file"):
        read_manifest(tmp_path)
    (tmp_path / MANIFEST).write_text("{}")
    with pytest.raises(CheckpointError, match="is not a checkpoint of format 2"):
        read_manifest(tmp_path)


def test_mutated_manifests_and_settings_are_taken_or_refused_in_a_sentence(tmp_path: Path) -> None:
    assert try_manifests(tmp_path, 300, seed=2).keys() <= {"taken", "refused"}
    assert try_settings(tmp_path, 100, 2, ROOT / "configs/demo.yaml").keys() <= {"taken", "refused"}
    assert try_configs(tmp_path, 300, 2).keys() <= {"taken", "refused"}
