"""Weights of a split model from safetensors files: each rank reads its own slices and nothing else."""

import json
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from weft.parallel.sharding import Sharding, sharded_parameters

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@torch.no_grad()
def load_shards(module: nn.Module, directory: str | Path, *, device: torch.device | str = "cpu") -> None:
    """Fill the parameters of `module` with this rank's shards of the full tensors in `directory`.

    Parameters on the meta device come to `device`; shared ones stay shared, precisions stay the module's. The files are
    memory-mapped, so that a rank never holds more than its own shards. No communication.

    `directory` holds `model.safetensors`, or `model.safetensors.index.json` and its parts, as Hugging Face writes them.
    Names are the module's; the prefix of a Hugging Face base model may be missing.

    Raises:
        ValueError: the files cannot be read, or lack a tensor or have it in another shape; or a buffer on the meta
            device is not in the files and the module cannot compute it.
    """
    with ExitStack() as stack:
        files = TensorFiles(Path(directory), stack)
        _fill_buffers(module, files, device)
        names = _names(module)
        for first, parameter, sharding in list(sharded_parameters(module)):
            stored = files.find(names[id(parameter)], getattr(module, "base_model_prefix", ""), first)
            shape = tuple(parameter.shape) if sharding is None else sharding.full_shape
            if tuple(stored.get_shape()) != shape:
                raise ValueError(
                    f"{files.directory}: {first} is {stored.get_shape()} there and {list(shape)} in this model"
                )
            target = torch.empty_like(parameter, device=device) if parameter.is_meta else parameter.data
            _read(stored, sharding, target)
            if parameter.is_meta:
                _replace(module, names[id(parameter)], nn.Parameter(target, parameter.requires_grad))


class TensorFiles:
    """The tensors of a directory by name; files are memory-mapped when first needed, until `stack` closes.

    Raises:
        ValueError: there are no readable safetensors files; names the directory and what to do.
    """

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        self.directory = directory
        self._stack = stack
        self._open: dict[str, Any] = {}
        self._file_of = self._read_index()

    def find(self, names: list[str], prefix: str, wanted: str) -> Any:
        """The stored tensor that has one of the names, with or without the prefix."""
        for name in names:
            known = self.full_name(name, prefix)
            if known is not None:
                return self._file(self._file_of[known]).get_slice(known)
        raise ValueError(f"{self.directory} lacks {wanted}; it holds another model")

    def full_name(self, name: str, prefix: str | None = None) -> str | None:
        """The name under which the tensor is stored, with or without the prefix (default: the name's first word)."""
        prefix = name.partition(".")[0] if prefix is None else prefix
        known = [name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}"]
        if "LayerNorm." in name:  # as the first published BERT models have it
            known += [other.replace(".weight", ".gamma").replace(".bias", ".beta") for other in known]
        return next((candidate for candidate in known if candidate in self._file_of), None)

    def holds(self, name: str) -> bool:
        return name in self._file_of

    def open_all(self) -> None:
        """Find out at once whether every file is there and is one."""
        for file in set(self._file_of.values()):
            self._file(file)

    def names(self) -> list[str]:
        """The names of all tensors."""
        return list(self._file_of)

    def _read_index(self) -> dict[str, str]:
        if (self.directory / SINGLE).is_file():
            return dict.fromkeys(self._file(SINGLE).keys(), SINGLE)
        try:
            weights: dict[str, str] = json.loads((self.directory / INDEX).read_text(encoding="utf-8"))["weight_map"]
        except (OSError, ValueError, KeyError):
            if any(self.directory.glob("pytorch_model*.bin")):
                raise ValueError(_pickled(self.directory)) from None
            raise ValueError(
                f"{self.directory} has neither a {SINGLE} nor a readable {INDEX}; choose a folder that has"
            ) from None
        return weights

    def _file(self, name: str) -> Any:
        if name not in self._open:
            try:
                self._open[name] = self._stack.enter_context(safe_open(self.directory / name, framework="pt"))
            except Exception as error:  # safetensors has an exception type of its own for damaged files
                raise ValueError(f"{self.directory / name} cannot be read ({error}); get it again") from None
        return self._open[name]


def _pickled(directory: Path) -> str:
    return (
        f"{directory} has its weights in pickled .bin files, which can run code when they are read; write them as "
        f'safetensors with: python -c "from transformers import AutoModelForCausalLM as M; '
        f"M.from_pretrained('{directory}', weights_only=True).save_pretrained('{directory}-safetensors')\""
    )


def _names(module: nn.Module) -> dict[int, list[str]]:
    """All names of every parameter."""
    names: dict[int, list[str]] = defaultdict(list)
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    return names


def _read(stored: Any, sharding: Sharding | None, target: Tensor) -> None:
    if sharding is None or sharding.dim is None:
        target.copy_(stored[...])
        return
    target.zero_()
    for part in sharding.slices():
        index = [slice(None)] * sharding.dim + [slice(part.full_start, part.full_start + part.length)]
        target.narrow(sharding.dim, part.local_start, part.length).copy_(stored[tuple(index)])


def _replace(module: nn.Module, names: list[str], parameter: nn.Parameter) -> None:
    for name in names:
        owner, _, leaf = name.rpartition(".")
        module.get_submodule(owner)._parameters[leaf] = parameter


def _fill_buffers(module: nn.Module, files: TensorFiles, device: torch.device | str) -> None:
    """Buffers on the meta device from the files, or computed as their Hugging Face model computes them."""
    for prefix, owner in module.named_modules():
        computed = []
        for leaf, buffer in _meta_buffers(owner):
            name = f"{prefix}.{leaf}" if prefix else leaf
            filled = owner._buffers[leaf] = torch.empty_like(buffer, device=device)
            if files.holds(name):
                _read(files.find([name], "", name), None, filled)
            else:
                computed.append(name)
        if computed and not hasattr(module, "_init_weights"):
            raise ValueError(
                f"buffer {computed[0]} is on the meta device and not in the files; give it its values first"
            )
        if computed:
            module._init_weights(owner)  # type: ignore[operator]


def _meta_buffers(owner: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return ((leaf, buffer) for leaf, buffer in list(owner._buffers.items()) if buffer is not None and buffer.is_meta)
