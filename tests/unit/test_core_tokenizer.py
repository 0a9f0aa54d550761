"""Tokenizers, chat templates, and texts that are encoded in pieces."""

from __future__ import annotations

import json
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library
from tokenizers import models, normalizers, pre_tokenizers, trainers

from slim_core.data import encoding
from slim_core.data.chat import ChatTemplate, ChatTemplateError
from slim_core.data.encoding import EncodingCounts, cut
from slim_core.data.tokenizer import (
    DOCUMENT_BORDER,
    ByteTokenizer,
    TokenizerError,
    load_tokenizer,
    tokenizer_key,
)
from slim_core.data.train_tokenizer import train_tokenizer

TEXT = "\n\n".join(topics.values())
CONVERSATION = [
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "☃"},
    {"role": "assistant", "content": "a\nsnowman"},
    {"role": "user", "content": "thanks"},
]
EOS = {"eos_token": "<|endoftext|>"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of 600 tokens."""
    base = tmp_path_factory.mktemp("tokenizer")
    source = base / "topics.txt"
    source.write_text(TEXT[:100_000])
    return train_tokenizer(source, 600, base / "bpe")


def changed(folder: Path, out: Path, config: dict[str, Any] | None = None, template: str | None = None) -> Path:
    """The same vocabulary with another configuration."""
    out.mkdir()
    (out / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    if config is not None:
        (out / "tokenizer_config.json").write_text(json.dumps(config))
    if template is not None:
        (out / "chat_template.jinja").write_text(template)
    return out


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_bytes_are_reversible(text: str) -> None:
    assert ByteTokenizer().decode(ByteTokenizer().encode(text)) == text
    assert list(ByteTokenizer().encode_batch([text])[0]) == ByteTokenizer().encode(text)


def test_borders_and_broken_text_can_be_read() -> None:
    assert ByteTokenizer().decode([*b"a", DOCUMENT_BORDER, *b"b", 0xFF]) == "a\n---\nb\ufffd"


def test_a_trained_tokenizer_is_used_as_it_is(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    assert tokenizer.vocab_size == 600
    assert tokenizer.end_of_document == 0
    tokens = tokenizer.encode(TEXT[:5000] + "☃ 🙂 \x00")
    assert tokenizer.decode(tokens) == TEXT[:5000] + "☃ 🙂 \x00"
    assert len(tokens) < 3000
    assert tokenizer.encode_batch(["import x", ""]) == [tokenizer.encode("import x"), []]
    assert tokenizer.decode([*tokenizer.encode("a"), tokenizer.end_of_document]) == "a<|endoftext|>"
    assert tokenizer.id == tokenizer_key(folder)


def test_no_limit_of_a_file_cuts_a_text(folder: Path, tmp_path: Path) -> None:
    other = changed(folder, tmp_path / "limited")
    library = Library.from_file(str(other / "tokenizer.json"))
    library.enable_truncation(5)
    library.enable_padding(length=9)
    library.save(str(other / "tokenizer.json"))
    assert load_tokenizer(other).encode(TEXT[:900]) == load_tokenizer(folder).encode(TEXT[:900])


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        (None, "<|endoftext|>"),
        ({"eos_token": "<|im_end|>"}, "<|im_end|>"),
        ({"eos_token": {"content": "</s>", "special": True}}, "</s>"),
        ({"eos_token": None}, "<|endoftext|>"),
    ],
)
def test_what_ends_a_document(config: dict[str, Any] | None, wanted: str, folder: Path, tmp_path: Path) -> None:
    other = changed(folder, tmp_path / "other", config)
    library = Library.from_file(str(other / "tokenizer.json"))
    library.add_special_tokens(["</s>", "<|im_end|>"])
    library.save(str(other / "tokenizer.json"))
    tokenizer = load_tokenizer(other)
    assert tokenizer.decode([tokenizer.end_of_document]) == wanted
    assert tokenizer.vocab_size == 602


def test_a_key_changes_with_whatever_changes_tokens(folder: Path, tmp_path: Path) -> None:
    variants: list[tuple[dict[str, Any] | None, str | None]] = [
        (None, None),
        (EOS, None),
        (EOS, "{{ messages }}"),
        ({**EOS, "chat_template": "{{ messages[0] }}"}, None),
        ({**EOS, "bos_token": "<s>"}, None),
    ]
    keys = [tokenizer_key(changed(folder, tmp_path / str(n), *variant)) for n, variant in enumerate(variants)]
    assert len({*keys, tokenizer_key(None)}) == len(variants) + 1
    again = changed(folder, tmp_path / "again", {**EOS, "model_max_length": 5})
    assert tokenizer_key(again) == keys[1]
    assert load_tokenizer(None).id == tokenizer_key(None) == "bytes"


def test_a_folder_that_is_no_tokenizer(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(TokenizerError, match=r"there is no tokenizer\.json"):
        tokenizer_key(tmp_path)
    with pytest.raises(TokenizerError, match="eos_token '<end>' is not in the vocabulary"):
        load_tokenizer(changed(folder, tmp_path / "eos", {"eos_token": "<end>"}))
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json: is not an object"):
        load_tokenizer(changed(folder, tmp_path / "config", []))  # type: ignore[arg-type]
    bare = tmp_path / "bare"
    bare.mkdir()
    Library(models.BPE(vocab={"a": 0}, merges=[])).save(str(bare / "tokenizer.json"))
    with pytest.raises(TokenizerError, match="name one as eos_token"):
        load_tokenizer(bare)


def test_a_tokenizer_is_trained_the_same_way_again(folder: Path, tmp_path: Path) -> None:
    again = train_tokenizer(folder.parent / "topics.txt", 600, tmp_path / "again")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (again / name).read_bytes() == (folder / name).read_bytes()


def spaced(path: Path, *, prepend: bool) -> Path:
    """A vocabulary without bytes, of words that begin with a mark for the space before them, as SentencePiece makes."""
    library = Library(models.BPE(unk_token="<unk>"))
    if prepend:
        library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        library.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>", "</s>"], show_progress=False)
    library.train_from_iterator(TEXT[:50_000].split("\n"), trainer)
    path.mkdir()
    library.save(str(path / "tokenizer.json"))
    return path


@pytest.mark.parametrize("kind", ["byte-level", "metaspace", "prepend", "bytes"])
def test_pieces_have_the_tokens_of_the_whole(
    kind: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding, "PIECE_CHARACTERS", 1500)
    monkeypatch.setattr(encoding, "_SEARCHED_CHARACTERS", 300)
    paths = {"byte-level": folder, "bytes": None}
    path = paths[kind] if kind in paths else spaced(tmp_path / "it", prepend=kind == "prepend")
    tokenizer = load_tokenizer(path)
    text = TEXT[:60_000]
    counts = EncodingCounts()
    pieces = list(cut([text[at : at + 700] for at in range(0, len(text), 700)], tokenizer, counts))
    tokens = [token for piece in pieces for token in tokenizer.encode(piece)]
    assert 35 < len(pieces) < 60
    assert counts.inexact_cuts == 0
    assert tokens == tokenizer.encode(text)


def test_a_cut_that_changes_tokens_is_counted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A word without an end: one token of `the` for every three letters, wherever it is cut but between them."""
    monkeypatch.setattr(encoding, "PIECE_CHARACTERS", 1500)
    monkeypatch.setattr(encoding, "_MOST_TRIALS", 1)
    tokenizer = load_tokenizer(folder)
    counts = EncodingCounts()
    text = "the" * 2000 + " "
    pieces = list(cut([text[1:]], tokenizer, counts))
    assert "".join(pieces) == text[1:]
    assert counts.inexact_cuts == len(pieces) - 1 > 0


def parts_of(template: ChatTemplate, messages: list[dict[str, str]] = CONVERSATION) -> list[str]:
    """The text of a conversation; what has a loss in capitals."""
    return [text.upper() if loss else text for text, loss in template.segments(messages)]


def test_only_the_assistant_s_part_has_a_loss() -> None:
    head, answer, question, second, tail = ChatTemplate().segments(CONVERSATION)
    assert head == ("<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n", False)
    assert answer == ("4<|im_end|>\n", True)
    assert question == ("<|im_start|>user\n☃<|im_end|>\n<|im_start|>assistant\n", False)
    assert second == ("a\nsnowman<|im_end|>\n", True)
    assert tail == ("<|im_start|>user\nthanks<|im_end|>\n", False)
    assert "".join(text for text, _ in (head, answer, question, second, tail)) == ChatTemplate().render(CONVERSATION)


MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% elif m['role'] == 'assistant' %}{{ m['content'] + eos_token }}"
    "{% else %}{{ raise_exception('only users and assistants, no ' + m['role']) }}{% endif %}{% endfor %}"
)


def test_templates_of_other_kinds() -> None:
    mistral = ChatTemplate(MISTRAL, {"bos_token": "<s>", "eos_token": "</s>"})
    assert parts_of(mistral, CONVERSATION[:3]) == ["<s>[INST] 2 + 2? [/INST]", "4</S>", "[INST] ☃ [/INST]"]
    with pytest.raises(ChatTemplateError, match="only users and assistants, no system"):
        mistral.render([{"role": "system", "content": ""}])
    marked = ChatTemplate(
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}!{% endgeneration %}"
        "{% continue %}{% endif %}{{ m.content | tojson }}{% endfor %}"
    )
    assert parts_of(marked, CONVERSATION[:4]) == ['"2 + 2?"', "4!", '"☃"', "A\nSNOWMAN!"]


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}{{ m.content if loop.last or m.role == 'user' else '(gone)' }}{% endfor %}",
        "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}",
        "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}<think>{% endif %}",
    ],
)
def test_a_template_that_cannot_be_split_is_refused(source: str) -> None:
    with pytest.raises(ChatTemplateError, match="cannot be told"):
        ChatTemplate(source).segments(CONVERSATION)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages.__init__.__globals__ }}",
        "{{ self.__init__.__globals__ }}",
        "{% include '/etc/passwd' %}",
        "{% for i in range(10000000) %}{% endfor %}",
        "{{ missing.attribute }}",
        "{{ messages + 1 }}",
    ],
)
def test_a_template_runs_in_a_sandbox(source: str) -> None:
    with pytest.raises(ChatTemplateError):
        ChatTemplate(source).render(CONVERSATION)


def test_a_template_that_is_none_has_its_line() -> None:
    with pytest.raises(ChatTemplateError, match="the chat template is not one: line 2: "):
        ChatTemplate("\n{% if %}").render(CONVERSATION)


def test_where_a_template_comes_from(folder: Path, tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "default"}]
    configs: dict[str, dict[str, Any]] = {
        "one": {"chat_template": "one"},
        "several": {"chat_template": named},
        "none": {},
    }
    for name, config in configs.items():
        rendered = load_tokenizer(changed(folder, tmp_path / name, config)).chat_template.render(CONVERSATION)
        wanted = {"one": "one", "several": "default", "none": ChatTemplate().render(CONVERSATION)}
        assert rendered == wanted[name]
    file = changed(folder, tmp_path / "file", {**EOS, "chat_template": "config"}, "{{ eos_token }}")
    assert load_tokenizer(file).chat_template.render(CONVERSATION) == "<|endoftext|>"


def test_special_tokens_of_their_own_file_stand_in_for_those_of_the_config(folder: Path, tmp_path: Path) -> None:
    out = changed(folder, tmp_path / "map", {"bos_token": "b"})
    without = tokenizer_key(out)
    (out / "special_tokens_map.json").write_text(json.dumps({"bos_token": "c", "eos_token": {"content": "a"}}))
    tokenizer = load_tokenizer(out)
    assert tokenizer.decode([tokenizer.end_of_document]) == "a"
    assert tokenizer.id == tokenizer_key(changed(folder, tmp_path / "one", {"bos_token": "b", "eos_token": "a"}))
    assert tokenizer.id != without
    (out / "special_tokens_map.json").write_text("[]")
    with pytest.raises(TokenizerError, match=r"special_tokens_map\.json: is not an object"):
        load_tokenizer(out)
