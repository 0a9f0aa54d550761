"""What the tests of `slim_core` share: small models whose every weight matters, batches, plans and text."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor

from slim_core.config import ModelConfig
from slim_core.data.dataset import Windows
from slim_core.data.prepare import make_tokens
from slim_core.layers.dropout import NO_DROPOUT, Dropout
from slim_core.layers.head import IGNORED
from slim_core.model import LanguageModel
from slim_core.planning import MemoryBreakdown, Plan, StatePolicy
from slim_core.reference import reference_loss
from slim_core.step import count_targets, slim_step

torch.set_num_threads(1)  # the tests themselves run side by side

TINY = ModelConfig(num_layers=2, model_width=32, num_heads=2, mlp_width=48)
POLICIES: tuple[StatePolicy, ...] = ("keep", "reverse", "stride")


def a_model(config: ModelConfig, dtype: torch.dtype = torch.float32, seed: int = 0) -> LanguageModel:
    """Initialised, then stirred: biases away from 0 and norms away from 1, so that a mistake in any of them shows."""
    model = LanguageModel(config).initialize(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model.to(dtype)


def small_config(feature_map: str = "squared", **changes: object) -> ModelConfig:
    """A model of a few thousand weights with an odd number of features where the map allows one."""
    features = {"num_features": 11} if feature_map == "favor" else {}
    if changes.get("positions") == "learned":
        features["max_positions"] = 150
    base = {"num_layers": 2, "model_width": 16, "num_heads": 2, "mlp_width": 24, "vocab_size": 19}
    return ModelConfig.from_json({**base, "feature_map": feature_map, **features, **changes})


def a_batch(config: ModelConfig, batch: int, length: int, seed: int = 0, ignored: float = 0.0) -> tuple[Tensor, Tensor]:
    """Tokens and targets, (B, T) int32; a share of the targets has no loss, but at least one has."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(config.vocab_size, (batch, length + 1), generator=generator, dtype=torch.int32)
    tokens, targets = rows[:, :-1], rows[:, 1:].clone()
    if ignored:
        mask = torch.rand(targets.shape, generator=generator) < ignored
        mask[0, 0] = False
        targets[mask] = IGNORED
    return tokens, targets


Gradients = dict[str, Tensor]


def oracle(model: LanguageModel, tokens: Tensor, targets: Tensor, **options: Any) -> tuple[float, Gradients]:
    """Loss and gradients of the whole sequence by plain autograd, in the model's precision."""
    model.zero_grad(set_to_none=True)
    loss = reference_loss(model, tokens, targets, **options)
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.item(), _take_gradients(model)


def stepped(
    model: LanguageModel,
    tokens: Tensor,
    targets: Tensor,
    chunk_length: int,
    state_policy: StatePolicy,
    micro_batch: int | None = None,
    *,
    in_place: bool = True,
    dropout: Dropout = NO_DROPOUT,
    document_starts: Tensor | None = None,
    **options: Any,
) -> tuple[float, Gradients]:
    """Loss and gradients by SLiM steps over micro-batches, added to gradients that are there or new ones."""
    model.zero_grad(set_to_none=True)
    if in_place:
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
    micro_batch = micro_batch or tokens.shape[0]
    loss = sum(
        slim_step(
            model,
            tokens[first : first + micro_batch],
            targets[first : first + micro_batch],
            chunk_length=chunk_length,
            state_policy=state_policy,
            normaliser=count_targets(targets),
            dropout=replace(dropout, first_row=first),
            document_starts=None if document_starts is None else document_starts[first : first + micro_batch],
            **options,
        )
        for first in range(0, tokens.shape[0], micro_batch)
    )
    return loss, _take_gradients(model)


def _take_gradients(model: LanguageModel) -> Gradients:
    gradients: Gradients = {}
    for name, parameter in model.named_parameters():
        # None is zero: where nothing depends on a weight, as on the gates of a sequence of one position.
        gradients[name] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.double()
    model.zero_grad(set_to_none=True)
    return gradients


def assert_close(got: tuple[float, Gradients], wanted: tuple[float, Gradients], tolerance: float) -> None:
    """Relative error of the loss and, in norm, of every parameter's gradient.

    A gradient that all but cancels (queries and keys of a sequence of one position) is measured against a
    thousandth of the whole gradient instead of itself.
    """
    loss, gradients = got
    wanted_loss, wanted_gradients = wanted
    assert abs(loss - wanted_loss) <= tolerance * abs(wanted_loss), f"loss: {loss} instead of {wanted_loss}"
    assert gradients.keys() == wanted_gradients.keys()
    floor = 1e-3 * torch.stack([gradient.norm() for gradient in wanted_gradients.values()]).norm().item()
    errors = {
        name: (gradients[name] - wanted).norm().item() / max(wanted.norm().item(), floor)
        for name, wanted in wanted_gradients.items()
    }
    worst = max(errors, key=lambda name: errors[name])
    assert errors[worst] <= tolerance, f"gradient of {worst}: relative error {errors[worst]:.2e}"


def a_plan(chunk_length: int, state_policy: StatePolicy = "keep", micro_batch: int = 1, *, peak_bytes: int = 0) -> Plan:
    """A plan by hand; the loop reads its first few fields only."""
    breakdown = MemoryBreakdown(
        runtime=0, parameters=0, gradients=0, optimizer=0, states=0, activations=0, logits=0, workspace=0, safety=0
    )
    return Plan(
        chunk_length=chunk_length,
        num_chunks=1,
        state_policy=state_policy,
        micro_batch_size=micro_batch,
        accumulation_steps=1,
        predicted_peak_bytes=peak_bytes,
        breakdown=breakdown,
        predicted_step_seconds=0.0,
        predicted_total_seconds=0.0,
        unchunked_peak_bytes=0,
        minimum_cap_bytes=0,
        max_sequence_length=0,
        check_chunk_length=None,
        reason="by hand",
        calibration_source="none",
        time_factor=1.0,
        frontier=(),
    )


def write_text(folder: Path, names: Iterable[str] | None = None) -> Path:
    """Real text that is on every machine: Python's own help."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "topics.txt"
    path.write_text("\n\n".join(topics[name] for name in (names or sorted(topics))))
    return path


def text_windows(folder: Path, sequence_length: int, seed: int = 0) -> Windows:
    return Windows(make_tokens(write_text(folder)), sequence_length, seed)


def names(folder: Path) -> list[str]:
    """What is in a folder, sorted."""
    return sorted(path.name for path in folder.iterdir())
