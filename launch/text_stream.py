"""The text of a model as it comes, token by token, up to a stop string."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer


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
        from tokenizers.decoders import DecodeStream

        self._tokenizer, self._stops = tokenizer, [stop for stop in stops if stop]
        self._stream = DecodeStream(ids=list(prompt), skip_special_tokens=True)
        self._pending: list[int] = []
        self._prompt = list(prompt)
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Text that is certain with this token."""
        if self.stopped:
            return ""
        self._pending.append(token)
        text = self._stream.step(self._tokenizer, token)
        if text is None:
            return ""
        self._pending.clear()
        return self._take(text)

    def finish(self) -> str:
        """The rest of the text, with U+FFFD for bytes that are no whole character."""
        if self.stopped:
            return ""
        rest = self._take(self._tokenizer.decode(self._pending) if self._pending else "")
        held, self._held = self._held, ""
        return rest if self.stopped else rest + held

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
