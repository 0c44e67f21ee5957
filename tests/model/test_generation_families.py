"""Every family generates what `transformers` generates from padded prompts: 64 tokens greedily in one process.

In several, where each token costs messages, some tokens of one model of each family.
"""

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
from weft.model.decoder import DecoderStage
from weft.model.generation.driver import Session
from weft.model.generation.request import Request
from weft.model.generation.sampling import Sampling
from weft.model.generation.worker import Placement, Worker
from weft.model.hugging_face import load_pretrained
from weft.model.split import split_layers
from weft.parallel import build_mesh, build_schedule

NEW_TOKENS, FEW_TOKENS, ROWS = 64, 10, 4
# transformers' frequencies of these follow the longest text of a batch, so that its texts depend on their neighbours
BY_LENGTH = ("dynamic", "longrope")


def chosen(references: list[Reference]) -> list[Reference]:
    """One reference of each family of decoders and kind of rotary positions, whose model sees enough positions."""
    kept = {}
    for reference in references:
        config = json.loads((Path(reference.directory) / "config.json").read_text())
        if model_config(config).kind != "decoder":
            continue
        kind = (config.get("rope_parameters") or {}).get("rope_type")
        positions = config.get("max_position_embeddings", config.get("n_positions"))
        if kind not in BY_LENGTH and positions >= 24 + NEW_TOKENS:
            kept.setdefault((reference.case.model, kind), reference)
    return list(kept.values())


def generate_all(directories: list[str], layout: Layout, new_tokens: int) -> list[list[list[int]]]:
    """The new tokens of every model, on rank 0."""
    mesh = build_mesh(data=layout.data, tensor=layout.tensor, pipeline=layout.pipeline)
    rank = mesh["pipeline"].get_local_rank()
    schedule = build_schedule("gpipe", layout.pipeline, 1)
    found = []
    for directory in directories:
        config = model_config(json.loads((Path(directory) / "config.json").read_text()))
        layers = split_layers(config, layout.pipeline)[rank]
        ends: Any = {"first": rank == 0, "last": rank == layout.pipeline - 1}
        stage = DecoderStage(config, layers, **ends, mesh=mesh["tensor"], dtype=torch.float64).eval()
        stage.tie()
        load_pretrained(stage, directory, config)
        placement = Placement({rank: stage}, schedule, mesh["tensor"], mesh["pipeline"])
        options: Any = {"slots": ROWS, "capacity": 24 + NEW_TOKENS, "timeout": 50, "pack": True}
        worker = Worker(placement, vocab_size=config.vocab_size, **options)
        session = Session(worker, mesh)
        if int(os.environ["RANK"]):
            session.follow()
            continue
        requests = [Request(row, new_tokens, Sampling(temperature=0)) for row in prompts(ROWS)]
        session.run(requests)
        session.close()
        found.append(numbers(requests))
    return found


@pytest.fixture(scope="module")
def theirs(references: list[Reference]) -> list[list[list[int]]]:
    import transformers

    logging.disable(logging.WARNING)
    rows = prompts(ROWS)
    longest = max(map(len, rows))
    padded = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    found = []
    for reference in chosen(references):
        model = transformers.AutoModelForCausalLM.from_pretrained(reference.directory, dtype=torch.float64)
        model.generation_config.eos_token_id = None
        texts = model.generate(padded, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
        found.append(texts[:, longest:].tolist())
    return found


@pytest.mark.parametrize("layout", [Layout(), Layout(tensor=2, pipeline=2)], ids=str)
def test_texts_turn_by_their_own_length(pool: Pool, references: list[Reference], layout: Layout) -> None:
    """Each text of a batch, some longer than the length of the training, is what transformers makes of it alone."""
    import transformers

    cases = [
        reference
        for reference in references
        if reference.case.changes.get("rope_parameters", {}).get("rope_type") in BY_LENGTH
    ]
    assert len(cases) == 3
    new_tokens = NEW_TOKENS - 24 if layout == Layout() else 2 * FEW_TOKENS
    for case in cases:
        expected = []
        for row in prompts(ROWS):
            model: Any = transformers.AutoModelForCausalLM.from_pretrained(case.directory, dtype=torch.float64)
            model.generation_config.eos_token_id = None
            text = model.generate(torch.tensor([row]), max_new_tokens=new_tokens, do_sample=False, pad_token_id=0)
            expected.append(text[0, len(row) :].tolist())
        assert not compare(pool, [case], [expected], layout, new_tokens), case.case


def compare(pool: Pool, references: list[Reference], theirs: Any, layout: Layout, new_tokens: int) -> list[str]:
    """The cases that differ."""
    ours = pool.run(layout.ranks, generate_all, [reference.directory for reference in references], layout, new_tokens)[
        0
    ]
    pairs = zip(references, ours, theirs, strict=True)
    return [str(reference.case) for reference, mine, whole in pairs if mine != [row[:new_tokens] for row in whole]]


def test_greedy_tokens_of_every_family(pool: Pool, references: list[Reference], theirs: Any) -> None:
    assert len({reference.case.model for reference in chosen(references)}) >= 8
    assert not compare(pool, chosen(references), theirs, Layout(), NEW_TOKENS)


@pytest.mark.parametrize("layout", [Layout(pipeline=2), Layout(tensor=4), Layout(tensor=2, pipeline=2)], ids=str)
def test_one_model_of_every_family_in_several_processes(
    pool: Pool, references: list[Reference], theirs: Any, layout: Layout
) -> None:
    first = {
        reference.case.model: (reference, rows) for reference, rows in zip(chosen(references), theirs, strict=True)
    }
    kept, rows = zip(*first.values(), strict=True)
    assert not compare(pool, list(kept), rows, layout, FEW_TOKENS)
