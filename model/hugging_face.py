"""Weights of a Hugging Face directory into a model on a mesh: each rank reads its own slices and nothing else."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from weft.model.config import ModelConfig
from weft.model.families import FAMILIES
from weft.model.weight_names import Place, find_place
from weft.parallel.sharding import Sharding, Slice, sharded_parameters
from weft.parallel.tensor.load import TensorFiles


@torch.no_grad()
def load_pretrained(module: nn.Module, directory: str | Path, config: ModelConfig) -> None:
    """Fill a stage's parameters with this rank's shards of the weights in `directory`.

    `directory` holds `model.safetensors`, or `model.safetensors.index.json` and its parts, as Hugging Face writes them.
    The files are memory-mapped: beside its parameters a rank holds one slice at a time. Precisions stay the module's.
    No communication.

    Raises:
        ValueError: the files cannot be read, or lack a tensor or have it in another shape.
    """
    with ExitStack() as stack:
        files = TensorFiles(Path(directory), stack)
        for name, parameter, sharding in sharded_parameters(module):
            shape = tuple(parameter.shape) if sharding is None else sharding.full_shape
            place = place_of(name, config, shape)
            stored = find_stored(files, place, shape)
            _fill(parameter, sharding, stored, place, shape[0])


def check_pretrained(directory: str | Path, config: ModelConfig) -> None:
    """Check what shows without reading the weights: the files are there and are those of the config.

    Raises:
        ValueError: they are not.
    """
    head = config.num_attention_heads * config.head_dim
    blocks = "decoder" if config.encoder_layers else "layers"
    last = config.num_hidden_layers - config.encoder_layers - 1
    expected = {
        "embed_tokens.weight": (config.vocab_size, config.hidden_size),
        f"{blocks}.0.self_attn.q_proj.weight": (head, config.hidden_size),
        f"{blocks}.{last}.mlp.down_proj.weight": (config.hidden_size, config.intermediate_size),
    }
    with ExitStack() as stack:
        files = TensorFiles(Path(directory), stack)
        files.open_all()
        for name, shape in expected.items():
            find_stored(files, place_of(name, config, shape), shape)


def place_of(name: str, config: ModelConfig, shape: tuple[int, ...]) -> Place:
    """Where the files of the model's family store the parameter of that own name and full shape."""
    if config.tie_word_embeddings and name == "lm_head.weight":
        name = "embed_tokens.weight"
    return find_place(FAMILIES[config.model_type].weights, config, name, shape[0])


def find_stored(files: TensorFiles, place: Place, shape: tuple[int, ...]) -> Any:
    """The stored tensor, with or without the prefix of the base model, to be indexed like a tensor.

    Raises:
        ValueError: the files lack it or have it in another shape.
    """
    prefix = place.name.partition(".")[0]
    stored = files.find([place.name], prefix, place.name)
    wanted = stored_shape(place, shape)
    if list(stored.get_shape()) != wanted:
        raise ValueError(
            f"{files.directory}: {place.name} is {stored.get_shape()} there and {wanted} by its config.json"
        )
    return stored


def stored_shape(place: Place, shape: tuple[int, ...]) -> list[int]:
    """The shape of the stored tensor that a parameter of that shape is, or is a part of."""
    rows = shape[0] // place.length * place.stride
    return [rows, *shape[1:]][:: -1 if place.transposed else 1]


def read_rows(stored: Any, place: Place, start: int, count: int) -> Tensor:
    """The rows `start` … `start + count - 1` of a parameter, in the stored precision."""
    pieces = [_read(stored, place, piece, None) for piece in stored_rows(place, Slice(start, 0, count))]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _fill(target: Tensor, sharding: Sharding | None, stored: Any, place: Place, rows: int) -> None:
    dim = None if sharding is None else sharding.dim
    whole = [Slice(0, 0, rows)]
    parts = sharding.slices() if sharding is not None and dim is not None else whole
    if dim is not None:
        target.zero_()  # what pads a shard is not part of the parameter
    for row in parts if dim == 0 else whole:
        for piece in stored_rows(place, row):
            for column in parts if dim == 1 else [None]:
                goal = target.narrow(0, piece.local_start, piece.length)
                if column is not None:
                    goal = goal.narrow(1, column.local_start, column.length)
                goal.copy_(_read(stored, place, piece, column))


def stored_rows(place: Place, part: Slice) -> Iterator[Slice]:
    """The stored rows of rows `part` of a parameter, as slices that stand together in the file."""
    start, stop = part.full_start, part.full_start + part.length
    while start < stop:
        group, inside = divmod(start, place.length)
        length = min(place.length - inside, stop - start)
        local = part.local_start + start - part.full_start
        yield Slice(group * place.stride + place.start + inside, local, length)
        start += length


def _read(stored: Any, place: Place, row: Slice, column: Slice | None) -> Tensor:
    index = [slice(row.full_start, row.full_start + row.length)]
    if column is not None:
        index.append(slice(column.full_start, column.full_start + column.length))
    if not place.transposed:
        piece: Tensor = stored[tuple(index)]
        return piece
    columns = index[1] if column is not None else slice(None)
    transposed: Tensor = stored[columns, index[0]]
    return transposed.t()
