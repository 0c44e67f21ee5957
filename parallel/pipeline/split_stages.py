"""Pipeline stages of a decoder that somebody else wrote.

Each stage runs the model's own forward, so that masks, rotary embeddings and whatever else a forward prepares are what
the model makes of them; parts that belong to other stages pass their input on.
"""

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from torch import Tensor, nn

from weft.parallel.elsewhere import AddNothing, PassOn

# Parts in the order in which they run, `+` before those whose result is added to the hidden state.
_FAMILIES = {
    "gpt2": ("transformer.wte", "+transformer.wpe", "transformer.drop", "transformer.h", "transformer.ln_f", "lm_head"),
    "opt": (
        "model.decoder.embed_tokens",
        "+model.decoder.embed_positions",
        "model.decoder.project_in",
        "model.decoder.layers",
        "model.decoder.final_layer_norm",
        "model.decoder.project_out",
        "lm_head",
    ),
}


def split_stages(
    module: nn.Module,
    plan: Sequence[str] | Mapping[str, Any] | None,
    stages: int,
    *,
    split: Sequence[int] | None = None,
) -> "list[StageModule]":
    """Cut a decoder into `stages` modules for `PipelineStage`, in order.

        part = split_stages(model, None, 4)[rank]
        stage = PipelineStage(part, rank, shared=part.shared)

    The stages hold the parameters of `module` itself, not copies; one that belongs to several (tied embeddings) is
    named in their `shared`. A model on the meta device may be cut, and one that `parallelize` has split; or the stages'
    `model`s are split after the cut.

    `plan`: the names of the parts in the order in which they run, one of them an nn.ModuleList of the layers; parts
    before it belong to the first stage, parts after it to the last. A `+` before a name says that its result is added
    to the hidden state (learned positions). None takes the plan of a Hugging Face model (`_pp_plan`) or weft's for its
    family.

    `split`: the number of layers of each stage; None cuts evenly.

    Raises:
        ValueError: the plan names what the module lacks, has not one list of layers, or `split` does not fit it.
    """
    parts = _find_parts(module, plan)
    layers = module.get_submodule(parts.layers)
    bounds = _bounds(len(layers), stages, split)  # type: ignore[arg-type]
    pieces = [_cut(module, parts, range(bounds[i], bounds[i + 1]), i == 0, i == stages - 1) for i in range(stages)]
    holders = Counter(id(parameter) for piece in pieces for parameter in piece.parameters())
    names = {id(parameter): name for name, parameter in module.named_parameters() if holders[id(parameter)] > 1}
    return [StageModule(piece, i == 0, i == stages - 1, names) for i, piece in enumerate(pieces)]


class StageModule(nn.Module):
    """One stage: `model` with the other stages' parts passing their input on.

    The parameters of `model` have the names that they have in the whole model. Called with tokens on the first stage
    and the hidden state on the others, and with keyword arguments (attention_mask, position_ids, …) on all of them;
    returns the hidden state, on the last stage the model's result (of a Hugging Face model, its logits).
    """

    def __init__(self, model: nn.Module, first: bool, last: bool, shared: Mapping[int, str]) -> None:
        super().__init__()
        self.model = model
        self.first, self.last = first, last
        self.shared = {
            shared[id(parameter)]: f"model.{name}"
            for name, parameter in model.named_parameters()
            if id(parameter) in shared
        }

    def forward(self, x: Tensor, **keywords: Any) -> Any:
        if not hasattr(self.model, "get_input_embeddings"):
            return self.model(x, **keywords)
        given = {"input_ids" if self.first else "inputs_embeds": x, "use_cache": False}
        result = (self.model if self.last else self.model.base_model)(**given | keywords)  # type: ignore[operator]
        return result.logits if hasattr(result, "logits") else result.last_hidden_state


@dataclass(frozen=True)
class _Parts:
    first: tuple[str, ...]
    layers: str
    last: tuple[str, ...]
    added: frozenset[str]


def _find_parts(module: nn.Module, plan: Sequence[str] | Mapping[str, Any] | None) -> _Parts:
    given = plan if plan is not None else _own_plan(module)
    names = _in_order(module, given) if isinstance(given, Mapping) else list(given)
    plain = [name.removeprefix("+") for name in names]
    known = dict(module.named_modules())
    for name in plain:
        if name not in known:
            raise ValueError(f"{name!r} is no module of {type(module).__name__}; leave it out or mend its name")
    lists = [i for i, name in enumerate(plain) if isinstance(known[name], nn.ModuleList)]
    if len(lists) != 1:
        raise ValueError(f"{plain} has {len(lists)} nn.ModuleLists; name one, that of the layers")
    added = frozenset(name.removeprefix("+") for name in names if name.startswith("+"))
    return _Parts(tuple(plain[: lists[0]]), plain[lists[0]], tuple(plain[lists[0] + 1 :]), added)


def _own_plan(module: nn.Module) -> Sequence[str] | Mapping[str, Any]:
    own: Mapping[str, Any] | None = getattr(module, "_pp_plan", None)
    if own:
        return own
    family = getattr(getattr(module, "config", None), "model_type", None)
    if family not in _FAMILIES:
        raise ValueError(
            f"{type(module).__name__} has no _pp_plan and weft has none for {family or 'it'}; pass the names of its "
            'parts in order, such as ["embed", "layers", "norm", "head"]'
        )
    present = dict(module.named_modules())
    return [name for name in _FAMILIES[family] if name.removeprefix("+") in present]


def _in_order(module: nn.Module, plan: Mapping[str, Any]) -> list[str]:
    """Hugging Face's plan gives what each part reads: parts that read tokens or embeddings run before the layers."""
    early = [name for name, (reads, _) in plan.items() if {"input_ids", "inputs_embeds"} & set(reads)]
    layers = [name for name in plan if isinstance(module.get_submodule(name), nn.ModuleList)]
    return [*early, *layers, *(name for name in plan if name not in (*early, *layers))]


def _bounds(layers: int, stages: int, split: Sequence[int] | None) -> list[int]:
    if split is None:
        if not 1 <= stages <= layers:
            raise ValueError(f"{layers} layers do not fill {stages} stages; choose from 1 to {layers} stages")
        return [layers * stage // stages for stage in range(stages + 1)]
    if len(split) != stages or min(split) < 0 or sum(split) != layers:
        raise ValueError(f"split {list(split)} does not give {layers} layers to {stages} stages")
    return [0, *accumulate(split)]


def _cut(module: nn.Module, parts: _Parts, layers: range, first: bool, last: bool) -> nn.Module:
    """A copy of the module's structure, around the same parameters, that keeps these layers."""
    piece = copy.deepcopy(module, {id(parameter): parameter for parameter in module.parameters()})
    stack = piece.get_submodule(parts.layers)
    dropped = [*(() if first else parts.first), *(() if last else parts.last)]
    dropped += [f"{parts.layers}.{number}" for number in range(len(stack)) if number not in layers]  # type: ignore[arg-type]
    for name in dropped:
        owner, _, leaf = name.rpartition(".")
        piece.get_submodule(owner)._modules[leaf] = AddNothing() if name in parts.added else PassOn()
    return piece
