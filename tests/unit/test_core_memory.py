"""The meter, the cap and the memory model, each in a process that is started like a trainer."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from slim_core.config import ModelConfig
from slim_core.memory import is_out_of_memory
from slim_core.model import LanguageModel
from slim_core.planning import Calibration, Chunking, Workload, plan_job
from slim_core.planning.memory_model import DOUBLE, FLOAT, saved_sites, state_bytes
from tests.unit.core_support import write_text
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
tensor = torch.ones(200 * MIB // 4)
del tensor
found = {"start": start, "peak": meter.peak_bytes(), "now": private_bytes(), "again": meter.peak_bytes()}
fresh = CpuMeter()
found["fresh"] = fresh.peak_bytes()
mapped = np.memmap(arguments["path"], np.uint8, mode="r")
total = int(mapped[::4096].sum())
fresh = CpuMeter()
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
from slim_core.data.dataset import Windows, token_file
from slim_core.model import LanguageModel
from slim_core.planning import Plan
from slim_core.train import StepMetrics, TrainingRun

runtime = private_bytes()
meter = CpuMeter()
config = TrainConfig(
    sequence_length=arguments["sequence_length"], batch_size=arguments["batch_size"], steps=2, evaluate_every=2,
    evaluate_sequences=1,
)
model = LanguageModel(ModelConfig.from_json(arguments["model"])).initialize(0)
data = Windows(token_file(Path(arguments["text"])), config.sequence_length, seed=0)
run = TrainingRun(
    model, config, Plan.from_json(arguments["plan"]), data, data, Path(arguments["text"]).parent / "checkpoints", meter
)
for report in run.reports():
    pass
print(json.dumps({"runtime": runtime, "peak": meter.peak_bytes()}))
"""


def measured(workload: Workload, chunking: Chunking, text: Path) -> tuple[int, int]:
    """Peak of a short training run, evaluation and checkpoint included, and the prediction."""

    def planned(runtime_bytes: int) -> Any:
        calibration = Calibration("this process", "cpu", 1, runtime_bytes, 1e10, 1e-4)
        return plan_job(workload, NO_CAP, calibration, chunking)

    result = child(
        TRAIN,
        sequence_length=workload.sequence_length,
        batch_size=workload.batch_size,
        model=workload.model.to_json(),
        plan=planned(0).to_json(),
        text=str(text),
    )
    return result["peak"], planned(result["runtime"]).predicted_peak_bytes


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.mark.slow
def test_the_peak_does_not_grow_with_the_sequence(text: Path) -> None:
    model = ModelConfig(num_layers=2, model_width=64, num_heads=2, mlp_width=128)
    peaks = [measured(Workload(model, length, 1, 3), Chunking(64, "reverse"), text)[0] for length in (256, 16 * 256)]
    assert peaks[1] <= 1.03 * peaks[0]


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
    peak, predicted = measured(Workload(model, length, batch_size=2, steps=3), chunking, text)
    assert peak <= predicted
    assert peak >= 0.80 * predicted


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"activation": "swiglu"},
        {"norm": "post"},
        {"norm": "branch"},
        {"output_projection": False},
        {"positions": "rotary"},
        {"num_layers": 1, "tied_embeddings": True},
        {"feature_map": "elu1"},
        {"feature_map": "relu"},
        {"feature_map": "favor", "num_features": 96},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())) or "plain",
)
def test_the_sites_are_what_autograd_saves(changes: dict[str, Any]) -> None:
    """Counted from outside: every tensor that forward saves for backward, once, weights apart."""
    config = ModelConfig.from_json(
        {"num_layers": 3, "model_width": 64, "num_heads": 2, "mlp_width": 160, "vocab_size": 50, **changes}
    )
    length = 512
    model = LanguageModel(config).initialize(0)
    apart = {parameter.untyped_storage().data_ptr() for parameter in [*model.parameters(), *model.buffers()]}
    saved: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in apart:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    states = [state.requires_grad_() for state in model.initial_states(1)]
    apart |= {state.untyped_storage().data_ptr() for state in states}
    tokens = torch.zeros(1, length, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        chunk = model.forward_chunk(tokens, 0, states)
        loss = model.loss(chunk.hidden, tokens)
    found = sum(saved.values()) + chunk.hidden.nbytes  # which `slim_step` holds
    counted = FLOAT * length * sum(count * width for count, width in saved_sites(config))
    assert loss.requires_grad
    assert found == pytest.approx(counted, rel=0.04)


def test_stride_keeps_about_two_roots_of_n() -> None:
    model = ModelConfig(num_layers=2, model_width=64, num_heads=2, mlp_width=128)
    state = model.num_layers * model.state_size
    keep, stride, reverse = (state_bytes(model, policy, 100, 1) for policy in ("keep", "stride", "reverse"))
    assert keep - reverse == FLOAT * 99 * state
    assert stride - reverse == (FLOAT * 10 + DOUBLE * 10) * state
