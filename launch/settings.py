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
    return build_settings(_with_model_from_file(values))


def _with_model_from_file(values: dict[str, Any]) -> dict[str, Any]:
    """`values` with the keys of the config.json that `model` points at, and with the tokenizer that lies beside it."""
    model = values.get("model")
    if not isinstance(model, dict) or not {"config", "pretrained"} & model.keys():
        return values
    if "config" in model:
        read = _model_from_file("config", model["config"], model["config"])
        return values | {"model": read | {key: value for key, value in model.items() if key != "config"}}
    directory = model["pretrained"]
    if not isinstance(directory, str):
        raise UserError(f"model.pretrained is {describe(directory)}; give the path of a Hugging Face directory.")
    file = Path(directory) / "config.json"
    if "model_type" in model and not file.is_file():
        return values  # the resolved settings of a run whose directory is gone; a checkpoint has the weights
    values = values | {"model": model_of_directory(directory) | model | {"pretrained": directory}}
    corpus = values.get("corpus", {})
    if isinstance(corpus, dict) and (Path(directory) / "tokenizer.json").is_file():
        values["corpus"] = {"tokenizer": directory} | corpus
    return values


def model_of_directory(directory: str) -> dict[str, Any]:
    """The keys of the config.json in a Hugging Face directory.

    Raises:
        UserError: there is none, or it is not JSON.
    """
    config = _model_from_file("pretrained", directory, Path(directory) / "config.json")
    mask = _mask_token(Path(directory) / "tokenizer.json") if config.get("model_type") == "bert" else None
    return config if mask is None else {"mask_token_id": mask} | config


def _mask_token(file: Path) -> int | None:
    """The number of the token that stands for masked ones, which configs leave to the tokenizer."""
    try:
        added = json.loads(file.read_text(encoding="utf-8"))["added_tokens"]
        return next((int(token["id"]) for token in added if token["content"] == "[MASK]"), None)
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None


def _model_from_file(key: str, value: Any, path: Any) -> dict[str, Any]:
    """The keys of the config.json at `path`, which `model.KEY` points at with `value`."""
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, TypeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no path"
        missing = f"but {path} cannot be read" if key == "pretrained" else "which cannot be read"
        raise UserError(f"model.{key} is {describe(value)}, {missing}: {reason}.") from None
    except (ValueError, RecursionError):
        raise UserError(f"model.{key} is {value}, which is not JSON; give a Hugging Face config.json.") from None
    if not isinstance(config, dict):
        raise UserError(f"model.{key} is {value}, which holds no keys; give a Hugging Face config.json.")
    return config


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
