"""Tokenizers: bytes, and any `tokenizer.json` of the tokenizers library. Free of torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from slim_core.config import BYTE_VOCABULARY
from slim_core.data.chat import ChatTemplate

BYTES_KEY = "bytes"
DOCUMENT_BORDER = BYTE_VOCABULARY - 1
"""Of the byte tokenizer: stands after the last byte of every document."""
_END_TOKENS = ("<|endoftext|>", "</s>", "<|im_end|>")
_SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")


class TokenizerError(ValueError):
    """A tokenizer's folder that cannot be used; the message says why."""


class Tokenizer(Protocol):
    """Text to tokens and back."""

    @property
    def id(self) -> str:
        """Its key: equal for tokenizers that make equal token folders."""
        ...

    @property
    def vocab_size(self) -> int:
        """Tokens are below it."""
        ...

    @property
    def end_of_document(self) -> int:
        """Token that ends every document."""
        ...

    @property
    def chat_template(self) -> ChatTemplate: ...

    def encode(self, text: str) -> list[int]:
        """Without anything that a tokenizer adds at the beginning or the end of its own accord."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[Sequence[int]]:
        """Each as `encode`, faster."""
        ...

    def decode(self, tokens: Iterable[int]) -> str: ...


class ByteTokenizer:
    """A token a byte of UTF-8, and one more that ends a document."""

    id = BYTES_KEY
    vocab_size = BYTE_VOCABULARY
    end_of_document = DOCUMENT_BORDER

    def __init__(self) -> None:
        self.chat_template = ChatTemplate()

    def encode(self, text: str) -> list[int]:
        """UTF-8 bytes, without a border."""
        return list(text.encode())

    def encode_batch(self, texts: Sequence[str]) -> list[Sequence[int]]:
        return [text.encode() for text in texts]

    def decode(self, tokens: Iterable[int]) -> str:
        """A border becomes a line of its own, broken UTF-8 the replacement character."""
        data = bytearray()
        for token in tokens:
            data += b"\n---\n" if token == DOCUMENT_BORDER else bytes([token])
        return data.decode("utf-8", "replace")


class FileTokenizer:
    """A `tokenizer.json`. Special tokens that a text spells out are taken for such, as the library does."""

    def __init__(self, folder: Path) -> None:
        """Raises TokenizerError."""
        import tokenizers  # noqa: PLC0415  # not where bytes are all there is

        self.id = tokenizer_key(folder)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        except MemoryError:
            raise
        except Exception as error:  # the library's is no other
            raise TokenizerError(f"tokenizer.json: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise TokenizerError("tokenizer.json: has no tokens")
        config = _read_config(folder)
        self.vocab_size = max(vocabulary.values()) + 1
        self.end_of_document = _end_of_document(vocabulary, config)
        self.chat_template = ChatTemplate(_template_source(folder, config), _special_tokens(config))

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[Sequence[int]]:
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, tokens: Iterable[int]) -> str:
        """Special tokens are written out."""
        return self._tokenizer.decode(list(tokens), skip_special_tokens=False)


def load_tokenizer(folder: Path | None) -> Tokenizer:
    """Of a folder with tokenizer.json and, maybe, tokenizer_config.json, special_tokens_map.json and
    chat_template.jinja; None is bytes.

    A document ends with the eos_token of the config or else of the map, else with the first of <|endoftext|>, </s> and
    <|im_end|> that the vocabulary has. Raises TokenizerError.
    """
    return ByteTokenizer() if folder is None else FileTokenizer(folder)


def tokenizer_key(folder: Path | None) -> str:
    """The `id` of the folder's tokenizer, without loading it. Raises TokenizerError.

    It changes with everything that changes the tokens of a document: tokenizer.json, chat template, special tokens.
    """
    if folder is None:
        return BYTES_KEY
    config = _read_config(folder)
    digest = hashlib.sha256()
    try:
        with (folder / "tokenizer.json").open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except FileNotFoundError as error:
        raise TokenizerError("there is no tokenizer.json") from error
    digest.update(json.dumps([_template_source(folder, config), _special_tokens(config)], sort_keys=True).encode())
    return digest.hexdigest()[:16]


def _read_config(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json, with the special tokens of special_tokens_map.json that it does not name."""
    config = _read_object(folder / "tokenizer_config.json")
    return config | _special_tokens(_read_object(folder / "special_tokens_map.json")) | _special_tokens(config)


def _read_object(path: Path) -> dict[str, Any]:
    """A file's, {} where there is none."""
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{path.name}: {error}") from error
    if not isinstance(value, dict):
        raise TokenizerError(f"{path.name}: is not an object")
    return value


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """By name; a token is a string or an object with its content."""
    found = {}
    for name in _SPECIAL_TOKENS:
        value = config.get(name)
        if isinstance(value, dict):
            value = value.get("content")
        if isinstance(value, str):
            found[name] = value
    return found


def _end_of_document(vocabulary: dict[str, int], config: dict[str, Any]) -> int:
    wanted = _special_tokens(config).get("eos_token")
    if wanted is not None:
        if wanted not in vocabulary:
            raise TokenizerError(f"eos_token {wanted!r} is not in the vocabulary")
        return vocabulary[wanted]
    for token in _END_TOKENS:
        if token in vocabulary:
            return vocabulary[token]
    raise TokenizerError(
        "no token ends a document: name one as eos_token in tokenizer_config.json (the vocabulary has none of "
        f"{', '.join(_END_TOKENS)})"
    )


def _template_source(folder: Path, config: dict[str, Any]) -> str:
    path = folder / "chat_template.jinja"
    if path.exists():
        try:
            return path.read_text()
        except UnicodeDecodeError as error:
            raise TokenizerError("chat_template.jinja: is not valid UTF-8") from error
    template = config.get("chat_template")
    if isinstance(template, list):  # several by name
        template = next(
            (t.get("template") for t in template if isinstance(t, dict) and t.get("name") == "default"), None
        )
    return template if isinstance(template, str) else ChatTemplate().source
