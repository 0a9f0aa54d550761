"""Windows: what is in a batch, in which order, and what becomes of documents."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slim_core.config import Packing
from slim_core.data import stream
from slim_core.data.dataset import Batch, Windows, permute
from slim_core.data.prepare import make_tokens
from slim_core.data.stream import Part
from slim_core.data.tokens import DatasetError, Meta, TokenWriter, write_meta
from slim_core.layers.head import IGNORED

PACKINGS: tuple[Packing, ...] = ("continuous", "packed", "single")


NO_COUNTS: dict[str, Any] = dict.fromkeys(
    ("empty_documents", "untrained_documents", "inexact_cuts", "text_bytes", "source_bytes"), 0
)


def folder_of(folder: Path, documents: Sequence[Sequence[int]], masks: Sequence[Sequence[bool]] | None = None) -> Path:
    """A token folder of these documents, whose last token is taken for their end; and which tokens have a loss."""
    folder.mkdir(exist_ok=True)
    vocab_size = 1 << 20 if any(max(document) >= 1 << 16 for document in documents) else 1 << 16
    with TokenWriter(folder, vocab_size, masked=masks is not None) as writer:
        for number, document in enumerate(documents):
            for place, token in enumerate(document):
                writer.add([token], True if masks is None else masks[number][place])
            writer.end_document(document[-1], loss=True)
        facts = writer.finish()
        size = 2 if vocab_size == 1 << 16 else 4
    meta = Meta("test", vocab_size, size, 0, "text", **facts, **NO_COUNTS)
    write_meta(folder, meta)
    return folder


def numbered(folder: Path, count: int) -> Path:
    """One document whose token i is i."""
    return folder_of(folder / "tokens", [range(count)])


def row_of(batch: Batch, row: int = 0) -> tuple[list[int], list[int]]:
    return batch.tokens[row].tolist(), batch.targets[row].tolist()


def starts_of_epoch(windows: Windows, epoch: int) -> list[int]:
    """Where each window of an epoch starts, in the order of training; the token file is numbered."""
    first = epoch * windows.per_epoch
    return [int(windows.batch(index, 1).tokens[0, 0]) for index in range(first, first + windows.per_epoch)]


@pytest.mark.parametrize("count", [11, 101, 107, 110, 1003])
def test_each_epoch_visits_each_window_once(count: int, tmp_path: Path) -> None:
    windows = Windows(numbered(tmp_path, count), 10, seed=1)
    assert windows.per_epoch == (count - 1) // 10
    offsets = set()
    for epoch in range(30):
        starts = sorted(starts_of_epoch(windows, epoch))
        assert [b - a for a, b in pairwise(starts)] == [10] * (windows.per_epoch - 1)
        assert starts[0] >= 0
        assert starts[-1] + 10 < count
        offsets.add(starts[0])
    slack = (count - 1) % 10
    assert offsets <= set(range(slack + 1))
    if slack >= 3:
        assert len(offsets) > 1, "the tail of the text is never trained on"


def test_batches_are_rows_of_the_order_with_targets_shifted_by_one(tmp_path: Path) -> None:
    windows = Windows(numbered(tmp_path, 505), 10, seed=1)
    tokens, targets, starts = windows.batch(first=12, count=4)
    assert starts is None
    assert tokens.shape == targets.shape == (4, 10)
    assert (targets == tokens + 1).all()
    assert (tokens[:, 1:] == tokens[:, :-1] + 1).all()
    order = starts_of_epoch(windows, 0)
    assert tokens[:, 0].tolist() == order[12:16]


def test_a_batch_may_span_epochs(tmp_path: Path) -> None:
    windows = Windows(numbered(tmp_path, 55), 10, seed=1)
    assert windows.per_epoch == 5
    tokens = windows.batch(first=4, count=4).tokens
    assert tokens[:, 0].tolist() == [*starts_of_epoch(windows, 0)[4:], *starts_of_epoch(windows, 1)[:3]]


def test_the_order_depends_on_the_seed_and_the_epoch_alone(tmp_path: Path) -> None:
    path = numbered(tmp_path, 1001)
    orders = [starts_of_epoch(Windows(path, 10, seed), epoch) for seed in (1, 2) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4
    assert starts_of_epoch(Windows(path, 10, 2), 1) == orders[3]
    assert sorted(orders[0]) != orders[0]


def test_validation_windows_are_in_the_order_of_the_file(tmp_path: Path) -> None:
    windows = Windows(numbered(tmp_path, 55), 10, seed=1)
    tokens, targets, _ = windows.validation(first=2, count=2)
    assert tokens[:, 0].tolist() == [20, 30]
    assert (targets == tokens + 1).all()


@pytest.mark.parametrize("token", [65_535, 65_536, (1 << 20) - 1])
def test_high_tokens_are_not_negative(token: int, tmp_path: Path) -> None:
    tokens, targets = row_of(Windows(folder_of(tmp_path, [[token] * 9]), 8, seed=0).batch(0, 1))
    assert tokens == targets == [token] * 8


def test_a_sequence_needs_one_token_more_than_its_length(tmp_path: Path) -> None:
    assert Windows(numbered(tmp_path, 11), 10, seed=0).per_epoch == 1
    with pytest.raises(DatasetError, match="10 tokens; a sequence of 10"):
        Windows(numbered(tmp_path, 10), 10, seed=0)


@settings(deadline=None, derandomize=True)
@given(size=st.integers(1, 1500), key=st.binary(min_size=16, max_size=16))
def test_permute_is_a_bijection(size: int, key: bytes) -> None:
    assert sorted(permute(index, size, key) for index in range(size)) == list(range(size))


@pytest.mark.parametrize("size", [*range(1, 20), 255, 256, 257, 1023, 1024, 1025, 4097])
def test_permute_is_a_bijection_around_powers_of_two(size: int) -> None:
    assert sorted(permute(index, size, b"key") for index in range(size)) == list(range(size))


def test_permute_mixes() -> None:
    """Of few elements every order turns up; of many, an element rarely keeps its place or its neighbour."""
    orders = Counter(tuple(permute(index, 3, seed.to_bytes(2, "little")) for index in range(3)) for seed in range(600))
    assert len(orders) == 6
    assert min(orders.values()) > 50
    order = [permute(index, 1000, b"key") for index in range(1000)]
    assert sum(place == index for index, place in enumerate(order)) < 10
    assert sum(b - a == 1 for a, b in pairwise(order)) < 10


def test_a_permutation_of_billions_takes_no_time() -> None:
    values = {permute(index, 3_000_000_000, b"key") for index in range(1000)}
    assert len(values) == 1000
    assert max(values) < 3_000_000_000
    assert max(values) > 2_000_000_000


DOCUMENTS = [[10, 11, 12, 0], [20, 0], [30], [40, 41, 42, 43, 44, 45, 46, 47, 0]]


def test_packed_windows_are_the_continuous_ones_with_their_borders(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, DOCUMENTS)
    for seed in range(3):
        continuous, packed = (Windows(folder, 5, seed, packing) for packing in PACKINGS[:2])
        assert packed.per_epoch == continuous.per_epoch == 3
        wanted, got = continuous.batch(0, 9), packed.batch(0, 9)
        assert torch.equal(got.tokens, wanted.tokens)
        assert got.document_starts is not None
        assert torch.equal(got.document_starts, (wanted.tokens % 10 == 0) & (wanted.tokens > 0))
        begins = (wanted.targets % 10 == 0) & (wanted.targets > 0)
        assert torch.equal(got.targets, wanted.targets.masked_fill(begins, IGNORED))


def test_single_windows_hold_a_document_each(tmp_path: Path) -> None:
    windows = Windows(folder_of(tmp_path, DOCUMENTS), 5, seed=0, packing="single")
    batch = windows.validation(0, 4)
    assert windows.per_epoch == 4
    assert batch.document_starts is None
    assert [row_of(batch, row) for row in range(4)] == [
        ([10, 11, 12, 0, 0], [11, 12, 0, IGNORED, IGNORED]),
        ([20, 0, 0, 0, 0], [0, IGNORED, IGNORED, IGNORED, IGNORED]),
        ([40, 41, 42, 43, 44], [41, 42, 43, 44, 45]),
        ([45, 46, 47, 0, 0], [46, 47, 0, IGNORED, IGNORED]),
    ]
    order = [windows.batch(sample, 1).tokens[0, 0].item() for sample in range(8)]
    assert sorted(order[:4]) == sorted(order[4:]) == [10, 20, 40, 45]
    assert order[:4] != order[4:]


def test_what_has_no_loss_is_no_target(tmp_path: Path) -> None:
    masks = [[False, False, True, True], [False, True], [True], [False] * 6 + [True] * 3]
    folder = folder_of(tmp_path, DOCUMENTS, masks)
    continuous = Windows(folder, 7, 0).validation(0, 2)
    assert row_of(continuous)[1] == [IGNORED, 12, 0, IGNORED, 0, 30, IGNORED]
    packed = Windows(folder, 7, 0, "packed").validation(0, 2)
    assert row_of(packed)[1] == [IGNORED, 12, 0, IGNORED, 0, IGNORED, IGNORED]
    single = Windows(folder, 4, 0, "single").validation(0, 4)
    assert single.targets.tolist() == [
        [IGNORED, 12, 0, IGNORED],
        [0] + [IGNORED] * 3,
        [IGNORED] * 4,
        [IGNORED, 46, 47, 0],
    ]


def test_reports_name_what_is_cut_and_left_out(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, DOCUMENTS)
    facts = {"sequence_length": 5, "documents": 4, "tokens": 16}
    row = {"split_documents": 1, "dropped_documents": 0, "unused_tokens": 0, "padding": 0}
    # Tokens 0-4, 5-9 and 10-14 make the windows; the last one is a target only.
    assert asdict(Windows(folder, 5, 0).report()) == {**facts, **row, "windows": 3, "targets": 15}
    assert asdict(Windows(folder, 5, 0, "packed").report()) == {**facts, **row, "windows": 3, "targets": 12}
    row = {"split_documents": 1, "dropped_documents": 1, "unused_tokens": 1, "padding": 8}
    assert asdict(Windows(folder, 5, 0, "single").report()) == {**facts, **row, "windows": 4, "targets": 12}


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=2, max_size=30),
    length=st.integers(1, 9),
    packing=st.sampled_from(PACKINGS),
    masked=st.booleans(),
    fraction=st.sampled_from([None, 0.1, 0.5]),
    data=st.data(),
)
def test_counts_are_those_of_the_batches(
    lengths: list[int],
    length: int,
    packing: Packing,
    masked: bool,
    fraction: float | None,
    data: st.DataObject,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Blocks of three documents and five tokens, so that their borders matter."""
    ends = list(itertools.accumulate(lengths))
    documents = [list(range(end - size + 1, end + 1)) for end, size in zip(ends, lengths, strict=True)]
    masks = [data.draw(st.lists(st.booleans(), min_size=size, max_size=size)) for size in lengths] if masked else None
    folder = folder_of(tmp_path_factory.mktemp("tokens"), documents, masks)
    loss = dict(zip(range(1, ends[-1] + 1), itertools.chain(*(masks or [[True] * ends[-1]])), strict=True))
    firsts = {document[0] for document in documents}
    seen: Counter[int] = Counter()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "_BLOCK", 3)
        patch.setattr(stream, "_TOKEN_BLOCK", 5)
        for part in [None] if fraction is None else [Part(name, fraction, 7) for name in ("training", "validation")]:
            try:
                windows = Windows(folder, length, 0, packing, part)
            except DatasetError:
                continue
            batch = windows.validation(0, windows.per_epoch)
            report = windows.report()
            with_loss = batch.targets != IGNORED
            assert windows.num_validation_targets(0, windows.per_epoch) == with_loss.sum() == report.targets
            shuffled = windows.batch(3, 5)
            assert windows.num_targets(3, 5) == (shuffled.targets != IGNORED).sum()
            for row in range(windows.per_epoch):
                for token, target in zip(*row_of(batch, row), strict=True):
                    if target != IGNORED:
                        assert loss[target]
                        assert packing == "continuous" or (target == token + 1 and target not in firsts)
            seen.update(batch.targets[with_loss].tolist())
            if part is None and packing == "single":
                wanted = {token for token, has in loss.items() if has and token not in firsts}
                assert seen == Counter(wanted)
    assert all(count == 1 for count in seen.values())


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5])
@pytest.mark.parametrize("count", [2, 9, 200])
def test_documents_are_for_training_or_for_validation(
    fraction: float, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_of(tmp_path, [[number] * 3 for number in range(1, count + 1)])

    def documents(part: str, seed: int) -> list[int]:
        windows = Windows(folder, 1, 0, "single", Part(part, fraction, seed))  # type: ignore[arg-type]
        return [int(token) for token in windows.validation(0, windows.per_epoch).tokens[::2, 0]]

    training, validation = documents("training", 1), documents("validation", 1)
    assert sorted(training + validation) == list(range(1, count + 1))
    assert len(validation) == min(max(1, round(fraction * count)), count - 1)
    if count == 200:
        assert documents("validation", 2) != validation
        assert np.mean(validation) == pytest.approx(100, abs=70 if len(validation) < 5 else 20)
    monkeypatch.setattr(stream, "_BLOCK", 7)
    assert documents("validation", 1) == validation
    for packing in ("continuous", "packed"):
        for part, wanted in (("training", training), ("validation", validation)):
            windows = Windows(folder, 1, 0, packing, Part(part, fraction, 1))  # type: ignore[arg-type]
            tokens = windows.validation(0, windows.per_epoch).tokens[:, 0].tolist()
            assert tokens == [number for number in wanted for _ in range(3)][:-1]


def test_one_document_cannot_be_shared_out(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="needs two documents at least"):
        Windows(numbered(tmp_path, 100), 5, 0, "packed", Part("training", 0.1, 0))


def test_data_without_a_window_says_so(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no document of more than one token"):
        Windows(folder_of(tmp_path, [[1], [2]]), 5, 0, "single")


def test_what_lies_in_files_beside_the_data_has_no_name(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, DOCUMENTS)
    before = sorted(path.name for path in folder.iterdir())
    windows = [Windows(folder, 3, 0, packing, Part("training", 0.3, 0)) for packing in PACKINGS]
    assert sorted(path.name for path in folder.iterdir()) == before
    assert all(len(window.batch(0, 2).tokens) == 2 for window in windows)


def test_the_windows_of_a_file_are_those_of_its_bytes(tmp_path: Path) -> None:
    """From end to end: the order and the bytes that runs of before had."""
    source = tmp_path / "data.jsonl"
    source.write_text("\n".join(json.dumps({"text": text}) for text in ("first ☃", "", "second")))
    stream_of = [*"first ☃".encode(), 256, *b"second", 256]
    windows = Windows(make_tokens(source), 4, seed=3)
    tokens, targets = row_of(windows.validation(1, 1))
    assert (tokens, targets) == (stream_of[4:8], stream_of[5:9])
