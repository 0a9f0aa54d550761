"""Batches from a token folder (slim_core/data/tokens.py).

Legend: B batch, T sequence length, W windows (sequences) in an epoch.
"""

from __future__ import annotations

import hashlib
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from slim_core.data.stream import Int64s, Part, Stream, TokenArrays
from slim_core.data.tokens import DatasetError
from slim_core.layers.head import IGNORED

Packing = Literal["continuous", "packed", "single"]
_REPORT_TOKENS = 1 << 20


class Batch(NamedTuple):
    """Sequences as the step takes them."""

    tokens: Tensor
    """(B, T) int32."""
    targets: Tensor
    """(B, T) int32; IGNORED where there is no loss."""
    document_starts: Tensor | None
    """(B, T) booleans, true where a document begins; None where attention knows no borders."""

    def to(self, device: torch.device) -> Batch:
        starts = self.document_starts
        return Batch(self.tokens.to(device), self.targets.to(device), None if starts is None else starts.to(device))


@dataclass(frozen=True, slots=True)
class DataReport:
    """What becomes of the documents at one T: what is cut, left out and padded in an epoch.

    Windows that are cut from all documents in a row begin elsewhere in each epoch; counts are those of beginning at the
    first token.
    """

    packing: Packing
    sequence_length: int
    documents: int
    tokens: int
    windows: int
    """W."""
    split_documents: int
    """Documents that lie in more than one window."""
    dropped_documents: int
    """Documents without a place in a window: of one token, which has no target. None where documents lie in a row."""
    unused_tokens: int
    """Tokens that an epoch leaves out: less than a window at the end, or those of dropped documents."""
    padding: int
    """Positions of the epoch's windows behind the end of a document."""
    targets: int
    """Positions of the epoch's windows that have a loss."""


class _Sequences:
    """Windows by their place in the file. `slack` is how far all of them can be moved along it."""

    count: int
    slack: int

    def __init__(self, length: int) -> None:
        self.length = length

    def read(self, place: int, offset: int) -> tuple[npt.NDArray[np.int32], ...]:
        """Tokens, targets, document starts, each (T,)."""
        raise NotImplementedError


class Windows:
    """Sequences of a token folder, in an order that depends on the seed alone.

    Every epoch visits each of its W windows once, in a new order; windows that are cut from all documents in a row
    begin at a new offset as well. Where a run stands is a function of the step, so resuming needs no state and takes no
    time.
    """

    def __init__(
        self,
        folder: Path,
        sequence_length: int,
        seed: int,
        packing: Packing = "continuous",
        part: Part | None = None,
    ) -> None:
        """Raises DatasetError for data without a single window, or of another format."""
        arrays = TokenArrays(folder)
        self._rows: _Rows = (
            _SingleRows(arrays, part, sequence_length)
            if packing == "single"
            else _StreamRows(Stream(arrays, part), sequence_length, by_document=packing == "packed")
        )
        self._length = sequence_length
        self._seed = seed
        self._packing: Packing = packing
        self.per_epoch = self._rows.windows
        """W."""

    def batch(self, first: int, count: int) -> Batch:
        """Samples `first` to `first + count` of the run. Step s of a run with batches of B begins at sample s * B."""
        return self._stack([self._shuffled(first + row) for row in range(count)])

    def num_targets(self, first: int, count: int) -> int:
        """Targets with a loss in `batch(first, count)`, without its tokens."""
        return sum(self._rows.num_targets(*self._shuffled(first + row)) for row in range(count))

    def validation(self, first: int, count: int) -> Batch:
        """Windows `first` to `first + count` in the order of the file."""
        return self._stack([(first + row, 0) for row in range(count)])

    def num_validation_targets(self, first: int, count: int) -> int:
        """Targets with a loss in `validation(first, count)`."""
        return sum(self._rows.num_targets(first + row, 0) for row in range(count))

    def report(self) -> DataReport:
        """What becomes of the documents. Reads all borders, and the mask where there is one."""
        return self._rows.report(self._packing)

    def _stack(self, places: list[tuple[int, int]]) -> Batch:
        length = self._length
        rows = self._rows
        tokens = torch.empty(len(places), length + 1, dtype=torch.int32)
        starts = torch.zeros(len(places), length, dtype=torch.bool) if rows.by_document else None
        targets = torch.empty(len(places), length, dtype=torch.int32) if rows.ignores else tokens[:, 1:]
        for row, (window, offset) in enumerate(places):
            rows.fill(tokens[row].numpy(), targets[row].numpy(), None if starts is None else starts[row].numpy(), window, offset)
        return Batch(tokens[:, :-1], targets, starts)

    def _shuffled(self, index: int) -> tuple[int, int]:
        """Window and offset of a sample."""
        epoch, position = divmod(index, self.per_epoch)
        key = hashlib.blake2b(f"{self._seed}/{epoch}".encode(), digest_size=16).digest()
        offset = int.from_bytes(key, "little") % (self._rows.slack + 1)
        return permute(position, self.per_epoch, key), offset
