"""What the work of a step costs on one machine, as `slim_core.calibrate` measures it. Pure data, free of torch."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from math import log

from slim_core.config import _Json

SIZES = (1 << 10, 1 << 15, 1 << 17, 1 << 19, 1 << 21)
"""Numbers in a tensor for which a `Curve` is measured: a call's cost, one thread, all threads, beyond the caches."""
PRODUCT_ROWS = (16, 64, 512, 4096)
PRODUCT_WIDTHS = (16, 64, 256, 1024)
"""Rows and widths for which a `Table` is measured."""

Curve = tuple[float, ...]
"""Seconds of a call for a tensor of each of `SIZES`."""
Table = tuple[tuple[float, ...], ...]
"""Seconds of a product with square matrices, for each of `PRODUCT_ROWS` those for each of `PRODUCT_WIDTHS`."""


@dataclass(frozen=True, slots=True)
class Passes(_Json):
    """A function of the model, forward and backward."""

    forward: tuple[float, ...]
    backward: tuple[float, ...]
    """What a forward pass that keeps its graph and the backward pass take beyond `forward`."""


@dataclass(frozen=True, slots=True)
class Costs(_Json):
    """Seconds of every primitive in one precision. Sizes are numbers of the result unless said otherwise."""

    product: tuple[tuple[float, ...], ...]
    """Rows times weights, `slim_core.layers.linear` without gradients."""
    weight_gradient: tuple[tuple[float, ...], ...]
    """What the layer's backward pass takes beyond the product for the gradient of its input."""
    adapter_8: Passes
    """Two products with matrices of rank 8 and the sum with another layer's result."""
    adapter_32: Passes
    norm: Passes
    rms_norm: Passes
    add: Passes
    """Sum of two tensors."""
    column_sum: Passes
    """Gradient of a bias; `forward` only, size of the input."""
    heads: Passes
    """Split into heads, copied and joined again."""
    rotary: Passes
    squared: Passes
    relu: Passes
    elu1: Passes
    favor: Passes
    gelu: Passes
    gelu_tanh: Passes
    swiglu: Passes
    dropout: Passes
    """Masks of whole blocks of 64 positions."""
    embedding: Passes
    attention_32: Passes
    """Causal linear attention of heads of width 32, without what depends on its states."""
    attention_64: Passes
    softmax_32: Passes
    """A block of scores of softmax attention with heads of width 32; size is the number of scores."""
    softmax_64: Passes
    state: Passes
    """One number: seconds per number of a state, between a chunk and the next."""
    block: Passes
    """One number: seconds per block of positions, one after the other, however many heads."""
    sinusoids: Passes
    """Sines and cosines of positions; `forward` only."""
    loss: Passes
    """Cross-entropy and its gradient, in `forward`; size of the logits."""
    smoothed_loss: Passes
    """The same with label smoothing."""
    in_step: float
    """A whole step's seconds over the sum of its parts: within a step their data has left the caches."""


@dataclass(frozen=True, slots=True)
class Overheads(_Json):
    """Seconds beside the primitives, whatever the size: modules, views, the graph."""

    layer_forward: float
    layer_backward: float
    chunk_forward: float
    chunk_backward: float


@dataclass(frozen=True, slots=True)
class Update(_Json):
    """Seconds of an optimiser's update, with clipping and zeroing of the gradient."""

    per_step: float
    per_tensor: float
    per_number: float


def uniform_costs(flops_per_second: float, numbers_per_second: float, call_seconds: float) -> Costs:
    """Of a machine of which no more is known: one rate of products, one of passes over a tensor, one cost of a call."""

    def passes(forward: int, backward: int = 0, flops: tuple[int, int] = (0, 0)) -> Passes:
        """Of so many calls on the whole tensor, and so many operations a number."""
        curves = [
            tuple(
                calls * (call_seconds + numbers / numbers_per_second) + operations * numbers / flops_per_second
                for numbers in SIZES
            )
            for calls, operations in zip((forward, backward), flops, strict=True)
        ]
        return Passes(*curves)

    products = tuple(
        tuple(call_seconds + 2 * rows * width**2 / flops_per_second for width in PRODUCT_WIDTHS)
        for rows in PRODUCT_ROWS
    )
    return Costs(
        product=products,
        weight_gradient=products,
        adapter_8=passes(4, 8, flops=(32, 64)),
        adapter_32=passes(4, 8, flops=(128, 256)),
        norm=passes(2, 3),
        rms_norm=passes(3, 5),
        add=passes(1),
        column_sum=passes(1),
        heads=passes(2, 4),
        rotary=passes(4, 8),
        squared=passes(1, 2),
        relu=passes(1, 2),
        elu1=passes(3, 3),
        favor=passes(8, 12, flops=(128, 128)),
        gelu=passes(1, 2),
        gelu_tanh=passes(1, 2),
        swiglu=passes(3, 6),
        dropout=passes(6, 2),
        embedding=passes(1, 2),
        attention_32=passes(10, 25, flops=(384, 960)),
        attention_64=passes(10, 25, flops=(512, 1280)),
        softmax_32=passes(5, 9, flops=(128, 320)),
        softmax_64=passes(5, 9, flops=(256, 640)),
        state=Passes((4 / numbers_per_second,), (4 / numbers_per_second,)),
        block=Passes((2 * call_seconds,), (4 * call_seconds,)),
        sinusoids=passes(6),
        loss=passes(3),
        smoothed_loss=passes(4),
        in_step=1.0,
    )


def at_size(curve: Curve, numbers: float) -> float:
    """Between two sizes along a straight line, beyond the last one in proportion."""
    if numbers >= SIZES[-1]:
        return curve[-1] * numbers / SIZES[-1]
    upper = bisect_left(SIZES, numbers)
    if upper == 0:
        return curve[0]
    low, high = SIZES[upper - 1], SIZES[upper]
    return curve[upper - 1] + (curve[upper] - curve[upper - 1]) * (numbers - low) / (high - low)


def at_rows(table: Table, rows: float) -> Curve:
    """Seconds for each of `PRODUCT_WIDTHS`: between two counts a power of the rows, beyond the last in proportion."""
    if rows >= PRODUCT_ROWS[-1]:
        return tuple(seconds * rows / PRODUCT_ROWS[-1] for seconds in table[-1])
    upper = bisect_left(PRODUCT_ROWS, rows)
    if upper == 0:
        return table[0]
    share = log(rows / PRODUCT_ROWS[upper - 1]) / log(PRODUCT_ROWS[upper] / PRODUCT_ROWS[upper - 1])
    return tuple(a ** (1 - share) * b**share for a, b in zip(table[upper - 1], table[upper], strict=True))


def at_width(seconds: Curve, width: float) -> float:
    """Of one row of a table: between two widths a power of the width, beyond the last as its square."""
    if width >= PRODUCT_WIDTHS[-1]:
        return seconds[-1] * (width / PRODUCT_WIDTHS[-1]) ** 2
    upper = bisect_left(PRODUCT_WIDTHS, width)
    if upper == 0:
        return seconds[0]
    share = log(width / PRODUCT_WIDTHS[upper - 1]) / log(PRODUCT_WIDTHS[upper] / PRODUCT_WIDTHS[upper - 1])
    between: float = seconds[upper - 1] ** (1 - share) * seconds[upper] ** share
    return between
