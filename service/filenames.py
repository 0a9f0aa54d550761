"""Clients' file names: metadata, never paths."""

from __future__ import annotations

from service.jsonable import clean_text

MAX_NAME_LENGTH = 200


def clean_name(name: str) -> str:
    """A name that a text column takes, at most 200 characters."""
    return clean_text(name)[:MAX_NAME_LENGTH]


def clean_filename(filename: str) -> str:
    """A client's file name as harmless metadata: its last part, printable, at most 200 characters."""
    last = clean_text(filename).replace("\\", "/").rsplit("/", 1)[-1]
    printable = "".join(character for character in last if character.isprintable()).strip()
    if len(printable) > MAX_NAME_LENGTH:
        stem, dot, ending = printable.rpartition(".")
        kept = MAX_NAME_LENGTH - len(dot + ending)
        printable = stem[:kept] + dot + ending if kept > 0 and stem else printable[:MAX_NAME_LENGTH]
    return printable or "unnamed"
