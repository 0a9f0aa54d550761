"""The phase of matching: what FAVOR+ attention starts from, what the phase learns, and what it leaves alone."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from weakref import WeakSet

import pytest
import torch
from torch import Tensor

from slim_core.config import LoraConfig, MatchingConfig, ModelConfig, TrainConfig
from slim_core.data.dataset import Batch
from slim_core.layers.attention import Attention, Place, rotation
from slim_core.layers.performer import PerformerAttention
from slim_core.layers.softmax import SoftmaxAttention
from slim_core.matching import Matcher, matching_sequence
from slim_core.planning import Workload, default_calibration, plan_job
from slim_core.planning.memory_model import matching_bytes
from slim_core.tensor_heap import library_path
from slim_core.train import Checkpoint, Done, Matching, TrainingRun
from slim_core.weights.lora import adapters, add_adapters
from tests.unit.core_support import a_model, a_plan, text_windows
from tests.unit.test_core_memory import child
from tests.unit.test_core_train import NoMeter, assert_same_weights, weights

LLAMA = ModelConfig(
    num_layers=2,
    model_width=32,
    num_heads=2,
    num_kv_heads=1,
    mlp_width=48,
    feature_map="favor",
    num_features=32,
    norm_type="rms",
    activation="swiglu",
    mlp_bias=False,
    positions="rotary",
    scaled_embeddings=False,
)
TRAIN = TrainConfig(
    sequence_length=96,
    batch_size=1,
    steps=3,
    lora=LoraConfig(4, targets=("query", "key_value", "output", "mlp_in")),
    matching=MatchingConfig(steps=10, learning_rate=1e-2, sequence_length=48),
    packing="packed",
)


def a_student(config: ModelConfig = LLAMA, train: TrainConfig = TRAIN) -> Any:
    model = a_model(config)
    assert train.lora is not None
    add_adapters(model, train.lora, train.seed)
    return model


def softmax_over(own: Attention) -> SoftmaxAttention:
    teacher = SoftmaxAttention(replace(own.config, attention="softmax"), 0)
    teacher.load_state_dict({name: t for name, t in own.state_dict().items() if "features" not in name})
    return teacher


def outputs(attention: Attention, x: Tensor, place: Place) -> Tensor:
    out: Tensor = attention(x, attention.initial_state(x.shape[0], x.shape[1], x.dtype), place)[0]
    return out


def test_favor_is_softmax_with_an_error_of_one_over_the_root_of_its_features() -> None:
    """Same weights, same temperature, rotary positions before the features, grouped heads; nothing trained."""
    torch.manual_seed(0)
    x = torch.randn(4, 80, 32)
    place = Place(0, None, None, rotation(torch.arange(80), 16, x.dtype))

    def error(num_features: int) -> float:
        errors = []
        for seed in range(8):
            own = PerformerAttention(replace(LLAMA, num_features=num_features, feature_seed=seed), 0)
            with torch.no_grad():
                wanted = outputs(softmax_over(own), x, place)
                errors.append(((outputs(own, x, place) - wanted).norm() / wanted.norm()).item() ** 2)
        return math.sqrt(sum(errors) / len(errors))

    few, many = error(64), error(64 * 64)
    assert many < 0.1, (few, many)
    assert 1 / 12 < many / few < 1 / 5, (few, many)  # 1 / 8 = sqrt(64 / 4096)


@pytest.mark.parametrize("packing", ["packed", "continuous"])
def test_the_gradient_is_that_of_the_mean_relative_error(packing: Any, tmp_path: Path) -> None:
    """Against plain autograd over all layers at once."""
    train = replace(TRAIN, packing=packing)
    model = a_student(train=train)
    generator = torch.Generator().manual_seed(3)
    for layer in adapters(model).values():  # B is zero at first, and A then has no gradient
        if layer.out_features != LLAMA.mlp_in_width:
            layer.lora_B.data.normal_(std=0.05, generator=generator)
    tokens = torch.randint(LLAMA.vocab_size, (1, 40), generator=generator)
    starts = torch.zeros(1, 40, dtype=torch.bool)
    starts[0, 25] = True
    matcher = Matcher(model, train)
    got = matcher.add_gradient(Batch(tokens, tokens, starts if packing == "packed" else None))
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    positions = torch.arange(40)
    place = Place(0, None, None, rotation(positions, 16, torch.float32))
    if packing == "packed":
        positions = torch.cat([torch.arange(25), torch.arange(15)]).unsqueeze(0)
        place = Place(0, starts, positions, rotation(positions, 16, torch.float32))
    x = model.embedding(tokens)
    total = torch.zeros(())
    for block in model.blocks:
        plain = PerformerAttention(LLAMA, 0)
        plain.load_state_dict({n: t for n, t in block.attention.state_dict().items() if "lora" not in n})
        read = block.attention_norm(x)
        wanted = outputs(softmax_over(plain), read, place)
        error = (outputs(block.attention, read, place) - wanted).square().sum() / wanted.square().sum()
        total = total + error / LLAMA.num_layers
        x = x + wanted
        x = x + block.mlp_out(block.activate(block.mlp_in(block.mlp_norm(x))))
    model.zero_grad(set_to_none=True)
    total.backward()  # type: ignore[no-untyped-call]
    assert got == pytest.approx(total.item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        if ".attention." in name and "lora" in name:
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-6)


def test_matching_reduces_the_error_and_leaves_the_teacher_alone(tmp_path: Path) -> None:
    train = replace(TRAIN, matching=MatchingConfig(60, 1e-2, 96))
    data = text_windows(tmp_path, 96)
    model = a_student(train=train)
    matcher = Matcher(model, train)
    before = weights(model)

    def error() -> float:
        errors = [matcher.add_gradient(matching_sequence(data, number, train)) for number in range(100, 110)]
        matcher.optimizer.zero_grad(set_to_none=False)
        return sum(errors) / len(errors)

    at_first = error()
    for number in range(60):
        matcher.step(number, data)
    assert error() < 0.7 * at_first
    for name, tensor in model.state_dict().items():
        trained = ".attention." in name and ".lora_" in name
        assert torch.equal(tensor, before[name]) != trained, name


def test_no_graph_outlives_its_layer(tmp_path: Path) -> None:
    class Kept:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor

    kept: WeakSet[Kept] = WeakSet()
    most = 0

    def pack(tensor: Tensor) -> Kept:
        nonlocal most
        holder = Kept(tensor)
        kept.add(holder)
        most = max(most, len(kept))
        return holder

    between: list[int] = []
    model = a_student(replace(LLAMA, num_layers=5))
    matcher = Matcher(model, TRAIN)
    model.zero_grad(set_to_none=True)  # what the hooks give back has no gradient to add to
    batch = matching_sequence(text_windows(tmp_path, 96), 0, TRAIN)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda holder: holder.tensor):
        matcher.add_gradient(batch, lambda: between.append(len(kept)))
    assert between == [0] * 5
    assert most > 5


PHASE = """
from pathlib import Path
import torch
from slim_core.config import ModelConfig, TrainConfig
from slim_core.data.dataset import Batch
from slim_core.matching import Matcher
from slim_core.model import LanguageModel
from slim_core.optim import make_optimizer
from slim_core.tensor_heap import tensor_heap
from slim_core.weights.lora import add_adapters

torch.set_num_threads(1)
train = TrainConfig.from_json(arguments["train"])
model = LanguageModel(ModelConfig.from_json(arguments["model"])).initialize(0)
add_adapters(model, train.lora, 0)
make_optimizer(model, train.optimizer)
tokens = torch.zeros(1, train.matching.sequence_length, dtype=torch.int64)
heap = tensor_heap()
before = heap.read(restart=True).live
matcher = Matcher(model, train)
matcher.add_gradient(Batch(tokens, tokens, None))
print(json.dumps(heap.read().peak_live - before))
"""


@pytest.mark.skipif(library_path() is None, reason="built without a C compiler")
@pytest.mark.parametrize("layers", [1, 4])
def test_the_planner_counts_what_the_phase_holds(layers: int) -> None:
    model = replace(LLAMA, num_layers=layers, model_width=256, num_heads=4, num_features=128, mlp_width=700)
    train = replace(TRAIN, sequence_length=512, packing="continuous", matching=MatchingConfig(5, sequence_length=512))
    held = child(PHASE, model=model.to_json(), train=train.to_json())
    assert 0.6 * matching_bytes(model, train, 1) <= held <= matching_bytes(model, train, 1)


def test_a_plan_has_room_and_time_for_the_phase() -> None:
    # One layer's graph over 512 tokens is more than a step in chunks of 16 needs.
    model = replace(LLAMA, model_width=256, num_heads=4, num_features=128, mlp_width=700)
    train = replace(TRAIN, sequence_length=512, matching=None)
    without = plan_job(Workload(model, train), 1 << 50, default_calibration())
    matched = replace(train, matching=MatchingConfig(1000, sequence_length=512))
    plan = plan_job(Workload(model, matched), 1 << 50, default_calibration())
    assert plan.minimum_cap_bytes > without.minimum_cap_bytes
    assert plan.predicted_total_seconds > plan.predicted_step_seconds * train.steps
    with pytest.raises(ValueError, match="lora"):
        plan_job(Workload(model, replace(matched, lora=None)), 1 << 50, default_calibration())


class Runs:
    """Runs of the same job, each into its own folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data = text_windows(folder / "data", TRAIN.sequence_length)
        self.count = itertools.count()

    def run(self, stop_requested: Callable[[], bool] = lambda: False) -> TrainingRun:
        self.model = a_model(LLAMA)
        self.checkpoints = self.folder / f"run-{next(self.count)}"
        plan = a_plan(96)
        meter: Any = NoMeter()
        return TrainingRun(self.model, TRAIN, plan, self.data, self.data, self.checkpoints, meter, stop_requested)


@pytest.mark.parametrize("calls", [0, 9, 20, 22])
def test_a_run_goes_on_bit_for_bit_from_within_the_phase_and_from_its_end(calls: int, tmp_path: Path) -> None:
    """2 layers and 10 updates: 20 questions are of the phase, the 21st of the first step."""
    runs = Runs(tmp_path)
    whole = list(runs.run().reports())
    kinds = [type(report).__name__ for report in whole]
    assert kinds == [
        *["Matching"] * 10,
        "Checkpoint",
        "Evaluation",
        *["StepMetrics"] * 3,
        "Evaluation",
        "Checkpoint",
        "Done",
    ]
    wanted = weights(runs.model)

    asked = itertools.count()
    first = list(runs.run(lambda: next(asked) >= calls).reports())
    done = first[-1]
    assert isinstance(done, Done)
    assert done.reason == "stopped"
    checkpoint = [report for report in first if isinstance(report, Checkpoint)][-1]
    matched = json.loads((runs.checkpoints / checkpoint.name / "training.json").read_text())["matched"]
    assert matched == min(10, calls // 2)
    folder = runs.checkpoints / checkpoint.name
    second = runs.run()
    second.resume(folder)
    rest = list(second.reports())
    assert sum(isinstance(report, Matching) for report in [*first, *rest]) == 10
    assert_same_weights(runs.model, wanted)


def test_pieces_of_a_window_follow_each_other_and_padding_is_cut_off(tmp_path: Path) -> None:
    data = text_windows(tmp_path, 96)
    train = replace(TRAIN, packing="continuous")
    first, second, third = (matching_sequence(data, number, train).tokens for number in range(3))
    assert torch.equal(torch.cat([first, second], 1), data.batch(0, 1).tokens)
    assert torch.equal(third, data.batch(1, 1).tokens[:, :48])

    class Padded:
        def batch(self, _first: int, _count: int) -> Batch:
            targets = torch.full((1, 96), -100)
            targets[0, 3:10] = 5
            return Batch(torch.zeros(1, 96, dtype=torch.int32), targets, None)

    padded: Any = Padded()
    assert [matching_sequence(padded, number, train).tokens.shape[1] for number in range(2)] == [10, 10]
