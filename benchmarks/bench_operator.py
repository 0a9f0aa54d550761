"""Section 1: forward and backward of the attention operator against the number of positions.

python -m benchmarks.bench_operator [--quick]       prints the result as JSON
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.bench_measure import Contender, Record, interleave, num_threads, progress, run_section
from benchmarks.peers import OPERATORS

HEADS, WIDTH = 8, 64
"""H, and M = K; B = 1, float32."""
LENGTHS = (1_024, 2_048, 4_096, 8_192, 16_384, 32_768)
TARGET_LENGTH = 8_192
QUICK_LENGTHS = (128, 256)


def operator_section(quick: bool) -> Record:
    """Seconds of each contender, a list of rounds, by T; a contender is left out where a call would take minutes."""
    return run_section("bench_operator", quick=quick)


def measure(*, quick: bool) -> Record:
    """The section itself, in its process."""
    torch.set_num_threads(num_threads(quick=quick))
    seconds = {}
    for length in QUICK_LENGTHS if quick else LENGTHS:
        seconds[str(length)] = interleave(_contenders(length), quick=quick)
        progress("operator", length, seconds[str(length)])
    target_length = QUICK_LENGTHS[-1] if quick else TARGET_LENGTH
    return {"heads": HEADS, "width": WIDTH, "target_length": target_length, "seconds": seconds}


def _contenders(length: int) -> list[Contender]:
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(1, HEADS, length, WIDTH, generator=generator) for _ in range(4))
    inputs = q.square().requires_grad_(), k.square().requires_grad_(), v.requires_grad_()
    return [
        Contender(operator.name, functools.partial(_forward_backward, operator.function, inputs, grad))
        for operator in OPERATORS
        if length <= operator.longest
    ]


def _forward_backward(
    function: Callable[[Tensor, Tensor, Tensor], Tensor], inputs: tuple[Tensor, Tensor, Tensor], grad: Tensor
) -> None:
    torch.autograd.grad(function(*inputs), inputs, grad)


if __name__ == "__main__":
    print(json.dumps(measure(quick="--quick" in sys.argv)))
