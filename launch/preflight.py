"""Everything that can be known to be wrong before any process starts. Looks only; creates and changes nothing."""

import os
import socket
import sys
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from shutil import which
from typing import Any

from weft.launch.errors import UserError
from weft.launch.layout import model_ranks, zero_engine
from weft.launch.overrides import describe
from weft.launch.replan import replan
from weft.launch.settings import Settings, check_layout, load_settings
from weft.launch.world import device_type

# What a run must keep to be the same run; a layout may change between its parts, since it never changes the result.
_IDENTITY = (
    "name",
    "model",
    "batch.global_size",
    "batch.initial_size",
    "batch.growth_steps",
    "train.precision",
    "train.seed",
    "train.average_decay",
    "train.optimizer",
    "train.schedule",
    "corpus",
)


def check_run(settings: Settings, world_size: int) -> None:
    """Check a run of `world_size` ranks on this machine.

    Raises:
        UserError: the first thing that would make it fail.
    """
    check_layout(settings, world_size)
    _check_deepspeed(settings)
    _check_corpus(settings)
    check_directory("report.directory", settings.report.directory)
    check_directory("checkpoint.directory", settings.checkpoint.directory)
    check_same_run(settings)
    _check_resume(settings)
    _check_pretrained(settings)
    check_devices(settings, world_size)
    _check_precision(settings)
    _check_compiler(settings)


def check_directory(key: str, directory: str) -> None:
    """Check that the directory can be written, or made where it does not exist.

    Raises:
        UserError: names the key, the directory and what stands in the way.
    """
    path = Path(directory).absolute()
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    if not existing.is_dir():
        raise UserError(f"{key} is {directory}, but {existing} is a file; choose another directory.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"{key} is {directory}, but {existing} may not be written to; choose another directory.")


def check_same_run(settings: Settings) -> None:
    """Check that the run in `report.directory`, if there is one, is this one, in this or another layout.

    Raises:
        UserError: it is another run; names the first key that differs and both values.
    """
    config = Path(settings.report.directory) / "config.yaml"
    if not config.exists():
        return
    remedy = f"choose another name or report.directory, or delete {settings.report.directory}."
    try:
        earlier = load_settings(config)
    except UserError:
        raise UserError(f"report.directory holds {config}, which is not a run of this version; {remedy}") from None
    before, now = _identity(earlier), _identity(settings)
    for key in [*before, *(key for key in now if key not in before)]:
        if before.get(key) != now.get(key):
            raise UserError(
                f"report.directory is {settings.report.directory}, which holds a run with {key} "
                f"{describe(before.get(key))} instead of {describe(now.get(key))}; {remedy}"
            )
    if earlier.train.steps > settings.train.steps:
        raise UserError(
            f"train.steps is {settings.train.steps}, but the run in {settings.report.directory} was made for "
            f"{earlier.train.steps}; steps may only grow; {remedy}"
        )


def check_restarts(settings: Settings, restarts: int, *, ranks: int, nodes: int) -> None:
    """Check that the job could be started again, on as few as `ranks` ranks of `nodes` nodes.

    Raises:
        UserError: a restart would begin anew, or fewer nodes could not hold the model.
    """
    if restarts and settings.checkpoint.resume != "auto":
        raise UserError(
            f"checkpoint.resume is {settings.checkpoint.resume}, but a restart goes on from the newest checkpoint of "
            f"{settings.checkpoint.directory}; choose auto, or start without restarts."
        )
    if ranks < model_ranks(settings):
        raise UserError(
            f"--nnodes allows {nodes} nodes, which are {ranks} ranks, but one replica of the model takes "
            f"{model_ranks(settings)} (pipeline × context × tensor); choose more nodes or a smaller layout."
        )
    if restarts:
        fewer = replan(settings, ranks, nodes=nodes)
        assert fewer.parallel.data != "auto"
        check_layout(fewer, model_ranks(settings) * fewer.parallel.data)


def check_port(port: str) -> None:
    """Check that the rendezvous port that the user chose is a number and free.

    Raises:
        UserError: it is not; says how to let the system choose.
    """
    if not port.isdecimal() or not 0 <= int(port) < 2**16:
        raise UserError(f"MASTER_PORT is {port!r}, but a port is a number below 65536; unset it to have one chosen.")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", int(port)))
        except OSError as error:
            raise UserError(
                f"MASTER_PORT is {port}, which cannot be used ({error.strerror}); unset it to have a free port chosen."
            ) from None


def _identity(settings: Settings) -> dict[str, Any]:
    """What makes a run the run that it is, by dotted key."""
    values = settings.model_dump(mode="json")
    flat = dict(_leaves(values))
    return {key: value for key, value in flat.items() if any(f"{key}.".startswith(f"{name}.") for name in _IDENTITY)}


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _check_corpus(settings: Settings) -> None:
    from weft.launch.corpus import check_corpus

    check_corpus(settings.corpus.path)
    tokenizer, pretrained = settings.corpus.tokenizer, settings.model.get("pretrained")
    if tokenizer == "auto" and pretrained is not None:
        raise UserError(
            f"model.pretrained is {pretrained}, which has no tokenizer.json; set corpus.tokenizer to the one that the "
            "model was trained with."
        )
    file = Path(tokenizer) / "tokenizer.json" if Path(tokenizer).is_dir() else Path(tokenizer)
    if tokenizer != "auto" and not file.is_file():
        raise UserError(f"corpus.tokenizer is {tokenizer}, but there is no such file; give a tokenizer.json or auto.")


def _check_resume(settings: Settings) -> None:
    resume = settings.checkpoint.resume
    if resume not in ("auto", "never") and not Path(resume).is_dir():
        raise UserError(f"checkpoint.resume is {resume}, but there is no such checkpoint; choose auto, never or one.")


def _check_deepspeed(settings: Settings) -> None:
    if zero_engine(settings.parallel) == "deepspeed" and find_spec("deepspeed") is None:
        raise UserError(
            f"parallel.zero is {settings.parallel.zero}, which needs DeepSpeed; install weft with the extra deepspeed "
            "(pip install 'weft[deepspeed]'), or choose parallel.zero=0, or 3 with parallel.zero_engine=fsdp2."
        )


def _check_precision(settings: Settings) -> None:
    import torch

    precision = settings.train.precision
    if device_type(settings) == "cpu":
        if precision == "fp16":
            raise UserError("train.precision is fp16, which needs a GPU; on CPUs choose bf16 or fp32.")
    elif precision == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError(
            f"train.precision is bf16, which {torch.cuda.get_device_name()} does not compute in; choose fp16 or fp32."
        )


def _check_compiler(settings: Settings) -> None:
    """Check for what `torch.compile` needs: a C++ compiler on CPUs; Triton on GPUs, which calls one of C."""
    if not settings.train.compile:
        return
    if device_type(settings) == "cpu":
        needed, variable = "C++", "CXX"
        candidates = [os.environ.get(variable, "clang++" if sys.platform == "darwin" else "g++")]
    else:
        needed, variable = "C", "CC"
        candidates = [os.environ[variable]] if variable in os.environ else ["gcc", "clang"]
        if find_spec("triton") is None:
            raise UserError(
                "train.compile is true, which needs Triton on GPUs, but it is not installed; pip install triton, or "
                "choose train.compile=false."
            )
    if not any(map(which, candidates)):
        raise UserError(
            f"train.compile is true, which needs a {needed} compiler, but there is no {' or '.join(candidates)}; "
            f"install one, name yours in the environment variable {variable}, or choose train.compile=false."
        )


def _check_pretrained(settings: Settings) -> None:
    """Check that the weights of `model.pretrained`, where the run begins with them, are those of its config."""
    directory = settings.model.get("pretrained")
    if directory is None:
        return
    from weft.launch.checkpoints import checkpoints_to_resume
    from weft.model.config import model_config
    from weft.model.hugging_face import check_pretrained

    if not checkpoints_to_resume(settings.checkpoint):
        try:
            check_pretrained(directory, model_config(settings.model))
        except ValueError as error:
            raise UserError(f"model.pretrained: {error}.") from None


def check_devices(settings: Settings, world_size: int) -> None:
    """Check that this machine has the devices and the communication library for its share of the ranks.

    Raises:
        UserError: says what is missing.
    """
    import torch
    import torch.distributed as dist

    if device_type(settings) == "cpu":
        if not dist.is_gloo_available():
            raise UserError("cluster.device is cpu, but this torch has no gloo; install torch with gloo.")
        return
    gpus = torch.cuda.device_count()
    ranks = world_size // settings.cluster.nodes
    if not gpus:
        raise UserError(
            f"cluster.device is {settings.cluster.device}, but this machine has no GPU; choose cpu or auto."
        )
    if ranks > gpus:
        raise UserError(
            f"{ranks} ranks would run on this machine, but it has {gpus} GPUs; choose a smaller layout, "
            "more cluster.nodes, or cluster.device=cpu."
        )
    if not dist.is_nccl_available():
        raise UserError(
            f"cluster.device is {settings.cluster.device}, but this torch has no NCCL; install one with it."
        )
