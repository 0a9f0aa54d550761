"""The SLiM step: exact loss and gradients, whatever the chunks, the policy and the micro-batches."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from slim_core.config import FEATURE_MAPS, ModelConfig
from slim_core.layers.features import RELU_OFFSET, Favor, make_feature_map, orthogonal_projection
from slim_core.layers.performer import causal_linear_attention, state_contribution
from slim_core.model import Chunk, LanguageModel, States
from slim_core.planning import StatePolicy
from slim_core.reference import reference_loss
from slim_core.step import ChunkSpans, count_targets, evaluate_loss, slim_step
from tests.unit.core_support import POLICIES, a_batch, a_model, assert_close, oracle, small_config, stepped

EXACT = 1e-10
SINGLE = 1e-5

SHAPES = [  # batch, length, chunk length, micro-batch
    pytest.param(1, 150, 150, 1, id="one-chunk"),
    pytest.param(1, 150, 400, 1, id="chunk-longer-than-sequence"),
    pytest.param(1, 70, 1, 1, id="chunks-of-one"),
    pytest.param(1, 150, 64, 1, id="chunk-of-one-block"),
    pytest.param(1, 128, 64, 1, id="chunks-that-divide"),
    pytest.param(1, 150, 149, 1, id="last-chunk-of-one"),
    pytest.param(1, 150, 70, 1, id="chunks-of-two-blocks"),
    pytest.param(1, 1, 1, 1, id="sequence-of-one"),
    pytest.param(1, 2, 1, 1, id="sequence-of-two"),
    pytest.param(3, 100, 33, 3, id="batch"),
    pytest.param(3, 100, 33, 1, id="micro-batches-of-one"),
    pytest.param(5, 40, 17, 2, id="micro-batches-that-do-not-divide"),
]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("batch", "length", "chunk_length", "micro_batch"), SHAPES)
def test_exact_for_every_shape(
    batch: int, length: int, chunk_length: int, micro_batch: int, policy: StatePolicy
) -> None:
    config = small_config("elu1", num_layers=3)
    model = a_model(config, torch.float64)
    tokens, targets = a_batch(config, batch, length, ignored=0.2)
    got = stepped(model, tokens, targets, chunk_length, policy, micro_batch)
    assert_close(got, oracle(model, tokens, targets), EXACT)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("output_projection", [True, False])
@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_exact_for_every_model(feature_map: str, norm: str, output_projection: bool, policy: StatePolicy) -> None:
    config = small_config(feature_map, norm=norm, output_projection=output_projection)
    model = a_model(config, torch.float64)
    tokens, targets = a_batch(config, batch=2, length=150, ignored=0.1)
    got = stepped(model, tokens, targets, 37, policy, micro_batch=1)
    assert_close(got, oracle(model, tokens, targets), EXACT)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(data=st.data())
def test_exact_for_any_shape_and_model(data: st.DataObject) -> None:
    feature_map = data.draw(st.sampled_from(FEATURE_MAPS), label="feature map")
    heads = data.draw(st.integers(1, 3), label="H")
    changes = {
        "num_heads": heads,
        "model_width": heads * 2 * data.draw(st.integers(1, 4), label="K / 2"),
        "num_layers": data.draw(st.integers(1, 3), label="S"),
        "mlp_width": data.draw(st.integers(1, 20), label="F"),
        "vocab_size": data.draw(st.integers(2, 30), label="V"),
        "norm": data.draw(st.sampled_from(["pre", "post"]), label="norm"),
        "output_projection": data.draw(st.booleans(), label="output projection"),
        # Far above the default: the smallest epsilon makes a badly conditioned quotient of a well-posed test.
        "attention_epsilon": data.draw(st.sampled_from([1e-3, 1e-1]), label="epsilon"),
    }
    config = small_config(feature_map, **changes)
    length = data.draw(st.integers(1, 150), label="T")
    chunk_length = data.draw(st.integers(1, length + 5), label="C")
    batch = data.draw(st.integers(1, 3), label="B")
    micro_batch = data.draw(st.integers(1, batch), label="micro-batch")
    policy = data.draw(st.sampled_from(POLICIES), label="policy")
    ignored = data.draw(st.sampled_from([0.0, 0.3, 0.9]), label="share without a loss")

    model = a_model(config, torch.float64)
    tokens, targets = a_batch(config, batch, length, ignored=ignored)
    got = stepped(model, tokens, targets, chunk_length, policy, micro_batch)
    assert_close(got, oracle(model, tokens, targets), EXACT)


@pytest.mark.parametrize(("chunk_length", "policy"), [(11, "keep"), (11, "reverse"), (150, "keep")])
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_single_precision_is_close_to_double(feature_map: str, chunk_length: int, policy: StatePolicy) -> None:
    config = small_config(feature_map)
    model = a_model(config)
    tokens, targets = a_batch(config, batch=2, length=150)
    got = stepped(model, tokens, targets, chunk_length, policy, micro_batch=1)
    assert_close(got, oracle(model.double(), tokens, targets), SINGLE)


def test_hundreds_of_chunks_lose_no_digits() -> None:
    """`reverse` subtracts 255 times from a state that holds 4,096 positions."""
    config = small_config("squared", model_width=32, mlp_width=32)
    model = a_model(config)
    tokens, targets = a_batch(config, batch=1, length=4096)
    keep = stepped(model, tokens, targets, 16, "keep")
    reverse = stepped(model, tokens, targets, 16, "reverse")
    whole = stepped(model.double(), tokens, targets, 4096, "keep")
    assert_close(reverse, keep, SINGLE)
    assert_close(keep, whole, SINGLE)
    assert_close(reverse, whole, SINGLE)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_reverse_is_keep_bit_for_bit(feature_map: str, precision: torch.dtype) -> None:
    """What `reverse` recovers is what pass 1 had, or the rounding of one layer would be another chunk's in the next:
    in bfloat16 that would grow from chunk to chunk."""
    config = small_config(feature_map, num_layers=4)
    model = a_model(config)
    model.compute_dtype = precision
    tokens, targets = a_batch(config, batch=2, length=512)
    keep_loss, keep = stepped(model, tokens, targets, 4, "keep")
    loss, reverse = stepped(model, tokens, targets, 4, "reverse")
    assert loss == keep_loss
    assert [name for name in keep if not torch.equal(keep[name], reverse[name])] == []


def test_a_state_is_recovered_to_the_last_digit() -> None:
    """Of chunks whose features differ in size by 1e8: a small contribution has digits that a large state in float64 has
    not, unless both are on the grid."""
    generator = torch.Generator().manual_seed(0)
    chunks = [[torch.randn(1, 2, 64, 16, generator=generator) for _ in range(2)] for _ in range(200)]
    chunks = [[k.square() * 10.0 ** (-8 * (n % 2)), v] for n, (k, v) in enumerate(chunks)]
    states = [torch.zeros(1, 2, 16, 17, dtype=torch.float64)]
    for k, v in chunks:
        _, state = causal_linear_attention(k, k, v, states[-1], 1e-6)
        states.append(state)
    state = states.pop()
    for k, v in reversed(chunks):
        state = state - state_contribution(k, v)
        assert torch.equal(state, states.pop())


def test_gradients_are_added_to_what_is_there() -> None:
    config = small_config()
    model = a_model(config, torch.float64)
    tokens, targets = a_batch(config, batch=1, length=40)
    _, once = stepped(model, tokens, targets, 16, "reverse")
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    slim_step(model, tokens, targets, chunk_length=16, state_policy="reverse", normaliser=40)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, once[name] + 1)


class Journal:
    """What `slim_step` does, in order: `between`, `advance START`, `forward START`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, give_up_at: int | None = None) -> None:
        self.entries: list[str] = []
        self._give_up_at = give_up_at
        forward, advance = LanguageModel.forward_chunk, LanguageModel.advance

        def forward_chunk(model: LanguageModel, tokens: Tensor, start: int, states: States, **options: Any) -> Chunk:
            self.entries.append(f"forward {start}")
            return forward(model, tokens, start, states, **options)

        def advance_states(model: LanguageModel, tokens: Tensor, start: int, states: States, **options: Any) -> States:
            self.entries.append(f"advance {start}")
            return advance(model, tokens, start, states, **options)

        monkeypatch.setattr(LanguageModel, "forward_chunk", forward_chunk)
        monkeypatch.setattr(LanguageModel, "advance", advance_states)

    def between_chunks(self) -> None:
        if self.entries.count("between") + 1 == self._give_up_at:
            raise InterruptedError
        self.entries.append("between")


@pytest.mark.parametrize("policy", ["keep", "reverse"])
def test_the_two_passes(policy: StatePolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pass 1 leaves out the last chunk; a stop is possible before every chunk of both passes."""
    journal = Journal(monkeypatch)
    config = small_config()
    tokens, targets = a_batch(config, batch=1, length=35)
    model = a_model(config)
    slim_step(
        model,
        tokens,
        targets,
        chunk_length=10,
        state_policy=policy,
        normaliser=35,
        between_chunks=journal.between_chunks,
    )
    pass_1 = ["advance 0", "advance 10", "advance 20"]
    pass_2 = ["forward 30", "forward 20", "forward 10", "forward 0"]
    assert journal.entries[1::2] == pass_1 + pass_2
    assert set(journal.entries[::2]) == {"between"}


@pytest.mark.parametrize("policy", POLICIES)
def test_the_first_chunk_starts_from_exact_zeros(policy: StatePolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not from what is left of a difference that should come to zero."""
    first_entries: list[Tensor] = []
    forward = LanguageModel.forward_chunk

    def forward_chunk(model: LanguageModel, tokens: Tensor, start: int, states: States, **options: Any) -> Chunk:
        chunk = forward(model, tokens, start, states, **options)
        if start == 0:
            first_entries.extend(chunk.entry_states)
        return chunk

    monkeypatch.setattr(LanguageModel, "forward_chunk", forward_chunk)
    config = small_config()
    stepped(a_model(config, torch.float64), *a_batch(config, batch=1, length=300), 10, policy)
    assert len(first_entries) == config.num_layers
    assert not any(state.any() for state in first_entries)


@pytest.mark.parametrize("give_up_at", range(1, 8))
def test_gives_up_before_any_chunk(give_up_at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(monkeypatch, give_up_at)
    config = small_config()
    tokens, targets = a_batch(config, batch=1, length=35)
    with pytest.raises(InterruptedError):
        slim_step(
            a_model(config),
            tokens,
            targets,
            chunk_length=10,
            state_policy="keep",
            normaliser=35,
            between_chunks=journal.between_chunks,
        )
    assert len(journal.entries) == 2 * (give_up_at - 1)


def test_one_chunk_is_one_forward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(monkeypatch)
    config = small_config()
    tokens, targets = a_batch(config, batch=1, length=35)
    slim_step(a_model(config), tokens, targets, chunk_length=35, state_policy="keep", normaliser=35)
    assert journal.entries == ["forward 0"]


@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
@pytest.mark.parametrize("chunk_length", [1, 16, 64, 99, 100, 1000])
def test_evaluation_is_the_reference_for_every_chunk_length(feature_map: str, chunk_length: int) -> None:
    config = small_config(feature_map)
    model = a_model(config, torch.float64)
    tokens, targets = a_batch(config, batch=2, length=100, ignored=0.3)
    wanted = reference_loss(model, tokens, targets).item() * count_targets(targets)
    assert evaluate_loss(model, tokens, targets, chunk_length=chunk_length) == pytest.approx(wanted, rel=EXACT)
    assert all(parameter.grad is None for parameter in model.parameters())


class _Made(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Shapes of the tensors that are made, views of the model's own apart."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in pytree.tree_leaves(result):
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in self._own:
                self.shapes.add(tuple(x.shape))
        return result


def test_evaluation_makes_no_gradients() -> None:
    """Not of the head either, whose gradient comes with the loss: a vocabulary's worth that no plan counts."""
    config = small_config(vocab_size=701)
    model = a_model(config)
    tokens, targets = a_batch(config, batch=1, length=20)
    with _Made(model) as made:
        evaluate_loss(model, tokens, targets, chunk_length=10)
    assert (10, 701) in made.shapes
    assert not {(701, 16), (16, 701)} & made.shapes


def test_chunk_spans() -> None:
    spans = ChunkSpans(10, 4)
    assert list(spans) == [slice(0, 4), slice(4, 8), slice(8, 10)]
    assert list(reversed(spans)) == [slice(8, 10), slice(4, 8), slice(0, 4)]
    assert len(spans) == 3
    assert list(ChunkSpans(8, 4)) == [slice(0, 4), slice(4, 8)]
    assert list(ChunkSpans(3, 4)) == [slice(0, 3)]
    with pytest.raises(ValueError, match="chunk_length"):
        ChunkSpans(3, 0)


@pytest.mark.parametrize(
    ("named", "changes"),
    [
        ("targets", {"targets": torch.tensor([[1, 2, -1, 3]])}),
        ("normaliser", {"normaliser": 0}),
        ("stride", {"stride": 0}),
        ("state_policy", {"state_policy": "forget"}),
        ("chunk_length", {"chunk_length": 0}),
    ],
)
def test_a_bad_argument_is_named(named: str, changes: dict[str, Any]) -> None:
    """None of these is taken for something else: -1 would be token 0, a negative stride another chunk."""
    row = torch.tensor([[1, 2, 3, 4]])
    good: dict[str, Any] = {"targets": row, "chunk_length": 4, "state_policy": "keep", "normaliser": 4}
    with pytest.raises(ValueError, match=named):
        slim_step(a_model(small_config()), row, **(good | changes))


@pytest.mark.parametrize("output_projection", [True, False])
@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_the_configuration_counts_what_the_model_holds(feature_map: str, norm: str, output_projection: bool) -> None:
    config = small_config(feature_map, norm=norm, output_projection=output_projection)
    model = LanguageModel(config)
    assert config.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    states = model.initial_states(3, 40)
    assert len(states) == config.num_layers
    assert {state.numel() for state in states} == {3 * config.state_size}


def attention_inputs(length: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and an entry state that a past could have left, in float64."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    q, k, v = drawn(2, 2, length, 3) + 0.1, drawn(2, 2, length, 3) + 0.1, drawn(2, 2, length, 2) - 0.5
    return q, k, v, state_contribution(drawn(2, 2, 7, 3), drawn(2, 2, 7, 2) - 0.5)


@pytest.mark.parametrize("length", [1, 5, 63, 64, 65, 128, 150])
def test_attention_is_the_recurrence(length: int) -> None:
    """The definition, one position after the other (docs/algorithm.md)."""
    q, k, v, entry = attention_inputs(length)
    out, exit_state = causal_linear_attention(q, k, v, entry, 1e-3)
    state = entry
    for t in range(length):
        v1 = torch.cat([v[:, :, t], torch.ones(2, 2, 1)], dim=-1)
        state = state + k[:, :, t, :, None] * v1[:, :, None, :]
        sums = torch.einsum("bhm,bhmk->bhk", q[:, :, t], state)
        torch.testing.assert_close(out[:, :, t], sums[..., :2] / (sums[..., 2:] + 1e-3))
    torch.testing.assert_close(exit_state, state)
    torch.testing.assert_close(entry + state_contribution(k, v), exit_state, rtol=0, atol=0)
    narrow = entry.float().double(), k.float(), v.float()
    _, exit_state = causal_linear_attention(q.float(), narrow[1], narrow[2], narrow[0], 1e-3)
    torch.testing.assert_close(exit_state, state, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("length", [1, 5, 64, 70])
def test_attention_backward(length: int) -> None:
    """Of both outputs, with respect to all four inputs, numerically."""
    inputs = [x[:1, :1].clone().requires_grad_() for x in attention_inputs(length)]
    assert torch.autograd.gradcheck(lambda q, k, v, entry: causal_linear_attention(q, k, v, entry, 1e-3), inputs)


@pytest.mark.parametrize(
    ("feature_map", "wanted"),
    [
        ("squared", lambda x: x**2),
        ("relu", lambda x: x.clamp(min=0) + RELU_OFFSET),
        ("elu1", lambda x: torch.where(x > 0, x + 1, x.exp())),
    ],
)
def test_elementwise_feature_maps(feature_map: str, wanted: object) -> None:
    assert callable(wanted)
    x = torch.linspace(-3, 3, 24).view(2, 3, 4)
    features = make_feature_map(small_config(feature_map), layer=0)
    for is_query in (True, False):
        torch.testing.assert_close(features(x, is_query=is_query), wanted(x))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
def test_elu1_keeps_its_digits_far_below_zero(dtype: torch.dtype, tolerance: float) -> None:
    x = torch.tensor([-30.0, -10.0, -5.0, -3.0, 0.0, 2.0], dtype=dtype, requires_grad=True)
    features = make_feature_map(small_config("elu1"), layer=0)(x, is_query=False)
    wanted = [math.exp(-30), math.exp(-10), math.exp(-5), math.exp(-3), 1.0, 3.0]
    assert features.tolist() == pytest.approx(wanted, rel=tolerance)
    features.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == pytest.approx([*wanted[:5], 1.0], rel=tolerance)


def test_favor_rows_are_orthogonal_with_gaussian_norms() -> None:
    projection = orthogonal_projection(num_features=800, head_width=8, seed=3).double()
    assert projection.shape == (800, 8)
    for block in projection.view(-1, 8, 8):
        gram = block @ block.T
        torch.testing.assert_close(gram, torch.diag(gram.diagonal()), atol=1e-5, rtol=0)
    norms = projection.norm(dim=1)
    # |w|^2 is chi-squared with K degrees of freedom: mean 8, variance 16.
    assert norms.square().mean().item() == pytest.approx(8, rel=0.1)
    assert norms.square().var().item() == pytest.approx(16, rel=0.3)


def test_favor_is_drawn_from_its_seed_and_layer() -> None:
    def projections(config: ModelConfig) -> list[Tensor]:
        return [tensor for name, tensor in LanguageModel(config).state_dict().items() if name.endswith("projection")]

    config = small_config("favor", feature_seed=5)
    torch.manual_seed(1)
    first = projections(config)
    torch.manual_seed(2)
    second = projections(config)
    other = projections(small_config("favor", feature_seed=6))
    assert len(first) == config.num_layers
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], first[1])
    assert not any(torch.equal(a, b) for a in first for b in other)


def test_favor_is_an_unbiased_softmax_kernel() -> None:
    """With ever more features the error falls to nothing, which a skewed projection would not let it do."""
    width = 8
    favor = Favor(width, num_features=65_536, seed=0).double()
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 20, width, generator=generator, dtype=torch.float64) / 2
    scores = q @ k.T / math.sqrt(width)
    kernel = favor(q, is_query=False) @ favor(k, is_query=False).T
    torch.testing.assert_close(kernel, scores.exp(), rtol=0.05, atol=0)
    weights = favor(q, is_query=True) @ favor(k, is_query=False).T
    torch.testing.assert_close(weights / weights.sum(-1, keepdim=True), scores.softmax(-1), rtol=0.05, atol=0)


def test_favor_keeps_large_inputs_finite_and_ignores_the_other_rows() -> None:
    favor = Favor(8, num_features=32, seed=0)
    x = torch.randn(40, 8, generator=torch.Generator().manual_seed(0)) * 30
    for is_query in (True, False):
        features = favor(x, is_query=is_query)
        assert features.isfinite().all()
        assert (features >= 0).all()
        torch.testing.assert_close(torch.cat([favor(row[None], is_query=is_query) for row in x]), features)
    assert (favor(x, is_query=True).amax(-1) > 0.1).all()  # a query's own maximum was taken out, not the batch's
