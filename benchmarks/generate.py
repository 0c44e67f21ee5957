"""Generated tokens per second beside `transformers`, on the same small Llama with the same random weights.

    python benchmarks/generate.py                # three interleaved rounds, medians
    python benchmarks/generate.py --rounds 1

Greedy, 128 new tokens after prompts of 32, in float32 on the CPU. One process with two threads on each side;
weft in two processes of one thread each (tensor 2, pipeline 2) beside it.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from typing import Any

import torch

PROMPT, NEW_TOKENS = 32, 128
MODEL: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
}
LAYOUTS = {"one process": (1, 1), "tensor 2": (2, 1), "pipeline 2": (1, 2)}


def prompts(batch: int) -> list[list[int]]:
    rows: list[list[int]] = torch.randint(0, 2048, (batch, PROMPT), generator=torch.Generator().manual_seed(0)).tolist()
    return rows


def measure_weft(tensor: int, pipeline: int, batches: list[int]) -> None:
    """One rank: print the tokens per second of each batch, on rank 0."""
    import torch.distributed as dist

    from weft.model.config import model_config
    from weft.model.decoder import DecoderStage, initial_distribution
    from weft.model.generation.driver import Session
    from weft.model.generation.request import Request
    from weft.model.generation.sampling import Sampling
    from weft.model.generation.worker import Placement, Worker
    from weft.model.split import split_layers
    from weft.parallel import build_mesh, build_schedule, initialize

    torch.set_num_threads(2 // (tensor * pipeline))
    mesh = build_mesh(tensor=tensor, pipeline=pipeline)
    config, rank = model_config(MODEL), mesh["pipeline"].get_local_rank()
    layers = split_layers(config, pipeline)[rank]
    stage = DecoderStage(config, layers, first=rank == 0, last=rank == pipeline - 1, mesh=mesh["tensor"]).eval()
    initialize(stage, 0, initial_distribution(config))
    placement = Placement({rank: stage}, build_schedule("gpipe", pipeline, 1), mesh["tensor"], mesh["pipeline"])
    worker = Worker(placement, vocab_size=2048, slots=max(batches), capacity=PROMPT + NEW_TOKENS, pack=True)
    session = Session(worker, mesh)
    if dist.get_rank():
        session.follow()
    else:
        speeds = []
        for batch in [batches[0], *batches]:  # the first warms up
            requests = [Request(row, NEW_TOKENS, Sampling(temperature=0)) for row in prompts(batch)]
            start = time.perf_counter()
            session.run(requests)
            speeds.append(batch * NEW_TOKENS / (time.perf_counter() - start))
        session.close()
        print(json.dumps(speeds[1:]))
    dist.destroy_process_group()


def measure_transformers(batches: list[int]) -> None:
    """Print the tokens per second of each batch."""
    import transformers

    torch.set_num_threads(2)
    keys = {key: value for key, value in MODEL.items() if key != "model_type"}
    model: Any = transformers.LlamaForCausalLM(transformers.LlamaConfig(**keys, eos_token_id=None, pad_token_id=0))
    model.eval()
    speeds = []
    for batch in [batches[0], *batches]:
        rows = torch.tensor(prompts(batch))
        start = time.perf_counter()
        texts = model.generate(rows, attention_mask=torch.ones_like(rows), max_new_tokens=NEW_TOKENS, do_sample=False)
        assert texts.shape[1] == PROMPT + NEW_TOKENS
        speeds.append(batch * NEW_TOKENS / (time.perf_counter() - start))
    print(json.dumps(speeds[1:]))


def run(arguments: list[str], ranks: int) -> list[float]:
    starter = [sys.executable]
    if ranks > 1:
        starter += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    output = subprocess.run([*starter, __file__, *arguments], capture_output=True, text=True, check=True).stdout
    speeds: list[float] = json.loads(output.strip().splitlines()[-1])
    return speeds


def compare(rounds: int, batches: list[int]) -> None:
    given = ["--batches", *map(str, batches)]
    found: dict[str, list[list[float]]] = {"transformers": [], **{name: [] for name in LAYOUTS}}
    for _ in range(rounds):
        found["transformers"].append(run(["--side", "transformers", *given], 1))
        for name, (tensor, pipeline) in LAYOUTS.items():
            found[name].append(run(["--side", f"{tensor},{pipeline}", *given], tensor * pipeline))
    medians = {name: [statistics.median(column) for column in zip(*rows, strict=True)] for name, rows in found.items()}
    print("| batch | transformers | " + " | ".join(f"weft, {name}" for name in LAYOUTS) + " | ratio, one process |")
    print("|---:" * (3 + len(LAYOUTS)) + "|")
    for place, batch in enumerate(batches):
        cells = [f"{speeds[place]:,.0f} tokens/s" for speeds in medians.values()]
        ratio = medians["one process"][place] / medians["transformers"][place]
        print(f"| {batch} | " + " | ".join(cells) + f" | {ratio:.2f} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--side", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side is None:
        compare(options.rounds, options.batches)
    elif options.side == "transformers":
        measure_transformers(options.batches)
    else:
        measure_weft(*map(int, options.side.split(",")), options.batches)
