"""What this machine can do: the numbers that the planner needs, measured in some ten seconds in a process of their own.

python -m slim_core.calibrate --threads 2        # one line of JSON, a `slim_core.planning.Calibration`
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from slim_core.config import ModelConfig, OptimizerConfig, Precision, TrainConfig
from slim_core.layers.attention import Place, join_heads, rotation, sinusoids, split_heads
from slim_core.layers.dropout import Dropout
from slim_core.layers.features import make_feature_map
from slim_core.layers.head import block_loss, embed
from slim_core.layers.linear import gradients_in_place, linear
from slim_core.layers.norm import LayerNorm, RmsNorm
from slim_core.layers.performer import STATE_DTYPE, causal_linear_attention
from slim_core.layers.softmax import prefix_attention
from slim_core.memory import make_meter, pick_device, private_bytes
from slim_core.model import LanguageModel, gelu_tanh, swiglu
from slim_core.optim import make_optimizer
from slim_core.planning import Calibration, Workload
from slim_core.planning.costs import PRODUCT_ROWS, PRODUCT_WIDTHS, SIZES, Costs, Overheads, Passes, Table, Update
from slim_core.planning.memory_model import Schedule
from slim_core.planning.sites import MOST_SCORE_KEYS, SCORE_QUERIES, score_block
from slim_core.planning.time_model import step_seconds
from slim_core.step import slim_step
from slim_core.tensor_heap import tensor_heap

_WARM_UP_MODEL = ModelConfig(num_layers=1, model_width=64, num_heads=1, mlp_width=128)
_WIDTH = 256
"""Of the rows that primitives are measured with."""
_HEADS = 16
_CHAIN_NUMBERS = 1 << 21
_CHAIN_WEIGHTS = 1 << 23
_LONGEST_CHAIN = 32
"""Calls are timed in a chain, on tensors of their own, so many numbers together at most: as a step passes through its
layers, whose weights are not in the caches any more when the next chunk comes."""
_CHAIN_SECONDS = 0.1
"""No more calls than take so long together."""
_LONGEST_CALL_SECONDS = 0.05
"""What takes longer is not measured at a larger size: there it has reached its rate. Without this bfloat16 alone would
take minutes on a processor that has no instructions for it."""
_LARGEST_PRODUCT = 1 << 29
"""Multiplications of the largest product measured; larger ones run at its rate."""
_REPETITIONS = 4
_LONG_SECONDS = 0.03
"""A measurement that has taken this long has fewer repetitions."""
_EPSILON = 1e-6
_BLOCKS = 2
"""Of scores, in the chunks whose softmax attention is measured."""


def warm_up(device: torch.device) -> None:
    """Two training steps of a minimal model: every library has made its first-use buffers when it returns, and the heap
    of tensors has given back what is idle."""
    _train_seconds(_WARM_UP_MODEL, device, torch.float32, chunk_length=64, num_chunks=2, repetitions=1)
    if (heap := tensor_heap()) is not None:
        heap.give_back()


def calibrate(threads: int) -> Calibration:
    """Measure runtime memory and what the work of a step costs with `threads` threads. Call in a process that has done
    nothing else."""
    torch.set_num_threads(threads)
    device = pick_device()
    warm_up(device)
    runtime_bytes = private_bytes() if device.type == "cpu" else make_meter(device).peak_bytes()
    bench = {dtype: _Bench(device, dtype) for dtype in (torch.float32, torch.bfloat16)}
    calibration = Calibration(
        source=f"measured {time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())}, torch {torch.__version__}",
        device=device.type,
        threads=threads,
        runtime_bytes=runtime_bytes,
        float32=bench[torch.float32].costs(),
        bfloat16=bench[torch.bfloat16].costs(),
        overheads=Overheads(0.0, 0.0, 0.0, 0.0),
        adamw=_update("adamw", device),
        adafactor=_update("adafactor", device),
        sgd=_update("sgd", device),
    )
    calibration = replace(calibration, overheads=_overheads(calibration, device))
    return replace(
        calibration,
        float32=replace(calibration.float32, in_step=_in_step(calibration, device, torch.float32)),
        bfloat16=replace(calibration.bfloat16, in_step=_in_step(calibration, device, torch.bfloat16)),
    )


def _seconds(
    call: Callable[[], object],
    device: torch.device,
    repetitions: int = _REPETITIONS,
    long_seconds: float = _LONG_SECONDS,
    *,
    typical: bool = False,
) -> float:
    """The least of some calls, as whatever else runs on the machine only adds; or their median, which has a share of
    it. The first call does not count, if there is time for another."""

    def once() -> float:
        started = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    once()
    taken = [once()]
    while len(taken) < repetitions and sum(taken) < long_seconds:
        taken.append(once())
    return statistics.median(taken) if typical else min(taken)


class _Bench:
    """The primitives in one precision."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device = device
        self._dtype = dtype

    def costs(self) -> Costs:
        """All of them, in isolation; `in_step` is 1."""
        device, dtype = self._device, self._dtype
        products, weight_gradients = self._products()
        norm, rms_norm = LayerNorm(_WIDTH, device=device), RmsNorm(_WIDTH, _EPSILON).to(device)
        dropout = Dropout(rate=0.1, seed=0, step=0, first_row=0)
        maps = {name: self._feature_map(name) for name in ("squared", "relu", "elu1", "favor")}
        return Costs(
            product=products,
            weight_gradient=weight_gradients,
            adapter_8=self._adapter(rank=8),
            adapter_32=self._adapter(rank=32),
            norm=self._curves(norm, self._rows),
            rms_norm=self._curves(rms_norm, self._rows),
            add=self._curves(torch.add, lambda n: [*self._rows(n), *self._rows(n)], backward=False),
            column_sum=self._curves(lambda x: x.sum((0, 1), dtype=torch.float32), self._rows, backward=False),
            heads=self._curves(
                lambda x: join_heads(split_heads(x, x.shape[2] // 64, parts=1)[0].contiguous()), self._rows
            ),
            rotary=self._curves(
                lambda x: Place(0, None, None, rotation(torch.zeros(1, device=device), 64, dtype)).rotated(x),
                self._heads,
            ),
            **maps,
            gelu=self._curves(nn.functional.gelu, self._rows),
            gelu_tanh=self._curves(gelu_tanh, self._rows),
            swiglu=self._curves(swiglu, lambda n: [torch.cat(2 * self._rows(n), -1)]),
            dropout=self._curves(lambda x: dropout(x, 0, 0, "mlp"), self._blocks),
            embedding=self._embedding(),
            attention_32=self._attention(head_width=32),
            attention_64=self._attention(head_width=64),
            softmax_32=self._softmax(head_width=32),
            softmax_64=self._softmax(head_width=64),
            state=self._state,
            block=self._block(),
            sinusoids=self._curves(
                lambda x: sinusoids(torch.arange(x.shape[1], device=device), _WIDTH, dtype), self._rows, backward=False
            ),
            loss=self._curves(lambda x, targets: _loss(x, targets, 0.0), self._logits, backward=False),
            smoothed_loss=self._curves(lambda x, targets: _loss(x, targets, 0.1), self._logits, backward=False),
            in_step=1.0,
        )

    def _random(self, *shape: int) -> Tensor:
        return torch.rand(shape, device=self._device, dtype=torch.float32).to(self._dtype)

    def _rows(self, numbers: int) -> list[Tensor]:
        return [self._random(1, numbers // _WIDTH, _WIDTH)]

    def _blocks(self, numbers: int) -> list[Tensor]:
        """At least one block of positions."""
        width = min(_WIDTH, numbers // 64)
        return [self._random(1, numbers // width, width)]

    def _heads(self, numbers: int) -> list[Tensor]:
        return [self._random(1, min(_HEADS, numbers // 64), max(1, numbers // 64 // _HEADS), 64)]

    def _logits(self, numbers: int) -> list[Tensor]:
        vocabulary = max(_WIDTH, numbers // 128)
        rows = numbers // vocabulary
        return [self._random(rows, vocabulary), torch.arange(rows, device=self._device)]

    def _curves(
        self, function: Callable[..., Tensor], make: Callable[[int], list[Tensor]], *, backward: bool = True
    ) -> Passes:
        each: list[tuple[float, float]] = []
        for number, size in enumerate(SIZES):
            larger = size / SIZES[number - 1]
            if each and sum(each[-1]) * larger > _LONGEST_CALL_SECONDS:
                each.append((each[-1][0] * larger, each[-1][1] * larger))
            else:
                calls = _CHAIN_NUMBERS // size
                each.append(self._passes(function, functools.partial(make, size), calls, backward=backward))
        return Passes(tuple(forward for forward, _ in each), tuple(after for _, after in each))

    def _passes(
        self, function: Callable[..., Tensor], make: Callable[[], list[Tensor]], calls: int, *, backward: bool = True
    ) -> tuple[float, float]:
        """Seconds of a call without a graph, and what a call with one and its backward pass take beyond that."""
        first = make()
        with torch.no_grad():
            seconds = _seconds(lambda: function(*first), self._device, repetitions=1)
        calls = min(calls, _LONGEST_CHAIN, int(_CHAIN_SECONDS / seconds))
        chain = [first, *(make() for _ in range(max(2, calls) - 1))]

        def without_graph() -> None:
            with torch.no_grad():
                for inputs in chain:
                    function(*inputs)

        forward = _seconds(without_graph, self._device) / len(chain)
        if not backward:
            return forward, 0.0
        leaves = [tensor for inputs in chain for tensor in inputs if tensor.is_floating_point() and tensor.grad is None]
        for tensor in leaves:
            tensor.requires_grad_()
        with torch.no_grad():
            grad = torch.ones_like(function(*chain[0]))

        def with_graph() -> None:
            for tensor in leaves:
                tensor.grad = None
            results = [function(*inputs) for inputs in chain]
            for result in reversed(results):
                torch.autograd.backward(result, grad)

        return forward, max(0.0, _seconds(with_graph, self._device) / len(chain) - forward)

    def _products(self) -> tuple[Table, Table]:
        forward: list[tuple[float, ...]] = []
        gradients: list[tuple[float, ...]] = []
        for number, rows in enumerate(PRODUCT_ROWS):
            each: list[tuple[float, float]] = []
            for column, width in enumerate(PRODUCT_WIDTHS):
                longer = rows / PRODUCT_ROWS[number - 1]
                slow = forward and forward[-1][column] * longer > _LONGEST_CALL_SECONDS
                if rows * width**2 > _LARGEST_PRODUCT or slow:
                    each.append((forward[-1][column] * longer, gradients[-1][column] * longer))
                else:
                    each.append(self._product(rows, width))
            forward.append(tuple(product for product, _ in each))
            gradients.append(tuple(gradient for _, gradient in each))
        return tuple(forward), tuple(gradients)

    def _product(self, rows: int, width: int) -> tuple[float, float]:
        """Seconds of a product, and of the gradient of its weights."""

        def inputs() -> list[Tensor]:
            weight = torch.ones(width, width, device=self._device, requires_grad=True)
            weight.grad = torch.zeros_like(weight)
            return [self._random(1, rows, width), weight]

        forward, after = self._passes(_in_place(linear), inputs, _CHAIN_WEIGHTS // max(rows * width, width**2))
        # The gradient of the input is another product with the weights. Neither of the two is nearly free.
        return forward, max(after / 3, after - forward)

    def _adapter(self, rank: int) -> Passes:
        down = torch.full((rank, _WIDTH), 1 / _WIDTH, device=self._device, requires_grad=True)
        up = torch.zeros(_WIDTH, rank, device=self._device, requires_grad=True)
        return self._curves(lambda x, base: base + linear(linear(x, down) * 0.5, up), lambda n: 2 * self._rows(n))

    def _feature_map(self, name: str) -> Passes:
        config = ModelConfig(num_layers=1, model_width=64, num_heads=1, mlp_width=1, feature_map=name)
        features = make_feature_map(config, layer=0).to(self._device)
        return self._curves(lambda x: features(x, is_query=True), self._heads)

    def _embedding(self) -> Passes:
        table = torch.ones(1024, _WIDTH, device=self._device, requires_grad=True)
        table.grad = torch.zeros_like(table)
        return self._curves(
            _in_place(lambda tokens: embed(tokens, table)),
            lambda n: [torch.arange(n // _WIDTH, device=self._device).remainder(1024).unsqueeze(0)],
        )

    def _attention_seconds(self, heads: int, length: int, width: int) -> tuple[float, float]:
        def inputs() -> list[Tensor]:
            entry = torch.zeros(1, heads, width, width + 1, device=self._device, dtype=STATE_DTYPE)
            return [*(self._random(1, heads, length, width) for _ in range(3)), entry]

        def attend(q: Tensor, k: Tensor, v: Tensor, entry: Tensor) -> Tensor:
            return causal_linear_attention(q, k, v, entry, _EPSILON)[0]

        return self._passes(attend, inputs, _CHAIN_NUMBERS // 4 // (heads * length * width))

    def _attention(self, head_width: int) -> Passes:
        """Of one sequence of 1,024 channels, less what its states take."""
        heads = 1024 // head_width
        state = self._state
        states = heads * head_width * (head_width + 1)
        each = [self._attention_seconds(heads, size // 1024, head_width) for size in SIZES]
        least = self._attention_seconds(1, 1, head_width)
        return Passes(
            tuple(max(least[0], forward - states * state.forward[0]) for forward, _ in each),
            tuple(max(least[1], backward - states * state.backward[0]) for _, backward in each),
        )

    def _softmax(self, head_width: int) -> Passes:
        """A block of scores: from chunks that have one block of keys before them, and that have some more. The largest
        is taken to run at the rate of the one before it."""
        each: list[list[float]] = []
        for size in SIZES[:-1]:
            queries = min(SCORE_QUERIES, max(1, size // MOST_SCORE_KEYS))
            _, keys = score_block(queries)
            heads = size // (queries * keys)
            few, many = (self._prefix_seconds(heads, queries, head_width, blocks * keys) for blocks in (1, 1 + _BLOCKS))
            each.append([max(0.0, more - less) / _BLOCKS for less, more in zip(few, many, strict=True)])
        each.append([seconds * SIZES[-1] / SIZES[-2] for seconds in each[-1]])
        return Passes(tuple(forward for forward, _ in each), tuple(backward for _, backward in each))

    def _prefix_seconds(self, heads: int, queries: int, head_width: int, start: int) -> tuple[float, float]:
        state = self._random(2, 1, heads, start + queries, head_width)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return prefix_attention(q, k, v, state, start)

        def inputs() -> list[Tensor]:
            return [self._random(1, heads, queries, head_width) for _ in range(3)]

        return self._passes(attend, inputs, _CHAIN_NUMBERS // 8 // (heads * (start + queries)))

    @functools.cached_property
    def _state(self) -> Passes:
        """From one position of many heads and of one."""
        many, one = self._attention_seconds(_HEADS, 1, 64), self._attention_seconds(1, 1, 64)
        numbers = (_HEADS - 1) * 64 * 65
        return Passes((max(0.0, many[0] - one[0]) / numbers,), (max(0.0, many[1] - one[1]) / numbers,))

    def _block(self) -> Passes:
        """From 64 blocks one after the other and side by side."""
        after, beside = self._attention_seconds(1, 4096, 16), self._attention_seconds(64, 64, 16)
        return Passes((max(0.0, after[0] - beside[0]) / 63,), (max(0.0, after[1] - beside[1]) / 63,))


def _in_place(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def call(*inputs: Tensor) -> Tensor:
        with gradients_in_place():
            return function(*inputs)

    return call


def _loss(logits: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    _, gradient = block_loss(logits, targets, smoothing, wants_gradient=True)
    assert gradient is not None
    return gradient.to(logits.dtype)


def _update(name: Any, device: torch.device) -> Update:
    """From few and many small tensors, and from large ones."""

    def seconds(width: int, count: int) -> float:
        model: Any = nn.ModuleList([nn.Linear(width, width, bias=False, device=device) for _ in range(count)])
        optimizer = make_optimizer(model, OptimizerConfig(name=name))

        def step() -> None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)

        return _seconds(step, device)

    few, many, large = seconds(8, 2), seconds(8, 34), seconds(1024, 8)
    per_tensor = max(0.0, many - few) / 32
    per_step = max(0.0, few - 2 * per_tensor)
    return Update(per_step, per_tensor, max(0.0, large - per_step - 8 * per_tensor) / (8 * 1024**2))


_TINY = (1, 5)
"""Layers of the models whose steps are all overhead."""
_TINY_LENGTH = 16


def _overheads(calibration: Calibration, device: torch.device) -> Overheads:
    """What tiny models take beyond their primitives, in one chunk and in its pass 1."""
    step, pass_1 = [], []
    for layers in _TINY:
        config = ModelConfig(num_layers=layers, model_width=64, num_heads=1, mlp_width=64, vocab_size=64)
        one = _predicted(calibration, config, "float32", _TINY_LENGTH, num_chunks=1)
        two = _predicted(calibration, config, "float32", _TINY_LENGTH, num_chunks=2)
        step.append(_train_seconds(config, device, torch.float32, _TINY_LENGTH, 1, update=False) - one)
        pass_1.append(_advance_seconds(config, device, _TINY_LENGTH) - (two - 2 * one))
    more = _TINY[1] - _TINY[0]
    layer, layer_forward = max(0.0, step[1] - step[0]) / more, max(0.0, pass_1[1] - pass_1[0]) / more
    chunk, chunk_forward = max(0.0, step[0] - layer), max(0.0, pass_1[0] - layer_forward / 2)
    return Overheads(
        layer_forward=layer_forward,
        layer_backward=max(0.0, layer - layer_forward),
        chunk_forward=chunk_forward,
        chunk_backward=max(0.0, chunk - chunk_forward),
    )


_WHOLE_MODELS = (
    (ModelConfig(num_layers=6, model_width=64, num_heads=1, mlp_width=256), 1024),
    (ModelConfig(num_layers=4, model_width=256, num_heads=4, mlp_width=1024), 512),
)
"""Models, and chunk lengths, whose steps are compared with the sum of their parts."""
_WHOLE_SECONDS = 1.0
_SMALLEST_RATIO, _LARGEST_RATIO = 0.6, 1.5
"""What is beyond is other load, of the steps or of the parts."""


def _in_step(calibration: Calibration, device: torch.device, dtype: torch.dtype) -> float:
    """The geometric mean over the models."""
    ratios = []
    for config, chunk_length in _WHOLE_MODELS:
        precision: Precision = "float32" if dtype == torch.float32 else "bfloat16"
        measured = _train_seconds(config, device, dtype, chunk_length, 2, repetitions=40, update=False, typical=True)
        ratios.append(measured / _predicted(calibration, config, precision, chunk_length, 2))
    return min(max(_SMALLEST_RATIO, math.prod(ratios) ** (1 / len(ratios))), _LARGEST_RATIO)


def _predicted(
    calibration: Calibration, config: ModelConfig, precision: Precision, chunk_length: int, num_chunks: int
) -> float:
    """Of a step without its update."""
    train = TrainConfig(
        sequence_length=chunk_length * num_chunks,
        batch_size=1,
        steps=1,
        optimizer=OptimizerConfig(name="sgd"),
        precision=precision,
    )
    nothing = replace(calibration, sgd=Update(0.0, 0.0, 0.0))
    return step_seconds(Workload(config, train), Schedule(chunk_length, "reverse", 1), nothing)


def _train_seconds(
    config: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    chunk_length: int,
    num_chunks: int,
    *,
    repetitions: int = 10,
    update: bool = True,
    typical: bool = False,
) -> float:
    """The least of some training steps, or their median; the first one does not count."""
    model = LanguageModel(config).initialize(seed=0).to(device)
    model.compute_dtype = dtype
    optimizer = make_optimizer(model, OptimizerConfig())
    length = chunk_length * num_chunks
    tokens = torch.arange(length).remainder(config.vocab_size).unsqueeze(0).to(device)

    def step() -> None:
        slim_step(model, tokens, tokens, chunk_length=chunk_length, state_policy="reverse", normaliser=length)
        if update:
            torch.nn.utils.clip_grad_norm_(model.parameters(), math.inf)
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)

    return _seconds(step, device, repetitions, _WHOLE_SECONDS, typical=typical)


def _advance_seconds(config: ModelConfig, device: torch.device, length: int) -> float:
    """Of pass 1 over one chunk."""
    model = LanguageModel(config).initialize(seed=0).to(device)
    tokens, states = torch.zeros(1, length, dtype=torch.int64, device=device), model.initial_states(1, length)

    def advance() -> None:
        with torch.no_grad():
            model.advance(tokens, 0, states)

    return _seconds(advance, device, repetitions=10)


def main() -> None:
    """Print the calibration of this machine as one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, required=True)
    print(json.dumps(calibrate(parser.parse_args().threads).to_json()))  # this is a command


if __name__ == "__main__":
    main()
