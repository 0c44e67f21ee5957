"""The settings of a run as typed sections; every field says its meaning, its unit and its default.

The values are strict: a number in quotes is text, an unknown key is an error. `model` stays a mapping of
Hugging Face config names here; `weft.model.config` knows what they mean.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from weft.launch.units import DURATION

AtLeastOne = Annotated[int, Field(ge=1)]
NotNegative = Annotated[int, Field(ge=0)]
Text = Annotated[str, Field(min_length=1)]
Duration = Annotated[str, Field(min_length=2, pattern=DURATION, examples=["3h50m"])]
Decay = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """A group of settings: strict, unchangeable, no unknown keys."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)


class ParallelSettings(Section):
    """How the model and the batch are spread over the ranks."""

    tensor: AtLeastOne = Field(default=1, description="ranks that share each layer's matrices")
    pipeline: AtLeastOne = Field(default=1, description="ranks that hold consecutive stages of layers")
    data: Literal["auto"] | AtLeastOne = Field(
        default="auto", description="replicas of the model; auto takes what the other axes leave of the world"
    )
    context: AtLeastOne = Field(default=1, description="ranks that share each sequence")
    sequence_parallel: bool = Field(
        default=True, description="norms and residuals hold sequence / tensor positions on each tensor rank"
    )
    schedule: Text = Field(default="1f1b", description="pipeline schedule by name, or the path of a table.csv")
    stages_per_rank: AtLeastOne = Field(default=1, description="stages that each pipeline rank holds")
    split: Literal["auto"] | Annotated[tuple[NotNegative, ...], Field(strict=False, min_length=1)] = Field(
        default="auto", description="layers of each stage, first stage first; auto balances their cost"
    )
    zero: Annotated[int, Field(ge=0, le=3)] = Field(
        default=0,
        description="what the data ranks divide: 0 nothing, 1 optimiser states, 2 also gradients, 3 also weights",
    )
    zero_engine: Literal["auto", "deepspeed", "fsdp2"] = Field(
        default="auto",
        description="who divides: DeepSpeed, or torch's FSDP2; auto is deepspeed for 1, 2 and with offload, else fsdp2",
    )
    recompute: Literal["none", "selective", "full"] = Field(
        default="none", description="activations computed again in the backward pass instead of kept"
    )
    recompute_modules: Annotated[tuple[Literal["core", "mlp"], ...], Field(strict=False, min_length=1)] = Field(
        default=("core",), description="what selective computes again: the core of attention, the MLP, or both"
    )
    recompute_layers: Annotated[str, Field(pattern=r"^(all|[0-9]+ of [1-9][0-9]*)$")] = Field(
        default="all", description="the layers that compute again: all, or some of every few, such as 1 of 2"
    )
    offload: Literal["none", "optimizer", "activations", "both"] = Field(
        default="none",
        description="what the CPU's memory holds: optimizer states, which the CPU updates, with zero; activations",
    )

    @property
    def offloads_optimizer(self) -> bool:
        """Whether the CPU keeps the optimiser's states and updates the weights."""
        return self.offload in ("optimizer", "both")

    @property
    def offloads_activations(self) -> bool:
        """Whether the CPU keeps what blocks need for their backward."""
        return self.offload in ("activations", "both")


class BatchSettings(Section):
    """How many sequences are trained on at a time."""

    global_size: AtLeastOne = Field(default=32, description="sequences per optimiser step, over all ranks")
    initial_size: NotNegative = Field(
        default=0, description="sequences of the first steps, a divisor of global_size; 0 is global_size at once"
    )
    growth_steps: NotNegative = Field(default=0, description="steps in which the batch grows to global_size")
    micro_size: AtLeastOne = Field(default=4, description="sequences per microbatch")


class GroupSettings(Section):
    """What holds for the parameters whose names match, instead of what holds for all."""

    match: Text = Field(description="pattern of parameter names, such as *.bias or layers.0.*")
    learning_rate_factor: Annotated[float, Field(ge=0)] = Field(default=1.0, description="factor of the learning rate")
    weight_decay: Annotated[float, Field(ge=0)] | None = Field(
        default=None, description="decay in units of the learning rate; null leaves it as it is without the rule"
    )


class OptimizerSettings(Section):
    """The update rule and its constants."""

    name: Literal["adamw", "sgd", "adafactor", "muon"] = Field(
        default="adamw", description="update rule; muon is for matrices inside the blocks, adamw then for the rest"
    )
    learning_rate: Annotated[float, Field(gt=0)] = Field(default=1e-3, description="peak learning rate")
    betas: Annotated[tuple[Decay, Decay], Field(strict=False)] = Field(
        default=(0.9, 0.95), description="decay per step of the gradient's and the squared gradient's average"
    )
    momentum: Decay = Field(default=0.9, description="decay per step of the gradient's average, with sgd and muon")
    weight_decay: Annotated[float, Field(ge=0)] = Field(
        default=0.1, description="decay of the matrices, in units of the learning rate"
    )
    layer_decay: Annotated[float, Field(gt=0, le=1)] = Field(
        default=1.0, description="factor of the learning rate of each layer by that of the next one, for fine-tuning"
    )
    groups: Annotated[tuple[GroupSettings, ...], Field(strict=False)] = Field(
        default=(), description="rules for parameters by their names; the first that matches counts"
    )
    clip_grad_norm: Annotated[float, Field(ge=0)] = Field(
        default=1.0, description="largest L2 norm of the gradient of all parameters; 0 leaves it unclipped"
    )


class LearningRateSettings(Section):
    """How the learning rate changes over the steps."""

    warmup_steps: NotNegative = Field(default=20, description="steps of linear warm-up")
    decay: Literal["cosine", "linear", "constant", "wsd"] = Field(
        default="cosine", description="shape of the decay from the peak to the minimum; wsd stays at the peak first"
    )
    decay_share: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.2, description="share of the steps after the warm-up in which wsd decays"
    )
    minimum_learning_rate: Annotated[float, Field(ge=0)] = Field(
        default=1e-4, description="learning rate at the last step; constant leaves it at the peak"
    )


class TrainSettings(Section):
    """How long and by what rule the model is trained."""

    steps: AtLeastOne = Field(default=200, description="optimiser steps")
    precision: Literal["fp32", "bf16", "fp16"] = Field(default="fp32", description="number format of the computation")
    compile: bool = Field(
        default=False,
        description="norms, rotary positions, gated activations and dropout as one kernel each, compiled at the start",
    )
    seed: NotNegative = Field(default=1234, description="draws the initial weights, the dropout and the batches")
    stop_after: Literal["never"] | Duration = Field(
        default="never", description="time after which the run saves and ends, such as 3h50m; the same command goes on"
    )
    timeout: AtLeastOne = Field(default=600, description="longest wait for another rank, in seconds")
    stop_timeout: AtLeastOne = Field(
        default=30, description="longest time to finish the step and save after a signal to stop, in seconds"
    )
    not_finite: Literal["stop", "skip"] = Field(
        default="stop", description="what follows a step whose loss or gradient is not a finite number"
    )
    replay_not_finite: bool = Field(
        default=True, description="try such a step once more, to tell a fault of the data from one of the hardware"
    )
    check_replicas_every: NotNegative = Field(
        default=100, description="steps between comparisons of the parameters that several ranks hold; 0 never compares"
    )
    evaluate_every: NotNegative = Field(
        default=50, description="steps between evaluations on held-out text; 0 evaluates only at the end"
    )
    evaluate_sequences: AtLeastOne = Field(default=32, description="held-out sequences per evaluation")
    early_stopping: NotNegative = Field(
        default=0, description="evaluations without a lower held-out loss after which training ends; 0 never"
    )
    average_decay: Decay = Field(
        default=0.0, description="decay per step of an average of the weights, which is evaluated; 0 keeps none"
    )
    optimizer: OptimizerSettings = Field(default=OptimizerSettings(), description="update rule and its constants")
    schedule: LearningRateSettings = Field(default=LearningRateSettings(), description="learning rate over the steps")


class CorpusSettings(Section):
    """The text that is learned."""

    path: Text = Field(default="builtin", description="builtin, or a file or folder of text or JSONL")
    tokenizer: Text = Field(
        default="auto",
        description="auto trains one on the corpus, or takes that of model.pretrained; or a tokenizer.json",
    )
    sequence_length: AtLeastOne = Field(default=256, description="tokens per sequence")


class CheckpointSettings(Section):
    """When the run is saved, and where it goes on from."""

    directory: Text = Field(description="folder of the checkpoints; runs/NAME/checkpoints when left out")
    every: NotNegative = Field(default=50, description="steps between checkpoints; 0 saves only at the end")
    keep: AtLeastOne = Field(default=3, description="newest checkpoints that are kept")
    keep_every: NotNegative = Field(
        default=0, description="checkpoints of steps that are multiples of this are kept for ever; 0 keeps none so"
    )
    asynchronous: bool = Field(
        default=True, description="training goes on while a copy of the state, in host memory, is written"
    )
    resume: Text = Field(
        default="auto", description="auto (the newest that is whole, if there is one), never, or a checkpoint's path"
    )


class ReportSettings(Section):
    """Where metrics, logs and the report are written."""

    directory: Text = Field(description="folder of the run's metrics, logs and report; runs/NAME when left out")


class ClusterSettings(Section):
    """The machines that the run is meant for."""

    nodes: AtLeastOne = Field(default=1, description="machines")
    devices_per_node: Literal["auto"] | AtLeastOne = Field(
        default="auto", description="processes on each machine; auto: its GPUs, or on CPU what the layout needs"
    )
    device: Text = Field(default="auto", description="auto, cpu, cuda, or a GPU's name such as h100-sxm")


class Settings(Section):
    """Everything a run needs to know."""

    name: Text = Field(description="the run's name; the settings file's own when left out")
    model: Annotated[dict[str, Any], Field(min_length=1)] = Field(
        description="the model by Hugging Face config names, {config: path of its config.json}, or "
        "{pretrained: path of a directory with its config.json and weights}"
    )
    parallel: ParallelSettings = Field(default=ParallelSettings(), description="layout over the ranks")
    batch: BatchSettings = Field(default=BatchSettings(), description="sequences per step and per microbatch")
    train: TrainSettings = Field(default=TrainSettings(), description="steps, optimiser and seed")
    corpus: CorpusSettings = Field(default=CorpusSettings(), description="text and tokens")
    checkpoint: CheckpointSettings = Field(description="saving and resuming")
    report: ReportSettings = Field(description="metrics, logs and report")
    cluster: ClusterSettings = Field(default=ClusterSettings(), description="machines and devices")

    @model_validator(mode="before")
    @classmethod
    def _name_directories(cls, values: Any) -> Any:
        """Let directories that are left out follow the run's name."""
        if not isinstance(values, dict):
            return values
        report = values.get("report", {})
        if isinstance(report, dict):
            report = {"directory": f"runs/{values.get('name')}"} | report
        checkpoint = values.get("checkpoint", {})
        if isinstance(checkpoint, dict) and isinstance(report, dict):
            checkpoint = {"directory": f"{report['directory']}/checkpoints"} | checkpoint
        return values | {"report": report, "checkpoint": checkpoint}
