"""The byte tokenizer: a token a byte of UTF-8, and one more that ends a document."""

from __future__ import annotations

from collections.abc import Iterable

from slim_core.config import BYTE_VOCABULARY

DOCUMENT_BORDER = BYTE_VOCABULARY - 1
"""Stands after the last byte of every document."""


def encode(text: str) -> list[int]:
    """UTF-8 bytes, without a border."""
    return list(text.encode())


def decode(tokens: Iterable[int]) -> str:
    """Text of byte tokens; a border becomes a line of its own, broken UTF-8 the replacement character."""
    data = bytearray()
    for token in tokens:
        data += b"\n---\n" if token == DOCUMENT_BORDER else bytes([token])
    return data.decode("utf-8", "replace")
