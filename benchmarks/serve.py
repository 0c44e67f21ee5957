"""`weft serve` under load: 64 clients for a minute on one small model.

    python benchmarks/serve.py
    python benchmarks/serve.py --clients 16 --seconds 10 parallel.tensor=2

Each client asks for 16 to 48 new tokens at a time, one request after the other, and tries again a moment after a 429;
every tenth request is a stream that its client leaves after the first tokens. Random weights, float32 on the CPU, one
process of one thread unless a layout is given. Times are of requests that were answered, to their last token.
"""

import argparse
import asyncio
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import openai
import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))


def make_model(folder: Path) -> None:
    """A run with random weights of 3.6 M parameters, made by the tests' own maker."""
    from tests.launch.tiny_run import write_run

    write_run(folder, {
        "model_type": "llama", "vocab_size": 300, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4,
        "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 256,
    })  # fmt: skip


async def client(number: int, api: openai.AsyncOpenAI, end: float, seen: dict[str, Any]) -> None:
    draws = random.Random(number)
    while time.monotonic() < end:
        most, start = draws.randint(16, 48), time.monotonic()
        leaves = draws.random() < 0.1
        try:
            if leaves:
                stream = await api.completions.create(model="tiny", prompt="row by row", max_tokens=most, stream=True)
                async for _ in stream:
                    break
                await stream.close()
                seen["outcomes"]["left"] += 1
            else:
                answer = await api.completions.create(model="tiny", prompt="row by row", max_tokens=most)
                seen["tokens"] += answer.usage.completion_tokens if answer.usage else 0
                seen["seconds"].append(time.monotonic() - start)
                seen["outcomes"]["answered"] += 1
        except openai.RateLimitError:
            seen["outcomes"]["429"] += 1
            await asyncio.sleep(draws.uniform(0.2, 0.6))
        except openai.OpenAIError as error:
            seen["outcomes"][f"error: {error}"] += 1


async def watch(process: psutil.Process, end: float, sizes: list[int]) -> None:
    while time.monotonic() < end:
        ranks = [process, *process.children(recursive=True)]
        sizes.append(sum(rank.memory_info().rss for rank in ranks))
        await asyncio.sleep(1)


async def load(port: int, process: psutil.Process, clients: int, seconds: float) -> dict[str, Any]:
    api = openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=120)
    seen: dict[str, Any] = {"outcomes": Counter(), "seconds": [], "tokens": 0, "sizes": []}
    end = time.monotonic() + seconds
    await asyncio.gather(
        watch(process, end, seen["sizes"]), *(client(number, api, end, seen) for number in range(clients))
    )
    await asyncio.sleep(1)
    seen["models"] = [model.id async for model in await api.models.list()]
    return seen


def percentile(values: list[float], share: float) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[round(share * 100) - 1]


def report(seen: dict[str, Any], seconds: float, metrics: str) -> None:
    sizes, times = [size / 2**20 for size in seen["sizes"]], seen["seconds"]
    held = re.search(r"^weft_active_texts (\S+)", metrics, re.MULTILINE)
    print(f"outcomes: {json.dumps(seen['outcomes'])}; slots still held afterwards: {held[1] if held else '?'}")
    print(f"answered: {len(times) / seconds:.1f} requests/s, {seen['tokens'] / seconds:,.0f} tokens/s")
    print(f"time of a request: p50 {percentile(times, 0.5):.2f} s, p99 {percentile(times, 0.99):.2f} s")
    early = max(sizes[: max(1, len(sizes) // 4)])
    print(f"memory: {sizes[0]:.0f} MiB at first, {early:.0f} MiB after a quarter, {max(sizes):.0f} MiB at most, "
          f"{sizes[-1]:.0f} MiB at last")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("layout", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder, "tiny"))
        command = [
            sys.executable,
            "-m",
            "weft",
            "serve",
            f"{folder}/tiny",
            "--port",
            "0",
            "--slots",
            "16",
            "--queue",
            "32",
        ]
        server = subprocess.Popen(
            [*command, *options.layout], stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        assert server.stdout is not None
        port = int(re.findall(r":(\d+)/v1", server.stdout.readline())[0])
        seen = asyncio.run(load(port, psutil.Process(server.pid), options.clients, options.seconds))
        import urllib.request

        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
            report(seen, options.seconds, answer.read().decode())
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
