"""A plan that is remembered is the one that would be made."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from api import remembered_plans
from slim_core.config import BUILTIN_MODELS, LoraConfig, OptimizerConfig, ScheduleConfig, TrainConfig
from slim_core.planning import Chunking, Workload, default_calibration, plan_with_lessons

CAP = 1 << 30
TRAIN = TrainConfig(sequence_length=4_096, batch_size=2, steps=100, packing="packed")
WORKLOAD = Workload(BUILTIN_MODELS["performer-tiny"], TRAIN)


@pytest.mark.parametrize(
    "optimizer",
    [
        OptimizerConfig(learning_rate=3e-4, weight_decay=0.5, beta1=0.5, beta2=0.7, epsilon=1e-3),
        OptimizerConfig(name="adafactor", learning_rate=1e-2),
        OptimizerConfig(name="sgd", momentum=0.0),
        OptimizerConfig(name="sgd", momentum=0.5),
    ],
)
def test_what_a_sweep_varies_changes_no_plan(optimizer: OptimizerConfig) -> None:
    calibration = default_calibration()
    known = remembered_plans.calibration_of(calibration.to_json())
    varied = replace(TRAIN, optimizer=optimizer, schedule=ScheduleConfig("constant", 7), seed=9)
    workload = replace(WORKLOAD, train=varied)
    assert remembered_plans.plan(workload, CAP, known) == plan_with_lessons(workload, CAP, calibration)


@pytest.mark.parametrize(
    "change",
    [
        {"precision": "bfloat16"},
        {"lora": LoraConfig()},
        {"sequence_length": 2_048},
        {"batch_size": 3},
        {"dropout": 0.1},
        {"optimizer": OptimizerConfig(name="adafactor")},
        {"optimizer": OptimizerConfig(name="sgd")},
    ],
)
def test_what_a_plan_depends_on_is_another_plan(change: dict[str, Any]) -> None:
    """Also where the other one is remembered already."""
    calibration = default_calibration()
    known = remembered_plans.calibration_of(calibration.to_json())
    first = remembered_plans.plan(WORKLOAD, CAP, known)
    workload = replace(WORKLOAD, train=replace(TRAIN, **change))
    plan = remembered_plans.plan(workload, CAP, known)
    assert plan == plan_with_lessons(workload, CAP, calibration) != first


def test_plans_of_a_sweep_are_one_and_others_are_not() -> None:
    calibration = default_calibration()
    known = remembered_plans.calibration_of(calibration.to_json())
    first = remembered_plans.plan(WORKLOAD, CAP, known)
    again = replace(WORKLOAD, train=replace(TRAIN, seed=1))
    assert remembered_plans.plan(again, CAP, remembered_plans.calibration_of(calibration.to_json())) is first
    slower = remembered_plans.calibration_of(replace(calibration, time_factor=2.0).to_json())
    others = [
        remembered_plans.plan(replace(WORKLOAD, train=replace(TRAIN, steps=200)), CAP, known),
        remembered_plans.plan(WORKLOAD, CAP + 1_000_000, known),
        remembered_plans.plan(WORKLOAD, CAP, known, Chunking(512)),
        remembered_plans.plan(WORKLOAD, CAP, slower),
    ]
    assert all(other != first for other in others)
