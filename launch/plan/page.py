"""The page of a plan: one HTML file that needs nothing else, to read, keep and send."""

import os
from pathlib import Path

from weft.launch.plan.layout import Layout
from weft.launch.plan.pictures import frontier_svg, memory_svg, pipeline_svg, time_svg
from weft.launch.plan.reasons import size_text
from weft.launch.plan.report import plan_json
from weft.launch.plan.search import TIE, Candidate, Plan, Planner
from weft.launch.units import count_text, milliseconds_text


def write_page(path: Path, plan: Plan, planner: Planner, *, name: str, top: int, as_set: Candidate | None) -> None:
    """Write the page of a plan in which some layout fits; whole or not at all.

    Raises:
        OSError: the file cannot be written.
    """
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parents[1]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"bytes": size_text, "count": count_text, "seconds": milliseconds_text, "label": _label}
    found = pipeline_svg(plan)
    page = environment.get_template("plan/page.html").render(
        name=name,
        plan=plan,
        data=plan_json(plan, planner, top, as_set),
        tie=TIE,
        memory=Markup(memory_svg(plan)),
        time=Markup(time_svg(plan)),
        frontier=Markup(frontier_svg(plan)),
        pipeline=Markup(found) if found is not None else None,
    )
    work = path.with_name(f"{path.name}.part")
    work.write_text(page, encoding="utf-8")
    os.replace(work, path)


def _label(layout: dict[str, object]) -> str:
    return Layout(**layout).label  # type: ignore[arg-type]
