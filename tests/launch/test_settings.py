"""Settings: what a file and overrides become, and the one sentence that each mistake gets."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from weft.launch.errors import UserError
from weft.launch.overrides import read_yaml, write_yaml
from weft.launch.problems import known_keys
from weft.launch.settings import Settings, build_settings, dump_settings, load_settings, resolved

MODEL = {"model_type": "llama", "vocab_size": 64, "hidden_size": 8, "num_hidden_layers": 4}

CONTRACT = """
name: demo
model: {model_type: llama, vocab_size: 2048, hidden_size: 256, num_hidden_layers: 4}
parallel:
  tensor: 2
  pipeline: 2
  data: auto                # whatever is left of the world
  context: 1
  sequence_parallel: true
  schedule: 1f1b
  stages_per_rank: 1
  split: auto
  zero: 0
  recompute: none
batch: {global_size: 32, micro_size: 4}
train:
  steps: 200
  precision: fp32
  seed: 1234
  optimizer: {name: adamw, learning_rate: 1.0e-3, betas: [0.9, 0.95], weight_decay: 0.1, clip_grad_norm: 1.0}
  schedule: {warmup_steps: 20, decay: cosine, minimum_learning_rate: 1.0e-4}
corpus: {path: builtin, tokenizer: auto, sequence_length: 256}
checkpoint: {directory: runs/demo/checkpoints, every: 50, keep: 3, resume: auto}
report: {directory: runs/demo}
cluster: {nodes: 1, devices_per_node: 4, device: cpu}
"""


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write(text: str, name: str = "demo.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


def sentence(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_settings(path, overrides)
    return str(caught.value)


def test_documented_file_is_the_defaults_of_a_demo_layout(write: Any) -> None:
    settings = load_settings(write(CONTRACT))
    small = load_settings(write(f"model: {MODEL}\nparallel: {{tensor: 2, pipeline: 2}}"))
    assert settings.train.optimizer.betas == (0.9, 0.95)
    for section in ("batch", "train", "corpus", "checkpoint", "report", "parallel"):
        assert getattr(settings, section) == getattr(small, section)


def test_every_key_is_described() -> None:
    def described(section: Any) -> bool:
        return all(
            field.description and (not hasattr(field.annotation, "model_fields") or described(field.annotation))
            for field in section.model_fields.values()
        )

    assert described(Settings)
    assert {"train.optimizer.betas", "parallel.tensor", "cluster.device"} <= set(known_keys(Settings))


def test_name_and_directories_follow_the_file(write: Any) -> None:
    settings = load_settings(write(f"model: {MODEL}", "small.yaml"))
    assert (settings.name, settings.report.directory) == ("small", "runs/small")
    assert settings.checkpoint.directory == "runs/small/checkpoints"
    moved = load_settings(write(f"model: {MODEL}"), ["report.directory=/elsewhere"])
    assert moved.checkpoint.directory == "/elsewhere/checkpoints"


def test_overrides_are_yaml_at_dotted_keys(write: Any) -> None:
    path = write(CONTRACT)
    settings = load_settings(
        path,
        [
            "train.steps=7",
            "optimizer.betas=[0.8,0.9]",
            "train.optimizer.learning_rate=3e-4",
            "parallel.split=[1, 3]",
            "model.num_hidden_layers=6",
            "cluster.device=h100-sxm",
            "name=a=b",
        ],
    )
    assert (settings.train.steps, settings.train.optimizer.betas) == (7, (0.8, 0.9))
    assert settings.train.optimizer.learning_rate == 3e-4
    assert settings.parallel.split == (1, 3)
    assert settings.model["num_hidden_layers"] == 6
    assert settings.model["vocab_size"] == 2048
    assert (settings.cluster.device, settings.name) == ("h100-sxm", "a=b")
    assert load_settings(path).train.steps == 200


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("1E5", 1e5),
        (".5", 0.5),
        ("1.", 1.0),
        ("-3", -3),
        ("1_000", 1000),
        ("true", True),
        ("null", None),
        ("no", "no"),
        ("on", "on"),
        ("010", "010"),
        ("12:30", "12:30"),
        ("2024-01-01", "2024-01-01"),
        ("0x10", "0x10"),
        ("1f1b", "1f1b"),
        ("1.2.3", "1.2.3"),
        ("'1e-3'", "1e-3"),
    ],
)
def test_scalars_mean_what_they_look_like(text: str, value: object) -> None:
    read = read_yaml(text, "override")
    assert read == value
    assert type(read) is type(value)


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(), st.lists))
def test_written_yaml_reads_back_equal(value: object) -> None:
    assert read_yaml(write_yaml(value), "dump") == value


@given(st.sampled_from(["1e-3", "no", "on", "010", "12:30", "2024-01-01", "~", "", "=", "<<", "0x1F", "1_0"]))
def test_written_yaml_means_the_same_to_other_readers(text: str) -> None:
    assert yaml.safe_load(write_yaml({"name": text})) == {"name": text}


def test_dump_loads_back_equal(write: Any) -> None:
    settings = load_settings(write(CONTRACT), ["name=2024-01-01", "parallel.split=[1, 3]", "learning_rate=1e-7"])
    assert load_settings(write(dump_settings(settings), "dumped.yaml")) == settings


def test_resolved_fills_the_world_in(write: Any) -> None:
    settings = load_settings(write(f"model: {MODEL}\nparallel: {{tensor: 2}}\ncluster: {{nodes: 2}}"))
    filled = resolved(settings, 8)
    assert (filled.parallel.data, filled.cluster.devices_per_node) == (4, 4)
    assert resolved(filled, 8) == filled
    with pytest.raises(UserError, match=r"cluster\.nodes is 4, over which 6 ranks"):
        resolved(settings.model_copy(update={"cluster": settings.cluster.model_copy(update={"nodes": 4})}), 6)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["parallel.tensr=2"], "parallel.tensr is not a setting; did you mean parallel.tensor?"),
        (["train.global_size=2"], "train.global_size is not a setting; did you mean batch.global_size?"),
        (["corpsu=x"], "corpsu is not a setting; did you mean corpus?"),
        (["report.zzzz=1"], "report.zzzz is not a setting; choose from report.directory."),
        (["train.steps=many"], "train.steps is 'many', but takes a whole number of at least 1 (optimiser steps)."),
        (["train.steps=0"], "train.steps is 0, but takes a whole number of at least 1 (optimiser steps)."),
        (["train.steps=1.5"], "train.steps is 1.5, but takes a whole number of at least 1 (optimiser steps)."),
        (["train.steps=true"], "train.steps is true, but takes a whole number of at least 1 (optimiser steps)."),
        (["parallel.recompute=some"], "parallel.recompute is 'some', but takes one of none, selective, full ("),
        (["parallel.data=most"], "parallel.data is 'most', but takes auto or a whole number of at least 1 ("),
        (["parallel.split=[1, x]"], "parallel.split is [1, 'x'], but takes auto or a list of values, each a whole"),
        (
            ["train.optimizer.name=adam"],
            "train.optimizer.name is 'adam', but takes one of adamw, sgd, adafactor, muon (",
        ),
        (["train.precision=int8"], "train.precision is 'int8', but takes one of fp32, bf16, fp16 ("),
        (["parallel.zero=4"], "parallel.zero is 4, but takes a whole number of at least 0 and of at most 3 ("),
        (["betas=[0.9]"], "train.optimizer.betas is [0.9], but takes a list of 2 values, each a number of at least 0"),
        (["learning_rate=.inf"], "train.optimizer.learning_rate is .inf, but takes a number above 0 (peak"),
        (["train.optimizer=adamw"], "train.optimizer is 'adamw', but takes a mapping of keys to values ("),
        (["model=null"], "model is null, but takes a mapping of keys to values ("),
        (["schedule=gpipe"], "schedule could be parallel.schedule or train.schedule; write the one you mean."),
        (["train.steps"], "'train.steps' is not an override; write key=value, for example train.steps=100."),
        (["train.seed=[1"], "train.seed=[1, line 1 is not valid YAML: "),
        (["name.first=x"], "name.first=x cannot be applied, because first would lie below 'demo'."),
    ],
)
def test_each_mistake_gets_one_sentence(write: Any, overrides: list[str], expected: str) -> None:
    message = sentence(write(CONTRACT), *overrides)
    assert message.startswith(expected)
    assert "\n" not in message


def test_several_mistakes_get_a_sentence_each(write: Any) -> None:
    message = sentence(write(CONTRACT), "train.steps=x", "parallel.data=x", "batch.size=2")
    assert [line.split(" is ")[0] for line in message.splitlines()] == ["parallel.data", "batch.size", "train.steps"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "is empty; settings are a mapping"),
        ("- 1\n- 2", "holds [1, 2]; settings are a mapping"),
        ("just text", "holds 'just text'; settings are a mapping"),
        ("name: a\nmodel: {a: 1}\nname: b", "line 1 is not valid YAML: name is there twice."),
        ("name: a\nmodel:\n  a: 1\n  b: 2\n  a: 3", "line 3 is not valid YAML: a is there twice."),
        ("name: [1", "is not valid YAML: "),
        ("name: \x00", "is not valid YAML: "),
        ("1: x", "1 is not a setting; keys are words"),
        ("name: x", "model is missing: "),
        (f"name: x\nmodel: {{a: {'9' * 200}}}", "holds a number of more than 100 digits; write a smaller one."),
        (f"name: x\nmodel: {{a: 1}}\n{'k' * 200}: 1", "k… is not a setting; "),
    ],
)
def test_files_that_are_no_settings(write: Any, text: str, expected: str) -> None:
    message = sentence(write(text))
    assert expected in message
    assert "\n" not in message


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    assert sentence(tmp_path / "no.yaml") == f"{tmp_path / 'no.yaml'} does not exist; give the path of a settings file."
    assert "cannot be read: Is a directory" in sentence(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x80")
    assert "is not a text file" in sentence(tmp_path / "binary.yaml")


def test_directories_of_wrong_type_are_named() -> None:
    with pytest.raises(UserError, match="report is 3"):
        build_settings({"name": "x", "model": MODEL, "report": 3})
    with pytest.raises(UserError, match=r"report\.directory is 3"):
        build_settings({"name": "x", "model": MODEL, "report": {"directory": 3}})


def test_settings_import_no_torch() -> None:
    code = "import sys, weft.launch.settings; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
