"""Plans that were made already: a sweep asks for the same one again and again.

A plan is a function of the workload, the cap, the calibration and the user's own chunking, and of nothing else, so
a remembered one is the one that would be made. What it does not depend on is left out of the comparison.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from slim_core.config import OptimizerConfig, ScheduleConfig
from slim_core.planning import Calibration, Chunking, Plan, Workload, plan_with_lessons

PLANS = 256
"""A few kilobytes each."""
CALIBRATIONS = 16
"""One for each shape of model that jobs of late have taught something about."""


@dataclass(frozen=True, slots=True)
class KnownCalibration:
    """A calibration, the same as another one if its JSON is."""

    sha256: str
    calibration: Calibration = field(compare=False)


def calibration_of(data: dict[str, Any]) -> KnownCalibration:
    """From its JSON. Raises ValueError."""
    return _calibration(json.dumps(data))


def plan(
    workload: Workload, memory_cap_bytes: int, calibration: KnownCalibration, chunking: Chunking | None = None
) -> Plan:
    """`plan_with_lessons`, remembered. Raises as that does."""
    return _plan(_what_matters(workload), memory_cap_bytes, calibration, chunking)


def _what_matters(workload: Workload) -> Workload:
    """The workload without what neither memory nor time depends on, which is what a sweep varies most."""
    train = workload.train
    optimizer = OptimizerConfig(name=train.optimizer.name, momentum=train.optimizer.momentum)
    return replace(workload, train=replace(train, optimizer=optimizer, schedule=ScheduleConfig(), seed=0))


@lru_cache(maxsize=CALIBRATIONS)
def _calibration(text: str) -> KnownCalibration:
    return KnownCalibration(hashlib.sha256(text.encode()).hexdigest(), Calibration.from_json(json.loads(text)))


@lru_cache(maxsize=PLANS)
def _plan(workload: Workload, cap: int, calibration: KnownCalibration, chunking: Chunking | None) -> Plan:
    return plan_with_lessons(workload, cap, calibration.calibration, chunking=chunking)
