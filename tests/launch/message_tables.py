"""The tables of messages in the docs, and the messages that the code can say, both with `…` for names and numbers."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
ERRORS = {
    "UserError", "RunError", "FinalError", "StoppedError", "CheckpointError", "OtherModelError", "SaveError",
    "PipelineError",
}  # fmt: skip
SPEAKERS = {"say", "_say"}


def rows(page: str) -> list[str]:
    """The messages in the table of a page of the docs."""
    table = (ROOT / "docs" / page).read_text(encoding="utf-8").partition("\n## Messages")[2]
    return re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE)


def matches(row: str, message: str) -> bool:
    """Whether the message is the one of the row."""
    return re.fullmatch(re.escape(row).replace("…", ".+"), message, re.DOTALL) is not None


def fits(row: str, template: str) -> bool:
    """Whether the row is of the message that a template of the source makes; who says it may put the full stop."""
    one, other = row.rstrip("."), template.rstrip(".")
    return matches(one, other) or matches(other, one)


def templates(module: str) -> Iterator[str]:
    """What a module of weft says to people, by the calls that make its errors and print its lines."""
    for node in ast.walk(ast.parse((ROOT / module).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and node.args and _name(node.func) in ERRORS | SPEAKERS:
            text = _template(node.args[0])
            if re.search(r"\w{3}", text):
                yield text


def _name(function: ast.expr) -> str:
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def _template(expression: ast.expr) -> str:
    """A text with `…` for each part that is known only when it is said."""
    if isinstance(expression, ast.Constant) and isinstance(expression.value, str):
        return expression.value
    if isinstance(expression, ast.JoinedStr):
        text = "".join(_template(part) for part in expression.values)
        return re.sub("…+", "…", text)
    return "…"
