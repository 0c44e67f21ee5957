"""What `weft inspect` shows is what `transformers` computes, in every layout; and the page shows it."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.launch.browser import CHROMIUM, Browser
from tests.launch.tiny_run import MODEL, make_run
from tests.model.test_generation import in_transformers
from tests.pool import Pool
from weft.launch.cli import run
from weft.launch.inference import build_inference_mesh, load_placement
from weft.launch.inspection import page_data, write_page
from weft.launch.source import Source, open_source
from weft.launch.vocabulary import open_vocabulary
from weft.model.observe import Observation, observe

TOKENS = [5, 9, 33, 70, 12, 9, 33, 250, 2]
LAYOUTS = {1: [], 2: ["parallel.pipeline=2"], 4: ["parallel.tensor=2", "parallel.pipeline=2"]}


@pytest.fixture(scope="module")
def folder(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(pool, tmp_path_factory.mktemp("inspected") / "tiny")


def look(folder: Path, overrides: list[str]) -> Observation | None:
    source = open_source(str(folder), overrides)
    return observe(load_placement(source, build_inference_mesh(source)), TOKENS, 4)


@pytest.mark.parametrize("ranks", LAYOUTS)
def test_layers_heads_and_losses_are_those_of_transformers(pool: Pool, folder: Path, ranks: int) -> None:
    found = pool.run(ranks, look, folder, LAYOUTS[ranks])[0]
    assert found is not None
    model = in_transformers(MODEL, seed=1234)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        theirs = model(torch.tensor([TOKENS]), output_attentions=True, output_hidden_states=True)
        # the last of their hidden states is past the final norm
        early = [model.lm_head(model.model.norm(state))[0] for state in theirs.hidden_states[:-1]]
    attention = torch.stack([layer[0] for layer in theirs.attentions]).float()
    assert torch.allclose(found.attention, attention, atol=1e-5)
    losses = F.cross_entropy(theirs.logits[0, :-1], torch.tensor(TOKENS[1:]), reduction="none")
    assert torch.allclose(found.losses, losses.float(), atol=1e-4)
    for layer, logits in enumerate([*early, theirs.logits[0]]):
        values, numbers = logits.softmax(-1).topk(4)
        assert torch.equal(found.candidates[layer], numbers), layer
        assert torch.allclose(found.probabilities[layer], values.float(), atol=1e-5), layer


def observation(text: str, source: Source) -> tuple[Any, Observation]:
    vocabulary = open_vocabulary(source)
    tokens = vocabulary.encode(text)
    count = len(tokens)
    attention = torch.eye(count).expand(2, 4, count, count)
    candidates = torch.tensor(tokens).view(1, -1, 1).expand(3, -1, 2)
    return vocabulary, Observation(candidates, torch.full((3, count, 2), 0.25), attention, torch.arange(count - 1.0))


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
def test_page_shows_what_was_seen_whatever_the_text_is(folder: Path, tmp_path: Path) -> None:
    text = '</script><script>document.title = "taken over"</script> & "ä"\n🧵'
    source = open_source(str(folder))
    vocabulary, found = observation(text, source)
    tokens = vocabulary.encode(text)
    write_page(tmp_path / "page.html", source, vocabulary, tokens, found)
    with Browser((tmp_path / "page.html").as_uri()) as page:
        page.wait_for(f"document.querySelectorAll('#maps canvas').length === {MODEL['num_attention_heads']}")
        assert page.evaluate("document.title") == "tiny: inside"
        shown = page.evaluate("[...document.querySelectorAll('.token')].map(token => token.textContent).join('')")
        names = page_data(source, vocabulary, tokens, found)["tokens"]
        assert shown == "".join(names).replace("\n", "↵")
        assert page.evaluate("document.querySelectorAll('#lens tr').length") == 2 + MODEL["num_hidden_layers"]
        page.evaluate("document.querySelectorAll('.token')[3].click()")
        assert "(3) 100 %" in page.evaluate("document.getElementById('told').textContent")
        pixel = "document.querySelector('canvas').getContext('2d').getImageData(2, 2, 1, 1).data[3]"
        assert page.evaluate(pixel) == 255


def test_command_writes_a_page_that_needs_nothing_else(pool: Pool, folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "inside.html"
    arguments = ["inspect", str(folder), "--prompt", "row by row", "--output", str(output), *LAYOUTS[2]]
    assert pool.run(2, run, arguments) == [0, 0]
    page = output.read_text()
    assert "://" not in page
    assert pool.run(1, run, [*arguments[:2], "--prompt", "x", "--output", str(output)]) == [2]
    assert output.read_text() == page
