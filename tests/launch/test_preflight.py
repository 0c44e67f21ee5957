"""What is wrong with a run is found before it starts, and looking leaves no trace."""

import os
import socket
from pathlib import Path
from typing import Any

import pytest

from tests.launch.test_layout import MODEL
from weft.launch import preflight
from weft.launch.errors import UserError
from weft.launch.preflight import check_directory, check_port, check_run, check_same_run
from weft.launch.settings import Settings, build_settings, dump_settings, resolved

TEXT = "The quick brown fox jumps over the lazy dog.\n\n"


@pytest.fixture
def values(tmp_path: Path) -> dict[str, Any]:
    text = tmp_path / "text"
    text.mkdir()
    for number in range(4):
        (text / f"{number}.txt").write_text(TEXT * 100)
    return {
        "name": "t",
        "model": MODEL,
        "train": {"steps": 10},
        "corpus": {"path": str(text), "sequence_length": 32},
        "report": {"directory": str(tmp_path / "runs" / "t")},
        "cluster": {"device": "cpu"},
    }


def changed(values: dict[str, Any], **sections: Any) -> Settings:
    merged = {key: (values.get(key, {}) | new if isinstance(new, dict) else new) for key, new in sections.items()}
    return build_settings(values | merged)


def refusal(settings: Settings, world_size: int = 1) -> str:
    with pytest.raises(UserError) as caught:
        check_run(settings, world_size)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def snapshot(folder: Path) -> dict[str, tuple[int, bytes | None]]:
    return {
        str(path): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else None)
        for path in [folder, *folder.rglob("*")]
    }


def begin(settings: Settings, world_size: int = 1) -> None:
    """Leave behind what a run leaves behind."""
    directory = Path(settings.report.directory)
    directory.mkdir(parents=True)
    (directory / "config.yaml").write_text(dump_settings(resolved(settings, world_size)))


def test_good_run_passes_and_nothing_is_touched(values: dict[str, Any], tmp_path: Path) -> None:
    before = snapshot(tmp_path)
    check_run(build_settings(values), 1)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("content", ["", b"\x00\xff\xfe\x80", None])
def test_corpus_missing_empty_or_binary(values: dict[str, Any], tmp_path: Path, content: str | bytes | None) -> None:
    path = tmp_path / "corpus.txt"
    if content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    assert str(path) in refusal(changed(values, corpus={"path": str(path)}))


def test_missing_tokenizer_and_checkpoint(values: dict[str, Any]) -> None:
    assert "corpus.tokenizer is mine.json" in refusal(changed(values, corpus={"tokenizer": "mine.json"}))
    assert "checkpoint.resume is none" in refusal(changed(values, checkpoint={"resume": "none"}))


@pytest.mark.parametrize("key", ["report", "checkpoint"])
def test_directory_below_a_file(values: dict[str, Any], tmp_path: Path, key: str) -> None:
    (tmp_path / "file").write_text("")
    message = refusal(changed(values, **{key: {"directory": str(tmp_path / "file" / "runs")}}))
    assert message.startswith(f"{key}.directory is ")
    assert f"{tmp_path / 'file'} is a file" in message


def test_directory_without_write_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    real = os.getuid()
    if real == 0:
        os.setreuid(65534, 0)  # access is judged by the real user
    try:
        with pytest.raises(UserError, match=r"report\.directory is .* may not be written to; choose another"):
            check_directory("report.directory", str(tmp_path / "deep" / "runs"))
    finally:
        if real == 0:
            os.setreuid(0, 0)
        tmp_path.chmod(0o755)


def test_float16_is_refused_on_a_cpu(values: dict[str, Any]) -> None:
    assert refusal(changed(values, train={"precision": "fp16"})) == (
        "train.precision is fp16, which needs a GPU; on CPUs choose bf16 or fp32."
    )
    check_run(changed(values, train={"precision": "bf16"}), 1)


def test_zero_says_what_to_install(values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weft.launch.preflight.find_spec", lambda name: None)
    message = refusal(changed(values, parallel={"zero": 2}))
    assert "parallel.zero is 2, which needs DeepSpeed" in message
    assert "pip install 'weft[deepspeed]'" in message
    for zero in (0, 3):
        check_run(changed(values, parallel={"zero": zero}), 1)


def test_run_goes_on_in_another_layout_and_for_longer(values: dict[str, Any]) -> None:
    begin(build_settings(values))
    again = changed(
        values,
        parallel={"tensor": 2, "schedule": "gpipe"},
        batch={"micro_size": 2},
        train={"steps": 20, "timeout": 5, "evaluate_every": 3},
        checkpoint={"every": 7},
        cluster={"devices_per_node": 2},
    )
    check_run(again, 2)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"name": "u"}, ["name 't' instead of 'u'"]),
        ({"model": {"hidden_size": 96}}, ["model.hidden_size 48 instead of 96"]),
        ({"model": {"rope_theta": 5.0}}, ["model.rope_theta null instead of 5.0"]),
        ({"batch": {"global_size": 64}}, ["batch.global_size 32 instead of 64"]),
        ({"train": {"steps": 10, "seed": 1}}, ["train.seed 1234 instead of 1"]),
        ({"train": {"optimizer": {"betas": [0.9, 0.99]}}}, ["train.optimizer.betas", "0.95", "0.99"]),
        ({"corpus": {"sequence_length": 16}}, ["corpus.sequence_length 32 instead of 16"]),
        ({"train": {"steps": 9}}, ["train.steps is 9", "was made for 10"]),
    ],
)
def test_directory_of_another_run(values: dict[str, Any], tmp_path: Path, change: Any, words: list[str]) -> None:
    begin(build_settings(values))
    before = snapshot(tmp_path)
    message = refusal(changed(values, **change))
    assert all(word in message for word in words), message
    assert "choose another name or report.directory, or delete " in message
    assert snapshot(tmp_path) == before


def test_directory_of_something_else(values: dict[str, Any]) -> None:
    settings = build_settings(values)
    Path(settings.report.directory).mkdir(parents=True)
    check_same_run(settings)
    (Path(settings.report.directory) / "config.yaml").write_text("theme: dark")
    assert "config.yaml, which is not a run of this version" in refusal(settings)


def test_gpus_that_are_not_there(values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = 0
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    fast = changed(values, cluster={"device": "h100-sxm"}, parallel={"tensor": 2})
    assert refusal(fast, 2).startswith("cluster.device is h100-sxm, but this machine has no GPU; choose cpu")
    gpus = 1
    assert refusal(fast, 2).startswith("2 ranks would run on this machine, but it has 1 GPUs; ")


def test_port() -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(
            UserError, match=rf"^MASTER_PORT is {port}, which cannot be used \(Address already in use\)"
        ):
            check_port(str(port))
    check_port(str(port))
    check_port("0")
    with pytest.raises(UserError, match="MASTER_PORT is 'http', but a port is a number"):
        check_port("http")


@pytest.mark.parametrize(("given", "missing"), [(None, "g++"), ("/no/such/compiler", "/no/such/compiler")])
def test_compilation_without_a_compiler(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch, given: str | None, missing: str
) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    if given is None:
        monkeypatch.delenv("CXX", raising=False)
        monkeypatch.setenv("PATH", "/nowhere")
    else:
        monkeypatch.setenv("CXX", given)
    assert f"train.compile is true, which needs a C++ compiler, but there is no {missing}; " in refusal(
        changed(values, train={"compile": True})
    )
    check_run(changed(values, train={"compile": False}), 1)


def test_compilation_on_gpus_without_triton_or_a_c_compiler(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = changed(values, train={"compile": True}, cluster={"device": "cuda"})
    monkeypatch.setattr(preflight, "check_devices", lambda *_: None)
    monkeypatch.setattr(preflight, "find_spec", lambda name: None)
    assert refusal(settings).startswith("train.compile is true, which needs Triton on GPUs, but it is not installed; ")
    monkeypatch.setattr(preflight, "find_spec", lambda name: name)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    assert "which needs a C compiler, but there is no gcc or clang; " in refusal(settings)
