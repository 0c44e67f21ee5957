"""`weft serve` against the clients that people use: OpenAI's own, curl, and those that mean no good."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI

from tests.launch.browser import CHROMIUM, Browser
from tests.launch.tiny_run import make_run
from tests.pool import Pool

SLOTS, QUEUE, CONTEXT, TOKEN = 3, 2, 200, "a secret"


@dataclass
class Server:
    """A running `weft serve`, and a connection that sends its request a byte at a time."""

    process: subprocess.Popen[str]
    port: int
    slow: socket.socket
    started: float

    @property
    def client(self) -> OpenAI:
        return OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key=TOKEN, max_retries=0, timeout=60)

    def send(self, head: str, content: bytes = b"") -> tuple[int, str]:
        """A request written by hand: the status and the rest of the answer."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=60) as connection:
            connection.sendall(head.replace("\n", "\r\n").encode())
            connection.sendall(content)
            answer = b""
            while part := connection.recv(65536):
                answer += part
        return int(answer.split(b" ", 2)[1]), answer.decode()

    def post(self, content: bytes, path: str = "/v1/completions", **headers: str) -> tuple[int, str]:
        given = {"host": "localhost", "content-type": "application/json", "content-length": str(len(content))}
        given |= {"authorization": f"Bearer {TOKEN}", "connection": "close"}
        given |= {name.replace("_", "-"): value for name, value in headers.items()}
        lines = "\n".join(f"{name}: {value}" for name, value in given.items())
        return self.send(f"POST {path} HTTP/1.1\n{lines}\n\n", content)

    def metric(self, name: str) -> float:
        _, text = self.send(
            f"GET /metrics HTTP/1.1\nhost: localhost\nauthorization: Bearer {TOKEN}\nconnection: close\n\n"
        )
        found = re.search(rf"^{re.escape(name)} (\S+)", text, re.MULTILINE)
        return float(found[1]) if found else 0.0


def start(run: Path, *arguments: str) -> tuple[subprocess.Popen[str], int]:
    command = [sys.executable, "-m", "weft", "serve", str(run), "--port", "0", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"WEFT_API_KEY": TOKEN})
    assert process.stdout is not None
    found = re.search(r"http://127.0.0.1:(\d+)/v1", process.stdout.readline())
    assert found, "the server did not start"
    return process, int(found[1])


@pytest.fixture(scope="module")
def run(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(pool, tmp_path_factory.mktemp("served") / "tiny", chat=True)


@pytest.fixture(scope="module")
def server(run: Path) -> Iterator[Server]:
    process, port = start(run, "--slots", str(SLOTS), "--queue", str(QUEUE), "--context", str(CONTEXT))
    slow = socket.create_connection(("127.0.0.1", port))
    slow.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: local")
    yield Server(process, port, slow, time.monotonic())
    process.kill()
    process.wait()


def test_openai_client_completes_streams_and_chats(server: Server) -> None:
    client = server.client
    assert [model.id for model in client.models.list()] == ["tiny"]
    options: dict[str, Any] = {"model": "tiny", "max_tokens": 12, "temperature": 0.9, "seed": 4}
    whole = client.completions.create(prompt=["The weft", "warp"], n=2, **options)
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
    assert len({choice.text for choice in whole.choices}) == 4
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 48
    stream = client.completions.create(
        prompt="The weft", stream=True, stream_options={"include_usage": True}, **options
    )
    pieces = list(stream)
    assert "".join(piece.choices[0].text for piece in pieces if piece.choices) == whole.choices[0].text
    assert pieces[-1].usage is not None
    assert pieces[-2].choices[0].finish_reason == "length"
    messages: Any = [{"role": "user", "content": [{"type": "text", "text": "Weave."}]}]
    answer = client.chat.completions.create(messages=messages, logprobs=True, top_logprobs=2, **options)
    told = "".join(part.choices[0].delta.content or "" for part in
                   client.chat.completions.create(messages=messages, stream=True, **options))  # fmt: skip
    plain = client.completions.create(prompt="[user] Weave.\n[assistant] ", **options)
    assert answer.choices[0].message.content == told == plain.choices[0].text
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert all(len(token.top_logprobs) == 2 and token.logprob <= 0 for token in logprobs.content)


def test_stop_strings_end_a_text_before_them(server: Server) -> None:
    options: dict[str, Any] = {"model": "tiny", "prompt": "The", "max_tokens": 40, "temperature": 0}
    whole = server.client.completions.create(**options).choices[0].text
    stop = whole[7:9]
    ended = server.client.completions.create(stop=[stop, "never"], **options).choices[0]
    assert (ended.text, ended.finish_reason) == (whole[: whole.index(stop)], "stop")


def test_prompts_are_scored_as_harnesses_ask_it(server: Server) -> None:
    """The request of lm-evaluation-harness for a log-likelihood."""
    tokens = [5, 9, 33, 70, 12]
    answer = server.client.completions.create(
        model="tiny", prompt=[tokens, tokens[:3]], max_tokens=1, logprobs=1, echo=True, temperature=0
    )
    first, second = (choice.logprobs for choice in answer.choices)
    assert first is not None
    assert second is not None
    assert first.token_logprobs is not None
    assert second.token_logprobs is not None
    assert len(first.token_logprobs) == len(tokens) + 1
    assert first.token_logprobs[0] is None
    assert first.token_logprobs[1:3] == pytest.approx(second.token_logprobs[1:3], abs=1e-5)
    likeliest = [next(iter(top.values())) for top in (first.top_logprobs or [])[1:]]
    assert all(given <= best + 1e-6 for given, best in zip(first.token_logprobs[1:], likeliest, strict=True))


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
def test_curl_gets_events_as_they_come(server: Server) -> None:
    body = json.dumps(
        {"model": "tiny", "prompt": "The weft", "max_tokens": 12, "temperature": 0.9, "seed": 4, "stream": True}
    )
    command = ["curl", "-sN", f"http://localhost:{server.port}/v1/completions", "-d", body]
    command += ["-H", "content-type: application/json", "-H", f"authorization: Bearer {TOKEN}"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n\n")
    assert len(lines) == 12 + 3  # tokens, the end of the text, that of the stream, and nothing
    assert all(line.startswith("data: ") for line in lines[:-1])
    assert lines[-2:] == ["data: [DONE]", ""]


BAD_BODIES = {
    b"not json": 400,
    b"[]": 400,
    b'{"model": "tiny", "prompt": "\xff"}': 400,
    b'{"model": "tiny", "prompt": "\\ud800"}': 400,
    b'{"model": "tiny", "prompt": "x", "max_tokens": -1}': 400,
    b'{"model": "tiny", "prompt": "x", "max_tokens": 1000}': 400,
    b'{"model": "tiny", "prompt": "x", "temperature": NaN}': 400,
    b'{"model": "tiny", "prompt": "x", "presence_penalty": 1}': 400,
    b'{"model": "tiny", "prompt": [300]}': 400,
    b'{"model": "tiny", "prompt": []}': 400,
    b'{"model": "tiny", "prompt": "' + b"word " * 5000 + b'"}': 400,
    b'{"model": "other", "prompt": "x"}': 404,
    b"[" * 100_000: 400,
    b" " * 2_000_000: 413,
}


def test_what_is_wrong_gets_the_right_status_and_harms_nobody(server: Server) -> None:
    for body, status in BAD_BODIES.items():
        found, answer = server.post(body)
        assert found == status, (body[:60], answer)
        assert json.loads(answer.partition("\r\n\r\n")[2])["error"]["message"], body[:60]
    assert server.post(b" " * (100 << 20))[0] == 413
    assert server.post(b"{}", content_type="text/plain")[0] == 415
    assert server.post(b"{}", authorization="Bearer wrong")[0] == 401
    assert server.post(b"{}", host="evil.example")[0] == 400
    assert server.post(b"{}", path="/v1/nothing")[0] == 404
    assert server.send("GARBAGE\n\n")[0] == 400
    wizard = {"model": "tiny", "messages": [{"role": "wizard", "content": "x"}]}
    status, answer = server.post(json.dumps(wizard).encode(), path="/v1/chat/completions")
    assert (status, "no wizards" in answer) == (400, True)
    with pytest.raises(openai.AuthenticationError):
        OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="guess").models.list()
    assert server.send("GET /health HTTP/1.1\nhost: localhost\nconnection: close\n\n")[0] == 200


def test_more_than_slots_and_queue_are_refused_and_a_client_that_leaves_frees_its_slot(server: Server) -> None:
    body: dict[str, Any] = {"model": "tiny", "prompt": "x", "max_tokens": 190, "temperature": 1.5, "n": SLOTS + QUEUE}
    streams = server.client.completions.create(**body, stream=True)
    next(iter(streams))
    with pytest.raises(openai.RateLimitError):
        server.client.completions.create(model="tiny", prompt="x")
    ended = server.metric("weft_generated_tokens_total")
    streams.close()
    deadline = time.monotonic() + 20
    while server.metric("weft_active_texts") or server.metric("weft_waiting_texts"):
        assert time.monotonic() < deadline, "the texts of a client that left go on"
    assert server.metric("weft_generated_tokens_total") - ended < 190 * (SLOTS + QUEUE)
    assert server.metric('weft_texts_total{finish="cancelled"}') > 0
    assert server.client.completions.create(model="tiny", prompt="x", max_tokens=2).choices[0].text


def test_many_clients_at_a_time_get_what_each_gets_alone(server: Server) -> None:
    """Texts come and go in the slots beside each other; refused clients try again."""
    client = OpenAI(base_url=server.client.base_url, api_key=TOKEN, max_retries=20, timeout=60)

    def ask(number: int) -> str:
        options: dict[str, Any] = {"model": "tiny", "max_tokens": 3 + number % 5, "seed": number, "temperature": 0.8}
        return client.completions.create(prompt=f"Row {number}", **options).choices[0].text

    alone = [ask(number) for number in range(8)]
    together: dict[int, str] = {}
    threads = [threading.Thread(target=lambda n=n: together.update({n: ask(n)})) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together[number] for number in range(8)] == alone


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
def test_page_chats_with_the_model(server: Server) -> None:
    with Browser(f"http://127.0.0.1:{server.port}/") as page:
        page.wait_for("document.getElementById('state')?.textContent.includes('token')")
        page.evaluate(f"at('token').value = {TOKEN!r}; at('token').dispatchEvent(new Event('change'))")
        page.wait_for("document.getElementById('name')?.textContent === 'tiny'")
        page.evaluate("at('temperature').value = 0; at('tokens').value = 8; at('text').value = 'Weave <b>.'")
        page.evaluate("at('text').dispatchEvent(new KeyboardEvent('keydown', {key: 'Enter'}))")
        page.wait_for("at('send').textContent === 'Send' && at('turns').children.length === 2")
        page.wait_for("at('turns').children[1].textContent")
        shown, answer = page.evaluate("[...at('turns').children].map(turn => turn.textContent)")
    messages: Any = [{"role": "user", "content": "Weave <b>."}]
    told = server.client.chat.completions.create(model="tiny", messages=messages, temperature=0, max_tokens=8)
    assert (shown, answer) == ("Weave <b>.", told.choices[0].message.content)


def test_a_head_that_drips_in_is_not_waited_for_and_sigterm_ends_the_server(server: Server) -> None:
    server.slow.settimeout(max(1.0, 30 - (time.monotonic() - server.started)))
    assert server.slow.recv(1) == b"", "the connection is still open"
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(20) == 0
