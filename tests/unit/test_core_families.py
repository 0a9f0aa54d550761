"""What models of the Llama family and GPT-2 have: grouped heads, RMS norms, other biases, slowed rotary positions."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn

from slim_core.config import ModelConfig, RotaryScalingConfig
from slim_core.layers.attention import frequencies, scaled
from slim_core.layers.norm import RmsNorm
from slim_core.model import LanguageModel
from tests.unit.core_support import POLICIES, a_batch, a_model, assert_close, oracle, small_config, stepped

EXACT = 1e-10

# A short first training, so that the angles of a small head are kept, slowed by degrees and slowed in full.
LLAMA3 = {
    "name": "llama3",
    "factor": 8.0,
    "low_frequency_factor": 1.0,
    "high_frequency_factor": 4.0,
    "original_positions": 64,
}
LLAMA: dict[str, Any] = {
    "num_heads": 4,
    "num_kv_heads": 2,
    "model_width": 32,
    "norm_type": "rms",
    "norm_epsilon": 1e-3,
    "activation": "swiglu",
    "mlp_bias": False,
    "positions": "rotary",
    "rotary_base": 500.0,
    "scaled_embeddings": False,
}
GPT2: dict[str, Any] = {
    "activation": "gelu_tanh",
    "attention_bias": True,
    "output_bias": True,
    "positions": "learned",
    "scaled_embeddings": False,
    "tied_embeddings": True,
    "norm_epsilon": 1e-3,
}
FAMILIES = {
    "llama": LLAMA,
    "llama-3.1": {**LLAMA, "rotary_scaling": LLAMA3},
    "linear-scaling": {**LLAMA, "rotary_scaling": {"name": "linear", "factor": 3.0}},
    "one-kv-head": {**LLAMA, "num_kv_heads": 1, "norm": "branch"},
    "qwen2": {**LLAMA, "attention_bias": True, "tied_embeddings": True},
    "gpt2": GPT2,
    "post-norm": {**LLAMA, "norm": "post", "mlp_bias": True, "output_bias": True},
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("feature_map", ["favor", "elu1"])
@pytest.mark.parametrize("family", FAMILIES)
def test_performers_of_every_family(family: str, feature_map: str, policy: Any) -> None:
    config = small_config(feature_map, attention_epsilon=1e-2, **FAMILIES[family])
    model = a_model(config, torch.float64)
    tokens, targets = a_batch(config, batch=2, length=150, ignored=0.1)
    got = stepped(model, tokens, targets, 37, policy, micro_batch=1)
    assert_close(got, oracle(model, tokens, targets), EXACT)


@pytest.mark.parametrize("attention", ["performer", "softmax"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_configuration_counts_every_weight(family: str, attention: str) -> None:
    config = small_config(attention=attention, **FAMILIES[family])
    model = LanguageModel(config).initialize(0)
    assert config.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert ModelConfig.from_json(config.to_json()) == config
    for name, parameter in model.named_parameters():
        assert parameter.dim() == 2 or bool((parameter == (1 if "norm.weight" in name else 0)).all()), name


def test_an_rms_norm_is_torch_s() -> None:
    generator = torch.Generator().manual_seed(0)
    norm = RmsNorm(24, 0.1).double()
    norm.weight.data += torch.randn(24, generator=generator, dtype=torch.float64)
    x = torch.randn(2, 5, 24, generator=generator, dtype=torch.float64).requires_grad_()
    torch.testing.assert_close(norm(x), nn.functional.rms_norm(x, (24,), norm.weight, 0.1))
    assert torch.autograd.gradcheck(lambda x, _: norm(x), (x, norm.weight))
    frozen = norm.requires_grad_(requires_grad=False)
    assert torch.autograd.gradcheck(frozen, (x,))


def test_an_rms_norm_sums_in_float32() -> None:
    """Squares of 4,096 numbers, which eight bits would stop adding up at 256."""
    norm = RmsNorm(4096, 1e-6)
    x = torch.rand(3, 4096, generator=torch.Generator().manual_seed(0)).add_(0.5).bfloat16().requires_grad_()
    wide = x.detach().float().requires_grad_()
    got, wanted = norm(x), nn.functional.rms_norm(wide, (4096,), norm.weight, 1e-6)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), wanted, rtol=2**-8, atol=0)
    grad = torch.randn(3, 4096, generator=torch.Generator().manual_seed(1)).bfloat16()
    got.backward(grad)
    wanted.backward(grad.float())  # type: ignore[no-untyped-call]
    assert x.grad is not None
    assert wide.grad is not None
    assert (x.grad.float() - wide.grad).norm() < 2**-8 * wide.grad.norm()
    assert norm.weight.grad is not None
    assert norm.weight.grad.dtype == torch.float32


def test_rotary_frequencies_of_llama_3_1() -> None:
    """As transformers 5.24 computes them (`_compute_llama3_parameters`, in float32) for Llama 3.2 1B, K = 64."""
    scaling = RotaryScalingConfig("llama3", factor=32.0)
    got = scaled(frequencies(64, 500_000.0, torch.device("cpu")), scaling)
    wanted = [1.0, 0.1939228, 0.03760603, 0.007292665, 0.0004295567, 8.570256e-06, 1.661967e-06, 3.222933e-07]
    torch.testing.assert_close(got[::4].tolist(), wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize("number", ["1e999", "-1e999", "NaN", "1" + "0" * 400])
def test_a_number_that_no_float_holds_is_refused_by_name(number: str) -> None:
    data = small_config().to_json()
    with pytest.raises(ValueError, match="norm_epsilon: must be a finite number"):
        ModelConfig.from_json({**data, "norm_epsilon": json.loads(number)})
