"""The tokenizer in a GGUF file's metadata, as the tokenizer.json and tokenizer_config.json that it was before.

Two kinds: BPE on bytes (GPT-2's and all that came after it), whose texts are cut into words by a rule that the file
only names; and SentencePiece's BPE (Llama 1 and 2, Mistral), which has scores in place of merges.

Source: the tokenizer.json files that the named models were published with; "Neural Machine Translation of Rare Words
with Subword Units" (Sennrich et al., 2016) for merges; SentencePiece (Kudo and Richardson, 2018) for scores, where the
pair whose union scores best is merged first.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from slim_core.weights.gguf_file import GgufError

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|{digits}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Llama 3 and Qwen2 cut text into words; they differ in digits."""
_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6
"""Kinds of token, `tokenizer.ggml.token_type`."""
_SPACE = "\u2581"
"""What stands for a space in SentencePiece's vocabularies."""


def tokenizer_files(fields: dict[str, Any], architecture: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """tokenizer.json and tokenizer_config.json. Raises GgufError for a tokenizer that is not one of the two kinds."""
    tokens = fields.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens or not all(isinstance(token, str) for token in tokens):
        raise GgufError("tokenizer.ggml.tokens: the file has no vocabulary")
    vocabulary = {token: number for number, token in enumerate(tokens)}
    if len(vocabulary) < len(tokens):
        twice = next(token for number, token in enumerate(tokens) if vocabulary[token] != number)
        raise GgufError(f"tokenizer.ggml.tokens: {twice!r} is there twice")
    kinds = fields.get("tokenizer.ggml.token_type", [1] * len(tokens))
    if not isinstance(kinds, list) or len(kinds) != len(tokens):
        raise GgufError("tokenizer.ggml.token_type: not one kind for each token")
    special = {name: _special(fields, name, tokens) for name in ("bos", "eos", "unknown", "padding")}
    match fields.get("tokenizer.ggml.model"):
        case "gpt2":
            parts, adds_bos = _byte_level(fields, vocabulary, architecture)
        case "llama":
            parts, adds_bos = _sentencepiece(fields, vocabulary, kinds, special["unknown"]), True
        case other:
            raise GgufError(f"tokenizer.ggml.model: {other!r} is not supported; gpt2 (byte-level BPE) and llama are")
    template = _template(
        vocabulary,
        special["bos"] if fields.get("tokenizer.ggml.add_bos_token", adds_bos) else None,
        special["eos"] if fields.get("tokenizer.ggml.add_eos_token", False) else None,
    )
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added(tokens, kinds, special),
        "post_processor": template,
        **parts,
    }
    return tokenizer, _config(fields, special)


def special_ids(fields: dict[str, Any]) -> dict[str, int]:
    """bos_token_id, eos_token_id and pad_token_id of config.json, where the file names them."""
    names = {"bos": "bos_token_id", "eos": "eos_token_id", "padding": "pad_token_id"}
    found = {theirs: fields.get(f"tokenizer.ggml.{ours}_token_id") for ours, theirs in names.items()}
    return {name: number for name, number in found.items() if isinstance(number, int)}


def _byte_level(fields: dict[str, Any], vocabulary: dict[str, int], architecture: str) -> tuple[dict[str, Any], bool]:
    """Model, words and decoder of a BPE on bytes, and whether texts begin with a token of their own if the file does
    not say."""
    rule = fields.get("tokenizer.ggml.pre", "default")
    if rule == "default" and architecture == "gpt2":
        rule = "gpt-2"  # older files of GPT-2 do not name it
    words = _WORD_RULES.get(rule)
    if words is None:
        known = ", ".join(_WORD_RULES)
        raise GgufError(f"tokenizer.ggml.pre: {rule!r} is not supported; {known} are")
    merges = fields.get("tokenizer.ggml.merges")
    if not isinstance(merges, list) or not all(isinstance(merge, str) and " " in merge[1:] for merge in merges):
        raise GgufError("tokenizer.ggml.merges: not a list of pairs")
    pairs = [[merge[: (cut := merge.index(" ", 1))], merge[cut + 1 :]] for merge in merges]
    for left, right in pairs:
        if left not in vocabulary or right not in vocabulary or left + right not in vocabulary:
            raise GgufError(f"tokenizer.ggml.merges: {left!r} and {right!r} make no token")
    parts = {
        "normalizer": {"type": "NFC"} if rule == "qwen2" else None,
        "pre_tokenizer": words(),
        "decoder": _byte_level_step(use_regex=True),
        "model": _bpe(vocabulary, pairs, ignore_merges=rule == "llama-bpe"),
    }
    return parts, rule == "llama-bpe"


def _byte_level_step(*, use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _split_words(digits: str) -> dict[str, Any]:
    pattern = {"Regex": _WORDS.replace("{digits}", digits)}
    split = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, _byte_level_step(use_regex=False)]}


def _smollm_words() -> dict[str, Any]:
    digits = {"type": "Digits", "individual_digits": True}
    return {"type": "Sequence", "pretokenizers": [digits, _byte_level_step(use_regex=True)]}


_WORD_RULES: dict[str, Callable[[], dict[str, Any]]] = {
    "gpt-2": lambda: _byte_level_step(use_regex=True),
    "smollm": _smollm_words,
    "llama-bpe": lambda: _split_words(r"\p{N}{1,3}"),
    "qwen2": lambda: _split_words(r"\p{N}"),
}
"""By `tokenizer.ggml.pre`."""


def _sentencepiece(
    fields: dict[str, Any], vocabulary: dict[str, int], kinds: list[int], unknown: str | None
) -> dict[str, Any]:
    """Bytes stand for characters that the vocabulary lacks, spaces for a character of their own."""
    scores = fields.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(vocabulary):
        raise GgufError("tokenizer.ggml.scores: not one score for each token")
    if not all(isinstance(score, int | float) and not math.isnan(score) for score in scores):
        raise GgufError("tokenizer.ggml.scores: not all are numbers")
    outside = (_UNKNOWN, _CONTROL, _BYTE)
    pieces = {token: number for token, number in vocabulary.items() if kinds[number] not in outside}
    merges: list[tuple[float, int, int, str, str]] = []
    for piece, number in pieces.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in pieces and right in pieces:
                merges.append((-scores[number], pieces[left], pieces[right], left, right))
    merges.sort()
    prefix = bool(fields.get("tokenizer.ggml.add_space_prefix", True))
    replace: dict[str, Any] = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    restore: dict[str, Any] = {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
    before = [{"type": "Prepend", "prepend": _SPACE}] if prefix else []
    after = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*before, replace]},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": [restore, {"type": "ByteFallback"}, {"type": "Fuse"}, *after]},
        "model": _bpe(
            vocabulary,
            [[left, right] for _, _, _, left, right in merges],
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        ),
    }


def _bpe(vocabulary: dict[str, int], merges: list[list[str]], **changes: Any) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        **changes,
        "vocab": vocabulary,
        "merges": merges,
    }


def _special(fields: dict[str, Any], name: str, tokens: list[str]) -> str | None:
    number = fields.get(f"tokenizer.ggml.{name}_token_id")
    if number is None:
        return None
    if not isinstance(number, int) or not 0 <= number < len(tokens):
        raise GgufError(f"tokenizer.ggml.{name}_token_id: {number!r} is no token of the vocabulary")
    return tokens[number]


def _added(tokens: list[str], kinds: list[int], special: dict[str, str | None]) -> list[dict[str, Any]]:
    """Tokens that are found in a text before it is cut into words."""
    named = set(special.values())
    return [
        {
            "id": number,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind != _USER_DEFINED,
        }
        for number, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if token and (kind in (_CONTROL, _USER_DEFINED) or token in named)
    ]


def _template(vocabulary: dict[str, int], bos: str | None, eos: str | None) -> dict[str, Any] | None:
    """What stands before and after a text."""
    if bos is None and eos is None:
        return None

    def around(letter: str, type_id: int) -> list[dict[str, Any]]:
        text = {"Sequence": {"id": letter, "type_id": type_id}}
        before = [{"SpecialToken": {"id": bos, "type_id": type_id}}] if bos else []
        after = [{"SpecialToken": {"id": eos, "type_id": type_id}}] if eos else []
        return [*before, text, *after]

    return {
        "type": "TemplateProcessing",
        "single": around("A", 0),
        "pair": [*around("A", 0), *around("B", 1)],
        "special_tokens": {
            token: {"id": token, "ids": [vocabulary[token]], "tokens": [token]} for token in (bos, eos) if token
        },
    }


def _config(fields: dict[str, Any], special: dict[str, str | None]) -> dict[str, Any]:
    named = {
        "bos_token": special["bos"],
        "eos_token": special["eos"],
        "unk_token": special["unknown"],
        "pad_token": special["padding"],
        "chat_template": fields.get("tokenizer.chat_template"),
    }
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **{name: value for name, value in named.items() if value is not None},
    }
