"""Mutated checkpoint manifests, settings and models' configs: each is taken or refused in one sentence, soon and in
little memory.

    python benchmarks/fuzz.py                        # 5,000 of each
    python benchmarks/fuzz.py --count 500 --seed 7

The mutations follow from the seed. Most manifests get a valid checksum of their own, as an attacker would give them.
"""

import argparse
import json
import random
import re
import resource
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from weft.launch.errors import UserError
from weft.launch.saved_run import read_run
from weft.launch.settings import check_layout, load_settings
from weft.model.families import FAMILIES
from weft.parallel import build_mesh
from weft.parallel.checkpoint import CheckpointError, Entry, load_checkpoint, save_checkpoint
from weft.parallel.checkpoint.verify import problems_of

SLOWEST = 5.0  # seconds that one file may take
MEMORY = 4 * 2**30  # bytes of address space above what the process begins with
NUMBERS = re.compile(rb"-?[0-9]+(\.[0-9]+)?")
STRINGS = re.compile(rb'"[^"\n]*"|[A-Za-z_]+')
VALUES = (
    b"0", b"-1", b"1e999", b"9" * 30, b"1000000000000000", b"null", b"true", b"[]", b"{}", b'""', b"1.5", b"NaN",
    b"\xff", b"[*a, *a, *a, *a]",
    b'"../../etc/passwd"', b'"/dev/zero"', b'"rank-00000.safetensors"', b"[" * 5000, b'{"a":' * 5000, b"&a [*a]", b"*a",
    b'"\\u0000"', b"!!python/object/apply:os.system [id]", "\u2028é".encode(), b"- - - -", b"? ", b": ", b"9" * 5000,
    b"[*a, *a, *a, *a, *a, *a]",
)  # fmt: skip
JSON_VALUES: tuple[Any, ...] = (
    0, -1, 1, 3, 10**15, 10**400, 1.5, 1e300, float("nan"), float("inf"), None, True, False, "", "x", [], [[]], [{}],
    {}, {"": 0}, {"rope_type": {}}, {"rope_type": "yarn", "factor": "x"},
    {"rope_type": "longrope", "short_factor": [0], "long_factor": ["x"]},
    ["full_attention", "sliding_attention"] * 2, [{}, [], 0, None],
)  # fmt: skip


def mutated(data: bytes, random: random.Random) -> bytes:
    """The file with one to four changes."""
    for _ in range(random.choice((1, 1, 2, 4))):
        start = random.randrange(len(data) or 1)
        stop = min(len(data), start + random.choice((1, 1, 8, 100)))
        found = list((NUMBERS if random.random() < 0.5 else STRINGS).finditer(data))
        kind = random.randrange(7)
        if kind == 0 and data:
            data = data[:start] + bytes([random.randrange(256)]) + data[start + 1 :]
        elif kind == 1:
            data = data[:start] + data[stop:]
        elif kind == 2:
            data = data[:stop] + data[start:]
        elif kind == 3:
            data = data[:start] + random.choice(VALUES) + data[start:]
        elif kind == 4:
            data = data[:start]
        elif found:
            place = random.choice(found)
            data = data[: place.start()] + random.choice(VALUES) + data[place.end() :]
    return data


def resigned(manifest: bytes) -> bytes:
    """The manifest with a checksum that fits, if it still begins as one."""
    start = len(b'{\n "crc32": "')
    if len(manifest) < start + 8:
        return manifest
    blank = manifest[:start] + b"0" * 8 + manifest[start + 8 :]
    return manifest[:start] + f"{zlib.crc32(blank):08x}".encode() + manifest[start + 8 :]


def try_manifests(folder: Path, count: int, seed: int) -> Counter[str]:
    """Read, verify and load a checkpoint with `count` mutated manifests; returns how often each came out how."""
    torch.manual_seed(seed)  # so that the manifest, which holds the tensors' checksums, is the same in each run
    entries = [Entry(name, torch.randn(12, 5)) for name in ("model/a", "exp_avg/a", "model/b")]
    mesh = build_mesh()
    try:
        metadata = {"step": 3, "counters": {"optimizer_steps": 3}, "settings": {"name": "x"}}
        save_checkpoint(folder / "saved", entries, metadata, mesh)
    finally:
        dist.destroy_process_group()
    path = folder / "saved" / "manifest.json"
    whole = path.read_bytes()
    generator = random.Random(seed)

    def attempt() -> None:
        data = mutated(whole, generator)
        path.write_bytes(resigned(data) if generator.random() < 0.9 else data)
        list(problems_of(path.parent))
        read_run(path.parent)
        load_checkpoint(path.parent, entries)

    return _try(attempt, CheckpointError, count)


def try_settings(folder: Path, count: int, seed: int, config: Path) -> Counter[str]:
    """Read and check `count` mutations of a settings file; returns how often each came out how."""
    path, whole = folder / "settings.yaml", config.read_bytes()
    generator = random.Random(seed)

    def attempt() -> None:
        path.write_bytes(mutated(whole, generator))
        check_layout(load_settings(path), 4)

    return _try(attempt, UserError, count)


def try_configs(folder: Path, count: int, seed: int) -> Counter[str]:
    """Read and check `count` mutated config.json of models of all families; returns how often each came out how."""
    pretrained, path = folder / "model", folder / "pretrained.yaml"
    pretrained.mkdir()
    path.write_text(f"model: {{pretrained: {pretrained}}}")
    generator = random.Random(seed)
    configs = [config_of(model_type) for model_type in sorted(FAMILIES)]

    def attempt() -> None:
        config = generator.choice(configs)
        if generator.random() < 0.5:
            config = config | {generator.choice(list(config)): generator.choice(JSON_VALUES)}
            data = json.dumps(config).encode()
        else:
            data = mutated(json.dumps(config, indent=1).encode(), generator)
        (pretrained / "config.json").write_bytes(data)
        check_layout(load_settings(path), 4)

    return _try(attempt, UserError, count)


def config_of(model_type: str) -> dict[str, Any]:
    """A config with sizes, windows and scaled positions, as far as the family has them."""
    family = FAMILIES[model_type]
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "head_dim": 8}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 4, "encoder_layers": 2, "decoder_layers": 2}
    own = {key: sizes[name] for key, name in family.names.items() if name in sizes}
    windows = {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 2, "layer_types": None}
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rotary = family.defaults.get("positions", "rotary") == "rotary" and family.local_theta is None
    return {
        "model_type": model_type,
        **own,
        **(windows if family.windows else {}),
        **({"rope_parameters": scaling} if rotary else {}),
        "tie_word_embeddings": True,
    }


def _try(attempt: Callable[[], None], refusal: type[Exception], count: int) -> Counter[str]:
    outcomes: Counter[str] = Counter()
    for _ in range(count):
        start = time.perf_counter()
        try:
            attempt()
            outcomes["taken"] += 1
        except refusal as error:
            outcomes["refused"] += 1
            outcomes["refused in no or a long sentence"] += not 10 < len(str(error)) < 4000
        except Exception as error:
            outcomes[f"{type(error).__name__}: {str(error)[:80]}"] += 1
        outcomes[f"longer than {SLOWEST:g} s"] += time.perf_counter() - start > SLOWEST
    return +outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    config = Path(__file__).parents[1] / "configs/demo.yaml"
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        for name, outcomes in (
            ("manifests", try_manifests(Path(folder), arguments.count, arguments.seed)),
            ("settings", try_settings(Path(folder), arguments.count, arguments.seed, config)),
            ("configs", try_configs(Path(folder), arguments.count, arguments.seed)),
        ):
            print(f"{arguments.count} mutated {name}: " + ", ".join(f"{n} {how}" for how, n in outcomes.most_common()))
        print(f"seed {arguments.seed}, {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
