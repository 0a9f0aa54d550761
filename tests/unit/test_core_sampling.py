"""Sampling: which tokens are drawn, how a text ends, and what of it is shown when."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from slim_core.config import ModelConfig, OptimizerConfig
from slim_core.data.tokenizer import ByteTokenizer
from slim_core.generate import Sampling, draw, generate
from slim_core.model import LanguageModel
from slim_core.optim import make_optimizer
from slim_core.sampler_memory import required_bytes
from slim_core.text_stream import TextStream
from slim_core.weights.checkpoint import checkpoint_name, save_checkpoint
from tests.unit.core_support import small_config

ROOT = Path(__file__).resolve().parents[2]
BYTES = ByteTokenizer()
TEXT = "Grüße, 世界 👩‍👩‍👧 — naïve 🏳️‍🌈 ok"


def shown(
    tokens: Iterable[int],
    decode: Callable[[Any], str] = BYTES.decode,
    stop: Iterable[str] = (),
    before: Sequence[int] = (),
) -> list[str]:
    stream = TextStream(decode, list(stop), before)
    pieces = []
    for token in tokens:
        pieces.append(stream.push(token))
        if stream.stopped:
            break
    return [*pieces, stream.finish()]


@given(
    st.binary(max_size=40) | st.text(max_size=20).map(str.encode), st.lists(st.text(min_size=1, max_size=3), max_size=3)
)
def test_the_pieces_are_the_text_before_the_first_stop(data: bytes, stop: list[str]) -> None:
    whole = data.decode("utf-8", "replace")
    ends = [whole.find(text) for text in stop if text in whole]
    assert "".join(shown(data, stop=stop)) == whole[: min(ends, default=None)]


def test_no_piece_has_half_a_character() -> None:
    pieces = shown(TEXT.encode())
    assert "".join(pieces) == TEXT
    assert not any("\ufffd" in piece for piece in pieces)
    assert shown([*b"ok", 0xE4]) == ["o", "k", "", "\ufffd"]


def test_a_byte_level_vocabulary_splits_characters_too() -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=262, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([TEXT], trainer)
    tokens = tokenizer.encode(TEXT).ids
    pieces = shown(tokens, tokenizer.decode)
    assert len(tokens) > len(TEXT)
    assert "".join(pieces) == TEXT
    assert not any("\ufffd" in piece for piece in pieces)


def sentencepiece() -> Tokenizer:
    """Of one character a token, and bytes for the others, as Llama 2's."""
    pieces = [f"<0x{byte:02X}>" for byte in range(256)] + list("\u2581aok.")
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


SENTENCEPIECE = sentencepiece()


def test_byte_tokens_are_not_taken_for_text_before_they_are() -> None:
    tokens = SENTENCEPIECE.encode("a😀😀a").ids[1:]
    assert shown(tokens, SENTENCEPIECE.decode) == ["a", "", "", "", "😀", "", "", "", "😀", "a", ""]
    broken = [*tokens[:5], tokens[1], tokens[0]]  # the library takes the whole run for broken
    assert "".join(shown(broken, SENTENCEPIECE.decode)) == "a😀\ufffda"
    assert "".join(shown(broken[:-1], SENTENCEPIECE.decode)) == "a😀\ufffd"
    assert "".join(shown([tokens[1]] * 40, SENTENCEPIECE.decode)) == "\ufffd" * 40


@given(st.text("a ok.é世😀", max_size=30), st.text("a ok.é世😀", max_size=30))
def test_a_text_goes_on_where_its_prompt_ends(prompt: str, text: str) -> None:
    before = SENTENCEPIECE.encode(prompt + "a").ids
    tokens = SENTENCEPIECE.encode(prompt + "a" + text).ids[len(before) :]
    pieces = shown(tokens, SENTENCEPIECE.decode, before=before)
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_nothing_of_a_stop_text_is_shown_and_no_more_is_held_than_could_begin_one() -> None:
    assert shown(b"one END", stop=["END"]) == ["o", "n", "e", " ", "", "", "", ""]
    assert shown(b"EEN.", stop=["END"]) == ["", "E", "", "EN.", ""]


LOGITS = torch.tensor([0.0, 3.0, 1.0, 2.0])


@pytest.mark.parametrize(
    ("sampling", "possible"),
    [
        (Sampling(temperature=0), {1}),
        (Sampling(temperature=1e-30), {1}),
        (Sampling(temperature=1e-300), {1}),
        (Sampling(temperature=5e-324), {1}),
        (Sampling(temperature=5, top_k=2), {1, 3}),
        (Sampling(temperature=5, top_k=9), {0, 1, 2, 3}),
        (Sampling(temperature=1, top_p=1e-9), {1}),
        (Sampling(temperature=1, top_p=0.65), {1, 3}),  # probabilities 0.64, 0.24, 0.09, 0.03
        (Sampling(temperature=5, top_k=3, top_p=0.999), {1, 2, 3}),
    ],
)
def test_only_likely_tokens_are_drawn(sampling: Sampling, possible: set[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    assert {draw(LOGITS, sampling, generator) for _ in range(300)} == possible


def test_predictions_that_are_no_numbers_are_an_error() -> None:
    with pytest.raises(ValueError, match="not finite"):
        draw(torch.tensor([0.0, float("nan")]), Sampling(), torch.Generator())


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return LanguageModel(small_config("favor")).initialize(0)


def sample(model: LanguageModel, prompt: Iterable[int], **changes: Any) -> tuple[list[int], str]:
    arguments: dict[str, Any] = {"max_tokens": 20, "end_of_document": -1, "vocab_size": 10**6, "sampling": Sampling()}
    tokens = generate(model, list(prompt), **{**arguments, **changes})
    drawn = []
    while True:
        try:
            drawn.append(next(tokens))
        except StopIteration as end:
            return drawn, end.value


@pytest.mark.parametrize("attention", ["performer", "softmax"])
def test_a_sample_is_what_the_whole_sequence_predicts(attention: str) -> None:
    model = LanguageModel(small_config(attention=attention)).initialize(0)
    prompt = [index % model.config.vocab_size for index in range(600)]  # more than is read at once
    drawn, reason = sample(model, prompt, max_tokens=5, sampling=Sampling(temperature=0))
    whole = torch.tensor([[*prompt, *drawn]])
    with torch.no_grad():
        hidden = model.forward_chunk(whole, 0, model.initial_states(1, whole.shape[1])).hidden
    assert model.logits(hidden[0, len(prompt) - 1 : -1]).argmax(-1).tolist() == drawn
    assert reason == "length"


def test_the_end_of_a_document_ends_the_text(model: LanguageModel) -> None:
    drawn, _ = sample(model, [1, 2])
    end = drawn[7]
    assert sample(model, [1, 2], end_of_document=end) == (drawn[: drawn.index(end)], "stop")
    assert sample(model, [1, 2], sampling=Sampling(seed=1))[0] != drawn
    assert sample(model, [1, 2], deadline=0.0) == ([], "time")
    assert max(sample(model, [1, 2], max_tokens=200, vocab_size=4)[0]) == 3


def test_learned_positions_end_the_text() -> None:
    config = small_config("relu", positions="learned", max_positions=8)
    assert len(sample(LanguageModel(config).initialize(0), [1, 2, 3])[0]) == 6  # the last one is never read


@pytest.mark.parametrize("changes", [{}, {"vocab_size": 60_000, "model_width": 256, "mlp_width": 512}])
def test_the_memory_that_is_asked_for_is_enough(changes: dict[str, Any], tmp_path: Path) -> None:
    config = ModelConfig(**{"num_layers": 2, "model_width": 64, "num_heads": 2, "mlp_width": 128} | changes)
    model = LanguageModel(config).initialize(0)
    save_checkpoint(tmp_path, 0, model, make_optimizer(model, OptimizerConfig()), {})
    folder = tmp_path / checkpoint_name(0)
    request: dict[str, Any] = {
        "folder": str(folder),
        "prompt": "x" * 3_000,
        "messages": None,
        "max_tokens": 10,
        "temperature": 1.0,
        "top_k": 50,
        "top_p": 0.9,
        "stop": [],
        "seed": 0,
        "seconds": 100.0,
    }
    enough = required_bytes(config, 3_010)
    assert [run_sampler({**request, "memory_bytes": limit})[-1]["type"] for limit in (enough, enough - 1)] == [
        "done",
        "error",
    ]


def run_sampler(request: dict[str, Any]) -> list[dict[str, Any]]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    command = [sys.executable, "-m", "slim_core.sampler"]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(request).encode() + b"\n")
        process.stdin.flush()
        return [json.loads(line) for line in process.stdout]
