"""Text in and text out for a trained model: its tokenizer, the tokens that end a text, and its chat template."""

import json
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weft.launch.errors import UserError
from weft.launch.source import Source
from weft.launch.tokenizer import end_of_text, load_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FILES = ("tokenizer_config.json", "generation_config.json", "special_tokens_map.json", "chat_template.jinja")
"""What Hugging Face keeps beside a tokenizer.json."""


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a model.

    Attributes:
        tokenizer: text to tokens and back.
        end: the token that ends a text.
        stop_tokens: all tokens that do.
        folder: where the tokenizer and what belongs to it lie.
    """

    tokenizer: "Tokenizer"
    end: int
    stop_tokens: frozenset[int]
    folder: Path

    def encode(self, text: str) -> list[int]:
        """Tokens of a text as the model takes it, with what its tokenizer puts in front; an empty text is its end."""
        tokens: list[int] = self.tokenizer.encode(text).ids
        return tokens or [self.end]

    def decode(self, tokens: list[int]) -> str:
        text: str = self.tokenizer.decode(tokens)
        return text

    def name(self, token: int) -> str:
        """One token as text; bytes that are no character alone are shown as such."""
        return self.decode([token]) or self.tokenizer.id_to_token(token) or f"<{token}>"

    @cached_property
    def chat_template(self) -> str | None:
        """The Jinja template that makes a prompt of a chat."""
        file = self.folder / "chat_template.jinja"
        if file.is_file():
            return file.read_text(encoding="utf-8")
        template = read_json(self.folder / "tokenizer_config.json").get("chat_template")
        return template if isinstance(template, str) else None

    @cached_property
    def special_texts(self) -> dict[str, str]:
        """The special tokens by their names in chat templates, such as `bos_token`."""
        settings = read_json(self.folder / "tokenizer_config.json")
        named = {name: _content(value) for name, value in settings.items() if name.endswith("_token")}
        return {"eos_token": self.tokenizer.id_to_token(self.end) or ""} | {k: v for k, v in named.items() if v}


def open_vocabulary(source: Source) -> Vocabulary:
    """The tokenizer that lies beside a model's weights or in its run's folder.

    Raises:
        UserError: there is none, or it has more entries than the model.
    """
    file = source.find("tokenizer.json")
    if file is None:
        raise UserError(f"{source.path} has no tokenizer.json, nor the folders above it; copy the model's own there.")
    tokenizer = load_tokenizer(file)
    end = end_of_text(tokenizer, file.parent)
    stated = read_json(file.parent / "generation_config.json").get("eos_token_id", [])
    stops = [stated] if isinstance(stated, int) else stated if isinstance(stated, list) else []
    return Vocabulary(tokenizer, end, frozenset([end, *(int(token) for token in stops)]), file.parent)


def keep_vocabulary(tokenizer: "Tokenizer", given: str, folder: Path) -> None:
    """Put the tokenizer of a run, and what lies beside the one that was `given` for it, into the run's folder."""
    tokenizer.save(str(folder / "tokenizer.json"))
    origin = Path(given) if Path(given).is_dir() else Path(given).parent
    for name in FILES if given != "auto" else ():
        if (origin / name).is_file():
            shutil.copyfile(origin / name, folder / name)


def read_json(file: Path) -> dict[str, Any]:
    """The mapping in a JSON file; empty where there is no such file.

    Raises:
        UserError: the file is not JSON.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except OSError:
        return {}
    except ValueError as error:
        raise UserError(f"{file} is not JSON ({error}).") from None
    return value if isinstance(value, dict) else {}


def _content(token: Any) -> str | None:
    """A special token's text, which some files wrap."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None
