"""`weft generate` and `weft evaluate` on their files, against `transformers`, in one process and in several."""

import json
from math import exp, log, sqrt
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.launch.tiny_run import MODEL, WORDS, make_run
from tests.model.test_generation import in_transformers
from tests.pool import Pool
from weft.launch.cli import run
from weft.launch.evaluation.perplexity import windows
from weft.launch.evaluation.results import mean, ratio
from weft.launch.tokenizer import load_tokenizer

LAYOUTS = {1: [], 2: ["parallel.tensor=2"], 4: ["parallel.pipeline=2", "parallel.data=2"]}
SEED = 1234  # of the settings that make_run leaves as they are
CHOICES = [
    {"prompt": "The shuttle carries", "choices": [" the weft", " a banana", " rows"], "answer": 0},
    {"prompt": "row by ", "choices": ["row", "whole"], "answer": 1},
    {"prompt": "", "choices": ["warp", "The cloth is whole"], "answer": 0},
]


@pytest.fixture(scope="module")
def folder(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("measured")
    make_run(pool, folder / "tiny")
    (folder / "text.txt").write_text(WORDS * 9, encoding="utf-8")
    (folder / "choices.jsonl").write_text("\n".join(map(json.dumps, CHOICES)))
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return in_transformers(MODEL, seed=SEED)


def command(pool: Pool, ranks: int, *arguments: str) -> None:
    assert pool.run(ranks, run, [*arguments, *LAYOUTS[ranks]]) == [0] * ranks


def token_losses(model: Any, tokens: list[int]) -> torch.Tensor:
    """Nats of each token but the first."""
    logprobs = model(torch.tensor([tokens])).logits.log_softmax(-1)[0, :-1]
    return -logprobs.gather(-1, torch.tensor(tokens[1:])[:, None])[:, 0].detach()


@pytest.mark.parametrize("ranks", [1, 4])
def test_numbers_are_those_of_transformers(pool: Pool, folder: Path, model: Any, ranks: int) -> None:
    output = folder / f"results-{ranks}.json"
    files = ["--text", str(folder / "text.txt"), "--task", str(folder / "choices.jsonl"), "--json", str(output)]
    command(pool, ranks, "evaluate", str(folder / "tiny"), *files, "--window", "64", "--batch", "3")
    results = {result["metric"]: result for result in json.loads(output.read_text())["results"]}
    encode = load_tokenizer(folder / "tiny").encode
    text = WORDS * 9
    tokens, end = encode(text).ids, 0
    total = 0.0
    for context, scored in windows([end, *tokens], 1, 64):
        total += float(token_losses(model, [*context, *scored])[len(context) - 1 :].sum())
    loss = total / len(tokens)
    assert results["loss, nats per token"]["value"] == pytest.approx(loss, rel=1e-5)
    assert results["perplexity"]["value"] == pytest.approx(exp(loss), rel=1e-4)
    assert results["bits per byte"]["value"] == pytest.approx(total / log(2) / len(text.encode()), rel=1e-5)
    assert results["loss, nats per token"]["count"] == len(tokens)
    right = []
    for question in CHOICES:
        context = encode(question["prompt"].rstrip()).ids or [end]
        spaces = question["prompt"][len(question["prompt"].rstrip()) :]
        totals = [float(-token_losses(model, context + encode(spaces + choice).ids)[len(context) - 1 :].sum())
                  for choice in question["choices"]]  # fmt: skip
        right.append(totals.index(max(totals)) == question["answer"])
    assert results["accuracy"]["value"] == pytest.approx(sum(right) / 3)
    assert 0 < sum(right) < 3, "nothing was told apart"


def test_texts_are_those_of_transformers_in_every_layout(pool: Pool, folder: Path, model: Any) -> None:
    lines = [
        {"prompt": prompt, "id": number} for number, prompt in enumerate(["The weft", "row by row", "🧵", "a", ""])
    ]
    prompts = folder / "prompts.jsonl"
    prompts.write_text("\n".join(map(json.dumps, lines)))
    found = {}
    for ranks in LAYOUTS:
        output = folder / f"texts-{ranks}.jsonl"
        options = ["--max-tokens", "24", "--temperature", "0", "--stop", "y", "--batch", "4"]
        command(
            pool, ranks, "generate", str(folder / "tiny"), "--prompts", str(prompts), "--output", str(output), *options
        )
        found[ranks] = [json.loads(line) for line in output.read_text().splitlines()]
    assert found[1] == found[2] == found[4]
    tokenizer = load_tokenizer(folder / "tiny")
    for line, result in zip(lines, found[1], strict=True):
        tokens = torch.tensor([tokenizer.encode(line["prompt"]).ids or [0]])
        whole = model.generate(tokens, max_new_tokens=24, do_sample=False, pad_token_id=0, eos_token_id=0)[0]
        text = tokenizer.decode(whole[tokens.shape[1] :].tolist())
        assert result["id"] == line["id"]
        assert result["text"] == text.partition("y")[0]
        assert result["finish"] == ("stop" if "y" in text or 0 in whole[tokens.shape[1] :] else "length")


def test_answers_of_ones_own_are_generated_and_compared(pool: Pool, folder: Path) -> None:
    prompts, output = ["The weft", "row"], folder / "answers.json"
    (folder / "ask.jsonl").write_text("\n".join(json.dumps({"prompt": prompt}) for prompt in prompts))
    command(pool, 1, "generate", str(folder / "tiny"), "--prompts", str(folder / "ask.jsonl"), "--temperature", "0",
            "--stop", "\n", "--max-tokens", "9", "--output", str(output))  # fmt: skip
    texts = [json.loads(line)["text"] for line in output.read_text().splitlines()]
    questions = [{"prompt": prompts[0], "answer": ["x", texts[0]]}, {"prompt": prompts[1], "answer": "something else"}]
    (folder / "open.jsonl").write_text("\n".join(map(json.dumps, questions)))
    arguments = ["--task", str(folder / "open.jsonl"), "--max-tokens", "9", "--json", str(output)]
    command(pool, 1, "evaluate", str(folder / "tiny"), *arguments)
    (result,) = json.loads(output.read_text())["results"]
    assert (result["metric"], result["value"], result["standard_error"]) == ("exact match", 0.5, 0.5)


@given(st.integers(1, 60), st.integers(1, 5), st.integers(2, 20))
def test_windows_score_every_token_once_after_as_much_text_as_fits(length: int, first: int, window: int) -> None:
    tokens = list(range(first + length))
    scored = []
    for context, part in windows(tokens, first, max(window, first + 1)):
        assert part, "nothing is scored"
        assert len(context) + len(part) <= max(window, first + 1)
        assert [*context, *part] == list(range(part[0] - len(context), part[-1] + 1))
        assert len(context) >= min(part[0], max(window, first + 1) // 2) or part[0] == first
        scored += part
    assert scored == tokens[first:]


def test_standard_errors_are_those_of_means_over_many_samples() -> None:
    generator = torch.Generator().manual_seed(0)
    single = [mean("", "", torch.randn(50, generator=generator).tolist()) for _ in range(300)]
    spread = torch.tensor([result.value for result in single]).std()
    assert sum(result.error or 0 for result in single) / 300 == pytest.approx(float(spread), rel=0.15)
    values = []
    for _ in range(300):
        counts = torch.randint(1, 9, (40,), generator=generator)
        shared = torch.randn(40, generator=generator)  # what the values of a cluster have in common
        sums = counts * shared + counts.sqrt() * torch.randn(40, generator=generator)
        values.append(ratio(sums.tolist(), counts.tolist()))
    spread = torch.tensor([value for value, _ in values]).std()
    errors = [error for _, error in values if error is not None]
    assert sum(errors) / len(errors) == pytest.approx(float(spread), rel=0.15)
    assert sqrt(1 / 220) < 0.6 * float(spread), "the clusters do not matter"
