"""Finding the model that `--model package.module:build` names, with a sentence for everything that can be wrong."""

import inspect
import sys
from contextlib import redirect_stdout
from difflib import get_close_matches
from pathlib import Path
from traceback import extract_tb
from types import ModuleType

import torch
import torch.distributed as dist
from torch import nn

from weft.launch.errors import UserError
from weft.launch.verify.own_model import SEED, Batch, OwnModel, import_from
from weft.parallel import build_mesh


def find_model(text: str, *, steps: int, rows: int, sequence: int) -> OwnModel:
    """The model, after building the plain one here once to see what it is fed with.

    Args:
        rows, sequence: size of the batch that is made up when the module has no `batch`.

    Raises:
        UserError: there is no such module or function, or it fails.
    """
    module, _, function = text.partition(":")
    function = function or "build"
    folder = str(Path.cwd())
    with redirect_stdout(sys.stderr):  # what the user's code prints is no part of the report
        own = _import(folder, module, text)
        _check_function(own, function, text)
        return OwnModel(folder, module, function, steps, _batch(own, function, text, rows, sequence))


def _check_function(own: ModuleType, function: str, text: str) -> None:
    if not callable(getattr(own, function, None)):
        names = [name for name, value in vars(own).items() if inspect.isfunction(value)]
        near = get_close_matches(function, names, 1)
        remedy = (
            f"did you mean {own.__name__}:{near[0]}?" if near else "write `def build(mesh)`, which returns the model."
        )
        raise UserError(f"--model {text}: {own.__name__} has no function {function}; {remedy}")


def _import(folder: str, module: str, text: str) -> ModuleType:
    try:
        return import_from(folder, module)
    except ModuleNotFoundError as error:
        if error.name and f"{module}.".startswith(f"{error.name}."):
            raise UserError(
                f"--model {text}: there is no module {error.name}; give package.module:function, importable from "
                "the current folder."
            ) from None
        raise UserError(f"--model {text} cannot be imported: {_told(error)}.") from None
    except Exception as error:
        raise UserError(f"--model {text} cannot be imported: {_told(error)}.") from None


def _batch(own: ModuleType, function: str, text: str, rows: int, sequence: int) -> Batch:
    mesh = build_mesh()
    try:
        torch.manual_seed(SEED)
        model = getattr(own, function)(mesh["tensor"])
        if not isinstance(model, nn.Module):
            raise TypeError(f"{function} returned {type(model).__name__}, not a torch.nn.Module")
        torch.manual_seed(SEED)
        given = getattr(own, "batch", None)
        if given is not None:
            return given()  # type: ignore[no-any-return]
        return made_up_batch(model, rows, sequence, labels=not hasattr(own, "stages"))
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"--model {text}: the plain model cannot be built: {_told(error)}.") from None
    finally:
        dist.destroy_process_group()


def made_up_batch(model: nn.Module, rows: int, sequence: int, *, labels: bool) -> Batch:
    """Random tokens for a model with an embedding, random vectors for one with a linear layer first.

    With `labels`, a model whose forward takes labels gets the tokens as labels too; stages of a pipeline take none.

    Raises:
        UserError: the model has neither.
    """
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            tokens = torch.randint(0, getattr(module, "full_num_embeddings", module.num_embeddings), (rows, sequence))
            labels = labels and "labels" in inspect.signature(model.forward).parameters
            return [tokens], {"labels": tokens} if labels else {}
        if isinstance(module, nn.Linear):
            return [torch.randn(rows, sequence, getattr(module, "full_in_features", module.in_features))], {}
    raise UserError(
        f"{type(model).__name__} has neither an embedding nor a linear layer to guess its input from; write a function "
        "batch() beside build that returns (args, kwargs) of its forward."
    )


def _told(error: Exception) -> str:
    """What an error of the user's code says, and where."""
    frames = [frame for frame in extract_tb(error.__traceback__) if "importlib" not in frame.filename]
    if isinstance(error, SyntaxError):
        return f"{error.msg} ({error.filename}, line {error.lineno})"
    where = f" ({frames[-1].filename}, line {frames[-1].lineno})" if len(frames) > 1 else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())}{where}"
