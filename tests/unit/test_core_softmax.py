"""Softmax attention chunk by chunk: the oracle's loss and gradients, in memory that depends on the chunk alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from slim_core.config import LoraConfig, ModelConfig
from slim_core.generate import Sampling, generate
from slim_core.layers import softmax
from slim_core.layers.dropout import Dropout
from slim_core.layers.head import IGNORED
from slim_core.model import LanguageModel, States
from slim_core.reference import reference_logits
from slim_core.step import evaluate_loss, slim_step
from slim_core.weights.lora import add_adapters
from tests.unit.core_support import POLICIES, a_batch, a_model, assert_close, oracle, small_config, stepped
from tests.unit.test_core_families import FAMILIES, GPT2, LLAMA, LLAMA3
from tests.unit.test_core_options import drawn_starts

EXACT = 1e-10
SINGLE = 1e-5


def a_config(**changes: Any) -> ModelConfig:
    return small_config(attention="softmax", **{**LLAMA, **changes})


def small_blocks(queries: int = 16, keys: int = 24, most_keys: int = 48) -> Any:
    """So that short sequences have many."""
    return mock.patch.multiple(softmax, QUERIES=queries, KEYS=keys, MOST_KEYS=most_keys)


@pytest.mark.parametrize("chunk_length", [7, 64, 149, 150, 200])
@pytest.mark.parametrize("family", FAMILIES)
def test_exact_for_every_family(family: str, chunk_length: int) -> None:
    config = small_config(attention="softmax", **FAMILIES[family])
    model = a_model(config, torch.float64)
    tokens, targets = a_batch(config, batch=2, length=150, ignored=0.1)
    wanted = oracle(model, tokens, targets)
    with small_blocks():
        assert_close(stepped(model, tokens, targets, chunk_length, "prefix", micro_batch=1), wanted, EXACT)
    assert_close(stepped(model, tokens, targets, chunk_length, "prefix"), wanted, EXACT)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(data=st.data())
def test_exact_for_any_combination(data: st.DataObject) -> None:
    kv_heads = data.draw(st.integers(1, 3), label="G")
    heads = kv_heads * data.draw(st.integers(1, 3), label="H / G")
    positions = data.draw(
        st.sampled_from(["sinusoidal", "concatenated", "learned", "rotary", "none"]), label="positions"
    )
    scaling = data.draw(st.sampled_from([None, LLAMA3, {"name": "linear", "factor": 2.0}]), label="scaling")
    config = small_config(
        attention="softmax",
        num_heads=heads,
        num_kv_heads=kv_heads,
        model_width=heads * 4 * data.draw(st.integers(1, 2), label="K / 4"),
        num_layers=data.draw(st.integers(1, 3), label="S"),
        mlp_width=data.draw(st.integers(1, 20), label="F"),
        norm=data.draw(st.sampled_from(["pre", "post", "branch"]), label="norm"),
        norm_type=data.draw(st.sampled_from(["layer", "rms"]), label="norm type"),
        norm_epsilon=1e-2,
        activation=data.draw(st.sampled_from(["gelu", "gelu_tanh", "swiglu"]), label="activation"),
        mlp_bias=data.draw(st.booleans(), label="MLP bias"),
        attention_bias=data.draw(st.booleans(), label="attention bias"),
        output_bias=data.draw(st.booleans(), label="output bias"),
        scaled_embeddings=data.draw(st.booleans(), label="scaled embeddings"),
        tied_embeddings=positions != "concatenated" and data.draw(st.booleans(), label="tied"),
        positions=positions,
        rotary_scaling=scaling if positions == "rotary" else None,
    )
    length = data.draw(st.integers(1, 150), label="T")
    chunk_length = data.draw(st.integers(1, length + 5), label="C")
    batch = data.draw(st.integers(1, 3), label="B")
    share = data.draw(st.sampled_from([0.0, 0.01, 0.1, 1.0]), label="share of positions that begin a document")
    starts = drawn_starts(batch, length, share) if share else None
    smoothing = data.draw(st.sampled_from([0.0, 0.1]), label="label smoothing")
    model = a_model(config, torch.float64)
    tokens, targets = a_batch(config, batch, length, ignored=data.draw(st.sampled_from([0.0, 0.3]), label="ignored"))

    wanted = oracle(model, tokens, targets, document_starts=starts, label_smoothing=smoothing)
    blocks = (data.draw(st.integers(1, 40), label=name) for name in ("n", "L", "most L"))
    with small_blocks(*blocks):
        got = stepped(
            model,
            tokens,
            targets,
            chunk_length,
            "prefix",
            data.draw(st.integers(1, batch), label="micro-batch"),
            in_place=data.draw(st.booleans(), label="gradients in place"),
            document_starts=starts,
            label_smoothing=smoothing,
        )
    assert_close(got, wanted, EXACT)


@pytest.mark.parametrize("chunk_length", [1, 11, 150])
@pytest.mark.parametrize("changes", [{}, {"rotary_scaling": LLAMA3}, {**GPT2, "num_kv_heads": None}])
def test_single_precision_is_close_to_double(changes: dict[str, Any], chunk_length: int) -> None:
    config = a_config(**changes)
    model = a_model(config)
    tokens, targets = a_batch(config, batch=2, length=150)
    starts = drawn_starts(2, 150, 0.02)
    with small_blocks():
        got = stepped(model, tokens, targets, chunk_length, "prefix", 1, document_starts=starts)
    assert_close(got, oracle(model.double(), tokens, targets, document_starts=starts), SINGLE)


TRAINED = [
    ("blocks.0.attention.query",),
    ("blocks.0.attention.key_value",),
    ("blocks.2.attention.query", "blocks.2.attention.key_value"),
    ("attention.query",),
    ("attention.key_value", "norm"),
    ("blocks.0.mlp_in", "blocks.1.attention.key_value"),
    ("blocks.2.mlp_out",),
    ("embedding",),
]


@pytest.mark.parametrize("trained", TRAINED, ids="-".join)
def test_exact_where_only_some_weights_are_trained(trained: tuple[str, ...]) -> None:
    config = a_config(num_layers=3)
    model = a_model(config, torch.float64)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in name for part in trained))
    tokens, targets = a_batch(config, batch=2, length=60)
    for in_place in (True, False):
        with small_blocks():
            got = stepped(model, tokens, targets, 17, "prefix", in_place=in_place)
        assert_close(got, oracle(model, tokens, targets), EXACT)


def collected(model: LanguageModel, tokens: Tensor, targets: Tensor, chunk_length: int) -> States:
    """The states of a step, with what it has left there."""
    states = model.initial_states(*tokens.shape)
    with mock.patch.object(LanguageModel, "initial_states", return_value=states):
        stepped(model, tokens, targets, chunk_length, "prefix")
    return states


@pytest.mark.parametrize(
    ("targets", "with_gradient"),
    [(("query",), [False, True, True]), (("key_value",), [True] * 3), (("mlp_in",), [False, True, True])],
)
def test_a_gradient_buffer_exists_only_where_keys_need_one(targets: tuple[str, ...], with_gradient: list[bool]) -> None:
    config = a_config(num_layers=3)
    model = a_model(config)
    add_adapters(model, LoraConfig(rank=2, targets=targets), seed=0)
    states = collected(model, *a_batch(config, batch=1, length=50), 20)
    assert [state.grad is not None for state in states] == with_gradient


def test_the_state_is_keys_and_values_in_the_precision_of_activations() -> None:
    config = a_config()
    model = a_model(config)
    model.compute_dtype = torch.bfloat16
    states = collected(model, *a_batch(config, batch=3, length=50), 20)
    shape = (2, 3, config.kv_heads, 50, config.head_width)
    assert {(state.dtype, tuple(state.shape)) for state in states} == {(torch.bfloat16, shape)}
    # A sum over chunks, of which eight bits would lose the small ones.
    assert {state.grad.dtype for state in states if state.grad is not None} == {torch.float32}


class _Made(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The largest storage that an operation returns, those that exist before apart."""

    def __init__(self, known: States) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._known = {state.untyped_storage().data_ptr() for state in known}
        self.largest_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self._known:
                self.largest_bytes = max(self.largest_bytes, tensor.untyped_storage().nbytes())
        return result


def test_memory_of_a_chunk_does_not_grow_with_its_position() -> None:
    """Neither what autograd saves nor the largest tensor made on the way, forward and backward."""
    config = a_config(num_layers=2)
    model = a_model(config)
    length, total = 64, 4096
    tokens, targets = a_batch(config, batch=1, length=length)
    states = model.initial_states(1, total)
    for state in states:
        state.normal_(generator=torch.Generator().manual_seed(0))
        state.grad = torch.zeros_like(state)
    known = [*states, *(state.grad for state in states if state.grad is not None)]

    def measured(start: int) -> tuple[int, int]:
        saved: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with _Made(known) as made:
            with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
                chunk = model.forward_chunk(tokens.long(), start, states)
                loss = model.loss(chunk.hidden, targets.long())
            loss.backward()  # type: ignore[no-untyped-call]
        assert not saved.keys() & {tensor.untyped_storage().data_ptr() for tensor in known}
        return sum(saved.values()), made.largest_bytes

    with small_blocks():
        at_start, at_end = measured(2 * length), measured(total - length)
    assert at_start == at_end
    assert at_end[1] < 4 * length * total


def test_other_documents_keys_are_never_read() -> None:
    starts = torch.zeros(1, 400, dtype=torch.bool)
    starts[0, [130, 300]] = True
    first = torch.where(starts, torch.arange(400), 0).cummax(1).values[:, 200:]
    with small_blocks(queries=100, keys=50):
        tiles = softmax._Tiles(200, 200, first, torch.device("cpu"))
        spans = [[(b.keys.start, b.keys.stop, b.hidden is None) for b in tiles.blocks(q)] for q in tiles.queries()]
    assert spans == [
        [(200, 300, False), (130, 180, True), (180, 200, True)],  # 200 to 299, of the document from 130 on
        [(300, 400, False)],
    ]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_documents_in_one_row_are_documents_in_rows_of_their_own(family: str) -> None:
    config = small_config(attention="softmax", **FAMILIES[family])
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
    packed = stepped(model, tokens, targets, 50, "prefix", document_starts=starts)
    assert_close(packed, stepped(model, padded_tokens, padded_targets, 30, "prefix"), EXACT)


@pytest.mark.parametrize(("chunk_length", "micro_batch"), [(1, 3), (37, 2), (64, 3), (100, 1)])
def test_dropout_is_the_same_under_every_plan(chunk_length: int, micro_batch: int) -> None:
    config = a_config()
    model = a_model(config, torch.float64)
    tokens, targets = a_batch(config, batch=3, length=150)
    dropout = Dropout(rate=0.3, seed=1, step=5, first_row=0)
    got = stepped(model, tokens, targets, chunk_length, "prefix", micro_batch, dropout=dropout)
    assert_close(got, stepped(model, tokens, targets, 150, "prefix", dropout=dropout), EXACT)


def test_a_second_step_of_opposite_weight_takes_the_first_away() -> None:
    config = a_config()
    model = a_model(config, torch.float64)
    tokens, targets = a_batch(config, batch=1, length=100)
    _, once = stepped(model, tokens, targets, 30, "prefix")
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for chunk_length, weight in ((30, 1.0), (13, -1.0)):
        slim_step(
            model,
            tokens,
            targets,
            chunk_length=chunk_length,
            state_policy="prefix",
            normaliser=100,
            weight=weight,
        )
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.norm() <= EXACT * once[name].norm(), name


def test_the_same_step_has_the_same_bits() -> None:
    config = a_config()
    model = a_model(config)
    tokens, targets = a_batch(config, batch=2, length=300)
    (loss, once), (again_loss, again) = (stepped(model, tokens, targets, 90, "prefix") for _ in range(2))
    assert loss == again_loss
    assert all(torch.equal(once[name], again[name]) for name in once)


def test_bfloat16_does_not_depend_on_the_plan() -> None:
    """Beyond what rounding to eight bits does, even with one chunk a position."""
    config = a_config(model_width=64, mlp_width=64)
    model = a_model(config)
    tokens, targets = a_batch(config, batch=2, length=150)
    wide = stepped(model, tokens, targets, 150, "prefix")
    model.compute_dtype = torch.bfloat16
    whole = stepped(model, tokens, targets, 150, "prefix")
    assert whole[0] != wide[0]
    assert_close(whole, wide, 0.1)
    for chunk_length in (1, 64):
        assert_close(stepped(model, tokens, targets, chunk_length, "prefix"), whole, 0.1)


def test_policies_are_those_of_the_attention() -> None:
    tokens, targets = a_batch(small_config(), batch=1, length=30)
    for policy in POLICIES:
        with pytest.raises(ValueError, match=rf"state_policy: .* allows prefix, not {policy}"):
            stepped(a_model(a_config()), tokens, targets, 10, policy)
    with pytest.raises(ValueError, match=r"state_policy: .* not prefix"):
        stepped(a_model(small_config()), tokens, targets, 10, "prefix")


def test_evaluation_sees_borders_too() -> None:
    config = a_config()
    model = a_model(config, torch.float64)
    tokens, targets = a_batch(config, batch=2, length=80)
    starts = drawn_starts(2, 80, 0.05)
    wanted, _ = oracle(model, tokens, targets, document_starts=starts)
    got = evaluate_loss(model, tokens, targets, chunk_length=30, document_starts=starts)
    assert got / targets.numel() == pytest.approx(wanted, rel=EXACT)


@pytest.mark.parametrize("attention", ["softmax", "performer"])
def test_generation_takes_the_oracle_s_most_likely_tokens(attention: Any) -> None:
    config = replace(a_config(), attention=attention)
    model = a_model(config, torch.float64)
    prompt = a_batch(config, batch=1, length=30)[0][0].tolist()
    greedy = Sampling(temperature=0.0)
    sample = list(
        generate(model, prompt, max_tokens=10, end_of_document=-1, vocab_size=config.vocab_size, sampling=greedy)
    )
    assert len(sample) == 10
    logits = reference_logits(model, torch.tensor([[*prompt, *sample]]))
    assert logits[0, len(prompt) - 1 : -1].argmax(-1).tolist() == sample


def test_a_state_has_room_for_its_sequence_and_no_more() -> None:
    model = a_model(a_config())
    tokens, _ = a_batch(model.config, batch=1, length=30)
    with pytest.raises(ValueError, match=r"length: .* room for 29 positions, not for 30"):
        model.forward_chunk(tokens.long(), 0, model.initial_states(1, 29))
