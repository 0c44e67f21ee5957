"""Memory that each rank holds while it loads a Hugging Face directory in tensor 2 × pipeline 2.

    python benchmarks/loading.py --gigabytes 2

Writes a Llama of random bfloat16 weights, starts four processes on this machine, and samples each one's anonymous
memory (what it holds; mapped files count as the system's cache) while `load_pretrained` fills its shard.
"""

import argparse
import json
import multiprocessing
import os
import tempfile
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist

from weft.model.config import model_config
from weft.model.decoder import DecoderStage
from weft.model.hugging_face import load_pretrained
from weft.model.safetensors_writer import Outgoing, write_safetensors
from weft.model.split import split_layers
from weft.model.weight_names import LLAMA, find_place
from weft.parallel import build_mesh

TENSOR, PIPELINE = 2, 2


def settings(gigabytes: float) -> dict[str, object]:
    hidden, vocabulary = 2048, 32768
    layer = 4 * hidden * hidden + 3 * hidden * 4 * hidden
    layers = max(2, round((gigabytes * 1e9 / 2 - 2 * vocabulary * hidden) / layer))
    return {
        "model_type": "llama", "vocab_size": vocabulary, "hidden_size": hidden, "intermediate_size": 4 * hidden,
        "num_hidden_layers": layers, "num_attention_heads": 16, "num_key_value_heads": 16,
    }  # fmt: skip


def write_model(directory: Path, gigabytes: float) -> None:
    """A directory like a real one, in shards of 500 MB."""
    values = settings(gigabytes)
    (directory / "config.json").write_text(json.dumps(values))
    config = model_config(values)
    stage = DecoderStage(config, range(config.num_hidden_layers), mesh=build_mesh()["tensor"], device="meta")
    tensors = []
    for name, parameter in stage.named_parameters():
        shape = tuple(parameter.shape)
        stored = find_place(LLAMA, config, name, shape[0]).name
        tensors.append(Outgoing(stored, torch.bfloat16, shape, lambda shape=shape: torch.full(shape, 0.01)))
    write_safetensors(directory, tensors, shard_bytes=500_000_000)


def anonymous_bytes() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def load(rank: int, directory: str, port: int, results: "multiprocessing.Queue[dict[str, float]]") -> None:
    """One rank: report what it held at most above what it held before, beside its shard and the largest tensor."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    mesh = build_mesh(tensor=TENSOR, pipeline=PIPELINE)
    config = model_config(json.loads((Path(directory) / "config.json").read_text()))
    stage_number = mesh["pipeline"].get_local_rank()
    layers = split_layers(config, PIPELINE)[stage_number]
    last = stage_number == PIPELINE - 1
    options = {"mesh": mesh["tensor"], "device": "meta", "dtype": torch.bfloat16}
    module = DecoderStage(config, layers, first=stage_number == 0, last=last, **options)
    before, peak, done = anonymous_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, anonymous_bytes())
            time.sleep(0.005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    module.to_empty(device="cpu")
    load_pretrained(module, directory, config)
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    shard = sum(parameter.nbytes for parameter in module.parameters())
    largest = 2 * max(config.vocab_size * config.hidden_size, config.hidden_size * config.intermediate_size)
    results.put({"rank": rank, "shard": shard, "tensor": largest, "held": peak - before, "seconds": seconds})
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=2.0)
    gigabytes = parser.parse_args().gigabytes
    with tempfile.TemporaryDirectory() as directory:
        write_model(Path(directory), gigabytes)
        dist.destroy_process_group()
        context = multiprocessing.get_context("spawn")
        results = context.Queue()
        port = 20000 + os.getpid() % 20000
        ranks = [context.Process(target=load, args=(rank, directory, port, results)) for rank in range(4)]
        for rank in ranks:
            rank.start()
        rows = sorted((results.get(timeout=500) for _ in ranks), key=lambda row: row["rank"])
        for rank in ranks:
            rank.join()
    print("rank  shard MB  largest tensor MB  held at most MB  held / shard  bound   seconds")
    for row in rows:
        kept = "kept" if row["held"] <= 1.15 * row["shard"] + row["tensor"] else "BROKEN"
        print(
            f"{row['rank']:4}  {row['shard'] / 1e6:8.0f}  {row['tensor'] / 1e6:17.0f}  {row['held'] / 1e6:15.0f}  "
            f"{row['held'] / row['shard']:12.3f}  {kept:6}  {row['seconds']:7.1f}"
        )


if __name__ == "__main__":
    main()
