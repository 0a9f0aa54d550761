"""Error of the whole gradient in float32 against the chunk length, for three ways to the entry states.

The reference is the ordinary step, one chunk, in float64. The states themselves are compared as well, where subtraction
has gone on longest: before the second chunk.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.paper_language import text
from benchmarks.paper_runs import write_json
from slim_core.config import ModelConfig
from slim_core.model import LanguageModel
from slim_core.planning import StatePolicy
from slim_core.step import slim_step

NAME = "gradients"
SEQUENCE_LENGTH = 8_192
SHORTEST_CHUNK = 16
SEED = 42
MODEL = ModelConfig(num_layers=2, model_width=256, num_heads=4, mlp_width=1_024, output_projection=False)
WAYS: tuple[tuple[str, StatePolicy, torch.dtype], ...] = (
    ("reverse, float64 states", "reverse", torch.float64),
    ("reverse, float32 states", "reverse", torch.float32),
    ("keep", "keep", torch.float64),
)
"""Label, policy and precision of the states. The published code is the second, the product the first and third."""


@contextmanager
def state_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Attention states in another precision, in every module that has taken the constant's value."""
    holders = [module for name, module in sys.modules.items() if name.startswith("slim_core") and _holds(module)]
    assert holders
    before = {module: module.STATE_DTYPE for module in holders}
    try:
        for module in holders:
            module.STATE_DTYPE = dtype  # type: ignore[attr-defined]
        yield
    finally:
        for module, value in before.items():
            module.STATE_DTYPE = value  # type: ignore[attr-defined]


def _holds(module: ModuleType) -> bool:
    return hasattr(module, "STATE_DTYPE")


def gradient(model: LanguageModel, tokens: Tensor, targets: Tensor, chunk_length: int, policy: StatePolicy) -> Tensor:
    """All parameters' gradients of the mean loss in one float64 vector."""
    model.zero_grad(set_to_none=True)
    slim_step(model, tokens, targets, chunk_length=chunk_length, state_policy=policy, normaliser=targets.numel())
    return torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None])


@contextmanager
def entry_states_of(model: LanguageModel, start: int) -> Iterator[dict[int, Tensor]]:
    """Layer -> state from which pass 2 computes the chunk that begins at position `start`, once a step has run."""
    seen: dict[int, Tensor] = {}

    def hook_of(layer: int) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_: nn.Module, inputs: Any, outputs: Any) -> None:
            if inputs[2].start == start:
                seen[layer] = outputs[1].detach()

        return hook

    handles = [block.register_forward_hook(hook_of(layer)) for layer, block in enumerate(model.blocks)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def relative_error(value: Tensor, reference: Tensor) -> float:
    """|value - reference| / |reference|, in the Euclidean norm."""
    return float((value - reference).norm() / reference.norm())


@torch.no_grad()
def states_after(model: LanguageModel, tokens: Tensor) -> Tensor:
    """All layers' states behind (1, C) tokens, in one vector."""
    return _vector(model.advance(tokens, 0, model.initial_states(*tokens.shape)))


def _vector(states: Iterable[Tensor]) -> Tensor:
    return torch.cat([state.flatten().double() for state in states])


def perform(folder: Path, sequence_length: int = SEQUENCE_LENGTH) -> None:
    """Measure every way at every chunk length, and write the result."""
    model = LanguageModel(MODEL).initialize(SEED)
    exact = copy.deepcopy(model).double()
    window = text()[None, : sequence_length + 1]
    tokens, targets = window[:, :-1], window[:, 1:]
    reference = gradient(exact, tokens, targets, sequence_length, "keep")
    chunk_lengths = [SHORTEST_CHUNK]
    while chunk_lengths[-1] * 2 <= sequence_length:
        chunk_lengths.append(chunk_lengths[-1] * 2)
    ways = []
    for label, policy, dtype in WAYS:
        errors: list[float] = []
        state_errors: list[float] = []
        with state_dtype(dtype):
            assert model.initial_states(1, 1)[0].dtype == dtype
            for chunk_length in chunk_lengths:
                with entry_states_of(model, chunk_length) as states:
                    errors.append(relative_error(gradient(model, tokens, targets, chunk_length, policy), reference))
                if chunk_length < sequence_length:
                    recovered = _vector(states[layer] for layer in sorted(states))
                    with state_dtype(torch.float64):
                        state_errors.append(relative_error(recovered, states_after(exact, tokens[:, :chunk_length])))
                print(f"{NAME}: {label}, C = {chunk_length:,}: {errors[-1]:.2e}", flush=True)
        ways.append({"label": label, "errors": errors, "state_errors": state_errors})
    result = {
        "name": NAME,
        "sequence_length": sequence_length,
        "chunk_lengths": chunk_lengths,
        "ways": ways,
    }
    write_json(folder / f"{NAME}.json", result)
