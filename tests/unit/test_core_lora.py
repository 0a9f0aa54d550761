"""Adapters: the oracle's gradients, a base that never moves, a merge that changes nothing."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from slim_core.config import LoraConfig, ModelConfig, OptimizerConfig, TrainConfig
from slim_core.layers.linear import Linear
from slim_core.model import LanguageModel
from slim_core.optim import make_optimizer
from slim_core.planning import StatePolicy
from slim_core.reference import reference_loss
from slim_core.step import count_targets, slim_step
from slim_core.train import StepMetrics, TrainingRun
from slim_core.weights import lora
from slim_core.weights.checkpoint import load_model
from slim_core.weights.lora import LoraLinear, adapters, add_adapters, merge_adapters
from tests.unit.core_support import POLICIES, TINY, a_batch, a_model, a_plan, small_config, text_windows

CONFIG = small_config()
EVERYTHING = LoraConfig(rank=3, alpha=5.0, targets=("query", "key_value", "output", "mlp_in", "mlp_out"))


def adapted(
    config: ModelConfig = CONFIG, settings: LoraConfig = EVERYTHING, dtype: torch.dtype = torch.float64, seed: int = 0
) -> LanguageModel:
    """A model with adapters away from their start."""
    model = a_model(config, dtype)
    add_adapters(model, settings, seed)
    generator = torch.Generator().manual_seed(7)
    for layer in adapters(model).values():
        layer.lora_B.data += 0.2 * torch.randn(layer.lora_B.shape, generator=generator).to(dtype)
    return model


def outputs(model: LanguageModel) -> Tensor:
    tokens, _ = a_batch(model.config, 2, 20)
    return model.forward_chunk(tokens.long(), 0, model.initial_states(2, 20)).hidden


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_same(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(got[name], tensor), name


class _ReferenceLoss(nn.Module):
    """So that `functional_call` can put W + alpha / r * B A in the place of W."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        return reference_loss(self.model, tokens, targets)


def oracle(
    plain: LanguageModel, model: LanguageModel, tokens: Tensor, targets: Tensor
) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of the adapters of `model` by plain autograd over a model without adapters."""
    leaves: dict[str, Tensor] = {}
    weights: dict[str, Tensor] = {}
    for name, layer in adapters(model).items():
        a, b = (p.detach().clone().requires_grad_() for p in (layer.lora_A, layer.lora_B))
        leaves |= {f"{name}.lora_A": a, f"{name}.lora_B": b}
        weight = plain.get_parameter(f"{name}.weight").detach()
        weights[f"model.{name}.weight"] = weight + EVERYTHING.alpha / EVERYTHING.rank * b @ a
    loss = torch.func.functional_call(_ReferenceLoss(plain), weights, (tokens, targets))
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return loss.item(), dict(zip(leaves, gradients, strict=True))


@pytest.mark.parametrize("chunk_length", [7, 64])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize(
    "targets", [EVERYTHING.targets, ("query",), ("key_value",), ("mlp_in",), ("query", "key_value")]
)
def test_loss_and_gradients_are_the_oracle_s(
    targets: tuple[str, ...], in_place: bool, policy: StatePolicy, chunk_length: int
) -> None:
    model = adapted(settings=LoraConfig(EVERYTHING.rank, EVERYTHING.alpha, targets))
    if in_place:
        make_optimizer(model, OptimizerConfig())
    tokens, wanted_tokens = a_batch(CONFIG, 2, 30, ignored=0.2)
    count = count_targets(wanted_tokens)
    loss = slim_step(model, tokens, wanted_tokens, chunk_length=chunk_length, state_policy=policy, normaliser=count)
    wanted_loss, wanted = oracle(a_model(CONFIG, torch.float64), model, tokens, wanted_tokens)
    assert loss == pytest.approx(wanted_loss, rel=1e-12)
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == wanted.keys()
    for name, gradient in wanted.items():
        got = model.get_parameter(name).grad
        assert got is not None
        assert gradient.norm() > 0, name
        assert (got - gradient).norm() <= 1e-10 * gradient.norm(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_new_adapters_change_no_bit_of_the_output(dtype: torch.dtype) -> None:
    model = a_model(CONFIG, dtype)
    before = outputs(model)
    add_adapters(model, EVERYTHING, seed=0)
    assert torch.equal(outputs(model), before)
    assert {layer.lora_A.dtype for layer in adapters(model).values()} == {dtype}
    adapters(model)["blocks.0.mlp_in"].lora_B.data += 1
    assert not torch.equal(outputs(model), before)


def test_everything_is_frozen_but_the_adapters_and_keeps_its_name() -> None:
    model = a_model(CONFIG)
    plain = {name: id(parameter) for name, parameter in model.named_parameters()}
    add_adapters(model, LoraConfig(targets=("query", "mlp_in")), seed=0)
    layers = {f"blocks.{block}.{layer}" for block in (0, 1) for layer in ("attention.query", "mlp_in")}
    assert adapters(model).keys() == layers
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {f"{layer}.{matrix}" for layer in layers for matrix in ("lora_A", "lora_B")}
    assert {n: id(p) for n, p in model.named_parameters() if n not in trained} == plain


@pytest.mark.parametrize("name", ["adamw", "adafactor", "sgd"])
def test_training_moves_the_adapters_and_never_the_base(name: str) -> None:
    model = adapted(dtype=torch.float32)
    before = parameters(model)
    optimizer = make_optimizer(model, OptimizerConfig.from_json({"name": name}))
    for step in range(3):
        tokens, targets = a_batch(CONFIG, 1, 30, seed=step)
        slim_step(model, tokens, targets, chunk_length=8, state_policy="reverse", normaliser=30)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    for its, tensor in parameters(model).items():
        assert torch.equal(tensor, before[its]) == ("lora_" not in its), its


@pytest.mark.parametrize("at_a_time", [1, 100, 10**6])
def test_a_merged_model_is_plain_and_computes_the_same(at_a_time: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora, "_BLOCK_NUMBERS", at_a_time)
    model = adapted()
    wanted, before = outputs(model), parameters(model)
    merge_adapters(model)
    torch.testing.assert_close(outputs(model), wanted, rtol=1e-10, atol=1e-10)
    assert adapters(model) == {}
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in a_model(CONFIG).named_parameters()]
    moved = {name for name, tensor in parameters(model).items() if not torch.equal(tensor, before[name])}
    assert moved == {f"{layer}.weight" for layer in adapters(adapted())}
    add_adapters(model, EVERYTHING, seed=0)  # again, from a plain model


def test_merging_by_rows_leaves_none_out() -> None:
    base = Linear(300, 3001, bias=False)
    layer = LoraLinear(base, rank=4, alpha=2.0, seed=0)
    layer.lora_B.data.normal_()
    wanted = base.weight.double() + 0.5 * layer.lora_B.double() @ layer.lora_A.double()
    pieces = list(layer.merged_rows())
    assert len(pieces) > 2
    torch.testing.assert_close(torch.cat(pieces), wanted.float(), rtol=1e-6, atol=1e-7)


def test_a_is_drawn_from_the_seed_and_the_layer_alone() -> None:
    def drawn(settings: LoraConfig, seed: int) -> dict[str, Tensor]:
        torch.manual_seed(len(settings.targets))  # of no account
        model = a_model(CONFIG)
        add_adapters(model, settings, seed)
        return {name: layer.lora_A.detach() for name, layer in adapters(model).items()}

    everything, other = drawn(EVERYTHING, 1), drawn(EVERYTHING, 2)
    assert_same(drawn(EVERYTHING, 1), everything)
    query = drawn(LoraConfig(3, 5.0, ("query",)), 1)
    assert_same(query, {name: everything[name] for name in query})
    tensors = [*everything.values(), *other.values()]
    for number, tensor in enumerate(tensors):
        for later in tensors[number + 1 :]:
            assert tensor.shape != later.shape or not torch.equal(tensor, later)


def test_a_has_variance_one_over_inputs_and_b_is_zero() -> None:
    layer = LoraLinear(Linear(400, 50), rank=16, alpha=1.0, seed=3)
    assert layer.lora_A.std().item() == pytest.approx(1 / math.sqrt(400), rel=0.05)
    assert not layer.lora_B.any()


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (
            ("query", "values"),
            "no linear layer 'values' in this model; it has key_value, mlp_in, mlp_out, output, query",
        ),
        (("gate",), "no linear layer 'gate'"),
        (("attention",), "no linear layer 'attention'"),
        (("query", "head"), "the loss reads the head's weights directly"),
    ],
)
def test_targets_that_cannot_be_are_refused_and_leave_the_model_alone(targets: tuple[str, ...], message: str) -> None:
    model = a_model(CONFIG)
    with pytest.raises(ValueError, match=message):
        add_adapters(model, LoraConfig(targets=targets), seed=0)
    assert adapters(model) == {}
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_adapters_are_not_added_twice() -> None:
    with pytest.raises(ValueError, match="adapters already"):
        add_adapters(adapted(), EVERYTHING, seed=0)


def test_layers_of_other_attention_are_found_by_name() -> None:
    config = small_config(attention="gated")
    model = a_model(config)
    add_adapters(model, LoraConfig(targets=("gate",)), seed=0)
    assert adapters(model).keys() == {f"blocks.{block}.attention.gate" for block in (0, 1)}


class _NoMeter:
    def peak_bytes(self) -> int:
        return 0

    def forget_files(self) -> None:
        raise NotImplementedError

    def enforce_cap(self, cap_bytes: int) -> None:
        raise NotImplementedError

    def keep_within(self, planned_bytes: int) -> None:
        """Nothing is idle here."""


def _run(folder: Path, model: LanguageModel, config: TrainConfig, resume: str | None = None) -> list[float]:
    data = text_windows(folder / "data", config.sequence_length)
    checkpoints = folder / "checkpoints"
    checkpoints.mkdir(exist_ok=True)
    run = TrainingRun(model, config, a_plan(40, "reverse"), data, None, checkpoints, _NoMeter())
    if resume:
        run.resume(checkpoints / resume)
    return [report.loss for report in run.reports() if isinstance(report, StepMetrics)]


def test_a_run_trains_adapters_resumes_bit_for_bit_and_leaves_a_plain_model(tmp_path: Path) -> None:
    rates = OptimizerConfig(learning_rate=0.03)
    config = TrainConfig(
        sequence_length=96, batch_size=2, steps=20, optimizer=rates, lora=LoraConfig(rank=4), checkpoint_every=12
    )
    start = LanguageModel(TINY).initialize(0)
    model = copy.deepcopy(start)
    losses = _run(tmp_path, model, config)
    assert sum(losses[-4:]) < sum(losses[:4]) - 0.2
    assert set(adapters(model)) == {f"blocks.{b}.attention.{n}" for b in (0, 1) for n in ("query", "key_value")}

    resumed = copy.deepcopy(start)
    resumed.blocks[0].get_submodule("attention.query").get_parameter("weight").data += 1  # the checkpoint has its own
    assert _run(tmp_path, resumed, config, resume="step-00000012") == losses[12:]
    assert_same(parameters(resumed), parameters(model))

    loaded = load_model(tmp_path / "checkpoints" / "step-00000020")
    merge_adapters(model)
    assert_same(parameters(loaded), parameters(model))
