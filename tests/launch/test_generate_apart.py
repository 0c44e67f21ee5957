"""`weft generate` with an encoder-decoder: its answers come from a checkpoint of a run, in any layout."""

import json
from pathlib import Path

import pytest

from tests.launch.tiny_run import write_run
from tests.pool import Pool
from weft.launch.cli import run
from weft.launch.errors import UserError
from weft.launch.source import check_kind, open_source

T5 = {
    "model_type": "t5",
    "vocab_size": 300,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
}


def answer(folder: Path, arguments: list[str]) -> int:
    prompts = folder / "prompts.jsonl"
    return run(["generate", str(folder), "--prompts", str(prompts), "--max-tokens", "8", *arguments])


def test_answers_are_the_same_in_every_layout(pool: Pool, tmp_path: Path) -> None:
    pool.run(1, write_run, tmp_path, T5)
    lines = [{"prompt": "The shuttle carries"}, {"prompt": "row", "id": 7}]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    ways = [("drawn", ["--temperature", "1.5"], 1), ("searched", ["--beams", "3", "--batch", "1"], 1)]
    ways += [(f"{name} again", [*options, "parallel.tensor=2", "parallel.pipeline=2"], 4) for name, options, _ in ways]
    for name, options, ranks in ways:
        given = ["--output", str(tmp_path / name), *options]
        assert pool.run(ranks, answer, tmp_path, given) == [0] * ranks
    for name in ("drawn", "searched"):
        texts = [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        assert [text.get("id") for text in texts] == [None, 7]
        assert texts == [json.loads(line) for line in (tmp_path / f"{name} again").read_text().splitlines()]
        assert all(text["tokens"] for text in texts)
    with pytest.raises(UserError, match="weft generate alone"):
        check_kind(open_source(str(tmp_path), []))
