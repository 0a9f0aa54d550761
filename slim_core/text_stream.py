"""Text out of tokens as they come: no half characters, nothing beyond a stop string. Free of torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

REPLACEMENT = "\ufffd"
"""What decoders write for bytes that are no text, or not yet."""
_LONGEST_INCOMPLETE = 3
"""Bytes of a UTF-8 character that lacks its last; a decoder writes one to three replacements for them."""
_MAX_PENDING = 16
"""Tokens after which replacements are taken for what they are, all but the last _LONGEST_INCOMPLETE: a decoder of byte
tokens writes one for every byte of a run, also for its whole characters, until the run is text from end to end."""
_CONTEXT_TOKENS = 16
"""Of what stands before the text: what the first tokens say may depend on them."""


class TextStream:
    """Turns tokens into pieces of text that, one after the other, are the decoded whole.

    A piece ends where a character does. What could be the beginning of a stop string waits for the tokens after it;
    the text ends before the first stop string that occurs in it, wherever the borders of tokens are.
    """

    def __init__(
        self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = (), before: Sequence[int] = ()
    ) -> None:
        """`stop` are texts of at least one character, `before` the tokens that the text continues: some decoders take
        the space from the first token that they see, which the text's own is not."""
        self._decode = decode
        self._stop = tuple(stop)
        self._tokens = list(before[-_CONTEXT_TOKENS:])
        """Since the character border before last: what a token says may depend on the ones before it."""
        while self._tokens and decode(self._tokens).startswith(REPLACEMENT):
            del self._tokens[0]  # cut within a character
        self._fresh = len(self._tokens)
        """Index of the first token behind the last character border."""
        self._given = self._context = decode(self._tokens)
        """Of the decoded `_tokens`, what has left the decoder; and what the ones before `_fresh` were."""
        self._held = ""
        """Text that could be the beginning of a stop string."""
        self.stopped = False
        """Whether a stop string has come. Nothing is taken after it."""

    def push(self, token: int) -> str:
        """The text that is certain now; often none, or more than the token's own."""
        self._tokens.append(token)
        text = self._decode(self._tokens)
        many = len(self._tokens) - self._fresh > _MAX_PENDING
        if text.endswith(REPLACEMENT) and not text.startswith(self._given) and not many:
            return ""
        text = self._consistent(text)
        open_end = len(text) - len(text.rstrip(REPLACEMENT))
        if many:
            open_end = min(open_end, _LONGEST_INCOMPLETE)
        settled = max(len(text) - open_end, len(self._given))
        piece = text[len(self._given) : settled]
        self._given += piece
        if not open_end:
            del self._tokens[: self._fresh]
            self._fresh = len(self._tokens)
            self._given = self._context = self._decode(self._tokens)
        return self._before_stop(piece)

    def finish(self) -> str:
        """The rest, where no stop string came: of an incomplete character, its replacement."""
        if self.stopped:
            return ""
        text = self._before_stop(self._consistent(self._decode(self._tokens))[len(self._given) :])
        rest, self._held = self._held, ""
        return text + rest

    def _consistent(self, text: str) -> str:
        """`text`, the decoded `_tokens`, if it begins with what was given; else, from now on, the tokens behind the
        last border by themselves: what was given cannot be taken back."""
        if text.startswith(self._given):
            return text
        del self._tokens[: self._fresh]
        self._fresh = 0
        self._given, self._context = self._given[len(self._context) :], ""
        return self._decode(self._tokens)

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
