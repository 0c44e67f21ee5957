"""Generated tokens against `transformers`, and the same ones in every layout."""

import os
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.pool import Pool
from weft.model.config import ModelConfig, model_config
from weft.model.decoder import DecoderStage, initial_distribution
from weft.model.generation.driver import Session
from weft.model.generation.request import Request
from weft.model.generation.sampling import Sampling
from weft.model.generation.worker import Placement, Worker
from weft.model.split import split_layers
from weft.parallel import build_mesh, build_schedule, gather_full, initialize
from weft.parallel.sharding import sharded_parameters

VOCABULARY, POSITIONS, LAYERS = 97, 128, 4
LLAMA = {
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS,
    "initializer_range": 0.3,
}
GPT2 = {
    "model_type": "gpt2",
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": LAYERS,
    "n_head": 4,
    "n_positions": POSITIONS,
    "initializer_range": 0.3,
}
CONFIGS = {"llama": LLAMA, "tied": LLAMA | {"tie_word_embeddings": True, "num_key_value_heads": 1}, "gpt2": GPT2}
SAMPLED = Sampling(temperature=1.1, top_k=50, top_p=0.95, min_p=0.01, repetition_penalty=1.2)


@dataclass(frozen=True)
class Layout:
    data: int = 1
    tensor: int = 1
    pipeline: int = 1

    @property
    def ranks(self) -> int:
        return self.data * self.tensor * self.pipeline


def prompts(count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    lengths = [3, 11, 1, 24, 7, 16, 2][:count]
    return [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


def open_session(config: ModelConfig, layout: Layout, *, slots: int, capacity: int = POSITIONS) -> Session:
    mesh = build_mesh(data=layout.data, tensor=layout.tensor, pipeline=layout.pipeline)
    rank = mesh["pipeline"].get_local_rank()
    layers = split_layers(config, layout.pipeline)[rank]
    ends = {"first": rank == 0, "last": rank == layout.pipeline - 1}
    stage = DecoderStage(config, layers, **ends, mesh=mesh["tensor"], dtype=torch.float64).eval()
    initialize(stage, 3, initial_distribution(config))
    for copy in stage.tied_parameters.values():
        dist.broadcast(copy.data, group=mesh["pipeline"].get_group(), group_src=0)
    schedule = build_schedule("gpipe", layout.pipeline, 1)
    placement = Placement({rank: stage}, schedule, mesh["tensor"], mesh["pipeline"])
    worker = Worker(placement, vocab_size=VOCABULARY, slots=slots, capacity=capacity, timeout=50, pack=True)
    return Session(worker, mesh)


def run_requests(settings: dict[str, Any], layout: Layout, requests: list[Request], slots: int) -> list[Request]:
    """The finished requests, on rank 0."""
    session = open_session(model_config(settings), layout, slots=slots)
    if int(os.environ["RANK"]):
        session.follow()
        return []
    session.run(requests)
    session.close()
    return requests


def numbers(requests: list[Request]) -> list[list[int]]:
    return [[token.number for token in request.generated] for request in requests]


def in_transformers(settings: dict[str, Any], seed: int = 3) -> nn.Module:
    """The model of `open_session`, drawn from `seed`, in `transformers`, in float64."""
    import transformers

    config = model_config(settings)
    mesh = build_mesh()["tensor"]
    stage = DecoderStage(config, range(config.num_hidden_layers), mesh=mesh, dtype=torch.float64)
    initialize(stage, seed, initial_distribution(config))
    weights = {name: gather_full(parameter, s) for name, parameter, s in sharded_parameters(stage)}
    keys = {key: value for key, value in settings.items() if key != "model_type"}
    special = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    if settings["model_type"] == "llama":
        model: Any = transformers.LlamaForCausalLM(transformers.LlamaConfig(**keys, **special, rms_norm_eps=1e-6))
        state = {name if name == "lm_head.weight" else f"model.{name}": value for name, value in weights.items()}
    else:
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**keys, **special))
        state = {f"transformer.{name}": value for name, value in gpt2_names(weights).items()}
    state.setdefault("lm_head.weight", weights["embed_tokens.weight"])
    model = model.double().eval()
    model.load_state_dict(state)
    return model


def gpt2_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    result = {
        "wte.weight": weights["embed_tokens.weight"],
        "wpe.weight": weights["embed_positions.weight"],
        "ln_f.weight": weights["norm.weight"],
        "ln_f.bias": weights["norm.bias"],
    }
    for number in range(LAYERS):
        mine, theirs = f"layers.{number}", f"h.{number}"
        for kind in ("weight", "bias"):
            fused = torch.cat([weights[f"{mine}.self_attn.{part}_proj.{kind}"] for part in "qkv"])
            named = {
                "ln_1": weights[f"{mine}.input_layernorm.{kind}"],
                "ln_2": weights[f"{mine}.post_attention_layernorm.{kind}"],
                "attn.c_attn": fused,
                "attn.c_proj": weights[f"{mine}.self_attn.o_proj.{kind}"],
                "mlp.c_fc": weights[f"{mine}.mlp.up_proj.{kind}"],
                "mlp.c_proj": weights[f"{mine}.mlp.down_proj.{kind}"],
            }
            result |= {
                f"{theirs}.{name}.{kind}": value.t() if value.dim() == 2 else value for name, value in named.items()
            }
    return result


def test_greedy_tokens_are_those_of_transformers(pool: Pool) -> None:
    for name, settings in CONFIGS.items():
        model = in_transformers(settings)
        rows = prompts(4)
        longest = max(map(len, rows))
        padded = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        options = {"max_new_tokens": 64, "do_sample": False, "pad_token_id": 0}
        theirs = model.generate(padded, attention_mask=mask, **options)[:, longest:].tolist()
        requests = [Request(row, 64, Sampling(temperature=0)) for row in rows]
        (ours,) = pool.run(1, run_requests, settings, Layout(), requests, 3)
        assert numbers(ours) == theirs, name
        assert len({tuple(row) for row in theirs}) == 4, "all the same: nothing was tested"


LAYOUTS = [
    ("gpt2", Layout(tensor=2)),
    ("tied", Layout(tensor=4)),
    ("tied", Layout(pipeline=2)),
    ("llama", Layout(data=2, pipeline=2)),
    ("llama", Layout(tensor=2, pipeline=2)),
]


@pytest.mark.parametrize(("model", "layout"), LAYOUTS, ids=str)
def test_every_layout_gives_the_tokens_of_one_process(pool: Pool, model: str, layout: Layout) -> None:
    """Greedy and sampled texts beside each other, with and without log-probabilities, more of them than slots."""
    (alone,) = pool.run(1, run_requests, CONFIGS[model], Layout(), mixed_requests(), 2)
    found = pool.run(layout.ranks, run_requests, CONFIGS[model], layout, mixed_requests(), 4)[0]
    assert numbers(found) == numbers(alone)
    for mine, theirs in zip(found, alone, strict=True):
        for token, expected in zip(mine.generated + mine.scores, theirs.generated + theirs.scores, strict=True):
            assert token.logprob == pytest.approx(expected.logprob, abs=1e-10)
            assert [number for number, _ in token.likeliest] == [number for number, _ in expected.likeliest]


def mixed_requests() -> list[Request]:
    kinds = [SAMPLED, Sampling(temperature=0), replace(SAMPLED, top_k=0, repetition_penalty=1.0), Sampling()]
    return [
        Request(row, 5 + 3 * number, replace(kinds[number % 4], seed=number), top=number % 3 - 1, score=number % 3 == 2)
        for number, row in enumerate(prompts(7))
    ]
