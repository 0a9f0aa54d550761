"""Everything that a model or a step can be, against the oracle: positions, activations, documents, dropout, ..."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from slim_core.config import CUSTOM_FEATURE_MAPS, FEATURE_MAPS, ModelConfig
from slim_core.layers import features
from slim_core.layers.attention import Place, rotation
from slim_core.layers.documents import positions_in_documents
from slim_core.layers.dropout import Dropout
from slim_core.layers.features import FeatureMap, register_feature_map
from slim_core.layers.head import IGNORED, embed, head_loss
from slim_core.layers.linear import gradients_in_place, linear
from slim_core.layers.performer import causal_linear_attention
from slim_core.model import LanguageModel
from slim_core.planning import StatePolicy
from slim_core.step import evaluate_loss, slim_step
from tests.unit.core_support import POLICIES, Gradients, a_batch, a_model, assert_close, oracle, small_config, stepped

EXACT = 1e-10

POSITIONS = ("sinusoidal", "concatenated", "learned", "rotary", "none")

OPTIONS: list[dict[str, Any]] = [
    *({"positions": positions} for positions in POSITIONS),
    {"activation": "swiglu"},
    {"norm": "branch"},
    {"attention_bias": True, "positions": "rotary"},
    {"tied_embeddings": True},
    {"tied_embeddings": True, "positions": "learned", "activation": "swiglu", "norm": "branch"},
]


def drawn_starts(batch: int, length: int, share: float, seed: int = 0) -> Tensor:
    """(B, T) booleans: where a document begins; the first position always is one, said or unsaid."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, length, generator=generator) < share


@pytest.mark.parametrize(
    ("attention", "policy"), [*(("performer", policy) for policy in POLICIES), ("gated", "keep"), ("gated", "stride")]
)
@pytest.mark.parametrize("changes", OPTIONS, ids=lambda changes: "-".join(map(str, changes.values())))
def test_exact_for_every_option(changes: dict[str, Any], attention: str, policy: StatePolicy) -> None:
    config = small_config("elu1", attention=attention, **changes)
    model = a_model(config, torch.float64)
    tokens, targets = a_batch(config, batch=2, length=150, ignored=0.1)
    wanted = oracle(model, tokens, targets)
    assert_close(stepped(model, tokens, targets, 37, policy, micro_batch=1), wanted, EXACT)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_exact_for_any_combination(data: st.DataObject) -> None:
    attention = data.draw(st.sampled_from(["performer", "gated"]), label="attention")
    heads = data.draw(st.integers(1, 3), label="H")
    positions = data.draw(st.sampled_from(POSITIONS), label="positions")
    config = small_config(
        data.draw(st.sampled_from(FEATURE_MAPS), label="feature map"),
        attention=attention,
        num_heads=heads,
        model_width=heads * 4 * data.draw(st.integers(1, 2), label="K / 4"),
        num_layers=data.draw(st.integers(1, 3), label="S"),
        mlp_width=data.draw(st.integers(1, 20), label="F"),
        norm=data.draw(st.sampled_from(["pre", "post", "branch"]), label="norm"),
        activation=data.draw(st.sampled_from(["gelu", "swiglu"]), label="activation"),
        positions=positions,
        output_projection=data.draw(st.booleans(), label="output projection"),
        attention_bias=data.draw(st.booleans(), label="attention bias"),
        tied_embeddings=positions != "concatenated" and data.draw(st.booleans(), label="tied"),
        attention_epsilon=1e-2,
    )
    length = data.draw(st.integers(1, 150), label="T")
    chunk_length = data.draw(st.integers(1, length + 5), label="C")
    batch = data.draw(st.integers(1, 3), label="B")
    model = a_model(config, torch.float64)
    policy = data.draw(st.sampled_from(model.policies), label="policy")
    stride = data.draw(st.none() | st.integers(1, 9), label="stride")
    share = data.draw(st.sampled_from([0.0, 0.01, 0.1, 1.0]), label="share of positions that begin a document")
    starts = drawn_starts(batch, length, share) if share else None
    smoothing = data.draw(st.sampled_from([0.0, 0.1]), label="label smoothing")
    tokens, targets = a_batch(config, batch, length, ignored=data.draw(st.sampled_from([0.0, 0.3]), label="ignored"))

    wanted = oracle(model, tokens, targets, document_starts=starts, label_smoothing=smoothing)
    got = stepped(
        model,
        tokens,
        targets,
        chunk_length,
        policy,
        data.draw(st.integers(1, batch), label="micro-batch"),
        in_place=data.draw(st.booleans(), label="gradients in place"),
        stride=stride,
        document_starts=starts,
        label_smoothing=smoothing,
    )
    assert_close(got, wanted, EXACT)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("in_place", [True, False])
def test_gradients_in_place_or_new(in_place: bool, policy: StatePolicy) -> None:
    config = small_config("favor", tied_embeddings=True)
    model = a_model(config, torch.float64)
    tokens, targets = a_batch(config, batch=2, length=90)
    got = stepped(model, tokens, targets, 20, policy, in_place=in_place)
    assert_close(got, oracle(model, tokens, targets), EXACT)


def test_the_gradient_keeps_its_memory() -> None:
    """What is in place never becomes another tensor: the planner counts one gradient."""
    config = small_config()
    model = a_model(config)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = [parameter.grad.data_ptr() for parameter in model.parameters() if parameter.grad is not None]
    tokens, targets = a_batch(config, batch=1, length=30)
    slim_step(model, tokens, targets, chunk_length=10, state_policy="reverse", normaliser=30)
    assert [p.grad.data_ptr() for p in model.parameters() if p.grad is not None] == before


def test_outside_the_step_gradients_are_autograds() -> None:
    """`torch.autograd.grad` gives what was asked for and touches nothing, gradient or not."""
    weight = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    weight.grad = torch.ones_like(weight)
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(linear(x, weight).sum(), weight)
    torch.testing.assert_close(gradient, x.sum(0).expand(3, 4))
    assert torch.equal(weight.grad, torch.ones_like(weight))
    with gradients_in_place():
        out = linear(x, weight)
    out.sum().backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(weight.grad, x.detach().sum(0).expand(3, 4) + 1)


def test_linear_head_and_embedding_numerically() -> None:
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    x, weight, bias = drawn(2, 5, 4), drawn(3, 4), drawn(3)
    assert torch.autograd.gradcheck(linear, (x, weight, bias))
    table, tokens = drawn(7, 4), torch.tensor([[1, 6, 1], [0, 1, 3]])
    assert torch.autograd.gradcheck(lambda table: embed(tokens, table), (table,))
    hidden, targets = drawn(300, 4), torch.randint(7, (300,), generator=generator)
    targets[::3] = IGNORED
    for smoothing in (0.0, 0.2):
        loss = head_loss(hidden, table, targets, smoothing=smoothing, scale=0.5)
        wanted = nn.functional.cross_entropy(
            hidden @ table.T, targets, ignore_index=IGNORED, reduction="sum", label_smoothing=smoothing
        )
        torch.testing.assert_close(loss, wanted / 2)
        got = torch.autograd.grad(3 * loss, (hidden, table))
        torch.testing.assert_close(got, torch.autograd.grad(1.5 * wanted, (hidden, table)))


def test_logits_in_blocks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The result does not depend on how many rows have logits at a time."""
    monkeypatch.setattr("slim_core.layers.head.head_block_rows", lambda _: 7)
    config = small_config()
    model = a_model(config, torch.float64)
    tokens, targets = a_batch(config, batch=2, length=30, ignored=0.2)
    assert_close(stepped(model, tokens, targets, 20, "keep"), oracle(model, tokens, targets), EXACT)


@pytest.mark.parametrize("attention", ["performer", "gated"])
def test_documents_in_one_row_are_documents_in_rows_of_their_own(attention: str) -> None:
    """Packing changes nothing: not the loss, not the gradient. The padding of the rows does not either."""
    config = small_config("squared", attention=attention, positions="learned")
    model = a_model(config, torch.float64)
    lengths = [1, 40, 64, 23]
    tokens, targets = a_batch(config, batch=1, length=sum(lengths))
    starts = torch.zeros(tokens.shape, dtype=torch.bool)
    padded_tokens = torch.zeros(len(lengths), max(lengths), dtype=torch.int32)
    padded_targets = torch.full_like(padded_tokens, IGNORED)
    first = 0
    for row, length in enumerate(lengths):
        starts[0, first] = True
        padded_tokens[row, :length] = tokens[0, first : first + length]
        padded_targets[row, :length] = targets[0, first : first + length]
        first += length
    packed = stepped(model, tokens, targets, 50, "keep", document_starts=starts)
    assert_close(packed, stepped(model, padded_tokens, padded_targets, 30, "keep"), EXACT)
    if attention == "performer":
        assert_close(stepped(model, tokens, targets, 50, "reverse", document_starts=starts), packed, EXACT)


def test_evaluation_sees_borders_too() -> None:
    config = small_config("relu")
    model = a_model(config, torch.float64)
    tokens, targets = a_batch(config, batch=2, length=80)
    starts = drawn_starts(2, 80, 0.05)
    wanted, _ = oracle(model, tokens, targets, document_starts=starts)
    got = evaluate_loss(model, tokens, targets, chunk_length=30, document_starts=starts)
    assert got / targets.numel() == pytest.approx(wanted, rel=EXACT)


def test_positions_in_documents() -> None:
    starts = torch.tensor([[0, 0, 1, 0, 0, 1, 1, 0], [1, 0, 0, 0, 0, 0, 0, 0]], dtype=torch.bool)
    wanted = [[0, 1, 0, 1, 2, 0, 0, 1], [0, 1, 2, 3, 4, 5, 6, 7]]
    assert positions_in_documents(starts).tolist() == wanted


# Dropout


def with_dropout(
    config: ModelConfig, chunk_length: int, policy: StatePolicy, **options: int
) -> tuple[float, Gradients]:
    model = a_model(config, torch.float64)
    tokens, targets = a_batch(config, batch=3, length=150)
    dropout = Dropout(rate=0.3, seed=options.get("seed", 1), step=options.get("step", 5), first_row=0)
    micro_batch = options.get("micro_batch", 3)
    return stepped(model, tokens, targets, chunk_length, policy, micro_batch, dropout=dropout)


@pytest.mark.parametrize(
    ("chunk_length", "policy", "micro_batch"),
    [(1, "reverse", 3), (37, "reverse", 2), (37, "stride", 1), (64, "keep", 3), (100, "keep", 1), (149, "reverse", 3)],
)
@pytest.mark.parametrize("norm", ["pre", "post", "branch"])
def test_dropout_is_the_same_under_every_plan(
    norm: str, chunk_length: int, policy: StatePolicy, micro_batch: int
) -> None:
    config = small_config("squared", norm=norm)
    got = with_dropout(config, chunk_length, policy, micro_batch=micro_batch)
    assert_close(got, with_dropout(config, 150, "keep"), EXACT)


def test_dropout_changes_with_everything_it_should() -> None:
    x = torch.ones(2, 70, 16)
    dropout = Dropout(rate=0.5, seed=1, step=2, first_row=3)
    kept = dropout(x, 0, 0, "mlp")
    others = [
        replace(dropout, seed=2)(x, 0, 0, "mlp"),
        replace(dropout, step=3)(x, 0, 0, "mlp"),
        replace(dropout, first_row=5)(x, 0, 0, "mlp"),
        dropout(x, 70, 0, "mlp"),
        dropout(x, 0, 1, "mlp"),
        dropout(x, 0, 0, "attention"),
    ]
    assert not any(torch.equal(kept, other) for other in others)
    assert not torch.equal(kept[0], kept[1])
    assert torch.equal(replace(dropout, first_row=4)(x[:1], 0, 0, "mlp")[0], kept[1])
    assert torch.equal(dropout(x[:, 5:], 5, 0, "mlp"), kept[:, 5:])


def test_dropout_keeps_the_mean_and_drops_its_share() -> None:
    x = torch.ones(1, 6_400, 16, requires_grad=True)
    kept = Dropout(rate=0.25, seed=0, step=0, first_row=0)(x, 0, 0, "mlp")
    assert sorted(set(kept.flatten().tolist())) == [0.0, pytest.approx(4 / 3)]
    assert (kept == 0).float().mean().item() == pytest.approx(0.25, abs=0.01)
    kept.sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    assert torch.equal(x.grad, kept)


# Policies and kinds of attention


@pytest.mark.parametrize("stride", [1, 2, 3, 7, 8, 100])
def test_every_stride(stride: int) -> None:
    config = small_config("squared")
    model = a_model(config, torch.float64)
    tokens, targets = a_batch(config, batch=1, length=150)
    got = stepped(model, tokens, targets, 20, "stride", stride=stride)
    assert_close(got, oracle(model, tokens, targets), EXACT)


def test_stride_recomputes_each_chunk_once_more() -> None:
    config = small_config()
    model = a_model(config)
    tokens, targets = a_batch(config, batch=1, length=100)
    calls: list[int] = []
    slim_step(
        model,
        tokens,
        targets,
        chunk_length=10,
        state_policy="stride",
        stride=3,
        normaliser=100,
        between_chunks=lambda: calls.append(1),
    )
    # 9 in pass 1, 10 in pass 2; of the groups 0-2, 3-5 and 6-8 all but the last one of each again.
    assert len(calls) == 9 + 10 + 6


def test_a_decayed_state_cannot_be_reversed() -> None:
    config = small_config(attention="gated")
    tokens, targets = a_batch(config, batch=1, length=30)
    with pytest.raises(ValueError, match=r"state_policy: .* allows keep and stride, not reverse"):
        stepped(a_model(config), tokens, targets, 10, "reverse")
    stepped(a_model(config), tokens, targets, 30, "reverse")  # one chunk: nothing to reverse


def test_positions_that_were_not_learned() -> None:
    config = small_config(positions="learned")
    tokens, targets = a_batch(config, batch=1, length=151)
    with pytest.raises(ValueError, match=r"max_positions: .* only 150"):
        stepped(a_model(config), tokens, targets, 50, "keep")
    starts = torch.zeros(tokens.shape, dtype=torch.bool)
    starts[0, 100] = True  # two documents, neither longer than what was learned
    model = a_model(config, torch.float64)
    got = stepped(model, tokens, targets, 50, "keep", document_starts=starts)
    assert_close(got, oracle(model, tokens, targets, document_starts=starts), EXACT)


def test_rotary_turns_queries_against_keys_by_their_distance() -> None:
    """Before any feature map a score depends on the distance alone."""
    q, k = torch.randn(2, 1, 1, 1, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def score(query_position: int, key_position: int) -> float:
        places = [
            Place(0, None, None, rotation(torch.tensor([position]), 8, torch.float64))
            for position in (query_position, key_position)
        ]
        return float(places[0].rotated(q) @ places[1].rotated(k).mT)

    assert score(7, 3) == pytest.approx(score(1_000_007, 1_000_003), rel=1e-8)
    assert score(7, 3) != pytest.approx(score(7, 2), rel=1e-3)


# Precision


@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_bfloat16_is_close_and_its_gradients_are_float32(feature_map: str) -> None:
    config = small_config(feature_map, model_width=32, mlp_width=64)
    model = a_model(config)
    tokens, targets = a_batch(config, batch=2, length=150)
    loss, gradients = stepped(model, tokens, targets, 37, "reverse")
    model.compute_dtype = torch.bfloat16
    narrow_loss, narrow = stepped(model, tokens, targets, 37, "reverse")
    assert narrow_loss == pytest.approx(loss, rel=0.01)
    assert narrow_loss != loss
    for name, gradient in gradients.items():
        assert (narrow[name] - gradient).norm() < 0.1 * gradient.norm(), name
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    chunk = model.forward_chunk(tokens.long(), 0, model.initial_states(2, 150))
    assert chunk.hidden.dtype == torch.bfloat16
    assert {state.dtype for state in chunk.exit_states} == {torch.float64}
    assert model.logits(chunk.hidden).dtype == torch.float32


@pytest.mark.parametrize("policy", POLICIES)
def test_bfloat16_does_not_depend_on_the_plan(policy: StatePolicy) -> None:
    """Beyond what rounding to eight bits does to small sums."""
    config = small_config("elu1", model_width=32, mlp_width=64)
    model = a_model(config)
    model.compute_dtype = torch.bfloat16
    tokens, targets = a_batch(config, batch=2, length=150)
    assert_close(stepped(model, tokens, targets, 64, policy), stepped(model, tokens, targets, 150, "keep"), 0.1)


def test_sums_of_attention_are_wide_in_bfloat16() -> None:
    """Of 640 equal keys every output is the mean of the values: sums in eight bits would stop growing at 256."""
    q = torch.ones(1, 1, 640, 4, dtype=torch.bfloat16)
    v = torch.rand(1, 1, 640, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    out, exit_state = causal_linear_attention(q, q, v, torch.zeros(1, 1, 4, 4, dtype=torch.float64), 1e-6)
    means = v.double().cumsum(2) / torch.arange(1, 641).view(1, 1, -1, 1)
    torch.testing.assert_close(out, means.bfloat16(), rtol=2**-7, atol=0)
    torch.testing.assert_close(
        exit_state[..., :3], v.double().sum(2, keepdim=True).expand(1, 1, 4, 3), rtol=1e-6, atol=0
    )


# Feature maps


class _Cube(FeatureMap):
    """|x|^3 and one feature more."""

    def forward(self, x: Tensor, *, is_query: bool) -> Tensor:  # noqa: ARG002  # the signature of all maps
        return torch.cat([x.abs() ** 3, torch.ones_like(x[..., :1])], -1)


def test_a_feature_map_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "_factories", {})
    with pytest.raises(ValueError, match=r"feature_map: .* registered before"):
        small_config("cube")
    register_feature_map("cube", lambda _config, _layer: _Cube())
    try:
        config = small_config("cube", num_features=9)
        model = a_model(config, torch.float64)
        tokens, targets = a_batch(config, batch=2, length=100)
        for policy in POLICIES:
            assert_close(stepped(model, tokens, targets, 30, policy), oracle(model, tokens, targets), EXACT)
        for taken in ("cube", "squared"):
            with pytest.raises(ValueError, match="already"):
                register_feature_map(taken, lambda _config, _layer: _Cube())
    finally:
        CUSTOM_FEATURE_MAPS.discard("cube")


def projections(model: LanguageModel) -> list[Tensor]:
    return [tensor.clone() for name, tensor in model.state_dict().items() if name.endswith("projection")]


def test_favor_is_redrawn_on_schedule() -> None:
    config = small_config("favor", feature_redraw_steps=10, feature_seed=3)
    model = LanguageModel(config)
    first = projections(model)
    model.redraw_features(9)
    assert all(torch.equal(a, b) for a, b in zip(projections(model), first, strict=True))
    model.redraw_features(10)
    second = projections(model)
    assert not any(torch.equal(a, b) for a in first for b in second)
    model.redraw_features(35)
    other = LanguageModel(config)
    other.redraw_features(39)  # however it got there
    assert all(torch.equal(a, b) for a, b in zip(projections(model), projections(other), strict=True))
    with torch.no_grad():  # weights of another run, and its projection with them
        for buffer in (restarted := LanguageModel(config)).buffers():
            buffer.zero_()
    restarted.redraw_features(0)
    assert all(torch.equal(a, b) for a, b in zip(projections(restarted), first, strict=True))
    unscheduled = LanguageModel(replace(config, feature_redraw_steps=None))
    unscheduled.redraw_features(39)
    assert all(torch.equal(a, b) for a, b in zip(projections(unscheduled), first, strict=True))


@pytest.mark.parametrize("changes", OPTIONS, ids=lambda changes: "-".join(map(str, changes.values())))
@pytest.mark.parametrize("attention", ["performer", "gated", "softmax"])
def test_the_configuration_counts_every_weight(attention: str, changes: dict[str, Any]) -> None:
    config = small_config(attention=attention, **changes)
    model = LanguageModel(config)
    assert config.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    growing = 2 * config.kv_width if attention == "softmax" else 0
    assert {state.numel() for state in model.initial_states(3, 7)} == {3 * (config.state_size + 7 * growing)}
    assert ModelConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"positions": "learned", "max_positions": None}, "max_positions"),
        ({"max_positions": 10}, "max_positions"),
        ({"positions": "learned", "max_positions": 0}, "max_positions"),
        ({"positions": "concatenated", "model_width": 18}, "model_width"),
        ({"positions": "concatenated", "tied_embeddings": True}, "tied_embeddings"),
        ({"positions": "rotary", "model_width": 6}, "num_heads"),
        ({"feature_redraw_steps": 5}, "feature_redraw_steps"),
        ({"feature_map": "favor", "feature_redraw_steps": 0}, "feature_redraw_steps"),
        ({"feature_map": "cosine"}, "feature_map"),
        ({"attention": "quadratic"}, "attention"),
        ({"activation": "relu"}, "activation"),
    ],
)
def test_impossible_models_are_refused_by_field(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(ValueError, match=rf"^{field}:"):
        ModelConfig.from_json({**small_config().to_json(), **changes})
