"""A few optimiser steps of one method in a process of its own, measured as a trainer is (compare `probe.py`).

    python -m benchmarks.bench_child '{"method": "slim", "model": {...}, "tokens": 4096, "chunk_length": 512,
    "policy": "reverse", "steps": 3, "cap_bytes": 17179869184, "threads": 2}'

Methods: `slim` (one chunk is the full step) and `checkpoint` (per-layer, chunk_length ignored). Prints one line of
JSON: runtime_bytes (private memory before the model), peak_bytes, step_seconds (every step, the first too), and
out_of_memory, true where the cap refused an allocation.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.peer_models import checkpointed, checkpointed_step
from slim_core.calibrate import warm_up
from slim_core.config import ModelConfig, OptimizerConfig
from slim_core.memory import is_out_of_memory, make_meter, private_bytes
from slim_core.model import LanguageModel
from slim_core.optim import make_optimizer
from slim_core.step import slim_step


def main() -> None:
    """Run what the first argument describes."""
    spec = json.loads(sys.argv[1])
    torch.set_num_threads(spec["threads"])
    device = torch.device("cpu")
    warm_up(device)
    meter = make_meter(device)
    meter.enforce_cap(spec["cap_bytes"])
    runtime_bytes, seconds, out_of_memory = private_bytes(), [], False
    try:
        step = make_step(spec)
        for _ in range(spec["steps"]):
            started = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - started)
            meter.peak_bytes()
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        out_of_memory = True
    record = {"runtime_bytes": runtime_bytes, "peak_bytes": meter.peak_bytes(), "step_seconds": seconds}
    print(json.dumps({**record, "out_of_memory": out_of_memory}))


def make_step(spec: dict[str, Any]) -> Callable[[], None]:
    """An optimiser step over one sequence of random tokens."""
    config = ModelConfig.from_json(spec["model"])
    length = spec["tokens"]
    model = LanguageModel(config).initialize(seed=0)
    optimizer = make_optimizer(model, OptimizerConfig())
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(config.vocab_size, (1, length + 1), generator=generator, dtype=torch.int32)
    tokens, targets = rows[:, :-1], rows[:, 1:]
    if spec["method"] == "checkpoint":
        checkpointed(model)

    def step() -> None:
        if spec["method"] == "checkpoint":
            checkpointed_step(model, tokens.long(), targets.long())
        else:
            slim_step(
                model,
                tokens,
                targets,
                chunk_length=spec["chunk_length"],
                state_policy=spec["policy"],
                normaliser=length,
            )
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    return step


if __name__ == "__main__":
    main()
