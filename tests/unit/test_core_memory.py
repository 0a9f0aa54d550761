"""The meter, the cap and the memory model, each in a process that is started like a trainer."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from slim_core.config import LoraConfig, ModelConfig, OptimizerConfig, TrainConfig
from slim_core.layers import softmax
from slim_core.layers.documents import positions_in_documents
from slim_core.layers.dropout import Dropout
from slim_core.memory import is_out_of_memory
from slim_core.model import Documents, LanguageModel
from slim_core.optim import make_optimizer, optimizer_tensors
from slim_core.planning import Chunking, Workload, default_calibration, plan_job
from slim_core.planning.memory_model import DOUBLE, optimizer_bytes, state_bytes, update_bytes
from slim_core.planning.shapes import num_frozen, num_trained
from slim_core.planning.sites import (
    FLOAT,
    MOST_SCORE_KEYS,
    SCORE_KEYS,
    SCORE_QUERIES,
    number_bytes,
    saved_in_blocks,
    saved_sites,
    score_block,
)
from slim_core.tensor_heap import library_path
from slim_core.weights.lora import add_adapters
from tests.unit.core_support import small_config, write_text
from worker.environment import trainer_environment

ROOT = Path(__file__).resolve().parents[2]
MIB = 2**20
NO_CAP = 1 << 50

PRELUDE = """
import json, resource, sys
import torch
from slim_core.calibrate import warm_up
from slim_core.memory import CpuMeter, is_out_of_memory, private_bytes

MIB = 2**20
arguments = json.loads(sys.argv[1])
torch.set_num_threads(1)
warm_up(torch.device("cpu"))
"""


def child(program: str, **arguments: Any) -> Any:
    """What a program of its own prints as JSON."""
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + program, json.dumps(arguments)],
        cwd=ROOT,
        env=trainer_environment(threads=1) | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


METER = """
import numpy as np

meter = CpuMeter()
start = meter.peak_bytes()
meter.keep_within(start)
tensor = torch.ones(200 * MIB // 4)
del tensor
found = {"start": start, "peak": meter.peak_bytes(), "now": private_bytes(), "again": meter.peak_bytes()}
fresh = CpuMeter()
found["fresh"] = fresh.peak_bytes()
mapped = np.memmap(arguments["path"], np.uint8, mode="r")
total = int(mapped[::4096].sum())
fresh.forget_files()
other = torch.ones(20 * MIB // 4)
found["beside_a_mapped_file"] = fresh.peak_bytes()
print(json.dumps(found))
"""


def test_the_meter_sees_what_comes_and_goes_between_two_readings(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * (100 * MIB))
    found = child(METER, path=str(path))
    assert found["now"] < found["start"] + 20 * MIB
    assert 199 * MIB <= found["peak"] - found["start"] <= 210 * MIB
    assert found["again"] == found["peak"]
    assert found["fresh"] < found["start"] + 20 * MIB
    # 100 MB of a mapped file are resident there, and are not this process's own.
    assert 19 * MIB <= found["beside_a_mapped_file"] - found["start"] <= 40 * MIB


CAP = """
meter = CpuMeter()
cap = meter.peak_bytes() + 100 * MIB
meter.enforce_cap(cap)
fits = torch.ones(60 * MIB // 4)
del fits
refused, filled = [], 0

def attempt(call):
    global filled
    try:
        call()
    except Exception as error:
        filled = max(filled, private_bytes())
        refused.append(is_out_of_memory(error))

def fill(size):
    held = []
    while True:
        held.append(torch.ones(size // 4))

attempt(lambda: torch.ones(140 * MIB // 4))
attempt(lambda: fill(1 * MIB))
attempt(lambda: fill(8 * MIB))
attempt(lambda: bytearray(300 * MIB))
attempt(lambda: torch.ones(2) + torch.ones(3))
attempt(lambda: torch.ones(2).view(3))
attempt(lambda: open("/nowhere"))
attempt(lambda: 1 / 0)
print(json.dumps({"cap": cap, "peak": meter.peak_bytes(), "filled": filled, "refused": refused}))
"""


def test_the_cap_refuses_what_would_exceed_it() -> None:
    """Large blocks and small ones: refused as out of memory, and at no time more held than allowed."""
    result = child(CAP)
    assert result["refused"] == [True] * 4 + [False] * 4
    assert result["filled"] <= result["cap"]
    assert result["filled"] >= result["cap"] - 10 * MIB  # what is allowed can be had
    # The meter is an upper bound: pages of the libraries that were read for the first time count once.
    assert result["filled"] <= result["peak"] <= result["cap"] + 20 * MIB


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 16777216 bytes."),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 16777216 bytes."),
        RuntimeError("std::bad_alloc"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        RuntimeError("could not create a primitive"),  # all that oneDNN says of it
    ],
)
def test_every_library_s_word_for_it_is_known(error: Exception) -> None:
    assert is_out_of_memory(error)


TRAIN = """
from pathlib import Path
from slim_core.config import ModelConfig, TrainConfig
from slim_core.data.dataset import Windows
from slim_core.data.prepare import make_tokens
from slim_core.model import LanguageModel
from slim_core.planning import Plan
from slim_core.train import StepMetrics, TrainingRun

runtime = private_bytes()
meter = CpuMeter()
config = TrainConfig.from_json(arguments["train"])
model = LanguageModel(ModelConfig.from_json(arguments["model"])).initialize(0)
data = Windows(make_tokens(Path(arguments["text"])), config.sequence_length, seed=0)
run = TrainingRun(
    model, config, Plan.from_json(arguments["plan"]), data, data, Path(arguments["text"]).parent / "checkpoints", meter
)
for report in run.reports():
    pass
print(json.dumps({"runtime": runtime, "peak": meter.peak_bytes()}))
"""


def training(length: int, batch_size: int, **options: Any) -> TrainConfig:
    """A short run with an evaluation and a checkpoint."""
    return TrainConfig(
        sequence_length=length, batch_size=batch_size, steps=2, evaluate_every=2, evaluate_sequences=1, **options
    )


def measured(model: ModelConfig, train: TrainConfig, chunking: Chunking, text: Path) -> tuple[int, int]:
    """Peak of a run, and the prediction."""

    def planned(runtime_bytes: int) -> Any:
        calibration = replace(default_calibration(), runtime_bytes=runtime_bytes)
        return plan_job(Workload(model, train), NO_CAP, calibration, chunking)

    result = child(TRAIN, train=train.to_json(), model=model.to_json(), plan=planned(0).to_json(), text=str(text))
    return result["peak"], planned(result["runtime"]).predicted_peak_bytes


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.mark.slow
def test_the_peak_does_not_grow_with_the_sequence(text: Path) -> None:
    """A set of states is 34 KiB here: one that stays behind for each of 512 chunks would be 17 MiB."""
    model = ModelConfig(num_layers=2, model_width=64, num_heads=2, mlp_width=128)
    peaks = [measured(model, training(length, 1), Chunking(16, "reverse"), text)[0] for length in (1024, 8 * 1024)]
    assert peaks[1] <= peaks[0] + 2 * MIB


SAMPLE = [
    pytest.param(
        ModelConfig(num_layers=3, model_width=256, num_heads=4, mlp_width=1024), 800, Chunking(400, "keep"), id="plain"
    ),
    pytest.param(
        ModelConfig(num_layers=2, model_width=256, num_heads=4, mlp_width=512, feature_map="favor", norm="post"),
        700,
        Chunking(256, "reverse"),
        id="favor-post",
    ),
    pytest.param(
        ModelConfig(num_layers=1, model_width=256, num_heads=8, mlp_width=512, vocab_size=8000, feature_map="elu1"),
        600,
        Chunking(300, "reverse"),
        id="wide-vocabulary",
    ),
    pytest.param(
        ModelConfig(
            num_layers=2, model_width=384, num_heads=6, mlp_width=1536, feature_map="relu", output_projection=False
        ),
        900,
        Chunking(900, "keep"),
        id="unchunked",
    ),
    pytest.param(
        ModelConfig(num_layers=4, model_width=192, num_heads=2, mlp_width=384), 1500, Chunking(40, "keep"), id="states"
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize(("model", "length", "chunking"), SAMPLE)
def test_the_prediction_is_an_upper_bound_and_not_a_loose_one(
    model: ModelConfig, length: int, chunking: Chunking, text: Path
) -> None:
    peak, predicted = measured(model, training(length, 2), chunking, text)
    assert peak <= predicted
    assert peak >= 0.80 * predicted


LORA = LoraConfig(rank=8)
WIDE = ModelConfig(num_layers=3, model_width=384, num_heads=6, mlp_width=1536)
OPTIONS: dict[str, tuple[ModelConfig, dict[str, Any]]] = {
    "adafactor": (WIDE, {"optimizer": OptimizerConfig("adafactor")}),
    "sgd": (WIDE, {"optimizer": OptimizerConfig("sgd", momentum=0.0)}),
    "lora": (WIDE, {"lora": LORA}),
    "lora-everywhere": (
        WIDE,
        {"lora": LoraConfig(rank=16, targets=("query", "key_value", "output", "mlp_in", "mlp_out"))},
    ),
    "lora-vocabulary": (replace(WIDE, vocab_size=32_000), {"lora": LORA}),
    "bfloat16": (WIDE, {"precision": "bfloat16"}),
    "dropout": (WIDE, {"dropout": 0.1, "label_smoothing": 0.1}),
    "swiglu-rotary": (replace(WIDE, activation="swiglu", positions="rotary"), {}),
    "tied-bfloat16-lora": (replace(WIDE, tied_embeddings=True), {"precision": "bfloat16", "lora": LORA}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONS)
def test_the_prediction_covers_every_option(name: str, text: Path) -> None:
    model, options = OPTIONS[name]
    peak, predicted = measured(model, training(512, 1, **options), Chunking(256, "reverse"), text)
    assert peak <= predicted
    assert peak >= 0.80 * predicted


TINY_LLAMA = ModelConfig(
    num_layers=3,
    model_width=192,
    num_heads=6,
    num_kv_heads=2,
    mlp_width=512,
    vocab_size=2_000,
    attention="softmax",
    norm_type="rms",
    activation="swiglu",
    mlp_bias=False,
    positions="rotary",
    scaled_embeddings=False,
    tied_embeddings=True,
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("chunk_length", "options"),
    [(64, {}), (2048, {}), (512, {"lora": LORA})],
    ids=["64", "whole", "lora-512"],
)
def test_the_prediction_holds_for_softmax_attention(chunk_length: int, options: dict[str, Any], text: Path) -> None:
    """`make plan-accuracy` draws a hundred more."""
    peak, predicted = measured(TINY_LLAMA, training(2048, 1, **options), Chunking(chunk_length), text)
    assert 0.90 * predicted <= peak <= predicted


@pytest.mark.slow
def test_the_graph_of_many_layers_is_counted(text: Path) -> None:
    deep = replace(TINY_LLAMA, num_layers=40, model_width=256, num_heads=4, vocab_size=500)
    peak, predicted = measured(deep, training(256, 1, lora=LORA), Chunking(128), text)
    assert 0.90 * predicted <= peak <= predicted


def test_blocks_of_scores_are_those_of_the_layer() -> None:
    assert (SCORE_QUERIES, SCORE_KEYS, MOST_SCORE_KEYS) == (softmax.QUERIES, softmax.KEYS, softmax.MOST_KEYS)
    for length in (1, 16, 100, 128, 5000):
        tiles = softmax._Tiles(length, 0, None, torch.device("cpu"))
        assert score_block(length) == (tiles._num_queries, tiles._num_keys)


ADAPTED = {"lora": {"rank": 8, "targets": ["key_value", "mlp_out"]}}
SOFTMAX = {"attention": "softmax"}
GPT2 = {
    "attention": "softmax",
    "activation": "gelu_tanh",
    "attention_bias": True,
    "output_bias": True,
    "positions": "learned",
    "max_positions": 512,
    "scaled_embeddings": False,
    "tied_embeddings": True,
}
LLAMA = {
    "num_heads": 4,
    "num_kv_heads": 2,
    "norm_type": "rms",
    "activation": "swiglu",
    "mlp_bias": False,
    "positions": "rotary",
    "scaled_embeddings": False,
    "tied_embeddings": True,
}


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({}, {}),
        ({"activation": "swiglu"}, {}),
        ({"norm": "post"}, {}),
        ({"norm": "branch"}, {}),
        ({"output_projection": False}, {}),
        ({"positions": "rotary"}, {}),
        ({"num_layers": 1, "tied_embeddings": True}, {}),
        ({"feature_map": "elu1"}, {}),
        ({"feature_map": "relu"}, {}),
        ({"feature_map": "favor", "num_features": 96}, {}),
        ({"num_kv_heads": 1, "norm_type": "rms", "activation": "swiglu", "mlp_bias": False}, {}),
        (LLAMA | {"feature_map": "favor", "num_features": 96}, {}),
        (LLAMA | {"feature_map": "favor", "num_features": 96}, ADAPTED | {"precision": "bfloat16"}),
        (LLAMA | SOFTMAX, {}),
        (LLAMA | SOFTMAX, {"precision": "bfloat16"}),
        (LLAMA | SOFTMAX, {"packing": "packed", "dropout": 0.1}),
        (LLAMA | SOFTMAX, {"lora": {"rank": 8, "targets": ["query", "key_value"]}}),
        (LLAMA | SOFTMAX, {"lora": {"rank": 8, "targets": ["mlp_out"]}}),
        (LLAMA | SOFTMAX, {"lora": {"rank": 8, "targets": ["output"]}, "precision": "bfloat16"}),
        (GPT2, {}),
        (GPT2, {"lora": {"rank": 8, "targets": ["key_value"]}}),
        ({}, {"dropout": 0.1}),
        ({}, {"precision": "bfloat16"}),
        ({"feature_map": "favor", "num_features": 96, "positions": "rotary"}, {"precision": "bfloat16"}),
        ({"num_layers": 6}, ADAPTED),
        ({"num_layers": 6, "activation": "swiglu", "norm": "post"}, ADAPTED | {"precision": "bfloat16"}),
    ],
    ids=lambda fields: "-".join(map(str, fields)) or "plain",
)
def test_the_sites_are_what_autograd_saves(changes: dict[str, Any], options: dict[str, Any]) -> None:
    """Counted from outside: every tensor that forward saves for backward, once, weights apart."""
    config = ModelConfig.from_json(
        {"num_layers": 3, "model_width": 64, "num_heads": 2, "mlp_width": 160, "vocab_size": 50, **changes}
    )
    length = 512
    options = {"sequence_length": length, "batch_size": 1, "steps": 1, **options}
    train = TrainConfig.from_json(options)
    model = LanguageModel(config).initialize(0)
    if train.lora is not None:
        add_adapters(model, train.lora, seed=0)
    if train.precision == "bfloat16":
        model.compute_dtype = torch.bfloat16
    apart = {parameter.untyped_storage().data_ptr() for parameter in [*model.parameters(), *model.buffers()]}
    saved: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in apart:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    states = model.initial_states(1, length)
    if config.attention == "performer":
        states = [state.requires_grad_() for state in states]
    apart |= {state.untyped_storage().data_ptr() for state in states}
    tokens = torch.zeros(1, length, dtype=torch.int64)
    documents = None
    if train.packing == "packed":
        starts = torch.arange(length).remainder(100).eq(0).unsqueeze(0)
        documents = Documents(starts, positions_in_documents(starts).long())
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        dropout = Dropout(train.dropout, seed=0, step=0, first_row=0)
        chunk = model.forward_chunk(tokens, 0, states, documents=documents, dropout=dropout)
        loss = model.loss(chunk.hidden, tokens)
    found = sum(saved.values())
    sites = [*saved_sites(config, train), *saved_in_blocks(config, train)]
    width = config.model_width * number_bytes(train)
    final_norm = [(1, width), (1 if config.norm_type == "rms" else 2, 4)] if config.norm == "pre" else []
    grad_hidden = (1, width)
    counted = length * sum(count * width for count, width in [*sites, *final_norm, grad_hidden])
    assert loss.requires_grad
    assert found == pytest.approx(counted, rel=0.04)


UPDATE = """
from slim_core.config import ModelConfig, OptimizerConfig
from slim_core.model import LanguageModel
from slim_core.optim import make_optimizer
from slim_core.tensor_heap import tensor_heap

model = LanguageModel(ModelConfig.from_json(arguments["model"])).initialize(0)
optimizer = make_optimizer(model, OptimizerConfig(arguments["optimizer"]))
heap = tensor_heap()
before = heap.read(restart=True).live
optimizer.step()
print(json.dumps(heap.read().peak_live - before))
"""


@pytest.mark.skipif(library_path() is None, reason="built without a C compiler")
@pytest.mark.parametrize(
    ("changes", "optimizer"),
    [
        ({}, "adafactor"),
        ({"activation": "swiglu", "output_projection": False}, "adafactor"),
        ({"vocab_size": 6000, "num_layers": 1}, "adafactor"),
        ({"vocab_size": 9000, "num_layers": 1, "tied_embeddings": True}, "adafactor"),
        ({}, "adamw"),
        ({}, "sgd"),
    ],
)
def test_the_update_holds_what_is_counted(changes: dict[str, Any], optimizer: Any) -> None:
    model = ModelConfig.from_json({"num_layers": 2, "model_width": 256, "num_heads": 4, "mlp_width": 1024, **changes})
    train = TrainConfig(sequence_length=8, batch_size=1, steps=1, optimizer=OptimizerConfig(optimizer))
    held = child(UPDATE, model=model.to_json(), optimizer=optimizer)
    assert held == pytest.approx(update_bytes(model, train), rel=0.05, abs=MIB // 4)


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "sgd"])
@pytest.mark.parametrize("targets", [None, ("query",), ("key_value", "output", "mlp_in", "mlp_out")])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"activation": "swiglu", "tied_embeddings": True, "attention_bias": True},
        {"positions": "learned", "attention": "softmax", "output_bias": True, "activation": "gelu_tanh"},
        {"norm_type": "rms", "num_kv_heads": 1, "mlp_bias": False},
    ],
)
def test_the_planner_counts_weights_and_state(changes: dict[str, Any], targets: Any, optimizer: Any) -> None:
    config = small_config(**changes)
    lora = None if targets is None else LoraConfig(rank=3, targets=targets)
    train = training(8, 1, lora=lora, optimizer=OptimizerConfig(optimizer))
    model = LanguageModel(config)
    if lora is not None:
        add_adapters(model, lora, seed=0)
    state = optimizer_tensors(model, make_optimizer(model, train.optimizer))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert sum(parameter.numel() for parameter in trained) == num_trained(config, train)
    assert sum(parameter.numel() for parameter in model.parameters()) - num_trained(config, train) == num_frozen(
        config, train
    )
    assert sum(tensor.nbytes for tensor in state.values()) == optimizer_bytes(config, train)


def test_stride_keeps_about_two_roots_of_n() -> None:
    model = ModelConfig(num_layers=2, model_width=64, num_heads=2, mlp_width=128)
    state = model.num_layers * model.state_size
    keep, stride, reverse = (
        state_bytes(model, training(8, 1), policy, 100, 1) for policy in ("keep", "stride", "reverse")
    )
    assert keep - reverse == (FLOAT * 99 - DOUBLE) * state
    assert stride - reverse == (FLOAT * 10 + DOUBLE * 9) * state


def test_reverse_keeps_the_sets_before_documents_that_may_begin_anywhere() -> None:
    model = ModelConfig(num_layers=2, model_width=64, num_heads=2, mlp_width=128)
    packed = training(8, 1, packing="packed")
    more = state_bytes(model, packed, "reverse", 100, 1) - state_bytes(model, training(8, 1), "reverse", 100, 1)
    assert more == 98 * DOUBLE * model.num_layers * model.state_size
