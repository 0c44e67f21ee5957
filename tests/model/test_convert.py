"""weft convert: weights come back bit for bit, and transformers computes with them what it did before."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.model.references import Reference, inputs_of
from tests.pool import Pool
from weft.launch.cli import run


def convert(source: Path | str, destination: Path, *options: str) -> int:
    return run(["convert", str(source), str(destination), *options])


def there_and_back(directories: list[str], work: Path) -> list[int]:
    return [
        status
        for number, directory in enumerate(directories)
        for status in (
            convert(directory, work / f"checkpoint{number}"),
            convert(work / f"checkpoint{number}", work / f"back{number}", "--shard-gigabytes", "0.00003"),
        )
    ]


def stored(directory: Path | str) -> dict[str, Tensor]:
    return {name: tensor for file in Path(directory).glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_weights_come_back_bit_for_bit_and_mean_the_same(
    pool: Pool, references: list[Reference], tmp_path: Path
) -> None:
    import transformers

    statuses = pool.run(1, there_and_back, [reference.directory for reference in references], tmp_path)
    assert set(statuses[0]) == {0}
    for number, reference in enumerate(references):
        before, after = stored(reference.directory), stored(tmp_path / f"back{number}")
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before), reference.case
        config = json.loads((tmp_path / f"back{number}" / "config.json").read_text())
        model = getattr(transformers, config["architectures"][0]).from_pretrained(tmp_path / f"back{number}").eval()
        # with gradients, as the reference is made: without them T5's logits are rounded otherwise
        logits = model(**inputs_of(reference.case)).logits
        assert torch.equal(logits, reference.logits), reference.case
        index = json.loads((tmp_path / f"back{number}" / "model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == after.keys()


def test_precision_is_kept_or_changed_as_asked(pool: Pool, references: list[Reference], tmp_path: Path) -> None:
    weights = {name: tensor.bfloat16() for name, tensor in stored(references[4].directory).items()}
    (tmp_path / "half").mkdir()
    save_file(weights, tmp_path / "half" / "model.safetensors")
    config = Path(references[4].directory) / "config.json"
    (tmp_path / "half" / "config.json").write_text(config.read_text())
    assert pool.run(1, there_and_back, [str(tmp_path / "half")], tmp_path) == [[0, 0]]
    same, wider = stored(tmp_path / "back0"), tmp_path / "wider"
    assert all(torch.equal(same[name], weights[name]) and same[name].dtype == torch.bfloat16 for name in weights)
    assert json.loads((tmp_path / "back0" / "config.json").read_text())["dtype"] == "bfloat16"
    assert pool.run(1, convert, tmp_path / "checkpoint0", wider, "--dtype", "float32") == [0]
    assert all(torch.equal(tensor, weights[name].float()) for name, tensor in stored(wider).items())


def spoil(directory: Path, **changes: Any) -> Path:
    config = json.loads((directory / "config.json").read_text()) | changes
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture
def copied(references: list[Reference], tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    for file in Path(references[4].directory).iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    return directory


def refusal(copied: Path, capsys: pytest.CaptureFixture[str]) -> str:
    assert convert(copied, copied.parent / "checkpoint") == 2
    assert not list(copied.parent.glob("*checkpoint*"))
    return capsys.readouterr().err


def test_unknown_models_are_refused_with_the_known_ones(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = refusal(spoil(copied, model_type="mamba"), capsys)
    assert "'mamba'" in words
    assert "gemma3_text" in words
    assert "parallelize()" in words


def test_pickled_weights_are_refused_with_a_command(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for file in copied.glob("model*"):
        file.unlink()
    (copied / "pytorch_model.bin").write_bytes(b"\x80")
    words = refusal(copied, capsys)
    assert "weights_only=True" in words
    assert "save_pretrained" in words


def test_what_the_config_does_not_say_or_weft_does_not_do_is_refused(
    pool: Pool, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "rope_parameters" in refusal(spoil(copied, rope_parameters={"rope_type": "spiral"}), capsys)
    assert "quantization_config" in refusal(
        spoil(copied, quantization_config={"bits": 4}, rope_parameters=None), capsys
    )


def test_weights_of_another_shape_are_refused(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "model.embed_tokens.weight" in refusal(spoil(copied, vocab_size=98), capsys)
