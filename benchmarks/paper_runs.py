"""One training run of the reproduction: resumable, a step at a time through `slim_step`, its curve in one JSON file.

Also what the parts share: where results lie, how a file is written whole or not at all, and the published code's
initial weights.

Legend: B batch, T positions of a sequence, C of a chunk.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slim_core.model import LanguageModel
from slim_core.step import count_targets, slim_step

WORK = Path(".slimtune") / "paper"
"""Where results lie unless told otherwise."""

SAVE_SECONDS = 60.0
"""Between two copies of weights and moments: what a kill can cost."""

BITS = 1 / math.log(2)
"""Bits in a nat."""


@dataclass(frozen=True)
class Run:
    """One curve: a model, its data and a chunk length that may change on the way."""

    name: str
    """Of its files in the work folder."""
    label: str
    """In tables and figures."""
    steps: int
    planned_steps: int
    """As many as the experiment has unless told otherwise; fewer `steps` are a shortened run."""
    make_model: Callable[[], LanguageModel]
    batch: Callable[[int], tuple[Tensor, Tensor]]
    """Step -> tokens and targets, (B, T); a function of the step alone, so that every variant sees the same data and a
    resumed run goes on with the next ones."""
    learning_rate: Callable[[int], float]
    chunk_length: Callable[[int], int]
    """Step -> C."""
    accuracy: Callable[[LanguageModel, Tensor, Tensor, int], float] | None = None
    """Model, tokens, targets, C -> a share, from the weights before the step's update."""
    accuracy_every: int = 0
    finish: Callable[[LanguageModel], dict[str, float]] = lambda _: {}
    """What is measured once, after the last step."""
    branch: tuple[str, int] | None = None
    """Name and step of a common beginning: the run that comes there first leaves its weights, others start from
    them."""


@dataclass
class _Progress:
    step: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    accuracies: list[tuple[int, float]] = field(default_factory=list)


def initialise_as_published(model: LanguageModel, seed: int) -> LanguageModel:
    """The initial distributions of the published code, which are torch's defaults. Returns the model.

    Linear layers: weights and biases uniform in +-1 / sqrt(inputs). Embeddings: standard normal, beside sines and
    cosines of the position and not multiplied by anything. Norms: 1 and 0.
    """
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.weight.data.normal_(generator=generator)
        elif isinstance(module, nn.Linear):
            bound = 1 / math.sqrt(module.in_features)
            module.weight.data.uniform_(-bound, bound, generator=generator)
            if module.bias is not None:
                module.bias.data.uniform_(-bound, bound, generator=generator)
    return model


def perform(run: Run, folder: Path) -> None:
    """Train to the end and write the result; from where a stopped process left it, if one did.

    Adam with betas 0.9 and 0.999 and epsilon 1e-8, no weight decay, no clipping: torch's defaults, as published.
    """
    model = run.make_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=run.learning_rate(0))
    progress = _restore(run, folder, model, optimizer)
    saved_at = time.monotonic()
    for step in range(progress.step, run.steps):
        began = time.monotonic()
        _train_step(run, step, model, optimizer, progress)
        progress.seconds += time.monotonic() - began
        if run.branch is not None and progress.step == run.branch[1]:
            _save(folder / f"{run.branch[0]}.pt", run, model, optimizer, progress)
        if time.monotonic() - saved_at > SAVE_SECONDS:
            _save(folder / f"{run.name}.pt", run, model, optimizer, progress)
            saved_at = time.monotonic()
            print(f"{run.name}: step {progress.step:,} of {run.steps:,}, loss {progress.losses[-1]:.3f}", flush=True)
    write_json(
        folder / f"{run.name}.json",
        {
            "name": run.name,
            "label": run.label,
            "steps": run.steps,
            "planned_steps": run.planned_steps,
            "step_seconds": progress.seconds / run.steps,
            "losses_nats": progress.losses,
            "accuracies": progress.accuracies,
            **run.finish(model),
        },
    )
    (folder / f"{run.name}.pt").unlink(missing_ok=True)


def _train_step(
    run: Run, step: int, model: LanguageModel, optimizer: torch.optim.Optimizer, progress: _Progress
) -> None:
    tokens, targets = run.batch(step)
    chunk_length = run.chunk_length(step)
    if run.accuracy is not None and (step + 1) % run.accuracy_every == 0:
        progress.accuracies.append((step + 1, run.accuracy(model, tokens, targets, chunk_length)))
    for group in optimizer.param_groups:
        group["lr"] = run.learning_rate(step)
    optimizer.zero_grad(set_to_none=False)  # the step adds to them in place
    loss = slim_step(
        model,
        tokens,
        targets,
        chunk_length=chunk_length,
        state_policy="reverse",
        normaliser=count_targets(targets),
    )
    optimizer.step()
    progress.losses.append(loss)
    progress.step = step + 1


def _save(path: Path, run: Run, model: LanguageModel, optimizer: torch.optim.Optimizer, progress: _Progress) -> None:
    state = {
        "steps": run.steps,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "progress": vars(progress),
    }
    partial = _partial(path)
    torch.save(state, partial)
    partial.replace(path)


def _restore(run: Run, folder: Path, model: LanguageModel, optimizer: torch.optim.Optimizer) -> _Progress:
    """The furthest state that an earlier process left for a run of as many steps, put into model and optimiser."""
    candidates = [folder / f"{run.name}.pt"]
    if run.branch is not None:
        candidates.append(folder / f"{run.branch[0]}.pt")
    for path in candidates:
        if not path.exists():
            continue
        state = torch.load(path, weights_only=True)
        if state["steps"] == run.steps:
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            return _Progress(**state["progress"])
    return _Progress()


def read_result(folder: Path, name: str) -> dict[str, Any] | None:
    """The result of a run that is complete; None if there is none."""
    path = folder / f"{name}.json"
    if not path.exists():
        return None
    result: dict[str, Any] = json.loads(path.read_text())
    return result


def write_json(path: Path, value: object, indent: int | None = None) -> None:
    """Whole or not at all."""
    partial = _partial(path)
    partial.write_text(json.dumps(value, indent=indent) + "\n")
    partial.replace(path)


def _partial(path: Path) -> Path:
    """Beside the file, and this process's own: two runs may write a common beginning at the same time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f"{path.name}.{os.getpid()}.partial")
