"""What is wrong with settings, in one plain sentence per key instead of the validator's own words."""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from weft.launch.overrides import describe
from weft.model.config_values import shortened

Schema = Mapping[str, Any]


def known_keys(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every dotted key of the section and of the sections in it, outermost first."""
    for name, field in section.model_fields.items():
        yield f"{prefix}{name}"
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from known_keys(field.annotation, f"{prefix}{name}.")


def sentences(error: ValidationError, section: type[BaseModel], values: Mapping[str, Any]) -> list[str]:
    """One sentence for each key of `values` that `section` does not take, in the order of its fields."""
    known = list(known_keys(section))
    schema = section.model_json_schema()
    problems: dict[str, str] = {}
    for detail in error.errors(include_url=False, include_context=False):
        path = [str(part) for part in detail["loc"]]
        if detail["type"] == "extra_forbidden":
            problems.setdefault(".".join(path), _unknown_key(path, known))
        else:
            key = _known_part(path, known)
            problems.setdefault(key, _wrong_value(key, values, schema))
    return list(problems.values())


def nearest(name: str, names: Sequence[str]) -> str | None:
    """The one of `names` that `name` is most probably meant to be, None when none is near."""
    return next(iter(difflib.get_close_matches(name, names, n=1, cutoff=0.6)), None)


def _unknown_key(path: Sequence[str], known: Sequence[str]) -> str:
    parent = "".join(f"{part}." for part in path[:-1])
    siblings = {key.removeprefix(parent): key for key in known if key.rpartition(".")[0] == parent.rstrip(".")}
    anywhere = {key.rpartition(".")[2]: key for key in reversed(known)}
    near = [names[name] for names in (siblings, anywhere) if (name := nearest(path[-1], list(names)))]
    remedy = f"did you mean {near[0]}?" if near else f"choose from {', '.join(siblings.values())}."
    return f"{shortened('.'.join(path))} is not a setting; {remedy}"


def _known_part(path: Sequence[str], known: Sequence[str]) -> str:
    """The longest dotted beginning of `path` that is a key; the rest are list items and branches of a union."""
    return next(key for end in range(len(path), 0, -1) if (key := ".".join(path[:end])) in known)


def _wrong_value(key: str, values: Mapping[str, Any], schema: Schema) -> str:
    field = _field_schema(key, schema)
    value: Any = values
    for part in key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return f"{key} is missing: {field['description']}."
        value = value[part]
    return f"{key} is {describe(value)}, but takes {_allowed(field, schema)} ({field['description']})."


def _field_schema(key: str, schema: Schema) -> Schema:
    field = schema
    for part in key.split("."):
        field = _resolved(field, schema)["properties"][part]
    return field


def _resolved(field: Schema, schema: Schema) -> Schema:
    """The definition that a JSON schema field points at, or the field itself."""
    reference = field.get("$ref")
    return schema["$defs"][reference.rpartition("/")[2]] if reference else field


def _allowed(field: Schema, schema: Schema) -> str:
    """The values that a field takes, in words, from its JSON schema."""
    field = _resolved(field, schema)
    if "anyOf" in field:
        return " or ".join(_allowed(branch, schema) for branch in field["anyOf"])
    if "const" in field:
        return str(field["const"])
    if "enum" in field:
        return f"one of {', '.join(field['enum'])}"
    if field["type"] == "array":
        return _allowed_list(field, schema)
    if "examples" in field:
        return f"text such as {field['examples'][0]}"
    plain = {"string": "text", "boolean": "true or false", "object": "a mapping of keys to values"}
    return plain.get(field["type"]) or _allowed_number(field)


def _allowed_list(field: Schema, schema: Schema) -> str:
    items = field.get("prefixItems")
    if items:
        return f"a list of {len(items)} values, each {_allowed(items[0], schema)}"
    return f"a list of values, each {_allowed(field['items'], schema)}"


def _allowed_number(field: Schema) -> str:
    bounds = {
        "minimum": "of at least",
        "exclusiveMinimum": "above",
        "maximum": "of at most",
        "exclusiveMaximum": "below",
    }
    limits = " and ".join(f"{words} {field[name]:g}" for name, words in bounds.items() if name in field)
    kind = "a whole number" if field["type"] == "integer" else "a number"
    return f"{kind} {limits}" if limits else kind
