"""Text out of tokens as they come: no half characters, nothing beyond a stop string. Free of torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

REPLACEMENT = "\ufffd"
"""What decoders write for bytes that are no text, or not yet."""
_LONGEST_INCOMPLETE = 3
"""Bytes of a UTF-8 character that lacks its last; decoders write one or up to three replacements for them."""


class TextStream:
    """Turns tokens into pieces of text that, one after the other, are the decoded whole.

    A piece ends where a character does. What could be the beginning of a stop string waits for the tokens after it;
    the text ends before the first stop string that occurs in it, wherever the borders of tokens are.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = ()) -> None:
        """`stop` are texts of at least one character."""
        self._decode = decode
        self._stop = tuple(stop)
        self._tokens: list[int] = []
        """Since the character border before last: what a token says may depend on the ones before it."""
        self._fresh = 0
        """Index of the first token behind the last character border."""
        self._given = 0
        """Characters of the decoded `_tokens` that have left the decoder."""
        self._held = ""
        """Text that could be the beginning of a stop string."""
        self.stopped = False
        """Whether a stop string has come. Nothing is taken after it."""

    def push(self, token: int) -> str:
        """The text that is certain now; often none, or more than the token's own."""
        self._tokens.append(token)
        text = self._decode(self._tokens)
        open_end = min(len(text) - len(text.rstrip(REPLACEMENT)), _LONGEST_INCOMPLETE)
        settled = max(len(text) - open_end, self._given)
        piece = text[self._given : settled]
        self._given = settled
        if not open_end:
            del self._tokens[: self._fresh]
            self._fresh = len(self._tokens)
            self._given = len(self._decode(self._tokens))
        return self._before_stop(piece)

    def finish(self) -> str:
        """The rest, where no stop string came: of an incomplete character, its replacement."""
        if self.stopped:
            return ""
        text = self._before_stop(self._decode(self._tokens)[self._given :])
        rest, self._held = self._held, ""
        return text + rest

    def _before_stop(self, piece: str) -> str:
        text = self._held + piece
        found = [index for stop in self._stop if (index := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            self._held = ""
            return text[: min(found)]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` with which `stop` begins."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)
