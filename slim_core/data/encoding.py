"""Documents to tokens, a batch at a time.

A tokenizer takes some thirty times a text's size while it works, and a `.txt` may be of any size: texts are encoded in
pieces. A cut is made where the tokenizer has a border between tokens whatever follows, which it is asked about at each
cut with some text of both sides; where no such place is found the text is cut all the same, and that is counted.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from slim_core.data.chat import ASSISTANT, ChatTemplateError
from slim_core.data.readers import CompletionDocument, Document, TextDocument
from slim_core.data.tokenizer import BYTES_KEY, Tokenizer
from slim_core.data.tokens import Problems, TokenWriter

PIECE_CHARACTERS = 1 << 15
BATCH_CHARACTERS = 1 << 18
_BATCH_PIECES = 4096
_SEARCHED_CHARACTERS = 2048
"""Before the longest possible end of a piece, for a place to cut."""
_CONTEXT_CHARACTERS = 192
"""On each side of a cut, to see whether the tokenizer has a border there."""
_MOST_TRIALS = 16
_WORD_END = re.compile(r"(?<=\w)(?=\s)")


@dataclass(slots=True)
class EncodingCounts:
    """What the arrays do not tell."""

    empty_documents: int = 0
    untrained_documents: int = 0
    inexact_cuts: int = 0
    text_bytes: int = 0


@dataclass(frozen=True, slots=True)
class _Piece:
    text: str
    loss: bool
    ends_document: bool


def write_documents(
    documents: Iterable[Document], tokenizer: Tokenizer, writer: TokenWriter, problems: Problems
) -> EncodingCounts:
    """Tokens of all documents. Once there are problems nothing more is encoded: the rest is only looked at."""
    counts = EncodingCounts()
    batch: list[_Piece] = []
    characters = 0
    for piece in _pieces(documents, tokenizer, counts, problems):
        if problems.total:
            batch.clear()
            continue
        batch.append(piece)
        characters += len(piece.text)
        if characters >= BATCH_CHARACTERS or len(batch) >= _BATCH_PIECES:
            _write(batch, tokenizer, writer)
            batch.clear()
            characters = 0
    if not problems.total:
        _write(batch, tokenizer, writer)
    return counts


def _write(batch: list[_Piece], tokenizer: Tokenizer, writer: TokenWriter) -> None:
    for piece, tokens in zip(batch, tokenizer.encode_batch([piece.text for piece in batch]), strict=True):
        writer.add(tokens, piece.loss)
        if piece.ends_document:
            writer.end_document(tokenizer.end_of_document, piece.loss)


def _pieces(
    documents: Iterable[Document], tokenizer: Tokenizer, counts: EncodingCounts, problems: Problems
) -> Iterator[_Piece]:
    for document in documents:
        try:
            segments = _segments(document, tokenizer)
        except ChatTemplateError as error:
            problems.add(document.line, str(error))
            continue
        if segments is None:
            counts.untrained_documents += 1
            continue
        held: _Piece | None = None
        for text, loss in segments:
            for piece in cut(text, tokenizer, counts):
                if held is not None:
                    yield held
                held = _Piece(piece, loss, ends_document=False)
                counts.text_bytes += len(piece) if piece.isascii() else len(piece.encode())
            last_loss = loss
        if held is None:
            counts.empty_documents += 1
        else:
            if held.loss != last_loss:  # the last segment is empty: its end is the document's
                yield held
                held = _Piece("", last_loss, ends_document=False)
            yield _Piece(held.text, held.loss, ends_document=True)


def _segments(document: Document, tokenizer: Tokenizer) -> list[tuple[Iterable[str], bool]] | None:
    """Texts, in portions, each with whether it has a loss; the last says it of the document's end too. None for a
    document of which no part has one."""
    if isinstance(document, TextDocument):
        return [(document.text, True)]
    if isinstance(document, CompletionDocument):
        return [([document.prompt], False), ([document.completion], True)]
    pieces = tokenizer.chat_template.segments(document.messages)
    if not any(loss for _, loss in pieces):
        return None
    ends_with_assistant = document.messages[-1]["role"] == ASSISTANT
    return [*(([text], loss) for text, loss in pieces), ([], ends_with_assistant)]


def cut(portions: Iterable[str], tokenizer: Tokenizer, counts: EncodingCounts) -> Iterator[str]:
    """The text in pieces of about PIECE_CHARACTERS that have the same tokens as the whole, but for counted cuts.

    A piece may lack the space that it began with, where the tokenizer puts one before every text.
    """
    rest = ""
    for portion in portions:
        text = rest + portion
        start = 0
        while len(text) - start > PIECE_CHARACTERS + _CONTEXT_CHARACTERS:
            end, following = _place(text, start + PIECE_CHARACTERS, tokenizer, counts)
            yield text[start:end]
            start = following
        rest = text[start:]
        del text
    if rest:
        yield rest


def _place(text: str, latest: int, tokenizer: Tokenizer, counts: EncodingCounts) -> tuple[int, int]:
    """Where a piece ends, `latest` at most, and where the next one begins."""
    if tokenizer.id == BYTES_KEY:
        return latest, latest
    words = [match.start() for match in _WORD_END.finditer(text, latest - _SEARCHED_CHARACTERS, latest)]
    places = [*words[: -_MOST_TRIALS - 1 : -1], *range(latest, latest - _MOST_TRIALS, -1)]
    for place in places:
        before = text[place - _CONTEXT_CHARACTERS : place]
        after = text[place : place + _CONTEXT_CHARACTERS]
        wanted = tokenizer.encode(before + after)
        first = tokenizer.encode(before)
        if wanted == first + tokenizer.encode(after):
            return place, place
        if after.startswith(" ") and wanted == first + tokenizer.encode(after[1:]):
            return place, place + 1
    counts.inexact_cuts += 1
    return places[0], places[0]
