"""How documents become sequences: one by one, or cut from all of them in a row.

Legend: T sequence length, W windows (sequences) in an epoch.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from slim_core.data.stream import Int64s, Part, Stream, TokenArrays
from slim_core.data.tokens import DatasetError


class Row(NamedTuple):
    """One sequence of up to T positions."""

    tokens: npt.NDArray[Any]
    """(n + 1): those of n positions, and the last target."""
    loss: npt.NDArray[np.bool_] | None
    """(n): which positions have a loss; None for all."""
    starts: npt.NDArray[np.bool_] | None
    """(n): where documents begin, if attention is to know."""


@dataclass(frozen=True, slots=True)
class DataReport:
    """What becomes of the documents at one T: what an epoch cuts, leaves out and pads.

    Windows that are cut from all documents in a row begin elsewhere in each epoch; the counts are those of an epoch
    that begins at the first token.
    """

    sequence_length: int
    documents: int
    tokens: int
    windows: int
    """W."""
    split_documents: int
    """Documents with targets in more than one window."""
    dropped_documents: int
    """Documents of one token, which has nothing to be predicted from: left out where each document is a sequence."""
    unused_tokens: int
    """Tokens that are in no window: a rest at the end that fills none, or those of dropped documents."""
    padding: int
    """Positions of windows behind the end of their document."""
    targets: int
    """Positions of windows that have a loss."""


class Rows(Protocol):
    """The windows of a dataset in the order of the file."""

    @property
    def windows(self) -> int:
        """W."""
        ...

    @property
    def slack(self) -> int:
        """How far all windows can be moved towards the end."""
        ...

    @property
    def all_have_loss(self) -> bool:
        """Every position of every window."""
        ...

    @property
    def by_document(self) -> bool:
        """Whether rows say where documents begin."""
        ...

    def row(self, window: int, offset: int) -> Row: ...

    def num_targets(self, window: int, offset: int) -> int:
        """Positions with a loss in `row`."""
        ...

    def report(self) -> DataReport: ...


class StreamRows:
    """Windows of T tokens (and one more, the last target) cut from all documents in a row.

    With `by_document` attention starts afresh with each document, and its first token is no target: what comes before
    it is another document.
    """

    def __init__(self, stream: Stream, length: int, *, by_document: bool) -> None:
        self._stream = stream
        self._length = length
        self.by_document = by_document
        self.all_have_loss = not (by_document or stream.masked)
        self.windows = (stream.length - 1) // length
        if self.windows < 1:
            raise DatasetError(
                f"the dataset has {stream.length} tokens; a sequence of {length} needs one more than that"
            )
        self.slack = stream.length - 1 - self.windows * length

    def row(self, window: int, offset: int) -> Row:
        start, count = offset + window * self._length, self._length + 1
        tokens, loss = self._stream.tokens(start, count), self._stream.loss(start, count)
        if not self.by_document:
            return Row(tokens, None if loss is None else loss[1:], None)
        begins = self._stream.starts(start, count)
        return Row(tokens, ~begins[1:] if loss is None else loss[1:] & ~begins[1:], begins[:-1])

    def num_targets(self, window: int, offset: int) -> int:
        return self._stream.num_targets(offset + window * self._length, self._length, by_document=self.by_document)

    def report(self) -> DataReport:
        stream, length = self._stream, self._length
        split = 0
        for starts, ends in stream.documents_in_blocks():
            split += int((starts // length != np.maximum(ends - 2, starts) // length).sum())
        return DataReport(
            sequence_length=length,
            documents=stream.documents,
            tokens=stream.length,
            windows=self.windows,
            split_documents=split,
            dropped_documents=0,
            unused_tokens=self.slack,
            padding=0,
            targets=stream.num_targets(0, self.windows * length, by_document=self.by_document),
        )


class SingleRows:
    """A document a window, one longer than T in several, whose attention knows nothing of each other."""

    slack = 0
    all_have_loss = False
    by_document = False

    def __init__(self, arrays: TokenArrays, part: Part | None, length: int) -> None:
        self._arrays = arrays
        self._part = part
        self._length = length
        self._documents = self._split = self._dropped = self._tokens = 0
        self._windows_before = self._count_windows()
        """(documents): windows of the documents before each of the file's."""
        self.windows = int(self._windows_before[-1])
        if self.windows < 1:
            raise DatasetError("the dataset has no document of more than one token")

    def row(self, window: int, offset: int) -> Row:
        assert offset == 0
        start, end = self._span(window)
        mask = self._arrays.mask
        loss = None if mask is None else mask[start + 1 : end].astype(np.bool_)
        return Row(self._arrays.tokens[start:end], loss, None)

    def num_targets(self, window: int, offset: int) -> int:
        assert offset == 0
        start, end = self._span(window)
        mask = self._arrays.mask
        return end - start - 1 if mask is None else int(np.count_nonzero(mask[start + 1 : end]))

    def report(self) -> DataReport:
        stream = Stream(self._arrays, self._part)
        positions = self._tokens - self._documents
        return DataReport(
            sequence_length=self._length,
            documents=self._documents,
            tokens=self._tokens,
            windows=self.windows,
            split_documents=self._split,
            dropped_documents=self._dropped,
            unused_tokens=self._dropped,
            padding=self.windows * self._length - positions,
            targets=stream.num_targets(0, stream.length - 1, by_document=True),
        )

    def _span(self, window: int) -> tuple[int, int]:
        """Where the window's tokens lie in the file, the last target included."""
        document = int(np.searchsorted(self._windows_before, window, side="right")) - 1
        begin, end = (int(border) for border in self._arrays.borders[document : document + 2])
        start = begin + (window - int(self._windows_before[document])) * self._length
        return start, min(start + self._length + 1, end)

    def _count_windows(self) -> Int64s:
        """Their sums, in a nameless file. Counts documents on the way."""
        with tempfile.TemporaryFile(dir=self._arrays.folder) as file:
            file.write(bytes(8))
            total = 0
            for borders, selected in self._arrays.blocks(self._part):
                lengths = np.diff(borders)
                if selected is not None:
                    lengths = lengths * selected
                windows = np.maximum(lengths - 1 + self._length - 1, 0) // self._length
                sums = total + np.cumsum(windows)
                file.write(sums.astype(np.int64).tobytes())
                total = int(sums[-1])
                self._documents += int((lengths > 0).sum())
                self._tokens += int(lengths.sum())
                self._split += int((windows > 1).sum())
                self._dropped += int((lengths == 1).sum())
            file.flush()
            return np.memmap(file, np.int64, mode="r")
