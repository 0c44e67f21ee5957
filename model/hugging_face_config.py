"""A model's config as Hugging Face's libraries read it: every number stated, under the names of the family."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from weft.model.config import ModelConfig, model_config
from weft.model.families import FAMILIES

_ACTIVATIONS = {"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh", "gelu": "gelu", "relu": "relu"}
_ONLY_GPT2_NAMES = {
    "hidden_size": "n_embd",
    "intermediate_size": "n_inner",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
}


def hugging_face_config(settings: Mapping[str, Any], *, dtype: str, vocabulary: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of the model that `settings` describe by Hugging Face's names, as `model_config` reads them.

    What the settings state stays as they state it; numbers that they leave to weft's defaults are added, since the
    defaults of other libraries may differ. `dtype`: of the weights; `vocabulary`: keys such as `eos_token_id`, added
    where the settings have none.
    """
    config = model_config(settings)
    family = FAMILIES[config.model_type]
    stated = {key: value for key, value in settings.items() if key not in ("pretrained", "torch_dtype")}
    if config.model_type == "gpt2":
        stated = {_ONLY_GPT2_NAMES.get(key, key): value for key, value in stated.items()}
    known = {field.name for field in fields(ModelConfig)}
    implied: dict[str, Any] = {}
    for key, own in family.names.items():
        renamed = config.model_type == "gpt2" and key in _ONLY_GPT2_NAMES
        if not renamed and own.split()[0] in known:
            value = getattr(config, own.split()[0])
            implied[key] = _ACTIVATIONS[value] if own == "activation" else value
    result = implied | {key: value for key, value in stated.items() if value is not None or key not in implied}
    if config.positions == "rotary" and not {"rope_parameters", "rope_theta"} & stated.keys():
        result["rope_theta"] = config.rotary.theta
    added = {key: value for key, value in vocabulary.items() if result.get(key) is None}
    return dict(sorted({"architectures": [family.architecture], **result, **added, "dtype": dtype}.items()))
