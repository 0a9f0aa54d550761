"""docs/formats.md: its examples are read, refused, tokenised and counted as it says."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import get_args

import pytest

from slim_core.config import Packing
from slim_core.data.chat import ChatTemplate
from slim_core.data.dataset import Batch, Windows
from slim_core.data.prepare import make_tokens
from slim_core.data.readers import read_documents
from slim_core.data.tokens import DatasetError, Problems, read_meta
from slim_core.layers.head import IGNORED

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "formats.md").read_text()
EXAMPLES: dict[str, str] = dict(re.findall(r"^```([\w ]+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))


def source(folder: Path, name: str) -> Path:
    path = folder / "data.jsonl"
    path.write_text(EXAMPLES[f"jsonl {name}"])
    return path


@pytest.mark.parametrize("kind", ["text", "completion", "messages"])
def test_documents_of_each_kind(kind: str, tmp_path: Path) -> None:
    problems = Problems()
    kinds = [document.kind for document in read_documents(source(tmp_path, kind), problems)]
    assert kinds == [kind] * EXAMPLES[f"jsonl {kind}"].count("\n")
    assert problems.total == 0


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError) as caught:
        make_tokens(source(tmp_path, "refused"))
    problems = [f"line {problem.line}: {problem.reason}\n" for problem in caught.value.problems]
    assert "".join(problems) == EXAMPLES["problems"]


def test_a_conversation_as_text() -> None:
    segments = ChatTemplate().segments(json.loads(EXAMPLES["jsonl messages"])["messages"])
    assert "".join(text for text, _ in segments) == EXAMPLES["rendered"]
    assert [text for text, loss in segments if loss] == [EXAMPLES["loss"]]


def test_what_is_counted(tmp_path: Path) -> None:
    wanted = json.loads(EXAMPLES["json counted"])
    meta = read_meta(make_tokens(source(tmp_path, "counted"))).to_json()
    assert {name: meta[name] for name in wanted} == wanted


def shown(tokens: list[int]) -> str:
    return "".join("|" if token == 256 else "." if token == IGNORED else chr(token) for token in tokens)


def sequences(batch: Batch) -> str:
    """Padding is shown as spaces."""
    rows = []
    for tokens, targets in zip(batch.tokens.tolist(), batch.targets.tolist(), strict=True):
        rows.append(f"{shown(tokens).replace(chr(0), ' ')} -> {shown(targets)}")
    return "   ".join(rows)


def test_sequences_and_reports(tmp_path: Path) -> None:
    folder = make_tokens(source(tmp_path, "packing"))
    lines = EXAMPLES["sequences"].splitlines()
    reports = json.loads(EXAMPLES["json reports"])
    assert {line.split()[0] for line in lines} == set(reports) == set(get_args(Packing))
    for line in lines:
        packing: Packing = line.split()[0]  # type: ignore[assignment]
        windows = Windows(folder, 5, 0, packing)
        assert line.split(maxsplit=1)[1].rstrip() == sequences(windows.validation(0, windows.per_epoch))
        report = windows.report()
        assert {name: getattr(report, name) for name in reports[packing]} == reports[packing]
