"""Section 2: the optimiser step of the paper's three configurations, beside the rate of the machine's sgemm.

    python -m benchmarks.bench_step [--quick]       prints the result as JSON

Legend: T tokens, C chunk length, N chunks.
"""

from __future__ import annotations

import functools
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.bench_measure import Contender, Record, interleave, num_threads, progress, run_section
from benchmarks.peer_models import (
    PUBLISHED_VOCABULARY,
    PublishedModel,
    adamw,
    autograd_step,
    checkpointed,
    checkpointed_step,
    performer_pytorch_model,
    published_step,
)
from slim_core.config import BUILTIN_MODELS, ModelConfig, OptimizerConfig
from slim_core.model import LanguageModel
from slim_core.optim import make_optimizer
from slim_core.planning import StatePolicy
from slim_core.planning.time_model import step_flops
from slim_core.step import slim_step

POLICIES: tuple[StatePolicy, ...] = ("reverse", "keep")
SGEMM_SIZE = 2_048
SGEMM = "sgemm"
FULL = "slimtune full"
PERFORMER_PYTORCH = "performer-pytorch"
PERFORMER_PYTORCH_LIMIT = 16_384
"""Largest T * H at which performer-pytorch's default of 266 features is run: at ENW it would need some 40 GB."""


@dataclass(frozen=True)
class Configuration:
    """One of the paper's, and the chunk lengths it was run at; B = 1."""

    name: str
    model: ModelConfig
    tokens: int
    chunk_lengths: tuple[int, ...]


CONFIGURATIONS = (
    Configuration("CT", BUILTIN_MODELS["performer-tiny"], 512, (128, 64)),
    Configuration("PTB", BUILTIN_MODELS["performer-ptb"], 1_024, (512, 256)),
    Configuration("ENW", BUILTIN_MODELS["performer-enwik8"], 4_096, (2_048, 1_366)),
)
_QUICK_MODEL = ModelConfig(num_layers=2, model_width=64, num_heads=1, mlp_width=256, output_projection=False)
QUICK_CONFIGURATIONS = tuple(Configuration(name, _QUICK_MODEL, 512, (256,)) for name in ("CT", "PTB", "ENW"))


def step_section(quick: bool) -> Record:
    """Seconds of each contender, a list of rounds, by configuration, and what the work of ours is."""
    return run_section("bench_step", quick=quick)


def measure(*, quick: bool) -> Record:
    """The section itself, in its process."""
    torch.set_num_threads(num_threads(quick=quick))
    size = 256 if quick else SGEMM_SIZE
    result: Record = {"sgemm_flops": 2.0 * size**3, "configurations": {}}
    for configuration in QUICK_CONFIGURATIONS if quick else CONFIGURATIONS:
        contenders, chunked = _ours(configuration)
        contenders = [_sgemm(size), *contenders, *_peers(configuration)]
        seconds = interleave(contenders, quick=quick)
        progress("step", configuration.name, seconds)
        result["configurations"][configuration.name] = {
            "model": configuration.model.to_json(),
            "tokens": configuration.tokens,
            "full_flops": step_flops(configuration.model, configuration.tokens, 1),
            "chunked": chunked,
            "seconds": seconds,
        }
    return result


def _sgemm(size: int) -> Contender:
    a, b, out = torch.randn(size, size), torch.randn(size, size), torch.empty(size, size)
    return Contender(SGEMM, lambda: torch.mm(a, b, out=out))


def _batch(tokens: int, vocabulary: int) -> tuple[Tensor, Tensor]:
    rows = torch.randint(vocabulary, (1, tokens + 1), generator=torch.Generator().manual_seed(0))
    return rows[:, :-1], rows[:, 1:]


def _ours(configuration: Configuration) -> tuple[list[Contender], Record]:
    """The full step and those in chunks; of the latter, C, policy and the bound on time over full: the ratio of work,
    (3 + (N - 1) / N rho) / 3."""
    model = LanguageModel(configuration.model).initialize(seed=0)
    optimizer = make_optimizer(model, OptimizerConfig())
    tokens, targets = _batch(configuration.tokens, configuration.model.vocab_size)

    def step(chunk_length: int, policy: StatePolicy) -> None:
        slim_step(
            model,
            tokens,
            targets,
            chunk_length=chunk_length,
            state_policy=policy,
            normaliser=configuration.tokens,
        )
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    contenders = [Contender(FULL, functools.partial(step, configuration.tokens, "keep"))]
    chunked = {}
    for chunk_length in configuration.chunk_lengths:
        num_chunks = math.ceil(configuration.tokens / chunk_length)
        work = [step_flops(configuration.model, configuration.tokens, n) for n in (1, num_chunks)]
        for policy in POLICIES:
            name = f"slimtune C = {chunk_length}, {policy}"
            contenders.append(Contender(name, functools.partial(step, chunk_length, policy)))
            chunked[name] = {"chunk_length": chunk_length, "policy": policy, "bound": work[1] / work[0]}
    return contenders, chunked


def _peers(configuration: Configuration) -> list[Contender]:
    config = configuration.model
    torch.manual_seed(0)
    published = PublishedModel(config)
    tokens, targets = _batch(configuration.tokens, PUBLISHED_VOCABULARY)
    optimizer = adamw(published)
    contenders = [
        Contender(
            f"published algorithm, {'full' if chunk_length == configuration.tokens else f'C = {chunk_length}'}",
            functools.partial(
                _optimiser_step,
                optimizer,
                functools.partial(published_step, published, tokens, targets, chunk_length),
            ),
        )
        for chunk_length in (configuration.tokens, *configuration.chunk_lengths)
    ]
    tokens, targets = _batch(configuration.tokens, config.vocab_size)
    models = {
        f"{PERFORMER_PYTORCH}, M = K": performer_pytorch_model(config, configuration.tokens, as_many_features=True)
    }
    if configuration.tokens * config.num_heads <= PERFORMER_PYTORCH_LIMIT:
        models[PERFORMER_PYTORCH] = performer_pytorch_model(config, configuration.tokens)
    ours = checkpointed(LanguageModel(config).initialize(seed=0))
    pairs: list[tuple[str, nn.Module, Callable[[], float]]] = [
        *((name, model, functools.partial(autograd_step, model, tokens, targets)) for name, model in models.items()),
        ("torch.utils.checkpoint", ours, functools.partial(checkpointed_step, ours, tokens, targets)),
    ]
    for name, model, gradients in pairs:
        contenders.append(Contender(name, functools.partial(_optimiser_step, adamw(model), gradients)))
    return contenders


def _optimiser_step(optimizer: torch.optim.AdamW, gradients: Callable[[], float]) -> None:
    gradients()
    optimizer.step()
    optimizer.zero_grad()


if __name__ == "__main__":
    print(json.dumps(measure(quick="--quick" in sys.argv)))
