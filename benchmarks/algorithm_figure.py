"""The picture of docs/algorithm.md: both passes over the chunks of a sequence, and what is alive meanwhile.

python -m benchmarks.algorithm_figure        writes docs/figures/two_passes.svg
"""

from __future__ import annotations

from html import escape

from benchmarks.bench_measure import ROOT

FIGURE = ROOT / "docs" / "figures" / "two_passes.svg"
CHUNKS = 4
WIDTH, HEIGHT = 860, 470
LEFT, STEP, BOX_W, BOX_H = 150, 170, 118, 46
FIRST, SECOND = 70, 215
"""Tops of the rows of both passes."""
INK, DIM, STATE, GRADIENT, ALIVE = "#1b2330", "#68717f", "#1a56b0", "#a3262e", "#0f6e66"


def box(x: float, y: float, lines: tuple[str, ...], colour: str, *, solid: bool) -> str:
    fill, dash = ("#eaf4f2", "") if solid else ("#ffffff", ' stroke-dasharray="5 4"')
    text = "".join(label(x + BOX_W / 2, y + 20 + 15 * row, line, size=12) for row, line in enumerate(lines))
    return (
        f'<rect x="{x}" y="{y}" width="{BOX_W}" height="{BOX_H}" rx="6" fill="{fill}" stroke="{colour}" '
        f'stroke-width="1.6"{dash}/>{text}'
    )


def label(x: float, y: float, text: str, colour: str = INK, size: int = 13, anchor: str = "middle") -> str:
    return f'<text x="{x}" y="{y}" fill="{colour}" font-size="{size}" text-anchor="{anchor}">{escape(text)}</text>'


def heading(y: float, title: str, *below: str) -> list[str]:
    rest = [label(12, y + 38 + 14 * row, line, DIM, 11, "start") for row, line in enumerate(below)]
    return [label(12, y + 20, title, size=15, anchor="start"), *rest]


def arrow(x1: float, y1: float, x2: float, y2: float, colour: str) -> str:
    return (
        f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{colour}" stroke-width="2" '
        f'marker-end="url(#{"state" if colour == STATE else "gradient"})"/>'
    )


def passes() -> list[str]:
    """Pass 1 from left to right, pass 2 from right to left."""
    parts = [
        *heading(FIRST, "pass 1", "states only,", "no graph"),
        *heading(SECOND, "pass 2", "loss; the graph", "of one chunk"),
    ]
    parts.append(label(LEFT + (CHUNKS - 1) * STEP + BOX_W / 2, FIRST + 27, "not needed", DIM, 11))
    gap = STEP - BOX_W
    for number in range(CHUNKS):
        x = LEFT + number * STEP
        if number < CHUNKS - 1:
            parts.append(box(x, FIRST, (f"chunk {number + 1}", "advance"), DIM, solid=False))
            parts.append(arrow(x + BOX_W, FIRST + BOX_H / 2, x + STEP - 4, FIRST + BOX_H / 2, STATE))
            parts.append(label(x + BOX_W + gap / 2, FIRST + 14, f"s{number + 1}", STATE, 12))
        parts.append(box(x, SECOND, (f"chunk {number + 1}", "forward, backward"), ALIVE, solid=True))
        if number:
            parts.append(arrow(x, SECOND + BOX_H / 2, x - gap + 4, SECOND + BOX_H / 2, GRADIENT))
            parts.append(label(x - gap / 2, SECOND + 14, f"G{number}", GRADIENT, 12))
            parts.append(arrow(x + 20, FIRST + BOX_H + 8, x + 20, SECOND - 5, STATE))
            parts.append(label(x + 27, (FIRST + BOX_H + SECOND) / 2 + 4, f"enters with s{number}", STATE, 11, "start"))
    return parts


def memory() -> list[str]:
    """What lies beside weights at the peak: of the ordinary step, and of this one."""
    top, left = 330, LEFT
    unchunked = STEP * (CHUNKS - 1) + BOX_W
    return [
        *heading(top, "alive at once", "beside weights"),
        f'<rect x="{left}" y="{top}" width="{unchunked}" height="30" rx="4" fill="#f3dcdc" stroke="{GRADIENT}"/>',
        label(left + unchunked / 2, top + 20, "ordinary step: the activations of all tokens", size=12),
        f'<rect x="{left}" y="{top + 44}" width="{BOX_W}" height="30" rx="4" fill="#d5ebe8" stroke="{ALIVE}"/>',
        f'<rect x="{left + BOX_W}" y="{top + 44}" width="26" height="30" rx="4" fill="#dbe6f6" stroke="{STATE}"/>',
        label(
            left + BOX_W + 40,
            top + 64,
            "chunked: the activations of one chunk, and a few states",
            size=12,
            anchor="start",
        ),
        label(left, top + 100, "s: attention state, all that a chunk needs of its past", DIM, 12, "start"),
        label(left, top + 118, "G: gradient of the loss of all later chunks by that state", DIM, 12, "start"),
    ]


def main() -> None:
    heads = "".join(
        f'<marker id="{name}" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0L10 5L0 10z" fill="{colour}"/></marker>'
        for name, colour in (("state", STATE), ("gradient", GRADIENT))
    )
    title = "Two passes over the chunks: states forward, then loss and gradients backward, one chunk's graph at a time"
    FIGURE.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="system-ui, sans-serif" '
        f'role="img"><title>{title}</title><defs>{heads}</defs>'
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="8" fill="#fff"/>'
        + label(LEFT, 40, "the sequence, in chunks", DIM, 12, "start")
        + "".join((*passes(), *memory()))
        + "</svg>\n",
        encoding="utf-8",
    )


if __name__ == "__main__":
    main()
