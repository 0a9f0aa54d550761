"""Code generated for what lies between matrix products: an option, because it takes a compiler and half a minute."""

from __future__ import annotations

import warnings

import torch

from slim_core.layers.performer import PerformerAttention
from slim_core.model import Block, LanguageModel


def compile_blocks(model: LanguageModel) -> bool:
    """Let torch.compile generate activation functions and feature maps; returns whether it could.

    Without a working compiler the model stays as it is, with a RuntimeWarning. Matrix products and attention have
    backward passes of their own and are left alone.
    """
    device = next(model.parameters()).device
    try:
        x = torch.ones(8, 8, device=device, requires_grad=True)
        torch.autograd.grad(torch.compile(torch.nn.functional.gelu)(x).sum(), x)
    except Exception as error:  # noqa: BLE001  # a missing compiler, an unwritable cache, an unsupported Python
        torch.compiler.reset()
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        warnings.warn(f"compile: training goes on without it: {reason}", RuntimeWarning, stacklevel=2)
        return False
    for block in model.blocks:
        assert isinstance(block, Block)
        block.activate = torch.compile(block.activate, dynamic=True)
        if isinstance(block.attention, PerformerAttention):
            block.attention.features.compile(dynamic=True)
    return True
