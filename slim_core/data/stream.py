"""A token folder in use: its arrays are mapped and never loaded, and a part of its documents reads like one text.

What grows with the number of documents (16 bytes each at most) lies in nameless temporary files beside the arrays,
mapped too: none of it is memory of the process.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from slim_core.data.tokens import DatasetError, read_meta

Int64s = npt.NDArray[np.int64]
_BLOCK = 1 << 16
"""Documents that are looked at together."""
_TOKEN_BLOCK = 1 << 20
"""Tokens that are counted together."""


@dataclass(frozen=True, slots=True)
class Part:
    """A share of a dataset's documents, drawn by `seed`: `fraction` of them for validation, the rest for training."""

    name: Literal["training", "validation"]
    fraction: float
    seed: int

    def __post_init__(self) -> None:
        if not 0 < self.fraction < 1:
            raise ValueError(f"fraction: must be above 0 and below 1, got {self.fraction}")


class TokenArrays:
    """Of one folder; all documents, by their place."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.meta = read_meta(folder)
        self.tokens = np.memmap(folder / "tokens.bin", np.dtype(f"<u{self.meta.token_bytes}"), mode="r")
        self.borders: Int64s = np.memmap(folder / "documents.bin", np.dtype("<i8"), mode="r")
        """(documents + 1): where each begins, and the end of the last."""
        mask = folder / "mask.bin"
        self.mask: npt.NDArray[np.uint8] | None = np.memmap(mask, np.uint8, mode="r") if mask.exists() else None
        """(tokens): 1 where a token has a loss as a target; None where all have."""

    def blocks(self, part: Part | None) -> Iterator[tuple[Int64s, npt.NDArray[np.bool_] | None]]:
        """The documents' borders, some at a time, and which of them are in the part (None: all)."""
        count = self.meta.documents
        validation = None if part is None else _Draw(count, part)
        for first in range(0, count, _BLOCK):
            last = min(first + _BLOCK, count)
            selected = None if validation is None else validation.selected(first, last)
            yield np.asarray(self.borders[first : last + 1]), selected


class Stream:
    """The documents of a part in a row, in the order of the file, as one text of `length` tokens."""

    def __init__(self, arrays: TokenArrays, part: Part | None) -> None:
        self._arrays = arrays
        self._part = part
        self.documents = arrays.meta.documents
        self.length = arrays.meta.tokens
        self.masked = arrays.mask is not None
        self._runs = None if part is None else self._find_runs()
        """(2, runs): where runs of documents that lie together begin, in the stream and in the file."""

    def tokens(self, start: int, count: int) -> npt.NDArray[Any]:
        """(count) from `start` on."""
        return np.concatenate([self._arrays.tokens[part] for part in self._file_slices(start, count)])

    def loss(self, start: int, count: int) -> npt.NDArray[np.bool_] | None:
        """(count): which of these tokens have a loss as targets; None for all."""
        mask = self._arrays.mask
        if mask is None:
            return None
        return np.concatenate([mask[part] for part in self._file_slices(start, count)]).astype(np.bool_)

    def starts(self, start: int, count: int) -> npt.NDArray[np.bool_]:
        """(count): which of these tokens begin a document."""
        begins = np.zeros(count, np.bool_)
        offset = 0
        borders = self._arrays.borders[:-1]
        for part in self._file_slices(start, count):
            first, last = np.searchsorted(borders, (part.start, part.stop))
            begins[borders[first:last] - part.start + offset] = True
            offset += part.stop - part.start
        return begins

    def num_targets(self, start: int, count: int, *, by_document: bool) -> int:
        """Of `count` positions from `start` on, those with a loss; with `by_document`, a document's first token is no
        target."""
        if not (self.masked or by_document):
            return count
        total = 0
        for first in range(start + 1, start + 1 + count, _TOKEN_BLOCK):
            size = min(_TOKEN_BLOCK, start + 1 + count - first)
            loss = self.loss(first, size)
            counted = np.ones(size, np.bool_) if loss is None else loss
            if by_document:
                counted &= ~self.starts(first, size)
            total += int(np.count_nonzero(counted))
        return total

    def documents_in_blocks(self) -> Iterator[tuple[Int64s, Int64s]]:
        """Where documents start and end in the stream, some at a time."""
        end = 0
        for borders, selected in self._arrays.blocks(self._part):
            lengths = np.diff(borders)
            ends = end + np.cumsum(lengths if selected is None else lengths[selected])
            if len(ends):
                yield np.concatenate([[end], ends[:-1]]), ends
                end = int(ends[-1])

    def _file_slices(self, start: int, count: int) -> Iterator[slice]:
        """Where `count` tokens from `start` on lie in the file."""
        if self._runs is None:
            yield slice(start, start + count)
            return
        stream_starts, file_starts = self._runs
        run = int(np.searchsorted(stream_starts, start, side="right")) - 1
        while count > 0:
            end = int(stream_starts[run + 1]) if run + 1 < len(stream_starts) else self.length
            taken = min(count, end - start)
            place = int(file_starts[run]) + start - int(stream_starts[run])
            yield slice(place, place + taken)
            start, count, run = start + taken, count - taken, run + 1

    def _find_runs(self) -> Int64s:
        """In a nameless file. Sets `documents` and `length` on the way."""
        self.documents, self.length = 0, 0
        runs = 0
        with tempfile.TemporaryFile(dir=self._arrays.folder) as file:
            previous_end = -1
            for borders, selected in self._arrays.blocks(self._part):
                starts, ends = borders[:-1][selected], borders[1:][selected]
                if not len(starts):
                    continue
                stream_ends = self.length + np.cumsum(ends - starts)
                stream_starts = np.concatenate([[self.length], stream_ends[:-1]])
                begins = starts != np.concatenate([[previous_end], ends[:-1]])
                file.write(np.stack([stream_starts[begins], starts[begins]], axis=1).astype(np.int64).tobytes())
                runs += int(begins.sum())
                self.documents += len(starts)
                self.length, previous_end = int(stream_ends[-1]), int(ends[-1])
            file.flush()
            return np.memmap(file, np.int64, mode="r", shape=(runs, 2)).T


class _Draw:
    """Which documents are in a part: exactly round(fraction * documents) are for validation, one at least, and one is
    left for training."""

    def __init__(self, documents: int, part: Part) -> None:
        if documents < 2:
            raise DatasetError("a share of the documents for validation needs two documents at least; this has one")
        self._for_validation = part.name == "validation"
        key = hashlib.blake2b(f"split/{part.seed}".encode(), digest_size=8).digest()
        self._key = np.uint64(int.from_bytes(key, "little"))
        self._limit = self._smallest(documents, min(max(1, round(part.fraction * documents)), documents - 1))

    def selected(self, first: int, last: int) -> npt.NDArray[np.bool_]:
        lots = self._lots(first, last)
        return lots <= self._limit if self._for_validation else lots > self._limit

    def _lots(self, first: int, last: int) -> npt.NDArray[np.uint64]:
        """A number for each document, all different: a bijection (Steele et al., "Fast splittable pseudorandom number
        generators", OOPSLA 2014) of its own."""
        lots = np.arange(first, last, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + self._key
        lots = (lots ^ (lots >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        lots = (lots ^ (lots >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return lots ^ (lots >> np.uint64(31))

    def _smallest(self, documents: int, wanted: int) -> np.uint64:
        """The lot that `wanted` documents do not exceed, found 16 bits at a time without holding them all."""
        found = 0
        for shift in (48, 32, 16, 0):
            counts = np.zeros(1 << 16, np.int64)
            for first in range(0, documents, _BLOCK):
                lots = self._lots(first, min(first + _BLOCK, documents))
                high = lots >> np.uint64(shift)
                if shift < 48:
                    high = high[high >> np.uint64(16) == np.uint64(found)]
                counts += np.bincount((high & np.uint64(0xFFFF)).astype(np.int64), minlength=1 << 16)
            total = np.cumsum(counts)
            digit = int(np.searchsorted(total, wanted))
            wanted -= int(total[digit] - counts[digit])
            found = found << 16 | digit
        return np.uint64(found)
