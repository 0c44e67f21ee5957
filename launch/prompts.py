"""Prompts from a file of JSON lines."""

import json
from pathlib import Path
from typing import Any

from weft.launch.errors import UserError


def read_lines(path: Path, wanted: str) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines; empty lines are skipped.

    `wanted`: what a line is, for the errors, such as `{"prompt": …}`.

    Raises:
        UserError: the file cannot be read, or a line is no JSON object.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not text in UTF-8; give JSON lines, each {wanted}.") from None
    result = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise UserError(f"{path}, line {number} is no JSON object; write {wanted}.")
        result.append(value)
    if not result:
        raise UserError(f"{path} is empty; write JSON lines, each {wanted}.")
    return result


def read_prompts(path: Path) -> list[dict[str, Any]]:
    """Lines with a text under `prompt`; what else they hold is kept.

    Raises:
        UserError: a line has none.
    """
    lines = read_lines(path, '{"prompt": "…"}')
    for number, line in enumerate(lines, 1):
        if not isinstance(line.get("prompt"), str):
            raise UserError(f'{path}: object {number} has no text under "prompt"; write {{"prompt": "…"}}.')
    return lines
