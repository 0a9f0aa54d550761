// The curve of memory against time: plans as a stepped line, the cap as a line that can be moved, what no plan fits shaded.

import { colour, onTheme, shownBytes, shownSeconds } from "./app.js";
import { MIB } from "./sizes.js";

const WIDE = 4; // From this ratio of most to least memory on, the axis is logarithmic.
const HEIGHT = 280;
const KEYS = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1, PageDown: -10, PageUp: 10 };

export class Curve {
  /** Draws in `place`, says in `readout` what is under the pointer, and tells `onCap` where the cap was moved to. */
  constructor(place, readout, onCap) {
    Object.assign(this, { place, readout, onCap, state: null, chart: null, dragging: false });
    place.setAttribute("role", "group");
    place.setAttribute("aria-label", "Curve of memory against time; the same is in the table below it");
    this.handle = this.#makeHandle();
    new ResizeObserver(() => this.chart?.setSize({ width: place.clientWidth, height: HEIGHT })).observe(place);
    onTheme(() => this.#rebuild());
  }

  /** `points`: {bytes, seconds, chosen, says} from the least memory on. `minimum`, `unchunked`, `cap`: bytes. */
  show(state) {
    // While the line is being dragged, the axis stays as it is under the pointer.
    const range = this.dragging && this.state ? this.state.range : rangeOf(state);
    const log = range[1] / range[0] > WIDE;
    const remake = !this.chart || this.state.log !== log || this.state.what !== state.what;
    this.state = { ...state, range, log };
    if (remake) this.#rebuild();
    else this.chart.setData(this.#data());
  }

  /** The cap has changed, and the answer to it is still to come. */
  moveCap(cap) {
    if (!this.state) return;
    this.state.cap = cap;
    this.chart.redraw(false);
    this.#placeCap();
  }

  #x(bytes) {
    return this.state.log ? Math.log2(bytes) : bytes;
  }

  #data() {
    return [this.state.points.map((each) => this.#x(each.bytes)), this.state.points.map((each) => each.seconds)];
  }

  #rebuild() {
    if (!this.state) return;
    const focused = document.activeElement === this.handle;
    this.chart?.destroy();
    this.chart = new uPlot(this.#options(), this.#data(), this.place);
    this.chart.root.querySelector("canvas").setAttribute("aria-hidden", "true");
    this.chart.over.append(this.handle);
    this.chart.over.addEventListener("click", (event) => {
      if (event.target !== this.handle) this.#moveTo(event.clientX, true);
    });
    this.#placeCap();
    if (focused) this.handle.focus();
  }

  #options() {
    const axis = { stroke: () => colour("muted"), grid: { stroke: () => colour("line"), width: 1 }, ticks: { stroke: () => colour("line") }, font: "12px system-ui, sans-serif" };
    return {
      width: this.place.clientWidth,
      height: HEIGHT,
      padding: [12, 16, 0, 0],
      legend: { show: false },
      cursor: { drag: { x: false, y: false }, y: false, points: { show: false } },
      scales: {
        x: { time: false, range: () => this.state.range.map((each) => this.#x(each)) },
        y: { range: (chart, least, most) => padded(least, most) },
      },
      axes: [
        { ...axis, label: "Peak memory", labelSize: 20, labelFont: axis.font, size: 34, splits: () => this.#ticks(), values: (chart, values) => values.map((each) => shownBytes(Math.round(this.state.log ? 2 ** each : each))) },
        { ...axis, label: this.state.what, labelSize: 18, labelFont: axis.font, size: (chart, values) => 16 + 6.5 * Math.max(3, ...(values ?? []).map((each) => each.length)), values: (chart, values) => values.map((each) => shownSeconds(each)) },
      ],
      series: [{}, { stroke: () => colour("accent"), width: 2, paths: uPlot.paths.stepped({ align: 1 }), points: { show: false } }],
      hooks: {
        drawClear: [(chart) => this.#shade(chart)],
        // By now the scales are those of the new data.
        draw: [(chart) => this.#mark(chart), () => this.#placeCap()],
        setCursor: [(chart) => this.#read(chart)],
      },
    };
  }

  /** Below the smallest peak there is nothing. */
  #shade(chart) {
    const { ctx, bbox } = chart;
    const end = this.#pixel(chart, this.state.minimum);
    if (end <= bbox.left) return;
    ctx.save();
    ctx.beginPath();
    ctx.rect(bbox.left, bbox.top, Math.min(end, bbox.left + bbox.width) - bbox.left, bbox.height);
    ctx.clip();
    ctx.globalAlpha = 0.1;
    ctx.fillStyle = colour("danger");
    ctx.fill();
    ctx.globalAlpha = 0.35;
    ctx.strokeStyle = colour("danger");
    ctx.lineWidth = devicePixelRatio;
    const gap = 9 * devicePixelRatio;
    ctx.beginPath();
    for (let x = bbox.left - bbox.height; x < end; x += gap) {
      ctx.moveTo(x, bbox.top + bbox.height);
      ctx.lineTo(x + bbox.height, bbox.top);
    }
    ctx.stroke();
    ctx.restore();
  }

  #mark(chart) {
    const { ctx, bbox } = chart;
    ctx.save();
    if (this.state.unchunked <= this.state.range[1]) {
      const x = this.#pixel(chart, this.state.unchunked);
      ctx.setLineDash([2 * devicePixelRatio, 4 * devicePixelRatio]);
      ctx.strokeStyle = colour("warn");
      ctx.lineWidth = 2 * devicePixelRatio;
      ctx.beginPath();
      ctx.moveTo(x, bbox.top);
      ctx.lineTo(x, bbox.top + bbox.height);
      ctx.stroke();
      ctx.setLineDash([]);
    }
    for (const point of this.state.points) this.#dot(chart, point);
    ctx.restore();
  }

  #dot(chart, point) {
    const { ctx } = chart;
    const x = this.#pixel(chart, point.bytes);
    const y = chart.valToPos(point.seconds, "y", true);
    ctx.beginPath();
    ctx.arc(x, y, (point.chosen ? 7 : 3.5) * devicePixelRatio, 0, 2 * Math.PI);
    ctx.fillStyle = point.bytes <= this.state.cap ? colour("accent") : colour("muted");
    ctx.fill();
    ctx.lineWidth = (point.chosen ? 3 : 1) * devicePixelRatio;
    ctx.strokeStyle = colour("card");
    ctx.stroke();
    if (!point.chosen) return;
    ctx.beginPath();
    ctx.arc(x, y, 10 * devicePixelRatio, 0, 2 * Math.PI);
    ctx.lineWidth = 2 * devicePixelRatio;
    ctx.strokeStyle = colour("accent");
    ctx.stroke();
  }

  #pixel(chart, bytes) {
    return chart.valToPos(this.#x(bytes), "x", true);
  }

  #ticks() {
    const [least, most] = this.state.range;
    const room = Math.max(2, Math.floor(this.place.clientWidth / 90));
    return (this.state.log ? doublings(least, most, room) : evenly(least, most, room)).map((each) => this.#x(each));
  }

  #read(chart) {
    const point = chart.cursor.idx === null || chart.cursor.left < 0 ? null : this.state.points[chart.cursor.idx];
    this.readout.textContent = point ? point.says : "";
  }

  #makeHandle() {
    const handle = document.createElement("div");
    handle.className = "cap-line";
    handle.tabIndex = 0;
    handle.setAttribute("role", "slider");
    handle.setAttribute("aria-label", "Memory cap");
    handle.setAttribute("aria-orientation", "horizontal");
    handle.append(document.createElement("span"));
    handle.addEventListener("pointerdown", (event) => {
      handle.setPointerCapture(event.pointerId);
      this.dragging = true;
    });
    handle.addEventListener("pointermove", (event) => this.dragging && this.#moveTo(event.clientX, false));
    const drop = (event) => {
      if (!this.dragging) return;
      this.dragging = false;
      this.#moveTo(event.clientX, true);
    };
    handle.addEventListener("pointerup", drop);
    handle.addEventListener("pointercancel", drop);
    handle.addEventListener("keydown", (event) => this.#onKey(event));
    return handle;
  }

  #onKey(event) {
    const { cap, minimum, unchunked } = this.state;
    const step = Math.max(MIB, Math.round(cap / 100 / MIB) * MIB);
    let next = null;
    if (event.key in KEYS) next = Math.max(MIB, cap + KEYS[event.key] * step);
    if (event.key === "Home") next = minimum;
    if (event.key === "End") next = unchunked;
    if (next === null) return;
    event.preventDefault();
    this.#changed(next, true);
  }

  #moveTo(clientX, done) {
    const box = this.chart.over.getBoundingClientRect();
    const left = Math.min(Math.max(clientX - box.left, 0), box.width);
    const value = this.chart.posToVal(left, "x");
    this.#changed(this.state.log ? 2 ** value : value, done);
  }

  #changed(bytes, done) {
    this.moveCap(Math.ceil(bytes / MIB) * MIB);
    this.onCap(this.state.cap, done);
  }

  #placeCap() {
    if (!this.chart || !this.state) return;
    const [least, most] = this.state.range;
    const { cap, minimum } = this.state;
    const seen = Math.min(Math.max(cap, least), most);
    const left = this.chart.valToPos(this.#x(seen), "x");
    this.handle.style.left = `${left}px`;
    this.handle.classList.toggle("late", left > this.chart.over.clientWidth / 2);
    this.handle.classList.toggle("bad", cap < minimum);
    this.handle.firstChild.textContent = `${cap < least ? "‹ " : ""}${shownBytes(cap)}${cap > most ? " ›" : ""}`;
    this.handle.setAttribute("aria-valuemin", String(MIB));
    this.handle.setAttribute("aria-valuemax", String(Math.max(Math.round(most), cap)));
    this.handle.setAttribute("aria-valuenow", String(cap));
    this.handle.setAttribute("aria-valuetext", cap < minimum ? `${shownBytes(cap)}, less than any plan needs` : shownBytes(cap));
  }
}

/** What the axis shows: all plans, and the cap where it is not far from them. */
function rangeOf({ points, minimum, unchunked, cap }) {
  const most = Math.max(unchunked, points.at(-1)?.bytes ?? 0, minimum);
  const least = Math.max(Math.min(cap, minimum), minimum * 0.7);
  const high = Math.max(most, Math.min(cap, most * 1.15));
  if (high / least > WIDE) return [least / 1.12, high * 1.12];
  const pad = Math.max((high - least) * 0.1, 4 * MIB);
  return [least - pad, high + pad];
}

function padded(least, most) {
  const pad = Math.max((most - least) * 0.12, most * 0.02);
  return [Math.max(0, least - pad), most + pad];
}

function doublings(least, most, room) {
  const made = [];
  for (let power = Math.ceil(Math.log2(least)); power <= Math.log2(most); power += 1) made.push(2 ** power);
  const every = Math.ceil(made.length / room);
  return made.filter((each, index) => index % every === 0);
}

function evenly(least, most, room) {
  const unit = most >= 1000 * MIB ? 1024 * MIB : MIB;
  const rough = (most - least) / room / unit;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((each) => each * power).find((each) => each >= rough) * unit;
  const made = [];
  for (let at = Math.ceil(least / step) * step; at <= most; at += step) made.push(at);
  return made;
}
