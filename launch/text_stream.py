"""The text of a model as it comes, token by token, up to a stop string."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer


UNKNOWN = "\N{REPLACEMENT CHARACTER}"
CONTEXT = 8  # tokens of the prompt that are looked at


class TextStream:
    """Decodes new tokens into text that never has to be taken back.

    What may yet become part of a character, or of a stop string, is held back until that is decided. Special tokens are
    no text.

        stream.push(token)      # new text, often empty
        stream.stopped          # a stop string has come; the text ends before it
        stream.finish()         # what was held back

    Args:
        prompt: the tokens before, on which some tokenizers' spaces depend.
        stops: texts that end the text.
    """

    def __init__(self, tokenizer: "Tokenizer", prompt: Sequence[int], stops: Sequence[str] = ()) -> None:
        self._tokenizer, self._stops = tokenizer, [stop for stop in stops if stop]
        self._tokens = list(prompt[-CONTEXT:])
        self._context, self._shown = 0, len(self._tokens)
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Text that is certain with this token."""
        if self.stopped:
            return ""
        self._tokens.append(token)
        new = self._new_text()
        if not new or new.endswith(UNKNOWN):
            return ""
        self._context, self._shown = self._shown, len(self._tokens)
        return self._take(new)

    def finish(self) -> str:
        """The rest of the text, with U+FFFD for bytes that are no whole character."""
        if self.stopped:
            return ""
        rest = self._take(self._new_text())
        held, self._held = self._held, ""
        return rest if self.stopped else rest + held

    def _new_text(self) -> str:
        """What the tokens not shown yet add to those before them: how a token reads may depend on its neighbour."""
        before = self._tokenizer.decode(self._tokens[self._context : self._shown])
        whole: str = self._tokenizer.decode(self._tokens[self._context :])
        return whole[len(before) :]

    def _take(self, text: str) -> str:
        text = self._held + text
        found = [at for at in map(text.find, self._stops) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        kept = max((_begun(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]


def _begun(text: str, stop: str) -> int:
    """How many characters at the end of the text may be the beginning of the stop string."""
    longest = min(len(text), len(stop) - 1)
    return next((length for length in range(longest, 0, -1) if stop.startswith(text[-length:])), 0)
