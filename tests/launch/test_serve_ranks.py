"""`weft serve` on several ranks answers OpenAI's client as one process does, and goes on when a client leaves."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

from tests.launch.tiny_run import make_run
from tests.pool import Pool


@pytest.fixture(scope="module")
def run(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(pool, tmp_path_factory.mktemp("ranks") / "tiny")


@pytest.mark.parametrize("layout", ["parallel.tensor=2", "parallel.pipeline=2"])
def test_ranks_serve_together(run: Path, layout: str) -> None:
    command = [
        sys.executable,
        "-m",
        "weft",
        "serve",
        str(run),
        "--port",
        "0",
        "--slots",
        "2",
        "--context",
        "200",
        layout,
    ]
    environment = {name: value for name, value in os.environ.items() if name != "WEFT_API_KEY"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stdout is not None
        found = re.search(r"http://127.0.0.1:(\d+)/v1", process.stdout.readline())
        assert found, "the server did not start"
        check(OpenAI(base_url=f"http://127.0.0.1:{found[1]}/v1", api_key="none", max_retries=0, timeout=60))
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) in (0, 128 + signal.SIGTERM)
    finally:
        process.kill()
        process.wait()


def check(client: OpenAI) -> None:
    """Whole and streamed texts agree; a text whose client has left makes room for others."""
    options: dict[str, Any] = {"model": "tiny", "max_tokens": 8, "temperature": 0.9, "seed": 4}
    whole = client.completions.create(prompt=["The weft", "warp"], **options)
    assert len({choice.text for choice in whole.choices}) == 2
    stream = client.completions.create(prompt="The weft", stream=True, **options)
    assert "".join(piece.choices[0].text for piece in stream if piece.choices) == whole.choices[0].text
    left = client.completions.create(prompt="x", n=2, stream=True, **options | {"max_tokens": 190})
    next(iter(left))
    left.close()
    again = client.completions.create(prompt=["The weft", "warp"], **options)
    assert [choice.text for choice in again.choices] == [choice.text for choice in whole.choices]
    deadline = time.monotonic() + 30
    while "weft_active_texts 0.0" not in str(client.get("/../metrics", cast_to=str)):
        assert time.monotonic() < deadline, "the texts of a client that left go on"
