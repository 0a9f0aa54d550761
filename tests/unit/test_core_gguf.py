"""GGUF files become model folders: weights as they were before llama.cpp's conversion, and the tokenizer."""

from __future__ import annotations

import contextlib
import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from gguf import GGUFWriter, quants
from gguf.constants import GGMLQuantizationType
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from tokenizers import Tokenizer

from slim_core.weights.folder import check_folder
from slim_core.weights.gguf_convert import convert
from slim_core.weights.gguf_file import GgufError, read_gguf
from slim_core.weights.gguf_tokenizer import tokenizer_files
from tests.unit.weights_support import GPT2, LLAMA, QWEN2, random_tensors

ROOT = Path(__file__).resolve().parents[2]
Array = npt.NDArray[Any]

LLAMA_BIG = {**LLAMA, "hidden_size": 64, "intermediate_size": 96, "rope_theta": 1e5, "head_dim": 16}
QWEN2_BIG = {**QWEN2, "hidden_size": 64, "intermediate_size": 96, "tie_word_embeddings": True}
GPT2_BIG = {**GPT2, "n_embd": 64, "n_inner": 128}
LLAMA_NAMES = {
    "embed_tokens": "token_embd",
    "lm_head": "output",
    "norm": "output_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
GPT2_NAMES = {
    "wte": "token_embd",
    "wpe": "position_embd",
    "ln_f": "output_norm",
    "ln_1": "attn_norm",
    "ln_2": "ffn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
TOKENS = ["<s>", "</s>", "<unk>", "Ġ", "a", "b", "c", "1", "2", "ab", "Ġab", "abc", "12", *"defghi"]


def permuted(weights: Array, heads: int) -> Array:
    """As llama.cpp's conversion stores queries and keys."""
    halves = weights.reshape(heads, 2, len(weights) // heads // 2, *weights.shape[1:])
    return halves.swapaxes(1, 2).reshape(weights.shape)


def write_gguf(
    path: Path,
    config: dict[str, Any],
    kind: str = "F32",
    fields: dict[str, Any] | None = None,
    more: dict[str, Array] | None = None,
) -> dict[str, Array]:
    """The model as llama.cpp's conversion writes it, and `more` tensors; returns the weights that it stands for, by
    names of the folder."""
    writer = GGUFWriter(path, config["model_type"])
    _write_fields(writer, config, fields or {})
    quantised = GGMLQuantizationType[kind]
    expected: dict[str, Array] = {}
    for name, tensor in random_tensors(config).items():
        array = tensor.numpy()
        stored = _stored(name, array, config)
        if array.ndim > 1 and kind != "F32":
            packed = quants.quantize(stored, quantised)
            writer.add_tensor(_gguf_name(name, config), packed, raw_dtype=quantised)
            array = _folder_order(name, quants.dequantize(packed, quantised), config)
        else:
            writer.add_tensor(_gguf_name(name, config), stored)
        expected[name] = array
    for name, array in (more or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


def _write_fields(writer: GGUFWriter, config: dict[str, Any], fields: dict[str, Any]) -> None:
    if config["model_type"] == "gpt2":
        writer.add_block_count(config["n_layer"])
        writer.add_embedding_length(config["n_embd"])
        writer.add_feed_forward_length(config["n_inner"])
        writer.add_head_count(config["n_head"])
        writer.add_context_length(config["n_positions"])
        writer.add_layer_norm_eps(1e-5)
    else:
        writer.add_block_count(config["num_hidden_layers"])
        writer.add_embedding_length(config["hidden_size"])
        writer.add_feed_forward_length(config["intermediate_size"])
        writer.add_head_count(config["num_attention_heads"])
        writer.add_head_count_kv(config["num_key_value_heads"])
        writer.add_context_length(config["max_position_embeddings"])
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
        writer.add_rope_freq_base(config.get("rope_theta", 1e4))
    for name, value in {**a_tokenizer(), **fields}.items():
        if isinstance(value, list):
            writer.add_array(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        elif isinstance(value, bool):
            writer.add_bool(name, value)
        else:
            writer.add_uint32(name, value)


def a_tokenizer(pre: str = "gpt-2") -> dict[str, Any]:
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": [3, 3, 3] + [1] * (len(TOKENS) - 3),
        "tokenizer.ggml.merges": ["a b", "Ġ ab", "ab c", "1 2"],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
    }


def _gguf_name(name: str, config: dict[str, Any]) -> str:
    names = GPT2_NAMES if config["model_type"] == "gpt2" else LLAMA_NAMES
    short, _, kind = name.removeprefix("transformer.").removeprefix("model.").rpartition(".")
    parts = short.split(".")
    if parts[0] in ("layers", "h"):
        return f"blk.{parts[1]}.{names['.'.join(parts[2:])]}.{kind}"
    return f"{names[short]}.{kind}"


def _heads(name: str, config: dict[str, Any]) -> int:
    if config["model_type"] != "llama" or ("q_proj" not in name and "k_proj" not in name):
        return 0
    return int(config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"])


def _is_turned(name: str, config: dict[str, Any]) -> bool:
    return config["model_type"] == "gpt2" and name.endswith(".weight") and ".c_" in name


def _stored(name: str, array: Array, config: dict[str, Any]) -> Array:
    if heads := _heads(name, config):
        return permuted(array, heads)
    return np.ascontiguousarray(array.T) if _is_turned(name, config) else array


def _folder_order(name: str, stored: Array, config: dict[str, Any]) -> Array:
    """The inverse of `_stored`."""
    if heads := _heads(name, config):
        order = permuted(np.arange(len(stored)), heads)
        array = np.empty_like(stored)
        array[order] = stored
        return array
    return stored.T if _is_turned(name, config) else stored


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q4_1", "BF16"])
@pytest.mark.parametrize("config", [LLAMA_BIG, QWEN2_BIG, GPT2_BIG], ids=["llama", "qwen2", "gpt2"])
def test_the_weights_are_those_before_the_conversion(config: dict[str, Any], kind: str, tmp_path: Path) -> None:
    expected = write_gguf(tmp_path / "model.gguf", config, kind)
    summary = convert(tmp_path / "model.gguf", tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == (torch.float16 if kind == "F16" and array.ndim > 1 else torch.float32)
        np.testing.assert_array_equal(found[name].float().numpy(), array.astype(np.float32), err_msg=name)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {name: written[name] for name in config if name != "sliding_window" and name in written} == {
        name: value for name, value in config.items() if name in written
    }
    assert (written["bos_token_id"], written["eos_token_id"]) == (0, 1)
    assert summary == check_folder(tmp_path / "out")


def test_a_head_that_is_a_copy_of_the_embeddings_is_tied(tmp_path: Path) -> None:
    embeddings = random_tensors(GPT2_BIG)["transformer.wte.weight"].numpy()
    write_gguf(tmp_path / "model.gguf", GPT2_BIG, more={"output.weight": embeddings})
    assert convert(tmp_path / "model.gguf", tmp_path / "out").config.tied_embeddings
    write_gguf(tmp_path / "model.gguf", GPT2_BIG, more={"output.weight": embeddings + 1})
    assert not convert(tmp_path / "model.gguf", tmp_path / "untied").config.tied_embeddings


@pytest.mark.parametrize(
    ("pre", "text", "tokens"),
    [
        ("gpt-2", "ab abc 12", ["ab", "Ġab", "c", "Ġ", "12"]),
        ("smollm", "ab 12", ["ab", "Ġ", "1", "2"]),
        ("llama-bpe", "abc 12", ["<s>", "abc", "Ġ", "12"]),
        ("qwen2", "ab12", ["ab", "1", "2"]),
    ],
)
def test_texts_are_cut_into_words_as_the_file_says(pre: str, text: str, tokens: list[str]) -> None:
    tokenizer, config = tokenizer_files(a_tokenizer(pre), "llama")
    encoded = Tokenizer.from_str(json.dumps(tokenizer)).encode(text)
    assert encoded.tokens == tokens
    assert (config["bos_token"], config["eos_token"]) == ("<s>", "</s>")


def test_control_tokens_are_one_token_in_any_text() -> None:
    tokenizer = Tokenizer.from_str(json.dumps(tokenizer_files(a_tokenizer(), "llama")[0]))
    assert tokenizer.encode("ab</s>c").ids == [9, 1, 6]
    assert tokenizer.decode([9, 1, 10], skip_special_tokens=False) == "ab</s> ab"


def test_sentencepiece_merges_the_best_score_first_and_knows_all_bytes() -> None:
    plain = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        "a",
        "b",
        "ab",
        "▁a",
        "▁ab",
        "ba",
    ]
    kinds = [2, 3, 3] + [6] * 256 + [1] * 7
    scores = [0.0] * 260 + [0.0, 0.0, -1.0, -2.0, -4.0, -3.0]
    fields = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": plain,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    tokenizer = Tokenizer.from_str(json.dumps(tokenizer_files(fields, "llama")[0]))
    assert tokenizer.encode("ab aba").tokens == ["<s>", "▁ab", "▁ab", "a"]
    assert tokenizer.encode("é", add_special_tokens=False).tokens == ["▁", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(tokenizer.encode("ab aé").ids) == "ab aé"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tokenizer.ggml.model": "bert"}, r"tokenizer\.ggml\.model: 'bert' is not supported"),
        ({"tokenizer.ggml.pre": "dbrx"}, r"tokenizer\.ggml\.pre: 'dbrx' is not supported; gpt-2, smollm"),
        ({"tokenizer.ggml.pre": "default"}, r"tokenizer\.ggml\.pre: 'default' is not supported"),
        ({"tokenizer.ggml.tokens": ["a", "a"]}, "'a' is there twice"),
        ({"tokenizer.ggml.merges": ["a x"]}, "'a' and 'x' make no token"),
        ({"tokenizer.ggml.bos_token_id": 99}, "99 is no token"),
        ({"llama.expert_count": 8}, r"llama\.expert_count: not supported"),
        ({"llama.rope.dimension_count": 8}, r"llama\.rope\.dimension_count: only 16"),
        ({"llama.rope.scaling.type": "yarn"}, r"llama\.rope\.scaling\.type: 'yarn' is not supported"),
    ],
)
def test_what_the_folder_could_not_hold_is_refused(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", LLAMA_BIG, fields=fields)
    with pytest.raises(GgufError, match=message):
        convert(tmp_path / "model.gguf", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


def llama3_factors(factor: float, high: float = 4.0) -> Array:
    """Of 8 pairs of channels at base 10^5, by the formula of Llama 3.1 as its authors wrote it."""
    factors = []
    for channel in range(0, 16, 2):
        wavelength = 2 * np.pi * 1e5 ** (channel / 16)
        if wavelength < 8192 / high:
            factors.append(1.0)
        elif wavelength > 8192:
            factors.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / (high - 1)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)


@pytest.mark.parametrize("high", [4.0, 8.0])
def test_scaled_positions_of_llama_3_are_known_by_their_factors(high: float, tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", LLAMA_BIG, more={"rope_freqs.weight": llama3_factors(32.0, high)})
    if high == 4.0:
        scaling = convert(tmp_path / "model.gguf", tmp_path / "out").config.rotary_scaling
        assert scaling is not None
        assert (scaling.name, scaling.factor, scaling.high_frequency_factor) == ("llama3", 32.0, 4.0)
    else:
        with pytest.raises(GgufError, match=r"rope_freqs\.weight: scaled otherwise"):
            convert(tmp_path / "model.gguf", tmp_path / "out")


@given(cut=st.integers(0, 4_000), change=st.integers(0, 255))
def test_a_damaged_header_is_refused_or_read(tmp_path_factory: pytest.TempPathFactory, cut: int, change: int) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    write_gguf(folder / "model.gguf", GPT2_BIG)
    content = bytearray((folder / "model.gguf").read_bytes())
    for damaged in (content[:cut], content[:cut] + bytes([change]) + content[cut + 1 :]):
        (folder / "damaged.gguf").write_bytes(damaged)
        with contextlib.suppress(GgufError):
            assert read_gguf(folder / "damaged.gguf", lambda _: True).fields


def run(memory: int, source: Path, out: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "slim_core.weights.gguf_import", "--memory", str(memory), str(source), str(out)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_program_converts_in_less_memory_than_the_weights_take(tmp_path: Path) -> None:
    big = {**LLAMA_BIG, "hidden_size": 1_024, "intermediate_size": 8_192, "head_dim": 256, "vocab_size": 19}
    write_gguf(tmp_path / "model.gguf", big)
    size = (tmp_path / "model.gguf").stat().st_size
    assert size > 200e6
    done = run(100_000_000, tmp_path / "model.gguf", tmp_path / "out")
    assert (done.returncode, done.stderr) == (0, "")
    assert check_folder(tmp_path / "out").bytes > 200e6


def test_the_program_says_why_not(tmp_path: Path) -> None:
    source = tmp_path / "model.gguf"
    source.write_bytes(b"GGML" + bytes(100))
    done = run(200_000_000, source, tmp_path / "out")
    assert (done.returncode, done.stderr) == (2, "no GGUF file\n")
    with source.open("wb") as file:  # a chat template of 300 MB
        name = b"tokenizer.chat_template"
        file.write(struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + struct.pack("<Q", len(name)) + name)
        file.write(struct.pack("<IQ", 8, 300_000_000))
        file.truncate(file.tell() + 300_000_000)
    assert run(200_000_000, source, tmp_path / "out").returncode == 3
    assert not (tmp_path / "out").exists()


def _gguf(path: Path, *tensors: tuple[str, list[int], int]) -> Path:
    """A header of float32 tensors (name, dimensions, offset), and 64 bytes behind it."""
    data = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), 0)
    for name, dimensions, offset in tensors:
        data += struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", len(dimensions))
        data += struct.pack(f"<{len(dimensions)}QIQ", *dimensions, 0, offset)
    path.write_bytes(data + bytes(-len(data) % 32 + 64))
    return path


def test_tensors_have_bytes_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    assert len(read_gguf(_gguf(path, ("a", [4, 2], 0), ("b", [8], 32)), lambda _: True).tensors) == 2
    for second, message in [
        (("b", [8], 28), "'a' and 'b' overlap"),
        (("b", [8, 0], 32), "a dimension is not at least 1"),
        (("b", [0], 32), "a dimension is not at least 1"),
        (("b", [2, 2, 2], 32), "3 dimensions; at most 2"),
    ]:
        with pytest.raises(GgufError, match=message):
            read_gguf(_gguf(path, ("a", [4, 2], 0), second), lambda _: True)


def test_scores_are_numbers() -> None:
    fields = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": ["a", "b", "ab"]}
    for score in ("1", [1.0], float("nan")):
        with pytest.raises(GgufError, match="scores: not all are numbers"):
            tokenizer_files({**fields, "tokenizer.ggml.scores": [0.0, 0.0, score]}, "llama")
