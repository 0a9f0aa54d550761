"""What this machine can do: the numbers that the planner needs, measured in a few seconds in a process of their own.

python -m slim_core.calibrate --threads 2        # one line of JSON, a `slim_core.planning.Calibration`
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from dataclasses import dataclass

import torch

from slim_core.config import ModelConfig, OptimizerConfig, Precision, TrainConfig
from slim_core.memory import make_meter, pick_device, private_bytes
from slim_core.model import LanguageModel
from slim_core.optim import make_optimizer
from slim_core.planning import Calibration, Workload
from slim_core.planning.memory_model import Schedule
from slim_core.planning.time_model import Work, step_work
from slim_core.step import slim_step

_WARM_UP_MODEL = ModelConfig(num_layers=1, model_width=64, num_heads=1, mlp_width=128)
_REPETITIONS = 5
_FEATURES = ("flops", "bytes", "calls")
_SWEEPS = 200


@dataclass(frozen=True)
class _Sample:
    """A training step that is timed."""

    model: ModelConfig
    tokens: int
    chunk_length: int
    precision: Precision = "float32"

    @property
    def workload(self) -> Workload:
        train = TrainConfig(sequence_length=self.tokens, batch_size=1, steps=1, precision=self.precision)
        return Workload(self.model, train)

    @property
    def schedule(self) -> Schedule:
        return Schedule(self.chunk_length, "reverse", micro_batch_size=1)


_MIDDLE = ModelConfig(num_layers=2, model_width=256, num_heads=4, mlp_width=1024)
_SAMPLES = (
    _Sample(_MIDDLE, tokens=1024, chunk_length=1024),  # mostly products
    _Sample(
        ModelConfig(num_layers=4, model_width=64, num_heads=1, mlp_width=256), 4096, 4096
    ),  # mostly what is between
    _Sample(ModelConfig(num_layers=1, model_width=512, num_heads=8, mlp_width=2048), 512, 128),  # mostly weights
    _Sample(_MIDDLE, tokens=256, chunk_length=16),  # mostly calls
)
_NARROW = _Sample(_MIDDLE, 1024, 1024, "bfloat16")


def warm_up(device: torch.device) -> None:
    """A training step of a minimal model: every library has made its first-use buffers when it returns."""
    _step_seconds(_Sample(_WARM_UP_MODEL, tokens=128, chunk_length=64), device, repetitions=1)


def calibrate(threads: int) -> Calibration:
    """Measure runtime memory, rates and overhead with `threads` threads. Call in a process that has done nothing
    else."""
    torch.set_num_threads(threads)
    device = pick_device()
    warm_up(device)
    runtime_bytes = private_bytes() if device.type == "cpu" else make_meter(device).peak_bytes()

    seconds = [_step_seconds(sample, device, _REPETITIONS) for sample in _SAMPLES]
    per_flop, per_byte, per_call = fit([step_work(s.workload, s.schedule) for s in _SAMPLES], seconds)
    narrow = step_work(_NARROW.workload, _NARROW.schedule)
    narrow_seconds = _step_seconds(_NARROW, device, _REPETITIONS) - narrow.bytes * per_byte - narrow.calls * per_call
    return Calibration(
        source=f"measured {time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())}, torch {torch.__version__}",
        device=device.type,
        threads=threads,
        runtime_bytes=runtime_bytes,
        flops_per_second=1 / per_flop,
        bfloat16_flops_per_second=narrow.flops / max(narrow_seconds, narrow.flops * per_flop / 16),
        bytes_per_second=1 / per_byte,
        overhead_seconds=per_call,
    )


def fit(works: list[Work], seconds: list[float]) -> tuple[float, float, float]:
    """Seconds per operation, per byte and per call, none below a thousandth of what its own samples allow, that fit
    best relative to each time: coordinate descent on the squares."""
    columns = [[getattr(work, name) / taken for work, taken in zip(works, seconds, strict=True)] for name in _FEATURES]
    least = [1e-3 / max(column) for column in columns]
    costs = [1 / (len(columns) * max(column)) for column in columns]
    for _ in range(_SWEEPS):
        for index, column in enumerate(columns):
            others = [
                sum(cost * value for j, (cost, value) in enumerate(zip(costs, row, strict=True)) if j != index)
                for row in zip(*columns, strict=True)
            ]
            best = sum(c * (1 - o) for c, o in zip(column, others, strict=True)) / sum(c * c for c in column)
            costs[index] = max(best, least[index])
    per_flop, per_byte, per_call = costs
    return per_flop, per_byte, per_call


def _step_seconds(sample: _Sample, device: torch.device, repetitions: int) -> float:
    """Median seconds of a training step, the first one not counted."""
    model = LanguageModel(sample.model).initialize(seed=0).to(device)
    model.compute_dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[sample.precision]
    optimizer = make_optimizer(model, OptimizerConfig())
    length = sample.tokens
    tokens = torch.arange(length).remainder(sample.model.vocab_size).unsqueeze(0).to(device)
    seconds = []
    for _ in range(repetitions + 1):
        started = time.perf_counter()
        slim_step(model, tokens, tokens, chunk_length=sample.chunk_length, state_policy="reverse", normaliser=length)
        torch.nn.utils.clip_grad_norm_(model.parameters(), math.inf)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


def main() -> None:
    """Print the calibration of this machine as one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, required=True)
    print(json.dumps(calibrate(parser.parse_args().threads).to_json()))  # this is a command


if __name__ == "__main__":
    main()
