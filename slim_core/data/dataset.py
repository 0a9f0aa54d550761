"""Batches from a token folder (slim_core/data/tokens.py), which is mapped and never loaded.

Legend: B batch, T sequence length, W windows (sequences) in an epoch.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from slim_core.config import Packing
from slim_core.data.rows import DataReport, Rows, SingleRows, StreamRows
from slim_core.data.stream import Part, Stream, TokenArrays
from slim_core.layers.head import IGNORED


class Batch(NamedTuple):
    """Sequences as the step takes them."""

    tokens: Tensor
    """(B, T) int32."""
    targets: Tensor
    """(B, T) int32; IGNORED where there is no loss."""
    document_starts: Tensor | None
    """(B, T) booleans, true where a document begins; None where attention is to know no borders."""

    def to(self, device: torch.device) -> Batch:
        starts = self.document_starts
        return Batch(self.tokens.to(device), self.targets.to(device), None if starts is None else starts.to(device))


class Windows:
    """Sequences of T tokens from a token folder, in an order that depends on the seed alone.

    Every epoch visits each of its W windows once, in a new order and, where they are cut from all documents in a row,
    from a new offset. Where a run stands is a function of the step, so resuming needs no state and takes no time.
    `packing` is that of `slim_core.config.TrainConfig`, `part` the documents to take (None: all).
    """

    def __init__(
        self,
        folder: Path,
        sequence_length: int,
        seed: int,
        packing: Packing = "continuous",
        part: Part | None = None,
    ) -> None:
        """Raises DatasetError for data without a window."""
        arrays = TokenArrays(folder)
        self._rows: Rows
        if packing == "single":
            self._rows = SingleRows(arrays, part, sequence_length)
        else:
            self._rows = StreamRows(Stream(arrays, part), sequence_length, by_document=packing == "packed")
        self._length = sequence_length
        self._seed = seed
        self.per_epoch = self._rows.windows
        """W."""

    def batch(self, first: int, count: int) -> Batch:
        """Samples `first` to `first + count` of the run. Step s of a run with batches of B begins at sample s * B."""
        return self._stack([self._shuffled(first + row) for row in range(count)])

    def num_targets(self, first: int, count: int) -> int:
        """Targets with a loss in `batch(first, count)`, which is not made for it."""
        return sum(self._rows.num_targets(*self._shuffled(first + row)) for row in range(count))

    def validation(self, first: int, count: int) -> Batch:
        """Windows `first` to `first + count` in the order of the file."""
        return self._stack([(first + row, 0) for row in range(count)])

    def num_validation_targets(self, first: int, count: int) -> int:
        """Targets with a loss in `validation(first, count)`."""
        return sum(self._rows.num_targets(first + row, 0) for row in range(count))

    def report(self) -> DataReport:
        """What an epoch cuts, leaves out and pads. Reads the borders of all documents, and the mask where there is
        one."""
        return self._rows.report()

    def _stack(self, places: list[tuple[int, int]]) -> Batch:
        shape = (len(places), self._length)
        all_tokens = torch.zeros(shape[0], shape[1] + 1, dtype=torch.int32)
        tokens, targets = all_tokens[:, :-1], all_tokens[:, 1:]
        if not self._rows.all_have_loss:
            targets = torch.full(shape, IGNORED, dtype=torch.int32)
        starts = torch.zeros(shape, dtype=torch.bool) if self._rows.by_document else None
        for index, (window, offset) in enumerate(places):
            row = self._rows.row(window, offset)
            count = len(row.tokens) - 1
            all_tokens[index].numpy()[: count + 1] = row.tokens
            if not self._rows.all_have_loss:
                targets[index].numpy()[:count][... if row.loss is None else row.loss] = (
                    row.tokens[1:] if row.loss is None else row.tokens[1:][row.loss]
                )
            if starts is not None:
                starts[index].numpy()[:] = row.starts
        return Batch(tokens, targets, starts)

    def _shuffled(self, index: int) -> tuple[int, int]:
        """Window and offset of a sample."""
        epoch, position = divmod(index, self.per_epoch)
        key = hashlib.blake2b(f"{self._seed}/{epoch}".encode(), digest_size=16).digest()
        offset = int.from_bytes(key, "little") % (self._rows.slack + 1)
        return permute(position, self.per_epoch, key), offset


def permute(index: int, size: int, key: bytes) -> int:
    """Element `index` of a pseudo-random permutation of range(size), without holding the permutation.

    Four Feistel rounds on the smallest even number of bits that hold `size`, walking the cycle until the value is in
    range (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002).
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for round_number in range(4):
            message = round_number.to_bytes(1, "little") + right.to_bytes(8, "little")
            mixed = int.from_bytes(hashlib.blake2b(message, key=key, digest_size=8).digest(), "little")
            left, right = right, left ^ (mixed & mask)
        index = (left << half) | right
        if index < size:
            return index
