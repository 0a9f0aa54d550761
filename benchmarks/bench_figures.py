"""The figures of `make bench`, one for each section."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib as mpl

from benchmarks.bench_measure import GIB, MIB, Record, median
from benchmarks.bench_memory import CHECKPOINT, FULL, find, peak_bytes, step_seconds
from benchmarks.bench_step import FULL as FULL_STEP
from benchmarks.bench_step import SGEMM
from benchmarks.bench_targets import sgemm_share

mpl.use("Agg")
from matplotlib import pyplot as plt  # after the choice of the backend
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

INK, GREY = "#1f2937", "#9ca3af"
OURS = "#2563eb"
COLOURS = {
    "slimtune": OURS,
    "published algorithm": "#c2410c",
    "per-position recurrence": "#7c3aed",
    "performer-pytorch": "#b45309",
    "softmax SDPA": "#0f766e",
    "reverse": OURS,
    "keep": "#0891b2",
    "stride": "#6366f1",
    FULL: "#c2410c",
    CHECKPOINT: "#a16207",
}
LABEL_POINTS = 11
"""Least distance of two labels of lines."""

Line = tuple[str, Sequence[float], Sequence[float]]
"""Name, x and y."""


def draw_operator(result: Record, path: Path) -> None:
    """Milliseconds of a call against T, logarithmic both ways."""
    seconds = {int(length): by_name for length, by_name in result["seconds"].items()}
    names = list(next(iter(seconds.values())))
    lines: list[Line] = []
    for name in names:
        lengths = [length for length, by_name in seconds.items() if name in by_name]
        lines.append((name, lengths, [1_000 * median(seconds[length][name]) for length in lengths]))
    figure, axes = plt.subplots(figsize=(8, 4.6))
    _log_axis(axes)
    _tokens_axis(axes, list(seconds), "sequence length, tokens")
    axes.set_ylabel("forward and backward, ms")
    _lines(axes, lines)
    axes.set_title(f"Attention operator: {result['heads']} heads of {result['width']}, float32", loc="left")
    _save(figure, path)


def draw_step(result: Record, path: Path) -> None:
    """Seconds of an optimiser step, a panel for each configuration."""
    configurations = result["configurations"]
    figure, panels = plt.subplots(len(configurations), 1, figsize=(8, 9.6))
    for axes, (title, found) in zip(panels, configurations.items(), strict=True):
        names = [name for name in found["seconds"] if name != SGEMM]
        values = [median(found["seconds"][name]) for name in names]
        colours = [OURS if name.startswith("slimtune") else GREY for name in names]
        axes.barh(names, values, color=colours, height=0.7)
        axes.invert_yaxis()
        full = values[names.index(FULL_STEP)]
        for row, value in enumerate(values):
            note = f" {value:.3g} s" + ("" if value == full else f"  ({value / full:.2g} x)")
            axes.text(value, row, note, va="center", fontsize=8, color=INK)
        axes.set_xlim(right=1.15 * max(values))
        axes.tick_params(axis="y", length=0, labelsize=8)
        axes.spines["left"].set_visible(False)
        model = found["model"]
        axes.set_title(
            f"{title}: D {model['model_width']}, S {model['num_layers']}, {found['tokens']:,} tokens; "
            f"full step at {100 * sgemm_share(result, title):.0f} % of sgemm",
            loc="left",
            fontsize=10,
        )
    panels[-1].set_xlabel("seconds per optimiser step; in brackets, over our full step")
    _save(figure, path)


def draw_memory(result: Record, path: Path) -> None:
    """Peak memory and time per token against T."""
    methods = list(dict.fromkeys(point["method"] for point in result["points"]))
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6))
    peaks: list[Line] = []
    times: list[Line] = []
    for method in methods:
        points = [point for point in result["points"] if point["method"] == method]
        lengths = [point["tokens"] for point in points]
        peaks.append((method, lengths, [peak_bytes(point) / MIB for point in points]))
        times.append((method, lengths, [1e6 * step_seconds(point) / point["tokens"] for point in points]))
    all_lengths = sorted({point["tokens"] for point in result["points"]})
    for axes in (left, right):
        _tokens_axis(axes, all_lengths, "sequence length, tokens")
    _log_axis(left)
    left.set_ylabel("peak memory of the process, MiB")
    right.set_ylabel("step time per token, µs")
    left.margins(y=0.1)
    _lines(left, peaks)
    right.set_ylim(0, 1.15 * max(value for _, _, values in times for value in values if math.isfinite(value)))
    _lines(right, times)
    left.set_title(f"Memory (C = {result['chunk_length']} where there are chunks)", loc="left")
    right.set_title("Time", loc="left")
    _save(figure, path)


def draw_tradeoff(result: Record, path: Path) -> None:
    """Peak and time against C."""
    full = find(result["points"], method=FULL)
    figure, (above, below) = plt.subplots(2, 1, figsize=(8, 6.4), sharex=True)
    peaks: list[Line] = []
    times: list[Line] = []
    for policy in ("keep", "reverse"):
        points = [point for point in result["points"] if point["method"] == policy] + [full]
        chunks = [point["chunk_length"] for point in points]
        peaks.append((policy, chunks, [peak_bytes(point) / MIB for point in points]))
        times.append((policy, chunks, [step_seconds(point) for point in points]))
    chunks = sorted({point["chunk_length"] for point in result["points"]})
    for axes in (above, below):
        _tokens_axis(axes, chunks, "")
        axes.set_xlim(chunks[0] / 2, chunks[-1] * 1.3)
    _log_axis(above)
    above.set_ylabel("peak memory of the process, MiB")
    below.set_ylabel("seconds per step")
    below.set_xlabel("chunk length C, tokens (the last point is the full step)")
    for axes, lines in ((above, peaks), (below, times)):
        _lines(axes, lines, labels_left=True)
    below.set_ylim(bottom=0)
    above.set_title(f"Memory and time against chunk length, {result['tokens']:,} tokens", loc="left")
    _save(figure, path)


def draw_longer(result: Record, path: Path) -> None:
    """Peaks of the full step at the lengths tried, and of SLiM, below the cap."""
    figure, axes = plt.subplots(figsize=(8, 4))
    cap = result["cap_bytes"] / MIB
    tried = sorted(result["full"], key=lambda point: point["tokens"])
    lengths = [point["tokens"] for point in tried]
    fitting = [(p["tokens"], peak_bytes(p) / MIB) for p in tried if p["tokens"] <= result["full_tokens"]]
    refused = [p["tokens"] for p in tried if p["tokens"] > result["full_tokens"]]
    axes.plot(*zip(*fitting, strict=True), "o-", color=COLOURS[FULL], markersize=4)
    axes.plot(refused, [cap] * len(refused), "x", color=COLOURS[FULL], markersize=6)
    slim = result["slim"]
    axes.plot([slim["tokens"]], [peak_bytes(slim) / MIB], "o", color=OURS)
    axes.axhline(cap, color=INK, linewidth=1)
    axes.text(lengths[0], cap, f"cap {result['cap_bytes'] / GIB:.3g} GiB", va="bottom", color=INK)
    _annotate(axes, fitting[-1], f"full: {result['full_tokens']:,} tokens (x: does not run)", COLOURS[FULL], (10, -16))
    seconds = step_seconds(slim)
    _annotate(
        axes,
        (slim["tokens"], peak_bytes(slim) / MIB),
        f"SLiM: {slim['tokens']:,} tokens,\nC = {slim['chunk_length']}, {seconds:.3g} s a step",
        OURS,
        (-8, 12),
        align="right",
    )
    axes.set_xscale("log")
    axes.set_ylim(0, 1.12 * cap)
    axes.set_xlim(right=1.5 * max(*lengths, slim["tokens"]))
    axes.set_xlabel("sequence length, tokens")
    axes.set_ylabel("peak memory of the process, MiB")
    axes.set_title("Longest sequence under a cap", loc="left")
    _save(figure, path)


def _annotate(
    axes: Axes, at: tuple[float, float], text: str, colour: str, shift: tuple[float, float], align: str = "left"
) -> None:
    axes.annotate(text, at, xytext=shift, textcoords="offset points", color=colour, fontsize=9, ha=align)


def _tokens_axis(axes: Axes, ticks: Sequence[int], label: str) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [_short(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel(label)


def _short(tokens: int) -> str:
    for unit, size in (("M", 2**20), ("k", 2**10)):
        if tokens >= size and tokens % size == 0:
            return f"{tokens // size}{unit}"
    return str(tokens)


def _log_axis(axes: Axes) -> None:
    """A logarithmic y axis with plain numbers at 1, 2 and 5 of every power of ten."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def _lines(axes: Axes, lines: Sequence[Line], *, labels_left: bool = False) -> None:
    """Lines named at one of their ends. Names at the axes' edge are moved apart; one further inside goes where no other
    line is: above, below, or beside its end."""
    end = 0 if labels_left else -1
    for name, x, y in lines:
        axes.plot(x, y, "o-", color=COLOURS[name], markersize=4, linewidth=2 if COLOURS[name] == OURS else 1.4)
    axes.figure.canvas.draw()
    edge = (min if labels_left else max)(x[end] for _, x, _ in lines)
    below = -math.inf
    shift: tuple[float, float]
    for name, x, y in sorted(lines, key=lambda line: line[2][end]):
        height = _height(axes, x[end], y[end])
        if x[end] == edge:
            below = max(height, below + LABEL_POINTS)
            shift, across, up = (-7 if labels_left else 7, below - height), "right" if labels_left else "left", "center"
        else:
            others = [
                _height(axes, x[end], v[u.index(x[end])]) - height for n, u, v in lines if n != name and x[end] in u
            ]
            shift, across, up = _beside(others)
        axes.annotate(
            name,
            (x[end], y[end]),
            xytext=shift,
            textcoords="offset points",
            color=COLOURS[name],
            ha=across,
            va=up,
            fontsize=9,
            annotation_clip=False,
        )


def _height(axes: Axes, x: float, y: float) -> float:
    """Of a point, in points (1/72 inch)."""
    return float(axes.transData.transform((x, y))[1]) * 72 / axes.figure.dpi


def _beside(others: Sequence[float]) -> tuple[tuple[float, float], str, str]:
    """Offset and alignment of a name, by how far above the line's end other lines are."""
    room = 2 * LABEL_POINTS
    if not any(0 <= other < room for other in others):
        return (0, 6), "center", "bottom"
    if not any(-room < other <= 0 for other in others):
        return (4, -6), "left", "top"  # where the line has ended
    return (7, 0), "left", "center"


def _save(figure: mpl.figure.Figure, path: Path) -> None:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.title.set_color(INK)
    figure.tight_layout()
    figure.savefig(path, dpi=150, bbox_inches="tight", facecolor="white")
    plt.close(figure)


FIGURES: dict[str, Callable[[Record, Path], None]] = {
    "operator": draw_operator,
    "step": draw_step,
    "memory": draw_memory,
    "tradeoff": draw_tradeoff,
    "longer": draw_longer,
}
