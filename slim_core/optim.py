"""The optimiser and the learning rate of a step, both functions of the configuration alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from slim_core.config import OptimizerConfig, ScheduleConfig
from slim_core.model import LanguageModel

_UNIT = 2.0**40
"""Of Adafactor's learning rate; a power of two, so that dividing by it and multiplying with it rounds nothing."""

_ADAFACTOR_EPSILON = 1e-15
"""Its square, 1e-30, is the least squared gradient (Shazeer and Stern, section 9). torch's own default, the precision
of float32, is larger than most gradients of a mean over a long sequence. torch also takes it for the least mean of the
row sums, so gradients below 3e-8 in the mean are scaled up, to the clipping's limit at most; the paper has no such."""


class Adafactor(torch.optim.Adafactor):
    """torch's Adafactor whose update has a root mean square of the learning rate, at most.

    torch multiplies the rate with the size of the weights, which starves whatever starts at zero (biases, adapters),
    and limits it to 1 / sqrt(step): its rate is max(eps2, RMS(weights)) * min(lr, 1 / sqrt(step)). With eps2 = 2^40 and
    lr / 2^40 neither limit acts and the product is lr exactly, the rate of the schedule as for every other optimiser.
    """

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr=lr, eps=(_ADAFACTOR_EPSILON, _UNIT))

    def step(self, closure: Any = None) -> Any:
        """One update; the groups' `lr` and `weight_decay` are in torch's unit during it only."""
        self._scale(1 / _UNIT)
        try:
            return super().step(closure)  # type: ignore[no-untyped-call]
        finally:
            self._scale(_UNIT)

    def _scale(self, factor: float) -> None:
        for group in self.param_groups:
            group["lr"] *= factor
            group["weight_decay"] /= factor  # torch decays by lr * weight_decay


def make_optimizer(
    model: LanguageModel, config: OptimizerConfig, trained: Sequence[nn.Parameter] | None = None
) -> torch.optim.Optimizer:
    """The configured optimiser of all parameters that are not frozen, or of those that are `trained`, in the form that
    needs least memory beside its state: AdamW and SGD fused, in place; Adafactor one parameter at a time, with one
    temporary of the largest.

    Weights decay by rate * weight_decay apart from the gradient (AdamW, Adafactor); SGD's decay is part of the
    gradient and so of the momentum. It concerns matrices only.

    Gradients and state are allocated here, before any activation, and stay: allocated during the first step they
    would lie between activations, in whose gaps the heap could never shrink again. Keep them with
    `zero_grad(set_to_none=False)`.
    """
    if trained is None:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    decays = [parameter.dim() == 2 and id(parameter) not in embeddings for parameter in trained]
    groups = [
        {"params": [p for p, its in zip(trained, decays, strict=True) if its is chosen], "weight_decay": decay}
        for chosen, decay in ((True, config.weight_decay), (False, 0.0))
    ]
    optimizer = _make(groups, config)
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.grad = None  # of an earlier run's
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
        if state := _initial_state(parameter, config):
            optimizer.state[parameter] = state
    return optimizer


def _make(groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.Optimizer:
    rate = config.learning_rate
    match config.name:
        case "adamw":
            betas = (config.beta1, config.beta2)
            return torch.optim.AdamW(groups, lr=rate, betas=betas, eps=config.epsilon, fused=True)
        case "adafactor":
            return Adafactor(groups, lr=rate)
        case "sgd":
            return torch.optim.SGD(groups, lr=rate, momentum=config.momentum, fused=True)


def _initial_state(parameter: Tensor, config: OptimizerConfig) -> dict[str, Tensor]:
    """What torch would make during the first step: names, shapes and values."""
    match config.name:
        case "adamw":
            step = torch.tensor(0.0, device=parameter.device)  # the fused kernel reads it there
            return {"step": step, "exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
        case "adafactor" if parameter.dim() > 1:
            rows, columns = parameter.shape[:-1], parameter.shape[:-2]
            return {
                "step": torch.tensor(0.0),
                "row_var": parameter.new_zeros(*rows, 1),
                "col_var": parameter.new_zeros(*columns, 1, parameter.shape[-1]),
            }
        case "adafactor":
            return {"step": torch.tensor(0.0), "variance": torch.zeros_like(parameter)}
        case "sgd":
            # torch starts with the first gradient, which momentum * 0 + gradient is as well.
            return {"momentum_buffer": torch.zeros_like(parameter)} if config.momentum else {}


def optimizer_tensors(model: LanguageModel, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The tensors of the optimiser's state by `<parameter>.<name in the state>`; all but the count of steps."""
    return {
        f"{name}.{key}": tensor
        for name, parameter in model.named_parameters()
        for key, tensor in optimizer.state.get(parameter, {}).items()
        if key != "step"
    }


def set_step(optimizer: torch.optim.Optimizer, step: int) -> None:
    """Make the optimiser's own counts, where it has any, those after `step` steps."""
    for state in optimizer.state.values():
        if "step" in state:
            state["step"].fill_(step)


def learning_rate(step: int, total_steps: int, peak: float, schedule: ScheduleConfig) -> float:
    """Of optimiser step `step`, counted from 0: linear warm-up to `peak`, then the schedule's decay until
    `total_steps`."""
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    if schedule.name == "constant":
        return peak
    progress = (step - schedule.warmup_steps) / max(1, total_steps - schedule.warmup_steps)
    cosine = (1 + math.cos(math.pi * min(1.0, progress))) / 2
    return peak * (schedule.final_fraction + (1 - schedule.final_fraction) * cosine)
