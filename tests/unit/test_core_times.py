"""The time model: it counts the work that the code does, all of it, and the machine is measured in some seconds."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from slim_core.config import FEATURE_MAPS, LoraConfig, ModelConfig, OptimizerConfig, TrainConfig
from slim_core.model import LanguageModel
from slim_core.optim import make_optimizer
from slim_core.planning import Calibration, Workload, default_calibration
from slim_core.planning.costs import (
    PRODUCT_ROWS,
    PRODUCT_WIDTHS,
    SIZES,
    Costs,
    Overheads,
    Passes,
    Update,
    at_rows,
    at_size,
    at_width,
    uniform_costs,
)
from slim_core.planning.memory_model import Schedule
from slim_core.planning.plan import StatePolicy
from slim_core.planning.shapes import num_trained_tensors
from slim_core.planning.time_model import step_seconds
from slim_core.step import slim_step
from slim_core.weights.lora import add_adapters

ROOT = Path(__file__).resolve().parents[2]
MODEL = ModelConfig(num_layers=3, model_width=128, num_heads=2, mlp_width=256, vocab_size=500)
LLAMA = replace(
    MODEL,
    num_heads=4,
    num_kv_heads=2,
    norm_type="rms",
    activation="swiglu",
    mlp_bias=False,
    positions="rotary",
    scaled_embeddings=False,
    tied_embeddings=True,
)
SOFTMAX = replace(LLAMA, attention="softmax")
FREE_UPDATE = Update(0.0, 0.0, 0.0)
PRODUCTS_ONLY = replace(
    default_calibration(),
    float32=uniform_costs(flops_per_second=1.0, numbers_per_second=1e30, call_seconds=0.0),
    overheads=Overheads(0.0, 0.0, 0.0, 0.0),
    sgd=FREE_UPDATE,
)
"""A machine on which a step takes as many seconds as its matrix products have operations."""


def seconds(
    model: ModelConfig, calibration: Calibration, schedule: Schedule, batch_size: int = 1, **options: Any
) -> float:
    train = TrainConfig(**{"sequence_length": 512, "batch_size": batch_size, "steps": 1} | options)
    return step_seconds(Workload(model, train), schedule, calibration)


@pytest.mark.parametrize("lora", [None, ("query", "key_value"), ("mlp_in", "mlp_out"), ("output", "mlp_in")])
@pytest.mark.parametrize(
    ("described", "chunk_length", "policy"),
    [
        *((MODEL, *schedule) for schedule in ((512, "keep"), (128, "keep"), (64, "reverse"), (64, "stride"))),
        (LLAMA, 128, "reverse"),
        (SOFTMAX, 512, "prefix"),
        (SOFTMAX, 100, "prefix"),
    ],
)
def test_products_are_those_of_the_step(
    described: ModelConfig, chunk_length: int, policy: StatePolicy, lora: tuple[str, ...] | None
) -> None:
    """Operations as torch counts them, to 4 %: products with one column and copies of states are not in the model."""
    config = None if lora is None else LoraConfig(rank=8, targets=lora)
    model = LanguageModel(described).initialize(seed=0)
    if config is not None:
        add_adapters(model, config, seed=0)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    tokens = torch.zeros(2, 512, dtype=torch.int64)

    def added_in_place(total: Any, a: torch.Size, b: torch.Size, **_: Any) -> int:
        return 2 * a.numel() * b[-1]

    in_place = {torch.ops.aten.addmm_: added_in_place, torch.ops.aten.baddbmm_: added_in_place}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        slim_step(model, tokens, tokens, chunk_length=chunk_length, state_policy=policy, normaliser=1024)
    options: dict[str, Any] = {"lora": config, "optimizer": OptimizerConfig(name="sgd")}
    counted = seconds(described, PRODUCTS_ONLY, Schedule(chunk_length, policy, 2), batch_size=2, **options)
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.04)


@pytest.mark.parametrize("lora", [None, LoraConfig(targets=("query", "mlp_out"))])
@pytest.mark.parametrize("model", [MODEL, replace(MODEL, norm="post", attention_bias=True, tied_embeddings=True)])
def test_every_trained_tensor_is_updated(model: ModelConfig, lora: LoraConfig | None) -> None:
    built = LanguageModel(model)
    if lora is not None:
        add_adapters(built, lora, seed=0)
    groups = make_optimizer(built, OptimizerConfig()).param_groups
    train = TrainConfig(sequence_length=8, batch_size=1, steps=1, lora=lora)
    assert num_trained_tensors(model, train) == sum(len(group["params"]) for group in groups)


def _workloads() -> list[tuple[ModelConfig, dict[str, Any]]]:
    """Together they use everything that costs time."""
    models: list[ModelConfig] = [replace(MODEL, feature_map=name) for name in FEATURE_MAPS]
    models += [replace(MODEL, activation="swiglu", positions="rotary"), replace(MODEL, num_heads=4)]
    models += [
        LLAMA,
        SOFTMAX,
        replace(MODEL, attention="softmax"),
        replace(MODEL, activation="gelu_tanh", mlp_bias=False),
    ]
    trains: list[dict[str, Any]] = [{}, {"dropout": 0.1, "label_smoothing": 0.1}]
    trains += [{"lora": LoraConfig(rank=rank)} for rank in (8, 32)]
    return [(model, train) for model in models for train in trains]


@pytest.mark.parametrize("name", [field.name for field in fields(Costs)])
def test_every_cost_has_its_work(name: str) -> None:
    default = default_calibration()
    value = getattr(default.float32, name)
    dearer = replace(default.float32, **{name: _times(value, 2.0)})
    for schedule in (Schedule(512, "keep", 1), Schedule(64, "reverse", 1)):
        pairs = [
            [seconds(model, replace(default, float32=costs), schedule, **train) for costs in (default.float32, dearer)]
            for model, train in _workloads()
        ]
        assert all(after >= before for before, after in pairs)
        assert any(after > before for before, after in pairs)


def _times(value: Any, factor: float) -> Any:
    if isinstance(value, Passes):
        return Passes(_times(value.forward, factor), _times(value.backward, factor))
    return tuple(_times(each, factor) for each in value) if isinstance(value, tuple) else factor * value


def test_curves_and_tables_meet_what_was_measured() -> None:
    curve = (1.0, 3.0, 4.0, 8.0, 32.0)
    assert [at_size(curve, size) for size in SIZES] == list(curve)
    assert at_size(curve, 1) == 1.0
    assert at_size(curve, (SIZES[0] + SIZES[1]) / 2) == 2.0
    assert at_size(curve, 3 * SIZES[-1]) == 96.0
    table = tuple(tuple(float(rows * width**2) for width in PRODUCT_WIDTHS) for rows in PRODUCT_ROWS)
    for rows in (16, 100, 512, 4096, 100_000):
        for width in (16, 100, 1024, 5000):
            assert at_width(at_rows(table, rows), width) == pytest.approx(rows * width**2)


def test_longer_wider_and_deeper_takes_longer() -> None:
    least = seconds(MODEL, default_calibration(), Schedule(128, "reverse", 1))
    for more in (
        replace(MODEL, num_layers=4),
        replace(MODEL, model_width=192, num_heads=3),
        replace(MODEL, mlp_width=512),
        replace(MODEL, vocab_size=1000),
    ):
        assert seconds(more, default_calibration(), Schedule(128, "reverse", 1)) > least
    assert seconds(MODEL, default_calibration(), Schedule(128, "reverse", 1), sequence_length=1024) > 1.9 * least
    assert seconds(MODEL, default_calibration(), Schedule(16, "reverse", 1)) > least
    frozen = seconds(MODEL, PRODUCTS_ONLY, Schedule(128, "reverse", 1), lora=LoraConfig(rank=1))
    assert frozen < seconds(MODEL, PRODUCTS_ONLY, Schedule(128, "reverse", 1))


def test_masks_cost_whole_blocks() -> None:
    """A chunk that begins within a block of 64 positions draws one more."""
    model = replace(MODEL, positions="none")
    nothing = uniform_costs(1e30, 1e30, 0.0)
    curve = Passes(tuple(float(size) for size in SIZES), tuple(0.0 for _ in SIZES))
    free = replace(default_calibration(), overheads=Overheads(0, 0, 0, 0), adamw=FREE_UPDATE)
    masks_only = replace(free, float32=replace(nothing, dropout=curve))
    whole = seconds(model, masks_only, Schedule(512, "keep", 1), dropout=0.1)
    assert whole == pytest.approx((2 * 3 + 1) * 512 * 128)
    cut = seconds(model, masks_only, Schedule(32, "keep", 1), dropout=0.1)
    assert cut == pytest.approx((16 * 7 + 15 * 5) * 2 * 64 * 128)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_machine_is_measured(calibration: Calibration) -> None:
    assert calibration.device == "cpu"
    for costs in (calibration.float32, calibration.bfloat16):
        assert min(map(min, costs.product)) > 0
        assert costs.product[-1][-1] > costs.product[0][0]
        assert costs.gelu.forward[-1] > costs.gelu.forward[0] > 0
    least = seconds(MODEL, calibration, Schedule(512, "keep", 1))
    assert 0 < least < seconds(MODEL, default_calibration(), Schedule(512, "keep", 1)) * 3
