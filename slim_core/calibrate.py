"""What this machine can do: the numbers that the planner needs, measured in a few seconds in a process of their own.

python -m slim_core.calibrate --threads 2        # one line of JSON, a `slim_core.planning.Calibration`
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time

import torch

from slim_core.config import ModelConfig, OptimizerConfig
from slim_core.memory import make_meter, pick_device, private_bytes
from slim_core.model import LanguageModel
from slim_core.optim import make_optimizer
from slim_core.planning import Calibration
from slim_core.planning.time_model import step_flops
from slim_core.step import slim_step
from slim_core.tensor_heap import tensor_heap

_WARM_UP_MODEL = ModelConfig(num_layers=1, model_width=64, num_heads=1, mlp_width=128)
_RATE_MODEL = ModelConfig(num_layers=2, model_width=256, num_heads=4, mlp_width=1024)
_LONG_CHUNK = 512
_NARROW_CHUNK = 128
"""For bfloat16, which without instructions for it is some twenty times slower."""
_SHORT_CHUNK = 16
_SHORT_CHUNKS = 16
_REPETITIONS = 7


def warm_up(device: torch.device) -> None:
    """A training step of a minimal model: every library has made its first-use buffers when it returns, and the heap of
    tensors has given back what is idle."""
    _train_steps(_WARM_UP_MODEL, device, sequence_length=128, chunk_length=64, repetitions=1)
    if (heap := tensor_heap()) is not None:
        heap.give_back()


def calibrate(threads: int) -> Calibration:
    """Measure runtime memory, rates and overhead with `threads` threads. Call in a process that has done nothing
    else."""
    torch.set_num_threads(threads)
    device = pick_device()
    warm_up(device)
    runtime_bytes = private_bytes() if device.type == "cpu" else make_meter(device).peak_bytes()

    long_seconds = _train_steps(_RATE_MODEL, device, _LONG_CHUNK, _LONG_CHUNK, _REPETITIONS)
    rate = step_flops(_RATE_MODEL, tokens=_LONG_CHUNK, num_chunks=1) / long_seconds
    narrow_seconds = _train_steps(_RATE_MODEL, device, _NARROW_CHUNK, _NARROW_CHUNK, _REPETITIONS, torch.bfloat16)
    tokens = _SHORT_CHUNK * _SHORT_CHUNKS
    short_seconds = _train_steps(_RATE_MODEL, device, tokens, _SHORT_CHUNK, _REPETITIONS)
    computing = step_flops(_RATE_MODEL, tokens=tokens, num_chunks=_SHORT_CHUNKS) / rate
    overhead = max(0.0, short_seconds - computing) / (_SHORT_CHUNKS * _RATE_MODEL.num_layers)
    return Calibration(
        source=f"measured {time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())}, torch {torch.__version__}",
        device=device.type,
        threads=threads,
        runtime_bytes=runtime_bytes,
        flops_per_second=rate,
        bfloat16_flops_per_second=step_flops(_RATE_MODEL, tokens=_NARROW_CHUNK, num_chunks=1) / narrow_seconds,
        overhead_seconds=overhead,
    )


def _train_steps(
    config: ModelConfig,
    device: torch.device,
    sequence_length: int,
    chunk_length: int,
    repetitions: int,
    precision: torch.dtype = torch.float32,
) -> float:
    """Median seconds of a training step, the first one not counted."""
    model = LanguageModel(config).initialize(seed=0).to(device)
    model.compute_dtype = precision
    optimizer = make_optimizer(model, OptimizerConfig())
    tokens = torch.arange(sequence_length).remainder(config.vocab_size).unsqueeze(0).to(device)
    seconds = []
    for _ in range(repetitions + 1):
        started = time.perf_counter()
        slim_step(model, tokens, tokens, chunk_length=chunk_length, state_policy="reverse", normaliser=sequence_length)
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
