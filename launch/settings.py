"""The settings of a run: read from a YAML file and the command line, filled in, and written back.

    settings = load_settings("configs/demo.yaml", ["train.steps=100"])

Imports no torch, so that commands which only read settings start at once.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from weft.launch.errors import UserError
from weft.launch.layout import check_layout, data_size
from weft.launch.overrides import apply_overrides, describe, read_yaml_file, write_yaml
from weft.launch.problems import known_keys, sentences
from weft.launch.sections import Settings

__all__ = ["Settings", "build_settings", "check_layout", "dump_settings", "load_settings", "resolved"]


def load_settings(path: str | Path, overrides: Sequence[str] = ()) -> Settings:
    """Settings from a YAML file, with each `key=value` of `overrides` in place of what the file says.

    Raises:
        UserError: the file cannot be read, or a key or value is wrong; one sentence for each problem.
    """
    values = {"name": Path(path).stem} | read_yaml_file(Path(path))
    values = apply_overrides(values, overrides, list(known_keys(Settings)))
    model = values.get("model")
    if isinstance(model, dict) and "config" in model:
        values["model"] = _model_from_file(model)
    return build_settings(values)


def _model_from_file(model: dict[str, Any]) -> dict[str, Any]:
    """The config.json that `model.config` points at, with the other keys of `model` in place of its own."""
    path = model["config"]
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, TypeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no path"
        raise UserError(f"model.config is {describe(path)}, which cannot be read: {reason}.") from None
    except ValueError:
        raise UserError(f"model.config is {path}, which is not JSON; give a Hugging Face config.json.") from None
    if not isinstance(config, dict):
        raise UserError(f"model.config is {path}, which holds no keys; give a Hugging Face config.json.")
    return config | {key: value for key, value in model.items() if key != "config"}


def build_settings(values: dict[str, Any]) -> Settings:
    """Settings from a mapping.

    Raises:
        UserError: a key or value is wrong; one sentence for each problem.
    """
    misnamed = [key for key in values if not isinstance(key, str)]
    if misnamed:
        raise UserError(f"{misnamed[0]!r} is not a setting; keys are words such as name, model and parallel.")
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        raise UserError("\n".join(sentences(error, Settings, values))) from None


def resolved(settings: Settings, world_size: int) -> Settings:
    """The settings with `parallel.data` and `cluster.devices_per_node` as numbers for a world of `world_size` ranks.

    Raises:
        UserError: the layout does not fill the world, or the nodes do not share it equally.
    """
    nodes = settings.cluster.nodes
    devices = settings.cluster.devices_per_node
    if devices == "auto":
        if world_size % nodes:
            raise UserError(f"cluster.nodes is {nodes}, over which {world_size} ranks do not spread equally.")
        devices = world_size // nodes
    parallel = settings.parallel.model_copy(update={"data": data_size(settings, world_size)})
    cluster = settings.cluster.model_copy(update={"devices_per_node": devices})
    return settings.model_copy(update={"parallel": parallel, "cluster": cluster})


def dump_settings(settings: Settings) -> str:
    """The settings as YAML that loads back equal."""
    return write_yaml(settings.model_dump(mode="json"))
