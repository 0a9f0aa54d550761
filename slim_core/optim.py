"""The optimiser and the learning rate of a step, both functions of the configuration alone."""

from __future__ import annotations

import math

import torch

from slim_core.config import OptimizerConfig, ScheduleConfig
from slim_core.model import Performer

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Names of AdamW's moments in the optimiser's state."""


def make_optimizer(model: Performer, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW in its fused form, which updates in place and needs no memory beside its two moments.

    Gradients and moments are allocated here, before any activation, and stay: allocated during the first step they
    would lie between activations, in whose gaps the heap could never shrink again. Keep them with
    `zero_grad(set_to_none=False)`.
    """
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and name != "embedding.weight"]
    others = [p for name, p in model.named_parameters() if p.dim() != 2 or name == "embedding.weight"]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(
        groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), eps=config.epsilon, fused=True
    )
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
        moments = {moment: torch.zeros_like(parameter) for moment in MOMENTS}
        optimizer.state[parameter] = {"step": torch.tensor(0.0, device=parameter.device), **moments}
    return optimizer


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
