"""Whether a layout fits: the world, the batch, the sequence, the layers and the schedule divide as they must."""

from typing import TYPE_CHECKING, Literal

from weft.launch.batch_sizes import batch_sizes
from weft.launch.errors import UserError
from weft.launch.sections import ParallelSettings, Settings
from weft.parallel.tensor.divide import listed

if TYPE_CHECKING:
    from weft.model.config import ModelConfig

MOST_MICROBATCHES = 100_000
"""Of a step: a schedule is a table with a few entries for each."""


def model_ranks(settings: Settings) -> int:
    """Ranks that hold one replica of the model: pipeline x context x tensor."""
    return settings.parallel.pipeline * settings.parallel.context * settings.parallel.tensor


def data_size(settings: Settings, world_size: int) -> int:
    """Replicas of the model in a world of `world_size` ranks.

    Raises:
        UserError: the layout does not fill the world exactly.
    """
    parallel = settings.parallel
    replicas = world_size // model_ranks(settings)
    if replicas * model_ranks(settings) != world_size:
        product = f"pipeline {parallel.pipeline} × context {parallel.context} × tensor {parallel.tensor}"
        raise UserError(
            f"parallel: {product} is {model_ranks(settings)}, which does not divide the world of {world_size} ranks; "
            f"choose {_fitting(settings, world_size)}, or another world size."
        )
    if parallel.data not in ("auto", replicas):
        raise UserError(
            f"parallel.data is {parallel.data}, but a world of {world_size} ranks holds {replicas} replicas of "
            f"{model_ranks(settings)} ranks (pipeline × context × tensor); choose parallel.data={replicas} or auto, "
            f"or a world of {parallel.data * model_ranks(settings)} ranks."
        )
    return replicas


def microbatches(settings: Settings, world_size: int) -> int:
    """Microbatches of each replica per optimiser step.

    Raises:
        UserError: the global batch does not divide over replicas and microbatches.
    """
    size = settings.batch.global_size
    replicas = data_size(settings, world_size)
    share = replicas * settings.batch.micro_size
    if size % share:
        nearest = [multiple for multiple in (size // share * share, (size // share + 1) * share) if multiple]
        raise UserError(
            f"batch.global_size is {size}, which does not divide by data {replicas} × batch.micro_size "
            f"{settings.batch.micro_size} = {share}; the nearest sizes that do: {listed(nearest)}."
        )
    if size // share > MOST_MICROBATCHES:
        raise UserError(
            f"batch.global_size is {size}, which is {size // share} microbatches of each replica; a step has at most "
            f"{MOST_MICROBATCHES}; choose fewer sequences, or a larger batch.micro_size."
        )
    return size // share


def check_layout(settings: Settings, world_size: int) -> None:
    """Check everything about the layout that the settings and the world size alone decide.

    Raises:
        UserError: the first thing that does not fit, with the choices that do.
    """
    _check_available(settings)
    zero_engine(settings.parallel)
    _check_optimizer(settings)
    count = microbatches(settings, world_size)
    _check_growth(settings, world_size)
    model = _model_config(settings)
    _check_tensor(settings, model)
    _check_sequence(settings, model)
    stages = _stages(settings, count)
    _check_split(settings, model, stages)
    _check_one_stage(settings, stages)


def zero_engine(parallel: ParallelSettings) -> Literal["none", "deepspeed", "fsdp2"]:
    """Who divides what the data ranks hold.

    Raises:
        UserError: the engine that is asked for does not have the ZeRO stage, or not in this layout.
    """
    engine = _engine_that_fits(parallel)
    if parallel.offloads_optimizer and engine != "deepspeed":
        raise UserError(
            f"parallel.offload is {parallel.offload}, and DeepSpeed does that for the optimizer, but parallel.zero is "
            f"{parallel.zero} and parallel.zero_engine {parallel.zero_engine}; choose parallel.zero=1 with "
            "parallel.zero_engine=auto, or parallel.offload=none or activations."
        )
    return engine


def _engine_that_fits(parallel: ParallelSettings) -> Literal["none", "deepspeed", "fsdp2"]:
    if not parallel.zero:
        return "none"
    if parallel.zero < 3:
        if parallel.zero_engine == "fsdp2":
            raise UserError(
                f"parallel.zero_engine is fsdp2, which divides weights too (parallel.zero=3); for parallel.zero="
                f"{parallel.zero} choose deepspeed or auto."
            )
        return "deepspeed"
    if parallel.zero_engine == "auto":
        return "deepspeed" if parallel.offloads_optimizer else "fsdp2"
    return parallel.zero_engine


def _check_available(settings: Settings) -> None:
    parallel = settings.parallel
    available = {
        "parallel.context": (parallel.context, 1),
    }
    for key, (value, supported) in available.items():
        if value != supported:
            raise UserError(f"{key} is {value}; this version supports {supported}.")


def _check_growth(settings: Settings, world_size: int) -> None:
    batch, share = settings.batch, data_size(settings, world_size) * settings.batch.micro_size
    if not batch.initial_size:
        return
    if batch.global_size % batch.initial_size:
        raise UserError(
            f"batch.initial_size is {batch.initial_size}, which does not divide batch.global_size {batch.global_size}."
        )
    if batch.initial_size % share:
        raise UserError(
            f"batch.initial_size is {batch.initial_size}, which does not divide by data × batch.micro_size = {share}; "
            f"choose a multiple of {share}, or smaller microbatches."
        )
    for size in batch_sizes(batch):
        _stages(settings, size // share)


def _check_optimizer(settings: Settings) -> None:
    """Adafactor keeps means over rows and columns, not those of a part; Muon gathers the parts of tensor ranks."""
    parallel = settings.parallel
    if settings.train.optimizer.name == "muon" and parallel.zero:
        raise UserError(
            f"train.optimizer.name is muon, which needs matrices that data ranks do not divide, but parallel.zero is "
            f"{parallel.zero}; choose parallel.zero=0, or adamw or sgd."
        )
    if settings.train.optimizer.name == "adafactor" and (parallel.tensor > 1 or parallel.zero):
        raise UserError(
            f"train.optimizer.name is adafactor, which needs whole matrices, but parallel.tensor is {parallel.tensor} "
            f"and parallel.zero is {parallel.zero}; choose parallel.tensor=1 and parallel.zero=0, or adamw or sgd."
        )


def _check_tensor(settings: Settings, model: "ModelConfig") -> None:
    from weft.model.config import check_tensor

    try:
        check_tensor(model, settings.parallel.tensor)
    except ValueError as error:
        raise UserError(f"parallel.tensor is {settings.parallel.tensor}: {error}.") from None


def _check_sequence(settings: Settings, model: "ModelConfig") -> None:
    length = settings.corpus.sequence_length
    tensor = settings.parallel.tensor
    if length > model.max_position_embeddings:
        raise UserError(
            f"corpus.sequence_length is {length}, but the model has {model.max_position_embeddings} positions "
            "(model.max_position_embeddings); shorten the one or raise the other."
        )
    tensor *= 2 if model.kind == "encoder-decoder" else 1  # each reads one half
    if settings.parallel.sequence_parallel and settings.parallel.tensor > 1 and length % tensor:
        raise UserError(
            f"corpus.sequence_length is {length}, which does not divide over tensor {tensor} as "
            f"parallel.sequence_parallel needs; choose {length // tensor * tensor or tensor}, "
            "or parallel.sequence_parallel=false."
        )


def _check_split(settings: Settings, model: "ModelConfig", stages: int) -> None:
    from weft.model.split import split_layers

    parallel = settings.parallel
    try:
        split_layers(model, stages, None if parallel.split == "auto" else parallel.split)
    except ValueError as error:
        raise UserError(f"parallel.pipeline is {parallel.pipeline}: {error}.") from None


def _check_one_stage(settings: Settings, stages: int) -> None:
    parallel = settings.parallel
    if parallel.zero == 3 and zero_engine(parallel) == "deepspeed" and stages > 1:
        raise UserError(
            f"parallel.zero is 3 by DeepSpeed, under which stages would wait for each other for ever, but "
            f"parallel.pipeline {parallel.pipeline} with schedule {parallel.schedule} has {stages} stages; choose "
            "parallel.zero_engine=fsdp2 with parallel.offload=none, or parallel.zero=2."
        )


def _stages(settings: Settings, count: int) -> int:
    """Stages of the schedule, which some schedules set themselves."""
    from weft.launch.schedules import load_schedule

    try:
        return load_schedule(settings.parallel, count).stages
    except ValueError as error:
        raise UserError(f"parallel.schedule is {settings.parallel.schedule}: {error}.") from None


def _model_config(settings: Settings) -> "ModelConfig":
    from weft.model.config import model_config

    try:
        return model_config(settings.model)
    except ValueError as error:
        raise UserError(str(error)) from None


def _fitting(settings: Settings, world_size: int) -> str:
    """The tensor sizes with which the other axes of a replica divide the world."""
    others = model_ranks(settings) // settings.parallel.tensor
    tensors = [tensor for tensor in range(1, world_size // others + 1) if world_size % (others * tensor) == 0]
    return f"tensor {listed(tensors)}" if tensors else "sizes whose product does"
