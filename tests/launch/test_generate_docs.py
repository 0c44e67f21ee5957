"""The page on generating and serving tells the truth: its commands run in its order, and its client is served."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.tiny_run import WORDS, make_run
from tests.pool import Pool
from tests.test_docs import GENERATE, blocks
from weft.launch.cli import run
from weft.launch.generate_command import generate_command
from weft.launch.serve_command import serve_command

SMALL = [
    "train.steps=2",
    "batch.global_size=2",
    "batch.micro_size=1",
    "corpus.sequence_length=32",
    "cluster.device=cpu",
]


@pytest.fixture(scope="module")
def folder(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the page takes for given."""
    path = tmp_path_factory.mktemp("page")
    make_run(pool, path / "tiny", chat=True)
    pool.run(1, run_in, path, ["convert", "tiny", "my-model"])
    (path / "words").mkdir()
    for name in ("train", "held-out"):
        (path / "words" / f"{name}.txt").write_text(WORDS * 40, encoding="utf-8")
    (path / "prompts.jsonl").write_text('{"prompt": "row"}\n{"prompt": "warp", "id": 7}\n')
    for block, name in zip(blocks(GENERATE, "json"), ("choices.jsonl", "answers.jsonl"), strict=True):
        json.loads(block)
        (path / name).write_text(block)
    (settings,) = blocks(GENERATE, "yaml")
    (path / "finetune.yaml").write_text(settings)
    return path


def run_in(folder: Path, arguments: list[str]) -> int:
    """Run `weft` as one of the ranks that are there."""
    os.chdir(folder)
    return run(arguments)


def test_commands_run_one_after_the_other(pool: Pool, folder: Path) -> None:
    for words in [shlex.split(line) for block in blocks(GENERATE, "sh") for line in block.splitlines()]:
        assert words[0] == "weft"
        if words[1] == "serve" and "my-finetune" in words:
            check_served(folder, words)
        elif words[1] == "serve":
            serve_command.make_context("serve", words[2:])
        else:
            ranks = 2 if "train" in words or any(re.match(r"parallel\.\w+=2", word) for word in words) else 1
            given = words[1:] + (SMALL if words[1] == "train" else [])
            assert pool.run(ranks, run_in, folder, given) == [0] * ranks, words
    texts = [json.loads(line) for line in (folder / "texts.jsonl").read_text().splitlines()]
    assert [text.get("id") for text in texts] == [None, 7]
    assert {result["metric"] for result in json.loads((folder / "results.json").read_text())["results"]} == {
        "loss, nats per token", "perplexity", "bits per byte"
    }  # fmt: skip
    assert "inside" in (folder / "inside.html").read_text()


def check_served(folder: Path, words: list[str]) -> None:
    """Start the server at a free port, run the page's client against it, and end it as Ctrl-C does."""
    words[words.index("--port") + 1] = "0"
    command = [sys.executable, "-m", *words]
    server = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert server.stdout is not None
        port = re.findall(r":(\d+)/v1", server.stdout.readline())[0]
        (client,) = blocks(GENERATE, "python")
        subprocess.run([sys.executable, "-c", client.replace(":8000/", f":{port}/")], check=True, timeout=60)
        server.send_signal(signal.SIGINT)
        assert server.wait(30) in (0, 128 + signal.SIGINT)
    finally:
        server.kill()
        server.wait()


def test_options_on_the_page_are_those_of_the_command() -> None:
    page = GENERATE.read_text(encoding="utf-8")
    known = {option for parameter in generate_command.params for option in parameter.opts}
    listed = set(re.findall(r"`(--[a-z-]+)`", page.partition("| option | does |")[2].partition("## Serving")[0]))
    assert len(listed) == 9
    assert listed <= known
