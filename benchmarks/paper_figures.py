"""The pictures of docs/paper.md: lines labelled where they end, logarithmic axes where ratios are what matters."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes

from benchmarks.paper_runs import BITS

mpl.use("Agg")
from matplotlib import pyplot as plt  # after the choice of the backend

Result = dict[str, Any]

COLOURS = ("#111827", "#2563eb", "#c2410c", "#0f766e", "#9333ea")
"""A variant's, the same in every picture: black is the whole sequence."""
DPI = 150
LABEL_HEIGHT = 0.055
"""Of one line of text, as a share of the axes' height."""
NO_DIFFERENCE = 1e-9
"""Bits. Where a logarithmic axis shows curves that are equal bit for bit."""


def draw_copying(results: list[Result], path: Path) -> None:
    """Loss and accuracy over the steps."""
    figure, (above, below) = plt.subplots(2, 1, figsize=(8.4, 6.8), sharex=True)
    steps = results[0]["steps"]
    ends_above, ends_below = [], []
    for width, colour, result in zip(_widths(results), COLOURS, results, strict=False):
        losses = smooth(result["losses_nats"], max(1, steps // 100))
        above.plot(_steps(losses, steps), losses, color=colour, linewidth=width)
        ends_above.append(float(losses[-1]))
        samples = np.array(result["accuracies"])
        shares = smooth(samples[:, 1], max(1, len(samples) // 100))
        below.plot(samples[-len(shares) :, 0], shares, color=colour, linewidth=width)
        ends_below.append(float(shares[-1]))
    above.set_yscale("log")
    above.set_ylabel("loss, nats per copied token")
    below.set_ylabel("share of tokens copied right")
    below.set_ylim(-0.03, 1.06)
    below.set_xlabel(f"step (running means over {max(1, steps // 100):,} steps)")
    for axes, ends in ((above, ends_above), (below, ends_below)):
        _finish(axes, steps)
        _label_ends(axes, steps, ends, [result["label"] for result in results])
        for step in (steps // 2, steps * 2 // 3):
            axes.axvline(step, color="#6b7280", linewidth=0.8, linestyle=":")
    below.text(steps // 2, 0.3, "switch to chunks ", color="#6b7280", fontsize=8, ha="right")
    below.text(steps * 2 // 3, 0.3, " learning rate / 10", color="#6b7280", fontsize=8)
    above.set_title("Copying 255 tokens: whole sequences and chunks")
    figure.tight_layout()
    figure.savefig(path, dpi=DPI)
    plt.close(figure)


def draw_language(results: list[Result], path: Path) -> None:
    """Bits per character over the steps, and each chunked curve's distance from the full one."""
    figure, (above, below) = plt.subplots(2, 1, figsize=(8.4, 6.8), sharex=True)
    steps = results[0]["steps"]
    window = max(1, steps // 60)
    full = np.array(results[0]["losses_nats"]) * BITS
    ends_above, ends_below = [], []
    for width, colour, result in zip(_widths(results), COLOURS, results, strict=False):
        bits = np.array(result["losses_nats"]) * BITS
        smoothed = smooth(bits, window)
        above.plot(_steps(smoothed, steps), smoothed, color=colour, linewidth=width)
        ends_above.append(float(smoothed[-1]))
        if result is not results[0]:
            apart = np.maximum(smooth(np.abs(bits - full), window), NO_DIFFERENCE)
            below.plot(_steps(apart, steps), apart, color=colour, linewidth=1.3)
            ends_below.append(float(apart[-1]))
    above.set_ylabel("training loss, bits per character")
    below.set_ylabel("difference to full, bits per character")
    below.set_yscale("log")
    below.set_xlabel(f"step (running means over {window:,} steps)")
    labels = [result["label"] for result in results]
    for axes, ends, names in ((above, ends_above, labels), (below, ends_below, labels[1:])):
        _finish(axes, steps)
        _label_ends(axes, steps, ends, names, COLOURS[len(labels) - len(names) :])
    above.set_title("Character language model: whole sequences of 1,024 and chunks")
    figure.tight_layout()
    figure.savefig(path, dpi=DPI)
    plt.close(figure)


def draw_gradients(result: Result, path: Path) -> None:
    """Relative errors of the gradient and of the state before the second chunk against the chunk length."""
    figure, (above, below) = plt.subplots(2, 1, figsize=(8.4, 6.8), sharex=True)
    lengths = result["chunk_lengths"]
    labels = [way["label"] for way in result["ways"]]
    above.set_xscale("log", base=2)
    above.invert_xaxis()
    for axes, key in ((above, "errors"), (below, "state_errors")):
        for width, colour, way in zip((4.0, 2.0, 1.3), COLOURS, result["ways"], strict=False):
            values = way[key]
            axes.plot(lengths[: len(values)], values, "o-", color=colour, linewidth=width, markersize=4)
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        axes.set_ylim(10 ** np.floor(np.log10(low)), 10 ** np.ceil(np.log10(high)))
        axes.grid(axis="y", color="#e5e7eb", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        _label_ends(axes, lengths[0], [way[key][0] for way in result["ways"]], labels)
    above.set_ylabel("error of the gradient, relative")
    below.set_ylabel("error of the state before\nthe second chunk, relative")
    below.set_xticks(lengths, [f"{length:,}" for length in lengths])
    below.set_xlabel("chunk length C (logarithmic)")
    above.set_title(f"{result['sequence_length']:,} tokens in float32 against float64")
    figure.tight_layout()
    figure.savefig(path, dpi=DPI)
    plt.close(figure)


def smooth(values: Sequence[float] | np.ndarray[Any, np.dtype[np.float64]], window: int) -> Any:
    """Running mean over `window` values, as long as there are so many before; window - 1 values shorter."""
    return np.convolve(np.asarray(values, dtype=float), np.full(window, 1 / window), mode="valid")


def spread_apart(heights: Sequence[float], gap: float) -> list[float]:
    """Heights from 0 to 1 moved apart until there is `gap` between neighbours; the first of equals comes highest."""
    order = sorted(range(len(heights)), key=lambda index: (round(heights[index] / gap), -index))
    placed: list[float] = []
    for index in order:
        placed.append(max(heights[index], placed[-1] + gap) if placed else heights[index])
    middle = sum(placed) / len(placed) - sum(heights) / len(heights)
    lowest = min(max(0.0, placed[0] - middle), max(0.0, 1.0 - (placed[-1] - placed[0])))
    shift = placed[0] - lowest
    result = [0.0] * len(heights)
    for index, height in zip(order, placed, strict=True):
        result[index] = height - shift
    return result


def _widths(results: list[Result]) -> list[float]:
    """Thick below thin, so that curves that coincide are all seen."""
    return [4.0 - 3.0 * index / max(1, len(results) - 1) for index in range(len(results))]


def _steps(smoothed: Any, steps: int) -> Any:
    return np.arange(steps - len(smoothed) + 1, steps + 1)


def _finish(axes: Axes, steps: int) -> None:
    axes.set_xlim(0, steps)
    axes.grid(axis="y", color="#e5e7eb", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_formatter(mpl.ticker.StrMethodFormatter("{x:,.0f}"))


def _label_ends(
    axes: Axes, x: float, ends: Sequence[float], labels: Sequence[str], colours: Sequence[str] = COLOURS
) -> None:
    """Each label in its line's colour beside the line's end, moved as far as the others ask for."""
    to_share = axes.transData + axes.transAxes.inverted()
    shares = [float(to_share.transform((x, end))[1]) for end in ends]
    for share, label, colour in zip(spread_apart(shares, LABEL_HEIGHT), labels, colours, strict=False):
        axes.text(1.012, share, label, color=colour, transform=axes.transAxes, va="center", fontsize=9)
