"""The peers that `make bench` measures compute what they claim to, and the benchmark runs from end to end."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import peer_models, peers
from slim_core.config import ModelConfig
from slim_core.model import LanguageModel
from slim_core.step import slim_step

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ModelConfig(num_layers=2, model_width=32, num_heads=2, mlp_width=64, vocab_size=256, output_projection=False)
LENGTH = 150
"""Two steps of 64 positions and a part of one."""

torch.set_num_threads(1)


def _inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Features of queries and keys, and values, (2, 3, T, 8 or 5), float64 leaves."""
    generator = torch.Generator().manual_seed(0)
    shape = (2, 3, LENGTH)
    q, k, v = (torch.randn(*shape, width, generator=generator, dtype=torch.float64) for width in (8, 8, 5))
    return q.square().requires_grad_(), k.square().requires_grad_(), v.requires_grad_()


def _quadratic(q: Tensor, k: Tensor, v: Tensor, extra: Tensor | float = peers.EPSILON) -> Tensor:
    scores = (q @ k.mT).tril()
    return torch.as_tensor((scores @ v) / (scores.sum(-1, keepdim=True) + extra))


def _agree(function: Callable[[Tensor, Tensor, Tensor], Tensor], formula: Callable[..., Tensor]) -> None:
    """Values and gradients to 1e-9 of the largest entry."""
    q, k, v = _inputs()
    weights = torch.randn(v.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    got, expected = function(q, k, v), formula(q, k, v)
    grads = [torch.autograd.grad((out * weights).sum(), (q, k, v)) for out in (got, expected)]
    for value, wanted in zip((got, *grads[0]), (expected, *grads[1]), strict=True):
        torch.testing.assert_close(value, wanted, rtol=0, atol=1e-9 * wanted.abs().max().item())


@pytest.mark.parametrize("function", [peers.ours, peers.published, peers.recurrence])
def test_operators_of_linear_attention_agree_with_the_quadratic_formula(
    function: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> None:
    _agree(function, _quadratic)


def test_performer_pytorch_agrees_with_its_own_quadratic_formula() -> None:
    pytest.importorskip("einops")
    _agree(
        peers.performer_pytorch_attention,
        lambda q, k, v: _quadratic(q, k, v, peers.EPSILON * q.sum(-1, keepdim=True)),
    )


def test_softmax_agrees_with_its_quadratic_formula() -> None:
    def formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.mT / q.shape[-1] ** 0.5
        past = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
        return torch.as_tensor(scores.masked_fill(~past, -torch.inf).softmax(-1) @ v)

    _agree(peers.softmax, formula)


def _tokens() -> tuple[Tensor, Tensor]:
    rows = torch.randint(CONFIG.vocab_size, (1, LENGTH + 1), generator=torch.Generator().manual_seed(2))
    return rows[:, :-1], rows[:, 1:]


def _gradients(model: torch.nn.Module, step: Callable[[], float]) -> list[Tensor]:
    """Loss and all gradients of one step from zero."""
    model.zero_grad(set_to_none=True)
    loss = step()
    grads = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    assert len(grads) == len(list(model.parameters()))
    return [torch.tensor(loss, dtype=torch.float64), *grads]


def _published_logits(model: peer_models.PublishedModel, tokens: Tensor) -> Tensor:
    """The published architecture once more, with quadratic attention and plain autograd."""
    embedded = model.embedding(tokens)
    exponent = torch.arange(0, 16, 2, dtype=torch.float64) / 16
    angle = torch.arange(LENGTH, dtype=torch.float64)[:, None] / 10_000**exponent
    x = torch.cat([embedded, torch.cat([angle.sin(), angle.cos()], dim=1)[None]], dim=2)
    for layer in model.layers:
        assert isinstance(layer, peer_models.PublishedLayer)
        q, k, v = (f(x).view(1, LENGTH, 2, 16).transpose(1, 2) for f in (layer.query, layer.key, layer.value))
        attended = _quadratic(q.square(), k.square(), v).transpose(1, 2).reshape(1, LENGTH, 32)
        x = x + layer.attention_norm(attended)
        x = x + layer.mlp_norm(layer.mlp_out(torch.nn.functional.gelu(layer.mlp_in(x))))
    return torch.as_tensor(model.head(x))


@pytest.mark.parametrize("chunk_length", [LENGTH, 64, 47])
def test_the_published_model_has_the_gradient_of_its_formula_in_any_chunks(chunk_length: int) -> None:
    torch.manual_seed(0)
    model = peer_models.PublishedModel(CONFIG).double()
    tokens, targets = _tokens()
    got = _gradients(model, lambda: peer_models.published_step(model, tokens, targets, chunk_length))
    expected = _gradients(
        model, lambda: peer_models.autograd_step(lambda x: _published_logits(model, x), tokens, targets)
    )
    for value, wanted in zip(got, expected, strict=True):
        torch.testing.assert_close(value, wanted, rtol=0, atol=1e-9 * wanted.abs().max().item())


def test_checkpointing_changes_no_gradient() -> None:
    model = LanguageModel(CONFIG).initialize(0).double()
    other = peer_models.checkpointed(copy.deepcopy(model))
    tokens, targets = _tokens()
    got = _gradients(other, lambda: peer_models.checkpointed_step(other, tokens, targets))
    expected = _gradients(
        model,
        lambda: slim_step(model, tokens, targets, chunk_length=LENGTH, state_policy="keep", normaliser=targets.numel()),
    )
    for value, wanted in zip(got, expected, strict=True):
        torch.testing.assert_close(value, wanted, rtol=0, atol=1e-9 * wanted.abs().max().item())


@pytest.mark.parametrize("as_many_features", [False, True])
def test_performer_pytorch_model_learns(as_many_features: bool) -> None:
    pytest.importorskip("einops")
    torch.manual_seed(0)
    model = peer_models.performer_pytorch_model(CONFIG, LENGTH, as_many_features=as_many_features)
    tokens, targets = _tokens()
    optimizer = peer_models.adamw(model)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        losses.append(peer_models.autograd_step(model, tokens, targets))
        optimizer.step()
    assert losses[2] < losses[0]


@pytest.mark.extra
@pytest.mark.timeout(400)
def test_bench_runs_from_end_to_end(tmp_path: Path) -> None:
    pytest.importorskip("einops")
    pytest.importorskip("matplotlib")
    command = [sys.executable, "-m", "benchmarks.bench", "--quick", "--out", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=380)
    record = json.loads((tmp_path / "bench.json").read_text())
    assert set(record["sections"]) == {"operator", "step", "memory", "tradeoff", "longer"}
    assert all(set(target) == {"name", "value", "unit", "bar", "met"} for target in record["targets"])
    assert all(target["value"] is not None for target in record["targets"])
    assert sorted(path.name for path in tmp_path.glob("*.png")) == [
        f"bench_{section}.png" for section in ("longer", "memory", "operator", "step", "tradeoff")
    ]
    assert "sgemm" in (tmp_path / "benchmarks.md").read_text()
