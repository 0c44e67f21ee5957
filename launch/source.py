"""What a path to a trained model means: the newest checkpoint of a run, a checkpoint, or a Hugging Face directory."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weft.launch.errors import UserError
from weft.launch.overrides import apply_overrides
from weft.launch.problems import known_keys
from weft.launch.sections import Settings
from weft.launch.settings import build_settings, model_of_directory
from weft.launch.world import device_type, world_size

if TYPE_CHECKING:
    from weft.model.config import ModelConfig

MANIFEST = "manifest.json"
_CHANGEABLE = (
    "parallel.tensor",
    "parallel.pipeline",
    "parallel.data",
    "parallel.split",
    "cluster.device",
    "train.precision",
    "train.timeout",
)


@dataclass(frozen=True)
class Source:
    """A trained model on disk, and the layout to run it in.

    Attributes:
        path: the checkpoint or the Hugging Face directory.
        settings: the model's, with one process as layout unless another was asked for.
    """

    path: Path
    settings: Settings

    @property
    def is_hugging_face(self) -> bool:
        return not (self.path / MANIFEST).is_file()

    @property
    def config(self) -> "ModelConfig":
        from weft.model.config import model_config

        try:
            return model_config(self.settings.model)
        except ValueError as error:
            raise UserError(f"{self.path}: {error}.") from None

    @property
    def ranks(self) -> int:
        return world_size(self.settings)

    def find(self, name: str) -> Path | None:
        """A file of that name beside the weights: in the checkpoint, or in the run that it is of."""
        folders = (self.path, self.path.parent, self.path.parent.parent)
        return next((folder / name for folder in folders if (folder / name).is_file()), None)


def open_source(path: str, overrides: Sequence[str] = ()) -> Source:
    """The model that `path` means: a run's folder, its checkpoints' folder, a checkpoint, or a Hugging Face directory.

    `overrides` change the layout, `parallel.tensor=2`, the device and the precision.

    Raises:
        UserError: nothing of the kind is there, or an override is about something else or does not fit.
    """
    folder = Path(path)
    checkpoint = _newest(folder)
    if checkpoint is not None:
        source = Source(checkpoint, _settings(_saved_settings(checkpoint), overrides))
    elif (folder / "config.json").is_file():
        source = Source(
            folder, _settings({"name": folder.resolve().name, "model": model_of_directory(path)}, overrides)
        )
    else:
        raise UserError(
            f"{path} holds no checkpoint; give a run's folder such as runs/demo, one of its checkpoints, or a Hugging "
            "Face directory."
        )
    _check_layout(source)
    return source


def _newest(folder: Path) -> Path | None:
    if (folder / MANIFEST).is_file():
        return folder
    from weft.launch.saved_run import find_checkpoints

    for place in (folder, folder / "checkpoints", _named_in_config(folder)):
        if place is not None and place.is_dir():
            found = find_checkpoints(place)
            if found:
                return found[-1]
    return None


def _named_in_config(folder: Path) -> Path | None:
    """The folder of checkpoints that the run's own settings name."""
    from weft.launch.overrides import read_yaml_file

    config = folder / "config.yaml"
    if not config.is_file():
        return None
    directory = (read_yaml_file(config).get("checkpoint") or {}).get("directory")
    return Path(directory) if isinstance(directory, str) else None


def _saved_settings(checkpoint: Path) -> dict[str, Any]:
    try:
        saved: dict[str, Any] = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["metadata"]["settings"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"{checkpoint / MANIFEST} does not say of which run it is; choose another checkpoint."
        ) from None
    return saved


def _settings(saved: dict[str, Any], overrides: Sequence[str]) -> Settings:
    values = saved | {
        "parallel": {"data": 1, "sequence_parallel": False},
        "cluster": {"device": saved.get("cluster", {}).get("device", "auto")},
    }
    for override in overrides:
        key = override.partition("=")[0]
        if not any(key in (name, name.rpartition(".")[2]) for name in _CHANGEABLE):
            raise UserError(f"{override} cannot be changed in a trained model; what can is {', '.join(_CHANGEABLE)}.")
    return build_settings(apply_overrides(values, overrides, list(known_keys(Settings))))


def _check_layout(source: Source) -> None:
    import torch

    from weft.model.config import check_tensor
    from weft.model.split import split_layers

    settings, parallel = source.settings, source.settings.parallel
    if parallel.data == "auto":
        raise UserError("parallel.data is auto; give the number of replicas.")
    try:
        check_tensor(source.config, parallel.tensor)
    except ValueError as error:
        raise UserError(f"parallel.tensor is {parallel.tensor}: {error}.") from None
    try:
        split_layers(source.config, parallel.pipeline, None if parallel.split == "auto" else parallel.split)
    except ValueError as error:
        raise UserError(f"parallel.pipeline is {parallel.pipeline}: {error}.") from None
    if device_type(settings) == "cuda" and source.ranks > torch.cuda.device_count():
        raise UserError(
            f"the layout takes {source.ranks} GPUs, but this machine has {torch.cuda.device_count()}; choose a smaller "
            "layout, or cluster.device=cpu."
        )


def check_kind(source: Source, *, apart: bool = False) -> None:
    """Refuse models that do not go on from a text; `apart`: take those that answer a text with another.

    Raises:
        UserError: the model is of another kind.
    """
    kind = source.config.kind
    if kind == "encoder-decoder" and not apart:
        raise UserError(f"{source.path} is an encoder-decoder model; it answers prompts with weft generate alone.")
    if kind == "encoder":
        raise UserError(f"{source.path} is an encoder model; it writes no text, choose a decoder.")
