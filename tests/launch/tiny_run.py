"""A run's folder with a checkpoint of a tiny model, made without training, for the tests of what reads one."""

import json
from pathlib import Path
from typing import Any

from tests.pool import Pool

MODEL = {
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
}
TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'wizard' %}{{ raise_exception('no wizards') }}{% endif %}"
    "[{{ message.role }}] {{ message.content }}\n{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)
WORDS = "The shuttle carries the weft through the warp, row by row, until the cloth is whole: ä ö ü 漢字 🧵.\n"


def make_run(pool: Pool, folder: Path, *, chat: bool = False, **changes: Any) -> Path:
    """The folder of a run of a model with random weights."""
    pool.run(1, write_run, folder, MODEL | changes)
    if chat:
        (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    return folder


def write_run(folder: Path, model: dict[str, Any]) -> None:
    from weft.launch.checkpoints import Checkpoints
    from weft.launch.engine import Engine
    from weft.launch.saved_state import EngineState
    from weft.launch.settings import build_settings
    from weft.launch.tokenizer import train_tokenizer
    from weft.launch.vocabulary import keep_vocabulary
    from weft.model.config import model_config
    from weft.parallel import build_mesh

    settings = build_settings(
        {
            "name": "tiny",
            "model": model,
            "parallel": {"data": 1},
            "batch": {"global_size": 1, "micro_size": 1},
            "corpus": {"sequence_length": 16},
            "report": {"directory": str(folder)},
            "cluster": {"device": "cpu"},
        }
    )
    engine = Engine(model_config(model), settings, build_mesh())
    state = EngineState(engine)
    state.prepare({"optimizer_steps": 0})
    Checkpoints(settings.checkpoint, state).save(1, {"settings": settings.model_dump(mode="json")}, last=True)
    keep_vocabulary(train_tokenizer([WORDS * 20], 300), "auto", folder)
