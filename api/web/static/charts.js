// Line charts by uPlot, in the theme's colours. A chart's data are columns: x first, then one column a series.

import { colour, onTheme } from "/ui/static/app.js";

const uPlot = window.uPlot;

/**
 * A chart in `element`, as wide as it, that follows its size and the theme.
 *
 * `series`: [{label, colour: a name of app.css, width, dash, points, spanGaps, unlisted, value: (number) => text}] for the columns after x;
 * `bands: [[upper, lower, colour]]` fills between columns. `axes`: {x: label, y: label}. `onZoom(first, last)` is told what
 * was chosen by dragging, `onZoom(null, null)` that all is wanted again (double click).
 */
export class LineChart {
  constructor(element, options) {
    this.element = element;
    this.options = options;
    this.data = [];
    this.plot = null;
    this.marks = [];
    new ResizeObserver(() => this.plot?.setSize(this.#size())).observe(element);
    onTheme(() => this.#make());
  }

  /** `marks`: [{at, label}]: vertical lines. */
  set(data, marks = []) {
    this.data = data;
    this.marks = marks;
    if (this.plot === null) this.#make();
    else this.plot.setData(data, true);
  }

  /** On or off: a logarithmic scale of y. */
  logarithmic(on) {
    this.options.logarithmic = on;
    this.#make();
  }

  #size() {
    return { width: Math.max(this.element.clientWidth, 200), height: this.options.height ?? 260 };
  }

  #make() {
    if (this.data.length === 0) return;
    this.plot?.destroy();
    this.element.replaceChildren();
    const { series, axes, bands = [], logarithmic, sync } = this.options;
    const grid = { stroke: colour("line"), width: 1 };
    const axis = (label, extra) => ({
      label, labelSize: 22, labelFont: "12px sans-serif", font: "12px sans-serif",
      stroke: colour("muted"), grid, ticks: { ...grid, size: 5 }, ...extra,
    });
    this.plot = new uPlot(
      {
        ...this.#size(),
        scales: { x: { time: false }, y: { distr: logarithmic ? 3 : 1 } },
        axes: [axis(axes.x, {}), axis(axes.y, { size: 58, values: axes.values })],
        series: [
          { label: axes.x, value: (_, at) => (at === null ? "–" : at.toLocaleString()) },
          ...series.map((each) => ({
            label: each.label,
            class: each.unlisted ? "unlisted" : undefined,
            stroke: colour(each.colour),
            width: each.width ?? 1.5,
            dash: each.dash,
            spanGaps: each.spanGaps ?? false,
            points: each.points ?? { show: false },
            value: (_, at) => (at === null || at === undefined ? "–" : (each.value ?? short)(at)),
          })),
        ],
        bands: bands.map(([upper, lower, name]) => ({ series: [upper, lower], fill: `${colour(name)}2e` })),
        cursor: { sync: sync ? { key: sync, setSeries: false } : undefined, drag: { x: true, y: false, setScale: !this.options.onZoom } },
        legend: { live: true, markers: { width: 0, fill: (plot, index) => plot.series[index].stroke?.(plot, index) ?? "transparent" } },
        hooks: { draw: [(plot) => this.#drawMarks(plot)], setSelect: [(plot) => this.#zoomed(plot)] },
      },
      this.data,
      this.element,
    );
    this.plot.over.addEventListener("dblclick", () => this.options.onZoom?.(null, null));
  }

  #zoomed(plot) {
    if (!this.options.onZoom || plot.select.width < 4) return;
    const [first, last] = [plot.select.left, plot.select.left + plot.select.width].map((at) => plot.posToVal(at, "x"));
    plot.setSelect({ left: 0, width: 0, top: 0, height: 0 }, false);
    this.options.onZoom(Math.max(Math.floor(first), 0), Math.ceil(last));
  }

  #drawMarks(plot) {
    const { ctx, bbox } = plot;
    ctx.save();
    ctx.strokeStyle = ctx.fillStyle = colour("warn");
    ctx.lineWidth = devicePixelRatio;
    ctx.setLineDash([4 * devicePixelRatio, 4 * devicePixelRatio]);
    ctx.font = `${11 * devicePixelRatio}px sans-serif`;
    for (const [index, { at, label }] of this.marks.entries()) {
      const x = plot.valToPos(at, "x", true);
      if (x < bbox.left || x > bbox.left + bbox.width) continue;
      ctx.beginPath();
      ctx.moveTo(x, bbox.top);
      ctx.lineTo(x, bbox.top + bbox.height);
      ctx.stroke();
      const left = x + 90 * devicePixelRatio > bbox.left + bbox.width;
      ctx.textAlign = left ? "right" : "left";
      ctx.fillText(label, x + (left ? -5 : 5) * devicePixelRatio, bbox.top + (12 + 14 * (index % 3)) * devicePixelRatio);
    }
    ctx.restore();
  }
}

/** 0.0003 as 3e-4, 12.3456 as 12.35. */
export function short(number) {
  if (number === 0) return "0";
  return Math.abs(number) < 1e-3 || Math.abs(number) >= 1e6 ? number.toExponential(2) : String(Number(number.toPrecision(4)));
}
