"""Optimisers: the textbook's update, torch's own bits, and all memory before the first step."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal, get_args

import pytest
import torch
from torch import Tensor

from slim_core.config import ModelConfig, OptimizerConfig
from slim_core.model import LanguageModel
from slim_core.optim import make_optimizer, optimizer_tensors, set_step
from tests.unit.core_support import a_model, small_config

Name = Literal["adamw", "adafactor", "sgd"]
NAMES: tuple[Name, ...] = get_args(Name)
CONFIG = small_config()
STEPS = 4
UNIT = 2.0**40


def gradients(model: LanguageModel, steps: int = STEPS) -> Iterator[dict[str, Tensor]]:
    """Random gradients of every parameter, of sizes that differ from step to step."""
    generator = torch.Generator().manual_seed(3)
    for step in range(steps):
        yield {
            name: torch.randn(parameter.shape, generator=generator).to(parameter) * 10.0 ** (-2 * step)
            for name, parameter in model.named_parameters()
        }


def train(model: LanguageModel, optimizer: torch.optim.Optimizer, *, to_none: bool = False) -> None:
    """Steps by the gradients above, added to what there is as a backward pass does."""
    for step, given in enumerate(gradients(model)):
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        for name, parameter in model.named_parameters():
            if parameter.grad is None:
                parameter.grad = given[name].clone()
            else:
                parameter.grad += given[name]
        optimizer.step()
        optimizer.zero_grad(set_to_none=to_none)


def rate(step: int) -> float:
    return 0.01 / (step + 1)


def decay(name: str, parameter: Tensor, config: OptimizerConfig) -> float:
    return config.weight_decay if parameter.dim() == 2 and "embedding" not in name else 0.0


def assert_equals(model: LanguageModel, wanted: dict[str, Tensor], tolerance: float) -> None:
    for name, parameter in model.named_parameters():
        difference = (parameter - wanted[name]).abs().max().item()
        assert difference <= tolerance * wanted[name].abs().max().item(), f"{name}: {difference}"


def test_sgd_is_the_textbook_s() -> None:
    config = OptimizerConfig(name="sgd", momentum=0.8, weight_decay=0.3)
    model = a_model(CONFIG, torch.float64)
    wanted = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    momenta = {name: torch.zeros_like(tensor) for name, tensor in wanted.items()}
    for step, given in enumerate(gradients(model)):
        for name, w in wanted.items():
            momenta[name] = 0.8 * momenta[name] + given[name] + decay(name, w, config) * w
            wanted[name] = w - rate(step) * momenta[name]
    train(model, make_optimizer(model, config))
    assert_equals(model, wanted, 1e-13)


def test_adamw_is_the_textbook_s() -> None:
    config = OptimizerConfig(beta1=0.7, beta2=0.9, epsilon=1e-3, weight_decay=0.3)
    model = a_model(CONFIG, torch.float64)
    wanted = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    first = {name: torch.zeros_like(tensor) for name, tensor in wanted.items()}
    second = {name: torch.zeros_like(tensor) for name, tensor in wanted.items()}
    for step, given in enumerate(gradients(model)):
        for name, w in wanted.items():
            first[name] = 0.7 * first[name] + 0.3 * given[name]
            second[name] = 0.9 * second[name] + 0.1 * given[name] ** 2
            mean, variance = first[name] / (1 - 0.7 ** (step + 1)), second[name] / (1 - 0.9 ** (step + 1))
            w_decayed = w - rate(step) * decay(name, w, config) * w
            wanted[name] = w_decayed - rate(step) * mean / (variance.sqrt() + 1e-3)
    train(model, make_optimizer(model, config))
    assert_equals(model, wanted, 1e-13)


def test_adafactor_is_the_paper_s_at_the_rate_of_the_schedule() -> None:
    """Shazeer and Stern, algorithms 4 and 5, without relative step sizes; epsilon is too small to be seen."""
    config = OptimizerConfig(name="adafactor", weight_decay=0.3)
    model = a_model(CONFIG, torch.float64)
    wanted = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    variances: dict[str, Tensor] = {}
    for step, given in enumerate(gradients(model)):
        beta = 1 - (step + 1) ** -0.8
        for name, w in wanted.items():
            square = given[name] ** 2
            if w.dim() == 1:
                variance = variances[name] = beta * variances.get(name, 0) + (1 - beta) * square
            else:
                rows = variances[f"{name} R"] = beta * variances.get(f"{name} R", 0) + (1 - beta) * square.sum(1)
                columns = variances[f"{name} C"] = beta * variances.get(f"{name} C", 0) + (1 - beta) * square.sum(0)
                variance = torch.outer(rows, columns) / rows.sum()
            update = given[name] / variance.sqrt()
            update /= max(1.0, update.square().mean().sqrt().item())
            wanted[name] = w - rate(step) * decay(name, w, config) * w - rate(step) * update
    train(model, make_optimizer(model, config))
    assert_equals(model, wanted, 1e-12)


def lazy(model: LanguageModel, config: OptimizerConfig) -> torch.optim.Optimizer:
    """torch's own optimiser, which makes its state during the first step."""
    groups = [{"params": [p], "weight_decay": decay(name, p, config)} for name, p in model.named_parameters()]
    match config.name:
        case "adamw":
            betas = (config.beta1, config.beta2)
            return torch.optim.AdamW(groups, lr=1.0, betas=betas, eps=config.epsilon, fused=True)
        case "adafactor":
            for group in groups:
                group["weight_decay"] *= UNIT  # type: ignore[operator]
            return torch.optim.Adafactor(groups, lr=1.0, eps=(1e-15, UNIT))
        case "sgd":
            return torch.optim.SGD(groups, lr=1.0, momentum=config.momentum, fused=True)


@pytest.mark.parametrize("name", NAMES)
def test_state_made_beforehand_changes_no_bit(name: Name) -> None:
    config = OptimizerConfig(name=name, weight_decay=0.3)
    model, other = a_model(CONFIG), a_model(CONFIG)
    optimizer, torch_s = make_optimizer(model, config), lazy(other, config)
    train(model, optimizer)
    for step, given in enumerate(gradients(other)):
        for group in torch_s.param_groups:
            group["lr"] = rate(step) / (UNIT if name == "adafactor" else 1.0)
        for its_name, parameter in other.named_parameters():
            parameter.grad = given[its_name]
        torch_s.step()
        torch_s.zero_grad(set_to_none=True)
    for (its_name, parameter), its in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(parameter, its), its_name
        assert optimizer.state[parameter].keys() == torch_s.state[its].keys()
        for key, tensor in optimizer.state[parameter].items():
            assert torch.equal(tensor, torch_s.state[its][key]), f"{its_name}.{key}"
            assert tensor.dtype == torch_s.state[its][key].dtype


@pytest.mark.parametrize("name", NAMES)
def test_gradients_and_state_are_there_before_the_first_step_and_stay(name: Name) -> None:
    model = a_model(CONFIG)
    optimizer = make_optimizer(model, OptimizerConfig(name=name))

    def addresses() -> dict[str, int]:
        grads = {its: p.grad.data_ptr() for its, p in model.named_parameters() if p.grad is not None}
        return grads | {its: tensor.data_ptr() for its, tensor in optimizer_tensors(model, optimizer).items()}

    before = addresses()
    per_parameter = {
        "adamw": [{"exp_avg", "exp_avg_sq"}] * 2,
        "adafactor": [{"variance"}, {"row_var", "col_var"}],
        "sgd": [{"momentum_buffer"}] * 2,
    }[name]
    wanted = {its for its, _ in model.named_parameters()}
    wanted |= {f"{its}.{key}" for its, p in model.named_parameters() for key in per_parameter[p.dim() - 1]}
    assert before.keys() == wanted
    train(model, optimizer)
    assert addresses() == before


def test_sgd_without_momentum_has_no_state() -> None:
    model = a_model(CONFIG)
    optimizer = make_optimizer(model, OptimizerConfig(name="sgd", momentum=0.0))
    train(model, optimizer)
    assert optimizer_tensors(model, optimizer) == {}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        small_config(tied_embeddings=True),
        small_config(positions="learned", max_positions=9),
        small_config(attention_bias=True),
    ],
)
def test_matrices_decay_and_nothing_else(config: ModelConfig, name: Name) -> None:
    model = a_model(config)
    before = {its: parameter.detach().clone() for its, parameter in model.named_parameters()}
    optimizer = make_optimizer(model, OptimizerConfig(name=name, learning_rate=0.5, weight_decay=0.25))
    optimizer.step()  # of a gradient that is zero
    for its, parameter in model.named_parameters():
        matrix = parameter.dim() == 2 and its not in ("embedding.weight", "position.weight")
        torch.testing.assert_close(parameter.detach(), before[its] * (1 - 0.125) if matrix else before[its])


@pytest.mark.parametrize("name", NAMES)
def test_what_is_frozen_gets_neither_gradient_nor_state(name: Name) -> None:
    model = a_model(CONFIG)
    frozen = model.blocks[0]
    assert isinstance(frozen, torch.nn.Module)
    frozen.requires_grad_(requires_grad=False)
    before = {its: parameter.detach().clone() for its, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, torch.nan)  # of a run that trained everything and diverged
    optimizer = make_optimizer(model, OptimizerConfig(name=name, weight_decay=0.3))
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad += 1
    optimizer.step()
    for its, parameter in model.named_parameters():
        is_frozen = its.startswith("blocks.0.")
        assert (parameter.grad is None) == is_frozen
        assert (parameter in optimizer.state) == (not is_frozen)
        assert torch.equal(parameter, before[its]) == is_frozen, its


def test_all_matrices_may_be_frozen() -> None:
    model = a_model(CONFIG)
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.dim() == 1)
    optimizer = make_optimizer(model, OptimizerConfig())
    optimizer.step()
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(optimizer.state)


@pytest.mark.parametrize("step", [0, 10**6])
def test_adafactor_s_rate_is_limited_neither_by_the_step_nor_by_the_weights(step: int) -> None:
    """The gradient has always been the same, so that the update is its sign times the rate."""
    model = a_model(CONFIG, torch.float64)
    optimizer = make_optimizer(model, OptimizerConfig(name="adafactor", learning_rate=0.125, weight_decay=0.0))
    set_step(optimizer, step)
    before = {}
    for scale, (name, parameter) in zip([0.0, 1e-9, 1e6, 1.0] * 9, model.named_parameters(), strict=False):
        parameter.data *= scale
        before[name] = parameter.detach().clone()
        assert parameter.grad is not None
        parameter.grad -= 3e-6
        for tensor in (value for key, value in optimizer.state[parameter].items() if key != "step"):
            tensor.fill_(9e-12)
    assert len(before) == len(list(model.parameters()))
    optimizer.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter.detach() - before[name], torch.full_like(parameter, 0.125), rtol=1e-6, atol=0
        )
    assert {(group["lr"], group["weight_decay"]) for group in optimizer.param_groups} == {(0.125, 0.0)}


def test_adafactor_tells_gradients_apart_that_float32_s_precision_would_not() -> None:
    """A mean over a long sequence has gradients of 1e-9; each row's update still has the size of the rate."""
    model = a_model(CONFIG)
    optimizer = make_optimizer(model, OptimizerConfig(name="adafactor", learning_rate=0.125, weight_decay=0.0))
    assert model.head is not None
    weight = model.head.weight
    before = weight.detach().clone()
    rows = torch.logspace(-9, -6, weight.shape[0])
    assert weight.grad is not None
    weight.grad += rows[:, None]
    optimizer.step()
    torch.testing.assert_close(before - weight.detach(), torch.full_like(weight, 0.125), rtol=1e-3, atol=0)


def test_adafactor_survives_an_error_during_its_step() -> None:
    model = a_model(CONFIG)
    optimizer = make_optimizer(model, OptimizerConfig(name="adafactor", learning_rate=0.125, weight_decay=0.25))

    def fail() -> float:
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        optimizer.step(fail)
    assert {group["lr"] for group in optimizer.param_groups} == {0.125}
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.25, 0.0]


def test_a_step_of_adafactor_has_the_size_of_adamw_s() -> None:
    """So that a learning rate means the same under both."""
    sizes = {}
    for name in ("adamw", "adafactor"):
        model = a_model(CONFIG)
        before = [parameter.detach().clone() for parameter in model.parameters()]
        optimizer = make_optimizer(model, OptimizerConfig(name=name, weight_decay=0.0))
        for parameter, gradient in zip(model.parameters(), next(gradients(model)).values(), strict=True):
            parameter.grad = gradient
        optimizer.step()
        changes = [(p.detach() - b).flatten() for p, b in zip(model.parameters(), before, strict=True)]
        sizes[name] = torch.cat(changes).square().mean().sqrt().item()
    assert math.isclose(sizes["adafactor"], sizes["adamw"], rel_tol=0.1)
