"""Base models over HTTP: what is kept, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from sqlalchemy import Engine, text
from starlette.testclient import TestClient

from service.settings import Settings
from service.storage import Storage
from slim_core.config import ModelConfig
from tests.integration.model_files import LLAMA, Files, llama, llama_tensors, safetensors, sharded, with_header
from tests.integration.test_api_datasets import files_below

FILES = llama()
EMBEDDING = "model.embed_tokens.weight"
QUERY = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return settings.model_copy(update={"max_model_bytes": 2**20})


def post(client: TestClient, files: Files | Sequence[tuple[str, bytes]], **fields: str) -> Any:
    items = files.items() if isinstance(files, dict) else files
    return client.post("/models", files=[("file", item) for item in items], data=fields)


def test_a_llama_is_kept_with_its_tokenizer_and_found(client: TestClient, storage: Storage) -> None:
    answer = post(client, FILES, name="tiny llama")
    assert answer.status_code == 201, answer.text
    model = answer.json()
    assert answer.headers["location"] == f"/models/{model['id']}"
    assert (model["name"], model["kind"], model["status"]) == ("tiny llama", "upload", "ready")
    assert (model["layout"], model["tokenizer"], model["error"], model["job"]) == ("llama", "own", None, None)
    config = ModelConfig.from_json(model["config"])
    assert (config.attention, config.num_kv_heads, config.activation) == ("softmax", 2, "swiglu")
    assert model["num_parameters"] == config.num_parameters == sum(tensor.size for tensor in llama_tensors().values())
    assert [file["name"] for file in model["files"]] == list(FILES)
    assert model["bytes"] == sum(map(len, FILES.values()))
    assert sorted(files_below(storage)) == sorted(f"models/{model['id']}/{name}" for name in FILES)
    assert storage.path(f"models/{model['id']}/model.safetensors").read_bytes() == FILES["model.safetensors"]
    assert client.get(f"/models/{model['id']}").json() == model
    assert client.get("/models").json()["data"][-1] == model
    assert client.delete(f"/models/{model['id']}").status_code == 204
    assert client.get(f"/models/{model['id']}").status_code == 404
    assert files_below(storage) == []


def test_shards_and_models_of_our_own_are_taken_as_well(client: TestClient) -> None:
    assert post(client, sharded(FILES)).status_code == 201
    config = ModelConfig(num_layers=1, model_width=8, num_heads=2, mlp_width=16, output_projection=False)
    block = {
        "attention_norm.weight": (8,), "attention_norm.bias": (8,), "attention.query.weight": (8, 8),
        "attention.key_value.weight": (16, 8), "mlp_norm.weight": (8,), "mlp_norm.bias": (8,),
        "mlp_in.weight": (16, 8), "mlp_in.bias": (16,), "mlp_out.weight": (8, 16), "mlp_out.bias": (8,),
    }  # fmt: skip
    shapes = {f"blocks.0.{name}": shape for name, shape in block.items()}
    shapes |= {"embedding.weight": (257, 8), "head.weight": (257, 8)}
    shapes |= {"final_norm.weight": (8,), "final_norm.bias": (8,)}
    tensors = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    own = {"config.json": json.dumps(config.to_json()).encode(), "model.safetensors": safetensors(tensors)}
    answer = post(client, own)
    assert answer.status_code == 201, answer.text
    assert (answer.json()["layout"], answer.json()["tokenizer"]) == ("slimtune", "bytes")
    assert answer.json()["config"] == config.to_json()


def changed_tensors(**changes: np.ndarray[Any, Any] | None) -> bytes:
    tensors = llama_tensors()
    for name, tensor in changes.items():
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    return safetensors(tensors)


def changed_config(**changes: Any) -> Files:
    return FILES | {"config.json": json.dumps(LLAMA | changes).encode()}


HUGE = {EMBEDDING: {"dtype": "F32", "shape": [41_943_040, 32], "data_offsets": [0, 5 << 30]}}
WEIGHTS = FILES["model.safetensors"]
HOSTILE: dict[str, tuple[Files | list[tuple[str, bytes]], str, str]] = {
    "wrong shape": (
        FILES | {"model.safetensors": changed_tensors(**{QUERY: np.zeros((32, 16), np.float32)})},
        "model.safetensors",
        f"{QUERY!r} has shape (32, 16), the model wants (32, 32)",
    ),
    "missing tensor": (
        FILES | {"model.safetensors": changed_tensors(**{QUERY: None})},
        "model.safetensors",
        f"no tensor {QUERY!r}",
    ),
    "extra tensor": (
        FILES | {"model.safetensors": changed_tensors(extra=np.zeros(3, np.float32))},
        "model.safetensors",
        "unknown tensor 'extra'",
    ),
    "truncated": (FILES | {"model.safetensors": WEIGHTS[:-1]}, "model.safetensors", "bytes long, but its tensors end"),
    "header of nonsense": (FILES | {"model.safetensors": b"\xff" * 100}, "model.safetensors", "than its header of"),
    "header that is no JSON": (
        FILES | {"model.safetensors": b"\x03" + bytes(7) + b"{]}"},
        "model.safetensors",
        "no JSON",
    ),
    "5 GB in a few bytes": (FILES | {"model.safetensors": with_header(HUGE)}, "model.safetensors", "long, but its"),
    "an empty file": (FILES | {"model.safetensors": b""}, "model.safetensors", "fewer than its header"),
    "two configs": ([*FILES.items(), ("config.json", b"{}")], "config.json", "sent twice"),
    "no config": ({"model.safetensors": WEIGHTS}, "config.json", "missing"),
    "no weights": ({"config.json": FILES["config.json"]}, "model.safetensors", "missing"),
    "a path": ([("../../config.json", FILES["config.json"])], "../../config.json", "not a file of a model"),
    "an absolute path": ([("/etc/model.safetensors", WEIGHTS)], "/etc/model.safetensors", "not a file of a model"),
    "a path to a .gguf": ([("..\\evil.gguf", b"GGUF")], "..\\evil.gguf", "not a file of a model"),
    "a pickle": (FILES | {"pytorch_model.bin": b"PK"}, "pytorch_model.bin", "not a file of a model"),
    "a shard elsewhere": (
        sharded(FILES) | {"model.safetensors.index.json": b'{"weight_map": {"x": "../../etc/passwd"}}'},
        "model.safetensors.index.json",
        "is no name of a .safetensors file",
    ),
    "a million layers": (changed_config(num_hidden_layers=10**6), "config.json", "1000000 layers"),
    "no integer": (changed_config(hidden_size=1e400), "config.json", ""),
    "another architecture": (changed_config(model_type="mamba"), "config.json", "'mamba' is not supported"),
    "no JSON": (FILES | {"config.json": b"{" * 100_000}, "config.json", ""),
    "a tokenizer that is none": (FILES | {"tokenizer.json": b'{"model": {}}'}, "tokenizer.json", ""),
    "a tokenizer of another model": (changed_config(vocab_size=256), "model.safetensors", EMBEDDING),
    "not a GGUF": ([("model.gguf", b"GGML" + bytes(100))], "model.gguf", "is not GGUF"),
    "a GGUF and more": ([("config.json", b"{}"), ("a.gguf", b"GGUF")], "model.gguf", "must come alone"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_what_is_no_model_is_refused_by_name_and_nothing_is_kept(
    shared_client: TestClient, shared_settings: Settings, case: str
) -> None:
    files, file, reason = HOSTILE[case]
    answer = post(shared_client, files)
    assert (answer.status_code, answer.json()["code"]) == (422, "model_invalid"), answer.text
    problem = answer.json()["problems"][0]
    assert problem["file"] == file
    assert reason in problem["reason"]
    assert len(answer.content) < 8_192
    assert files_below(Storage(shared_settings.data_dir)) == []
    assert [model["kind"] for model in shared_client.get("/models").json()["data"]] == ["built_in"] * 3


def test_a_vocabulary_that_the_model_lacks_is_named(shared_client: TestClient) -> None:
    config = LLAMA | {"vocab_size": 100}
    answer = post(shared_client, llama(config))
    assert answer.json()["problems"] == [
        {"file": "tokenizer.json", "reason": "has 257 tokens, the model has 100 of them"}
    ]


def test_the_first_20_problems_are_listed(shared_client: TestClient) -> None:
    tensors = {f"layers.{number}.{'x' * 2_000}": np.zeros(1, np.float32) for number in range(30)}
    answer = post(shared_client, FILES | {"model.safetensors": safetensors(tensors)})
    assert answer.status_code == 422
    assert 20 <= len(answer.json()["problems"]) <= 21
    assert all(len(problem["reason"]) <= 300 for problem in answer.json()["problems"])


def test_files_over_a_limit_are_refused_and_gone(client: TestClient, storage: Storage) -> None:
    for files in ({"config.json": b" " * (300 << 10)}, FILES | {"model.safetensors": bytes(2**20)}):
        answer = post(client, files)
        assert (answer.status_code, answer.json()["code"]) == (413, "upload_too_large")
    many = [(f"model-{number:05}-of-00300.safetensors", b"") for number in range(300)]
    answer = post(client, many)
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request")
    assert files_below(storage) == []


def test_a_form_without_files_is_refused(client: TestClient, storage: Storage) -> None:
    for content_type in ("multipart/form-data; boundary=x", "application/json"):
        answer = client.post("/models", content=b"--x--\r\n", headers={"content-type": content_type})
        assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request")
    assert list(storage.path("tmp").iterdir()) == []


def test_a_row_that_cannot_be_written_takes_the_files_with_it(
    client: TestClient, bind: Engine, storage: Storage
) -> None:
    with bind.begin() as connection:
        connection.execute(text("ALTER TABLE models ADD CHECK (name <> 'unwanted')"))
    assert post(client, FILES, name="unwanted").status_code == 500
    assert files_below(storage) == []
    assert post(client, FILES).status_code == 201
