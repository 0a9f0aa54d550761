"""Models of the `transformers` library in, and out again: the same function, told by its logits."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from slim_core.config import LoraConfig, ModelConfig, OptimizerConfig
from slim_core.model import LanguageModel
from slim_core.optim import make_optimizer
from slim_core.reference import reference_logits
from slim_core.weights.checkpoint import load_model, load_weights, save_checkpoint
from slim_core.weights.folder import check_folder, read_config
from slim_core.weights.lora import adapters, add_adapters, merge_adapters
from slim_core.weights.source import ModelSource

pytestmark = [pytest.mark.extra, pytest.mark.filterwarnings("default")]

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "vocab_size": 61,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2_SIZES: dict[str, Any] = {
    "n_embd": 32,
    "n_head": 4,
    "n_layer": 2,
    "vocab_size": 61,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **SIZES},
    "llama, tied, linear": {
        "model_type": "llama",
        **SIZES,
        "tie_word_embeddings": True,
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    },
    "llama, biases, llama3": {
        "model_type": "llama",
        **SIZES,
        "attention_bias": True,
        "mlp_bias": True,
        "rope_scaling": LLAMA3,
        "rope_theta": 500.0,
    },
    "mistral": {"model_type": "mistral", **SIZES},
    "qwen2": {"model_type": "qwen2", **SIZES, "num_key_value_heads": 1},
    "gpt2": {"model_type": "gpt2", **GPT2_SIZES},
    "gpt2, untied, exact gelu": {
        "model_type": "gpt2",
        **GPT2_SIZES,
        "n_inner": 40,
        "tie_word_embeddings": False,
        "activation_function": "gelu",
    },
}
LORA = LoraConfig(rank=3, alpha=5.0, targets=("query", "key_value", "output", "mlp_in", "mlp_out"))


@pytest.fixture(params=MODELS)
def theirs(request: pytest.FixtureRequest) -> Any:
    """A random model of theirs, in which every number matters."""
    settings = MODELS[request.param]
    config = transformers.AutoConfig.for_model(**settings)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def tokens() -> Tensor:
    return torch.randint(61, (2, 50), generator=torch.Generator().manual_seed(1))


def their_logits(model: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(tokens()).logits
    return logits


def our_logits(model: LanguageModel) -> Tensor:
    plain = copy.deepcopy(model)
    merge_adapters(plain)
    with torch.no_grad():
        return reference_logits(plain, tokens())


def loaded(folder: Path, **options: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", **options).eval()


def stirred(model: LanguageModel, lora: LoraConfig | None) -> LanguageModel:
    """As after training."""
    if lora is not None:
        add_adapters(model, lora, seed=0)
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize("shard", ["50GB", "20KB"])
def test_a_model_of_theirs_is_ours(theirs: Any, shard: str, tmp_path: Path) -> None:
    theirs.save_pretrained(tmp_path, max_shard_size=shard)
    summary = check_folder(tmp_path)
    assert summary.bytes == sum(4 * parameter.numel() for parameter in theirs.parameters())
    ours = load_model(tmp_path)
    assert ours.config == read_config(tmp_path) == summary.config
    torch.testing.assert_close(our_logits(ours), their_logits(theirs), atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_of_half_precision_become_float32(theirs: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    theirs.to(dtype).save_pretrained(tmp_path)
    torch.testing.assert_close(
        our_logits(load_model(tmp_path)), their_logits(loaded(tmp_path, dtype=torch.float32)), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_a_checkpoint_loads_there_as_it_is(theirs: Any, lora: LoraConfig | None, tmp_path: Path) -> None:
    theirs.half().save_pretrained(tmp_path / "base")
    ours = stirred(load_model(tmp_path / "base"), lora)
    source = ModelSource.of(tmp_path / "base")
    save_checkpoint(tmp_path, 1, ours, make_optimizer(ours, OptimizerConfig()), {}, source=source)
    again = loaded(tmp_path / "step-00000001")
    assert next(again.parameters()).dtype == torch.float32
    torch.testing.assert_close(their_logits(again), our_logits(ours), atol=1e-4, rtol=0)
    torch.testing.assert_close(our_logits(load_model(tmp_path / "step-00000001")), our_logits(ours), atol=1e-5, rtol=0)


@pytest.mark.parametrize("targets", [LORA.targets, ("query",), ("key_value", "mlp_out")])
def test_an_adapter_loads_there_beside_its_base(theirs: Any, targets: tuple[str, ...], tmp_path: Path) -> None:
    theirs.save_pretrained(tmp_path / "base")
    ours = stirred(load_model(tmp_path / "base"), LoraConfig(rank=3, alpha=5.0, targets=targets))
    source = ModelSource.of(tmp_path / "base")
    save_checkpoint(tmp_path, 1, ours, make_optimizer(ours, OptimizerConfig()), {}, source=source)
    adapted = peft.PeftModel.from_pretrained(loaded(tmp_path / "base"), tmp_path / "step-00000001" / "adapter")
    assert sum(".lora_B." in name for name, _ in adapted.named_parameters()) > 0
    torch.testing.assert_close(their_logits(adapted.eval()), our_logits(ours), atol=1e-4, rtol=0)


def test_a_run_with_adapters_goes_on_from_a_checkpoint_in_their_layout(theirs: Any, tmp_path: Path) -> None:
    theirs.save_pretrained(tmp_path / "base")
    ours = stirred(load_model(tmp_path / "base"), LORA)
    source = ModelSource.of(tmp_path / "base")
    save_checkpoint(tmp_path, 1, ours, make_optimizer(ours, OptimizerConfig()), {}, source=source)
    resumed = load_model(tmp_path / "base")
    add_adapters(resumed, LORA, seed=7)
    load_weights(resumed, tmp_path / "step-00000001")
    assert adapters(resumed).keys() == adapters(ours).keys()
    for name, tensor in ours.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name


def test_a_performer_takes_their_weights_and_is_written_as_ours(theirs: Any, tmp_path: Path) -> None:
    theirs.save_pretrained(tmp_path / "base")
    changes = {"attention": "performer", "feature_map": "favor", "num_features": 16}
    config = ModelConfig.from_json({**read_config(tmp_path / "base").to_json(), **changes})
    performer = LanguageModel(config)
    load_weights(performer, tmp_path / "base")
    exact = load_model(tmp_path / "base").state_dict()
    for name, tensor in performer.state_dict().items():
        assert ".features." in name or torch.equal(tensor, exact[name]), name
    source = ModelSource.of(tmp_path / "base")
    save_checkpoint(tmp_path, 1, performer, make_optimizer(performer, OptimizerConfig()), {}, source=source)
    assert json.loads((tmp_path / "step-00000001" / "config.json").read_text()) == config.to_json()
    for name, tensor in load_model(tmp_path / "step-00000001").state_dict().items():
        assert torch.equal(tensor, performer.state_dict()[name]), name
