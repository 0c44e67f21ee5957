"""Encoder-decoders and beam searches give the texts of `transformers`, in every layout."""

import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.model.references import Reference
from tests.model.test_generation import Layout, numbers, prompts
from tests.pool import Pool
from weft.model.config import model_config
from weft.model.generation.beams import BeamSearch
from weft.model.generation.driver import Session
from weft.model.generation.request import Request
from weft.model.generation.sampling import Sampling
from weft.model.generation.worker import Placement, Worker
from weft.model.hugging_face import load_pretrained
from weft.model.split import split_layers
from weft.model.stage import build_stage
from weft.parallel import build_mesh, build_schedule

ROWS, NEW_TOKENS, SLOTS = 4, 12, 8
GREEDY = Sampling(temperature=0)
PENALIZED = Sampling(temperature=0, repetition_penalty=1.5)
SAMPLED = Sampling(temperature=1.2, top_k=30, seed=5)
# our options of a request, and transformers' names for the same
WAYS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"sampling": GREEDY}, {}),
    ({"sampling": PENALIZED}, {"repetition_penalty": 1.5}),
    ({"sampling": GREEDY, "beams": 2}, {"num_beams": 2}),
    ({"sampling": GREEDY, "beams": 4, "length_penalty": 0.3}, {"num_beams": 4, "length_penalty": 0.3}),
    ({"sampling": GREEDY, "beams": 3, "length_penalty": 2.0}, {"num_beams": 3, "length_penalty": 2.0}),
]


def generate(directory: str, ends: list[int], layout: Layout, ways: list[dict[str, Any]]) -> list[Any]:
    """The new tokens of all prompts in each way, beside each other, on rank 0."""
    mesh = build_mesh(data=layout.data, tensor=layout.tensor, pipeline=layout.pipeline)
    rank = mesh["pipeline"].get_local_rank()
    config = model_config(json.loads((Path(directory) / "config.json").read_text()))
    layers = split_layers(config, layout.pipeline)[rank]
    sides: Any = {"first": rank == 0, "last": rank == layout.pipeline - 1}
    stage = build_stage(config, layers, **sides, mesh=mesh["tensor"], dtype=torch.float64).eval()
    stage.tie()
    load_pretrained(stage, directory, config)
    placement = Placement({rank: stage}, build_schedule("gpipe", layout.pipeline, 1), mesh["tensor"], mesh["pipeline"])
    options: Any = {"slots": SLOTS, "capacity": 24 + NEW_TOKENS, "timeout": 50, "pack": True}
    session = Session(Worker(placement, vocab_size=config.vocab_size, **options), mesh)
    if int(os.environ["RANK"]):
        session.follow()
        return []
    found = [[Request(row, NEW_TOKENS, stop_tokens=frozenset(ends), **way) for row in prompts(ROWS)] for way in ways]
    session.run([request for requests in found for request in requests])
    session.close()
    return [numbers(requests) for requests in found]


def in_transformers(directory: str, ends: list[int], ways: list[dict[str, Any]]) -> list[list[list[int]]]:
    import transformers

    logging.disable(logging.WARNING)
    kind = model_config(json.loads((Path(directory) / "config.json").read_text())).kind
    apart = kind == "encoder-decoder"
    family: Any = transformers.AutoModelForSeq2SeqLM if apart else transformers.AutoModelForCausalLM
    model = family.from_pretrained(directory, dtype=torch.float64)
    found = []
    for way in ways:
        texts = []
        for row in prompts(ROWS):
            common = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0, "eos_token_id": ends}
            # its cache has no room for more layers in the decoder than in the encoder
            text = model.generate(torch.tensor([row]), use_cache=not apart, **common, **way)[0].tolist()[
                1 if apart else len(row) :
            ]
            end = next((place for place, token in enumerate(text) if token in ends), len(text))
            texts.append(text[:end])
        found.append(texts)
    return found


@pytest.fixture(scope="module")
def cases(references: list[Reference]) -> list[tuple[str, list[int], Any]]:
    """Models, tokens that end their texts, and what transformers writes in each way."""
    found = []
    chosen = [reference for reference in references if reference.case.model == "t5"]
    for reference in [*chosen, next(reference for reference in references if reference.case.model == "qwen2")]:
        (plain,) = in_transformers(reference.directory, [1], [{}])
        ends = [1, plain[0][len(plain[0]) // 2], plain[2][-1]]
        theirs = in_transformers(reference.directory, ends, [way for _, way in WAYS])
        found.append((reference.directory, ends, theirs))
    return found


def test_texts_are_those_of_transformers(pool: Pool, cases: list[Any]) -> None:
    for directory, ends, theirs in cases:
        ours = pool.run(1, generate, directory, ends, Layout(), [way for way, _ in WAYS])[0]
        for way, mine, wanted in zip(WAYS, ours, theirs, strict=True):
            assert mine == wanted, way
    lengths = {len(text) for _, _, theirs in cases for texts in theirs for text in texts}
    assert len(lengths) > 3, "all texts are equally long: ends were not tested"


LAYOUTS = [Layout(pipeline=2), Layout(tensor=2, pipeline=2), Layout(data=2, tensor=2)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_texts_of_an_encoder_decoder_are_the_same_in_every_layout(pool: Pool, cases: list[Any], layout: Layout) -> None:
    directory, ends, theirs = cases[0]
    ways = [WAYS[1][0], WAYS[3][0], {"sampling": SAMPLED}]
    penalized, searched, sampled = pool.run(layout.ranks, generate, directory, ends, layout, ways)[0]
    assert [penalized, searched] == [theirs[1], theirs[3]]
    assert [sampled] == pool.run(1, generate, directory, ends, Layout(), ways[2:])[0]
    assert sampled != penalized


def test_a_search_finds_the_best_text_when_its_beams_are_enough() -> None:
    """Of all texts of a tiny language, scored exhaustively."""
    logits = torch.randn(3, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    table = logits.log_softmax(-1).tolist()  # the next token by the one before; 3 ends a text
    length = 3

    def texts(prefix: tuple[int, ...], score: float) -> list[tuple[float, tuple[int, ...]]]:
        if prefix and (prefix[-1] == 3 or len(prefix) == length):
            return [(score / len(prefix), prefix)]
        following = table[prefix[-1] if prefix else 0]
        return [text for token in range(4) for text in texts((*prefix, token), score + following[token])]

    search = BeamSearch(30, length, frozenset([3]))
    while not search.over:
        rows = [table[beam.tokens[-1] if beam.tokens else 0] for beam in search.running]
        search.advance([sorted(enumerate(row), key=lambda pair: -pair[1]) for row in rows])
    assert search.best == max(texts((), 0.0))[1]
