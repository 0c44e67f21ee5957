"""Settings as text: YAML without its traps, and `key=value` on the command line.

YAML 1.1 reads `1e-3` as text, `no` as false, `010` as 8 and `2024-01-01` as a date; here numbers are what JSON
and Python take for numbers, only `true` and `false` are truth values, and all else is text.
"""

import re
from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from weft.launch.errors import UserError
from weft.model.config_values import shortened

_SCALARS = {
    "tag:yaml.org,2002:bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "tag:yaml.org,2002:int": (r"[-+]?(0|[1-9][0-9_]*)", "-+0123456789"),
    "tag:yaml.org,2002:float": (
        r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+|[-+]?\.inf|\.nan",
        "-+0123456789.",
    ),
    "tag:yaml.org,2002:null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "tag:yaml.org,2002:merge": (r"<<", "<"),
}
_MOST_VALUES, _LONGEST_TEXT, _MOST_DIGITS, _DEEPEST = 10_000, 4096, 100, 100


class _Loader(yaml.SafeLoader):
    """Reads mappings whose keys occur once."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - add_implicit_resolver copies it per class

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [key.value for key, _ in node.value]
        repeated = next((key for index, key in enumerate(keys) if key in keys[:index]), None)
        if repeated is not None:
            raise yaml.constructor.ConstructorError(problem=f"{repeated} is there twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Writes text in quotes where either YAML 1.1 or `_Loader` would read something else."""


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    style = None if value.isprintable() else '"'  # outside quotes a line separator would be read back as a space
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style)


_Dumper.add_representer(str, _text)
for _tag, (_pattern, _first) in _SCALARS.items():
    _Loader.add_implicit_resolver(_tag, re.compile(f"^(?:{_pattern})$"), list(_first))
    _Dumper.add_implicit_resolver(_tag, re.compile(f"^(?:{_pattern})$"), list(_first))


def read_yaml(text: str, source: str) -> Any:
    """The value that the YAML `text` holds.

    Raises:
        UserError: `text` is not YAML, a mapping has a key twice, or it is far too large; names `source` and the line.
    """
    try:
        _check_nesting(text)
        value = yaml.load(text, _Loader)
        _check_size(value, source)
        return value
    except RecursionError:
        raise UserError(f"{source} is nested too deeply; settings have a few levels.") from None
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{source}{line} is not valid YAML: {error.problem}.") from None
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{source} is not valid YAML: {' '.join(str(error).split())}.") from None


def _check_nesting(text: str) -> None:
    """Refuse text with more open brackets than settings can have, over which the parser would take very long."""
    depth = 0
    for bracket in re.findall(r"[\[\]{}]", text):
        depth = depth + 1 if bracket in "[{" else max(0, depth - 1)
        if depth > _DEEPEST:
            raise RecursionError


def _check_size(value: Any, source: str) -> None:
    """Refuse what a few lines can grow into: an alias that stands for itself, or for thousands of others."""
    found, left = 0, [value]
    while left:
        part = left.pop()
        found += 1
        if found > _MOST_VALUES or (isinstance(part, str) and len(part) > _LONGEST_TEXT):
            raise UserError(
                f"{source} holds more than {_MOST_VALUES:,} values or a text of over {_LONGEST_TEXT:,} characters; "
                "settings are a few dozen lines."
            )
        if isinstance(part, int) and abs(part) >= 10**_MOST_DIGITS:
            raise UserError(f"{source} holds a number of more than {_MOST_DIGITS} digits; write a smaller one.")
        if isinstance(part, dict):
            left += [*part.keys(), *part.values()]
        elif isinstance(part, (list, tuple, set)):
            left += part


def write_yaml(value: Any) -> str:
    """YAML that `read_yaml` reads back as an equal value."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def read_yaml_file(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        UserError: the file is missing, unreadable, not YAML, or holds no mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; give the path of a settings file.") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not a text file; settings are YAML in UTF-8.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None
    value = read_yaml(text, str(path))
    if not isinstance(value, dict):
        kind = "is empty" if value is None else f"holds {describe(value)}"
        raise UserError(f"{path} {kind}; settings are a mapping with the keys name, model, parallel and so on.")
    return value


def describe(value: Any) -> str:
    """The value as a person would write it, shortened, text in quotes."""
    shown = write_yaml(value).removesuffix("...\n") if not isinstance(value, str) else repr(value)
    shown = repr(value) if isinstance(value, (list, tuple, dict)) else shown.strip()
    return shortened(shown)


def apply_overrides(values: dict[str, Any], overrides: Iterable[str], known: Sequence[str]) -> dict[str, Any]:
    """`values` with each `key=value` of `overrides` put in; `values` itself stays as it is.

    A key is dotted from the top (`train.optimizer.betas`) or an ending that only one of the `known` keys has
    (`optimizer.betas`). Values are read as YAML.

    Raises:
        UserError: no equals sign, an ambiguous ending, or a key below something that is no mapping.
    """
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key.strip():
            raise UserError(f"{override!r} is not an override; write key=value, for example train.steps=100.")
        path = _full_key(key.strip(), known).split(".")
        values = _replaced(values, path, read_yaml(text, override), override)
    return values


def _full_key(key: str, known: Sequence[str]) -> str:
    first = key.partition(".")[0]
    if first in known:
        return key
    endings = [name for name in known if name.endswith(f".{key}")]
    if len(endings) > 1:
        raise UserError(f"{key} could be {' or '.join(endings)}; write the one you mean.")
    return endings[0] if endings else key


def _replaced(values: Any, path: Sequence[str], value: Any, override: str) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise UserError(f"{override} cannot be applied, because {path[0]} would lie below {describe(values)}.")
    head, rest = path[0], path[1:]
    below = values.get(head)
    return values | {head: _replaced({} if below is None else below, rest, value, override) if rest else value}
