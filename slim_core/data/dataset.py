"""Batches from a token file (slim_core/data/tokens.py), which is mapped and never loaded.

Legend: B batch, T sequence length, W windows of T tokens (and one more, the last target) in an epoch.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from slim_core.data.tokens import TOKEN_BYTES, DatasetError

_TOKEN = np.dtype(f"<u{TOKEN_BYTES}")


class Windows:
    """Sequences of T + 1 tokens from a token file, in an order that depends on the seed alone.

    Every epoch visits each of its W windows once, in a new order and from a new offset. Where a run stands is a
    function of the step, so resuming needs no state and takes no time.
    """

    def __init__(self, path: Path, sequence_length: int, seed: int) -> None:
        self._tokens: npt.NDArray[np.uint16] = np.memmap(path, _TOKEN, mode="r")
        self._length = sequence_length
        self._seed = seed
        self.per_epoch = (len(self._tokens) - 1) // sequence_length
        """W."""
        if self.per_epoch < 1:
            raise DatasetError(
                f"the dataset has {len(self._tokens)} tokens; a sequence of {sequence_length} needs one more than that"
            )

    def batch(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Tokens and targets of samples `first` to `first + count` of the run, each (count, T) int32.

        Step s of a run with batches of B begins at sample s * B.
        """
        return self._stack([self._shuffled_start(first + row) for row in range(count)])

    def validation(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Windows `first` to `first + count` in the order of the file, each (count, T) int32."""
        return self._stack([(first + row) * self._length for row in range(count)])

    def _stack(self, starts: list[int]) -> tuple[Tensor, Tensor]:
        batch = torch.empty(len(starts), self._length + 1, dtype=torch.int32)
        for row, start in zip(batch.numpy(), starts, strict=True):
            row[:] = self._tokens[start : start + self._length + 1]
        return batch[:, :-1], batch[:, 1:]

    def _shuffled_start(self, index: int) -> int:
        epoch, position = divmod(index, self.per_epoch)
        key = hashlib.blake2b(f"{self._seed}/{epoch}".encode(), digest_size=16).digest()
        slack = len(self._tokens) - 1 - self.per_epoch * self._length
        offset = int.from_bytes(key, "little") % (slack + 1)
        return offset + permute(position, self.per_epoch, key) * self._length


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
