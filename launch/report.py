"""The report of a run: one HTML file that needs nothing else, to read, keep and send."""

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from weft.launch.loss_curve import draw_loss_curve
from weft.launch.metrics import StepMetrics, read_metrics
from weft.launch.tokens import TokenInfo
from weft.launch.units import bytes_text, count_text, seconds_text

FILE = "report.html"
_PACKAGES = ("weft", "torch", "numpy", "tokenizers")


@dataclass(frozen=True, kw_only=True)
class RankReport:
    """One rank: its place on the axes, its machine and device, what it holds, and the most memory that it held.

    `tracked`: bytes by kind in a step, as measured and by formula; empty where none was trained.
    """

    rank: int
    coordinates: Mapping[str, int]
    device: str
    holds: str
    memory_bytes: int
    tracked: Mapping[str, tuple[float, float]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Text that the trained model wrote, and what it was given to go on from."""

    prompt: str
    text: str


@dataclass(frozen=True, kw_only=True)
class RunReport:
    """What a report tells besides the run's metrics.

    Attributes:
        name: of the run.
        settings: the resolved settings, as YAML.
        axes: size of each mesh axis, outermost first.
        ranks: in their order.
        parameters: of the whole model.
        trained_tokens: in all steps.
        seconds: of training, without start and evaluation.
        tokens: of the corpus.
        timelines: of the pipeline, as `<svg>` elements by their captions, which are trusted as they are.
        sample: generated text, which is not.
    """

    name: str
    settings: str
    axes: Mapping[str, int]
    ranks: Sequence[RankReport]
    parameters: int
    trained_tokens: int
    seconds: float
    tokens: TokenInfo
    timelines: Mapping[str, str] = field(default_factory=dict)
    sample: Sample | None = None


def write_report(directory: Path, run: RunReport) -> Path:
    """Write `report.html` from what `run` tells and the directory's `metrics.jsonl`; whole or not at all.

    Returns the file's path.
    """
    import jinja2
    from markupsafe import Markup

    metrics = read_metrics(directory)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"bytes": bytes_text, "count": count_text}
    page = environment.get_template(FILE).render(
        run=run,
        figures=_figures(run, metrics),
        evaluations=[entry for entry in metrics if entry.held_out_loss is not None],
        loss_svg=Markup(draw_loss_curve(metrics)),
        loss_words=_loss_in_words(metrics),
        timelines={caption: Markup(svg) for caption, svg in run.timelines.items()},
        most_memory=max((rank.memory_bytes for rank in run.ranks), default=0) or 1,
        axes=[axis for axis, size in run.axes.items() if size > 1],
        ranks=_ranks(run),
        facts=_facts(run),
    )
    file = directory / FILE
    work = file.with_suffix(".html.part")
    work.write_text(page, encoding="utf-8")
    os.replace(work, file)
    return file


def _ranks(run: RunReport) -> str:
    return f"{len(run.ranks)} ranks" if len(run.ranks) != 1 else "1 rank"


@dataclass(frozen=True)
class Figure:
    """A number of the page's head: its name, its value, and a word on it."""

    name: str
    value: str
    note: str = ""


def _figures(run: RunReport, metrics: Sequence[StepMetrics]) -> list[Figure]:
    figures = []
    held_out = [entry for entry in metrics if entry.held_out_loss is not None]
    if held_out:
        figures.append(Figure("Held-out loss", _change([entry.held_out_loss for entry in held_out]), "nats per token"))
        bits = [entry.bits_per_byte for entry in held_out if entry.bits_per_byte is not None]
        if bits:
            figures.append(Figure("The same in bits", _change(bits), "bits per byte of text"))
    speed = run.trained_tokens / run.seconds if run.seconds else 0.0
    steps = metrics[-1].step if metrics else 0
    bubbles = [entry.bubble for entry in metrics if entry.bubble is not None]
    return [
        *figures,
        Figure("Trained on", count_text(run.trained_tokens), f"tokens, in {steps:,} steps"),
        Figure("Time", seconds_text(run.seconds), "of training"),
        Figure("Speed", count_text(speed), f"tokens/s on {_ranks(run)}"),
        *([Figure("Bubble", f"{bubbles[-1]:.1%}", "of pipeline time idle")] if bubbles else []),
    ]


def _change(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{known[0]:.2f} → {known[-1]:.2f}" if len(known) > 1 else f"{known[0]:.2f}"


def _loss_in_words(metrics: Sequence[StepMetrics]) -> str:
    """The curve for those who do not see it."""
    words = []
    for name, key in (("Train", "loss"), ("Held-out", "held_out_loss")):
        known = [(entry.step, getattr(entry, key)) for entry in metrics if getattr(entry, key) is not None]
        if known:
            (first, start), (last, end) = known[0], known[-1]
            words.append(f"{name} loss goes from {start:.2f} at step {first} to {end:.2f} at step {last}.")
    return " ".join(words) or "No loss was recorded."


def _facts(run: RunReport) -> dict[str, str]:
    corpus = run.tokens.corpus
    read_by = f" (Python {corpus.python})" if corpus.python else ""
    return {
        "Model": f"{run.parameters:,} parameters, vocabulary {run.tokens.vocabulary:,}",
        "Corpus": f"{corpus.path}{read_by}",
        "Train text": f"{bytes_text(corpus.train_bytes)}, {run.tokens.train_tokens:,} tokens, "
        f"{corpus.train_documents:,} documents",
        "Held-out text": f"{bytes_text(corpus.held_out_bytes)}, {run.tokens.held_out_tokens:,} tokens, "
        f"{corpus.held_out_documents:,} documents",
        "Bytes per token": f"{run.tokens.bytes_per_token:.2f}",
        "Text SHA-256": corpus.sha256,
        "Versions": ", ".join([f"Python {platform.python_version()}", *(_version(name) for name in _PACKAGES)]),
        "Machine": f"{platform.node()}, {platform.system()} {platform.machine()}",
    }


def _version(package: str) -> str:
    try:
        return f"{package} {metadata.version(package)}"
    except metadata.PackageNotFoundError:
        return f"{package} of unknown version"
