"""Seconds of an optimiser step of long sequences, full and with SLiM, in turns in one process.

    python -m benchmarks.bench_pair [--quick]       prints the result as JSON

`heap_environment` lets the full step, whose tensors are large, reuse its memory: the trainer's, which gives it back,
slows the full step and would flatter SLiM.
"""

from __future__ import annotations

import json
import sys

import torch

from benchmarks.bench_child import make_step
from benchmarks.bench_measure import Contender, Record, interleave, num_threads, progress
from benchmarks.bench_memory import (
    CHUNK_LENGTH,
    FULL,
    MODEL,
    PAIR_LENGTH,
    QUICK_CHUNK_LENGTH,
    QUICK_LENGTHS,
    QUICK_MODEL,
)

POLICY = "reverse"


def measure(*, quick: bool) -> Record:
    """Rounds of both."""
    torch.set_num_threads(num_threads(quick=quick))
    model, tokens, chunk_length = (
        (QUICK_MODEL, QUICK_LENGTHS[0], QUICK_CHUNK_LENGTH) if quick else (MODEL, PAIR_LENGTH, CHUNK_LENGTH)
    )
    spec = {"method": "slim", "model": model.to_json(), "tokens": tokens, "policy": POLICY}
    contenders = [
        Contender(FULL, make_step({**spec, "chunk_length": tokens})),
        Contender(POLICY, make_step({**spec, "chunk_length": chunk_length})),
    ]
    seconds = interleave(contenders, quick=quick)
    progress("pair", tokens, seconds)
    return {"tokens": tokens, "chunk_length": chunk_length, "seconds": seconds}


if __name__ == "__main__":
    print(json.dumps(measure(quick="--quick" in sys.argv)))
