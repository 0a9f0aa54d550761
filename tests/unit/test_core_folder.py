"""Model folders: what is accepted as which model, and what is refused, by name."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from slim_core.config import ModelConfig, RotaryScalingConfig
from slim_core.model import LanguageModel
from slim_core.weights.checkpoint import load_model
from slim_core.weights.folder import MAX_PROBLEMS, ModelFolderError, check_folder, read_config
from slim_core.weights.header import HeaderError, header_bytes, read_header
from slim_core.weights.layout import model_config, written_config
from slim_core.weights.tables import tensor_table
from tests.unit.core_support import a_model, small_config
from tests.unit.weights_support import (
    GPT2,
    LLAMA,
    MISTRAL,
    QWEN2,
    random_tensors,
    write_folder,
    write_index,
    write_shards,
)

ROOT = Path(__file__).resolve().parents[2]
FOREIGN = {"llama": LLAMA, "mistral": MISTRAL, "qwen2": QWEN2, "gpt2": GPT2}


@pytest.mark.parametrize(
    ("changes", "field", "value"),
    [
        ({"num_key_value_heads": None}, "num_kv_heads", None),
        ({"num_key_value_heads": 4}, "num_kv_heads", None),
        ({"num_key_value_heads": 1}, "num_kv_heads", 1),
        ({"head_dim": 4}, "num_heads", 4),
        ({"rope_theta": 500_000.0}, "rotary_base", 500_000.0),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "rope_theta": 1e4}, "rotary_base", 5e5),
        ({"rope_scaling": {"type": "linear", "factor": 4}}, "rotary_scaling", RotaryScalingConfig("linear", 4.0)),
        ({"tie_word_embeddings": True}, "tied_embeddings", True),
        ({"attention_bias": True}, "output_bias", True),
        ({"mlp_bias": True}, "mlp_bias", True),
        ({"attention_dropout": 0.5, "pretraining_tp": 2, "quantization_config": None}, "num_layers", 2),
    ],
)
def test_fields_of_llama(changes: dict[str, Any], field: str, value: object) -> None:
    assert getattr(model_config({**LLAMA, **changes}), field) == value


def test_biases_are_those_that_each_architecture_has() -> None:
    flags = {"attention_bias": True, "mlp_bias": True}
    found = {
        name: (config.attention_bias, config.output_bias, config.mlp_bias)
        for name, data in FOREIGN.items()
        for config in [model_config({**data, **flags})]
    }
    assert found == {
        "llama": (True, True, True),
        "mistral": (False, False, False),
        "qwen2": (True, False, False),
        "gpt2": (True, True, True),
    }


@pytest.mark.parametrize(
    ("data", "changes", "message"),
    [
        (LLAMA, {"model_type": "gemma"}, "model_type: 'gemma' is not supported; llama, mistral, qwen2, gpt2 are"),
        (LLAMA, {"hidden_act": "gelu"}, "hidden_act: 'gelu'"),
        (LLAMA, {"head_dim": 8}, "head_dim: 8"),
        (LLAMA, {"num_key_value_heads": 3}, "num_key_value_heads: 3 does not divide"),
        (LLAMA, {"num_attention_heads": 0}, "num_attention_heads: must be at least 1"),
        (LLAMA, {"hidden_size": "16"}, "hidden_size: must be of type int"),
        (LLAMA, {"hidden_size": True}, "hidden_size: must be of type int"),
        (LLAMA, {"rms_norm_eps": 1e999}, "rms_norm_eps: must be a finite number"),
        (LLAMA, {"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        (LLAMA, {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_scaling: rope_type 'yarn'"),
        (LLAMA, {"rope_parameters": {"full_attention": {}}}, "rope_parameters: other positions in some layers"),
        (LLAMA, {"rope_scaling": {"rope_type": "linear"}}, "rope_scaling: factor: missing"),
        (LLAMA, {"rope_scaling": {"rope_type": "linear", "factor": 0.5}}, "rope_scaling: factor: must be at least 1"),
        (LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor: 0.5"),
        (MISTRAL, {"sliding_window": 32}, "sliding_window: 32 of 64 positions"),
        (QWEN2, {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 1}, "sliding_window: 32"),
        (
            {name: value for name, value in QWEN2.items() if name != "num_hidden_layers"},
            {"use_sliding_window": True},
            "num_hidden_layers: missing",
        ),
        (QWEN2, {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 8}, "sliding_window: 8"),
        (GPT2, {"activation_function": "relu"}, "activation_function: 'relu'"),
        (GPT2, {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx: only false"),
        (GPT2, {"scale_attn_weights": False}, "scale_attn_weights: only true"),
        (GPT2, {"add_cross_attention": True}, "add_cross_attention: only false"),
    ],
)
def test_what_cannot_be_expressed_is_refused_by_name(
    data: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        model_config({**data, **changes})


@pytest.mark.parametrize(
    ("data", "changes"),
    [
        (MISTRAL, {"sliding_window": 64}),
        (QWEN2, {"use_sliding_window": False, "sliding_window": 32}),
        (QWEN2, {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 2}),
        (LLAMA, {"sliding_window": 8}),
    ],
)
def test_windows_that_no_layer_has_are_none(data: dict[str, Any], changes: dict[str, Any]) -> None:
    assert model_config({**data, **changes}).attention == "softmax"


def test_a_config_is_written_as_it_came_but_for_the_precision() -> None:
    data = {**LLAMA, "dtype": "bfloat16", "something": [1]}
    written = written_config(data, "float32")
    assert written == {**LLAMA, "something": [1], "torch_dtype": "float32"}
    assert model_config(written) == model_config(data)


OWN = {
    "favor": small_config("favor", attention_bias=True, tied_embeddings=True),
    "learned": small_config(positions="learned", norm="post", output_projection=False),
    "concatenated": small_config(positions="concatenated", norm="branch"),
    "gated": small_config(attention="gated"),
    **{name: model_config(data) for name, data in FOREIGN.items()},
}


@pytest.mark.parametrize("name", OWN)
def test_the_table_of_our_layout_is_the_model(name: str) -> None:
    state = LanguageModel(OWN[name]).state_dict()
    table = tensor_table("slimtune", OWN[name])
    assert {tensor.name: tensor.shape for tensor in table.values()} == {n: tuple(t.shape) for n, t in state.items()}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_table_covers_every_row_of_every_parameter_once(name: str) -> None:
    config = model_config(FOREIGN[name])
    rows: dict[str, list[int]] = {}
    for tensor in tensor_table(config_layout(name), config).values():
        outputs = tensor.shape[1] if tensor.transposed else tensor.shape[0]
        assert sum(part.count for part in tensor.parts) == outputs
        for part in tensor.parts:
            rows.setdefault(part.parameter, []).extend(range(part.first, part.first + part.count))
    state = LanguageModel(config).state_dict()
    assert {name: sorted(found) for name, found in rows.items()} == {n: list(range(len(t))) for n, t in state.items()}


def config_layout(name: str) -> Any:
    return "gpt2" if name == "gpt2" else "llama"


def test_a_folder_of_ours_is_summed_up(tmp_path: Path) -> None:
    model = a_model(OWN["favor"])
    save_file(dict(model.state_dict()), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(model.config.to_json()))
    summary = check_folder(tmp_path)
    assert (summary.config, summary.layout, summary.dtypes) == (model.config, "slimtune", ("F32",))
    assert (summary.tensors, summary.bytes) == (
        len(model.state_dict()),
        sum(tensor.nbytes for tensor in model.state_dict().values()),
    )


def test_llama_s_rows_are_where_they_belong(tmp_path: Path) -> None:
    tensors = write_folder(tmp_path, LLAMA)
    state = load_model(tmp_path).state_dict()
    layer = "model.layers.1"
    kv = torch.cat([tensors[f"{layer}.self_attn.k_proj.weight"], tensors[f"{layer}.self_attn.v_proj.weight"]])
    assert torch.equal(state["blocks.1.attention.key_value.weight"], kv)
    mlp = torch.cat([tensors[f"{layer}.mlp.gate_proj.weight"], tensors[f"{layer}.mlp.up_proj.weight"]])
    assert torch.equal(state["blocks.1.mlp_in.weight"], mlp)


def test_gpt2_s_matrices_are_turned_over(tmp_path: Path) -> None:
    tensors = write_folder(tmp_path, GPT2)
    state = load_model(tmp_path).state_dict()
    both = tensors["transformer.h.1.attn.c_attn.weight"].T
    assert torch.equal(state["blocks.1.attention.query.weight"], both[:16])
    assert torch.equal(state["blocks.1.attention.key_value.weight"], both[16:])
    assert torch.equal(state["blocks.0.mlp_out.weight"], tensors["transformer.h.0.mlp.c_proj.weight"].T)


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_shards_names_without_prefix_and_other_types_are_the_same_model(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    data = FOREIGN[name]
    plain = {name: tensor.to(dtype) for name, tensor in random_tensors(data).items()}
    bare = {name.removeprefix("model.").removeprefix("transformer."): tensor for name, tensor in plain.items()}
    constants = {"layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}
    if name == "gpt2":
        constants = {"h.0.attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.uint8), "h.1.attn.masked_bias": torch.ones(())}
    write_folder(tmp_path / "one", data, plain)
    write_folder(tmp_path / "two", data, bare | constants)
    summary = check_folder(tmp_path / "two")
    assert summary == check_folder(tmp_path / "one")
    assert summary.bytes == sum(tensor.nbytes for tensor in plain.values())
    one, two = load_model(tmp_path / "one").state_dict(), load_model(tmp_path / "two").state_dict()
    assert all(torch.equal(tensor, two[key]) and tensor.dtype == torch.float32 for key, tensor in one.items())


def test_shards_are_the_same_model(tmp_path: Path) -> None:
    write_shards(tmp_path / "shards", QWEN2)
    write_folder(tmp_path / "one", QWEN2)
    assert check_folder(tmp_path / "shards") == check_folder(tmp_path / "one")
    one, two = load_model(tmp_path / "one").state_dict(), load_model(tmp_path / "shards").state_dict()
    assert all(torch.equal(tensor, two[key]) for key, tensor in one.items())


def problems_of(folder: Path) -> list[str]:
    with pytest.raises(ModelFolderError) as caught:
        check_folder(folder)
    return caught.value.problems


def test_tied_embeddings_may_be_there_twice_if_they_are_equal(tmp_path: Path) -> None:
    data = {**LLAMA, "tie_word_embeddings": True}
    tensors = random_tensors(data)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    write_folder(tmp_path, data, tensors)
    assert check_folder(tmp_path).config.tied_embeddings
    tensors["lm_head.weight"][-1, -1] += 1
    write_folder(tmp_path, data, tensors)
    (problem,) = problems_of(tmp_path)
    assert problem.startswith("model.safetensors: 'lm_head.weight' differs from 'model.embed_tokens.weight'")


def test_every_wrong_tensor_is_named_with_what_was_expected(tmp_path: Path) -> None:
    tensors = random_tensors(LLAMA)
    del tensors["model.norm.weight"]
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(24, 15)
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(24, 16, dtype=torch.int64)
    tensors["model.layers.2.mlp.up_proj.weight"] = torch.zeros(24, 16)
    tensors["embed_tokens.weight"] = torch.zeros(19, 16)
    write_folder(tmp_path, LLAMA, tensors)
    assert sorted(problems_of(tmp_path)) == [
        "model.safetensors: 'model.embed_tokens.weight' is there twice, with and without its prefix",
        "model.safetensors: 'model.layers.0.mlp.up_proj.weight' has shape (24, 15), the model wants (24, 16)",
        "model.safetensors: 'model.layers.1.mlp.up_proj.weight' has type I64; F32, F16, BF16, F64 are supported",
        "model.safetensors: no tensor 'model.norm.weight', which has shape (16,)",
        "model.safetensors: unknown tensor 'model.layers.2.mlp.up_proj.weight'",
    ]


def test_only_the_first_problems_are_listed(tmp_path: Path) -> None:
    strange = {f"x{number}": torch.zeros(1) for number in range(50)}
    write_folder(tmp_path, LLAMA, random_tensors(LLAMA) | strange)
    problems = problems_of(tmp_path)
    assert len(problems) == MAX_PROBLEMS + 1
    assert problems[-1] == "... and 30 more"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder, _: write_index(folder, {}), "weight_map must be an object"),
        (lambda folder, _: write_index(folder, [1]), "weight_map must be an object"),
        (lambda folder, names: write_index(folder, {**names, "model.norm.weight": 3}), "weight_map must be an object"),
        (
            lambda folder, names: write_index(folder, {**names, "model.norm.weight": "../other/model.safetensors"}),
            "'../other/model.safetensors' is no name of a .safetensors file beside it",
        ),
        (
            lambda folder, names: write_index(folder, {**names, "model.norm.weight": "/etc/passwd"}),
            "'/etc/passwd' is no name",
        ),
        (
            lambda folder, names: (folder / names["model.norm.weight"]).unlink(),
            "missing, though model.safetensors.index.json names it",
        ),
        (
            lambda folder, names: write_index(folder, {**names, "x": names["model.norm.weight"]}),
            "'x' is said to be in",
        ),
        (
            lambda folder, names: write_index(folder, {k: v for k, v in names.items() if k != "model.norm.weight"}),
            "'model.norm.weight' is not in model.safetensors.index.json",
        ),
        (
            lambda folder, _: save_file(random_tensors(LLAMA), folder / "model-00001-of-00003.safetensors"),
            "is in model-00001-of-00003.safetensors as well",
        ),
        (lambda folder, _: (folder / "model.safetensors.index.json").unlink(), "model.safetensors: missing"),
    ],
)
def test_shards_that_do_not_belong_together_are_refused(
    damage: Callable[[Path, dict[str, str]], object], message: str, tmp_path: Path
) -> None:
    damage(tmp_path, write_shards(tmp_path, LLAMA))
    assert any(message in problem for problem in problems_of(tmp_path))


def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"[]", "must be a JSON object"),
        (b'{"a": NaN}', "NaN is no number of JSON"),
        (b'{"a": {}, "a": {}}', "'a' stands there twice"),
        (b"[" * 100_000, "too deeply nested"),
        (b'{"a": \xff}', "no JSON"),
        (b'{"a": ' + b"9" * 5_000 + b"}", "no JSON"),
        ({"a": entry(dtype="F4")}, "'a' has the unknown type 'F4'"),
        ({"a": entry(dtype=["F32"])}, "'a' has the unknown type"),
        ({"a": entry(shape=[-2])}, "'a' has no shape"),
        ({"a": entry(shape=[2.0])}, "'a' has no shape"),
        ({"a": entry(shape=[1 << 61, 1 << 61])}, "'a' has 8 bytes, its shape and type need"),
        ({"a": entry(offsets=[8, 0])}, "'a' has -8 bytes"),
        ({"a": entry(offsets=[0])}, "'a' must have two whole numbers"),
        ({"a": entry(offsets=[8, 16])}, "'a' does not follow"),
        ({"a": entry(), "b": entry(offsets=[4, 12])}, "'b' overlaps"),
        ({"a": entry(), "b": entry(offsets=[0, 8])}, "'b' overlaps"),
        ({"a": {**entry(), "x": 1}}, "'a' must have dtype, shape and data_offsets"),
        ({"a": entry(), "b": entry(offsets=[8, 16])}, "its tensors end at"),
        ({}, "its tensors end at"),
    ],
)
def test_a_header_that_lies_is_refused(header: bytes | dict[str, object], message: str, tmp_path: Path) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(HeaderError, match=message):
        read_header(path)


@given(st.binary(max_size=200))
def test_bytes_are_a_header_or_refused(content: bytes) -> None:
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        with contextlib.suppress(HeaderError):
            assert read_header(Path(file.name)) == {}


HUGE = """
import resource, sys
from pathlib import Path
from slim_core.weights.folder import ModelFolderError, check_folder
assert "torch" not in sys.modules and "numpy" not in sys.modules
resource.setrlimit(resource.RLIMIT_DATA, (60 << 20, 60 << 20))
for folder in sys.argv[1:]:
    try:
        check_folder(Path(folder))
    except ModelFolderError as error:
        print(error)
"""


def test_numbers_in_a_file_reserve_no_memory(tmp_path: Path) -> None:
    """In 60 MiB: a header of an exabyte, one of a gigabyte, a billion layers, a config of a gigabyte."""
    folders = [tmp_path / name for name in ("exabyte", "gigabyte", "layers", "config")]
    for folder in folders:
        write_folder(folder, LLAMA)
    for folder, length in zip(folders[:2], (1 << 60, 1 << 30), strict=True):
        with (folder / "model.safetensors").open("r+b") as file:
            file.write(length.to_bytes(8, "little"))
            file.truncate(2 << 30)  # a hole
    (folders[2] / "config.json").write_text(json.dumps({**LLAMA, "num_hidden_layers": 10**9}))
    with (folders[3] / "config.json").open("r+b") as file:
        file.truncate(1 << 30)
    done = subprocess.run(
        [sys.executable, "-c", HUGE, *map(str, folders)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "are fewer than its header" in lines[0]
    assert "a header of 1073741824 bytes; at most" in lines[1]
    assert lines[2] == "config.json: 1000000000 layers, but the files have only 21 tensors"
    assert "config.json: 1073741824 bytes; at most" in lines[3]


@pytest.mark.parametrize("text", ["", "[]", '{"num_layers": 1}', '{"model_type": 3}', '{"architectures": []}'])
def test_a_config_that_is_none_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelFolderError, match=r"^config\.json: "):
        read_config(tmp_path)


def test_headers_are_those_of_safetensors(tmp_path: Path) -> None:
    tensors: dict[str, Tensor] = {"b": torch.randn(3, 5), "a": torch.randn(4).half(), "c": torch.randn(2, 2)}
    save_file(tensors, tmp_path / "file", {"format": "pt"})
    header = read_header(tmp_path / "file")
    assert {name: stored.shape for name, stored in header.items()} == {n: tuple(t.shape) for n, t in tensors.items()}
    names, written = header_bytes({n: (s.dtype, s.shape) for n, s in header.items()}, {"format": "pt"})
    assert (tmp_path / "file").read_bytes().startswith(written)
    assert names == list(header)


def test_a_model_of_ours_reads_back_its_own_config(tmp_path: Path) -> None:
    config = ModelConfig(num_layers=1, model_width=16, num_heads=2, mlp_width=8)
    (tmp_path / "config.json").write_text(json.dumps(config.to_json()))
    assert read_config(tmp_path) == config
