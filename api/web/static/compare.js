// Two jobs' losses on one axis, and how far they are apart.

import { colour, isBack, onTheme, request, say, sayAway, shownSeconds } from "./app.js";

const ROWS = 10000; // Of a request.
const REQUESTS = 50; // At most, for each job.
const SHOWN = 1500; // Points of a line.
const POLL = 5000; // Milliseconds, while a job runs.
const OVER = ["succeeded", "failed", "cancelled"];
const NOISE = 1e-4; // Relative: what rounding in float32, summed in another order, may come to over a training.

const place = document.getElementById("loss");
if (place) start();

async function start() {
  const names = JSON.parse(place.dataset.names);
  const runs = JSON.parse(place.dataset.jobs).map((id, index) => ({ id, name: names[index], rows: [], more: false }));
  let running = JSON.parse(place.dataset.running);
  const charts = { loss: null, seconds: null };
  const redraw = () => draw(runs, charts);
  for (const input of document.querySelectorAll('[name="by"]')) input.addEventListener("input", redraw);
  onTheme(redraw);
  new ResizeObserver(redraw).observe(place);
  for (;;) {
    try {
      const left = await unfinished(running); // Asked first: what is over by now has all its rows.
      await Promise.all(runs.map(load));
      running = left;
      place.setAttribute("aria-busy", "false");
      isBack();
      redraw();
      judge(runs);
    } catch (error) {
      if (place.getAttribute("aria-busy") === "true") {
        document.getElementById("verdict").textContent = "The curves could not be loaded.";
        say(error.message);
        return;
      }
      sayAway();
    }
    if (!running.length) return;
    await nextLook();
  }
}

async function unfinished(ids) {
  const jobs = await Promise.all(ids.map((id) => request("GET", `/jobs/${id}`)));
  return jobs.filter((job) => OVER.every((status) => status !== job.status)).map((job) => job.id);
}

/** A while, and then until somebody can see the page. */
async function nextLook() {
  do await new Promise((resume) => setTimeout(resume, POLL));
  while (document.visibilityState !== "visible");
}

/** What there is beyond what is here already; the last row once more, as its validation loss may have come after it. */
async function load(run) {
  for (let asked = 0; asked < REQUESTS; asked += 1) {
    const after = (run.rows.at(-1)?.step ?? 0) - 1;
    const page = await request("GET", `/jobs/${run.id}/metrics?after_step=${after}&limit=${ROWS}`);
    run.rows.pop();
    for (const row of page.data) {
      const before = run.rows.at(-1)?.seconds ?? 0;
      run.rows.push({ step: row.step, tokens: row.tokens, loss: row.loss, validation: row.validation_loss, took: row.step_seconds, seconds: before + (row.step_seconds ?? 0) });
    }
    run.more = page.has_more;
    if (!page.has_more) return;
  }
}

function draw(runs, charts) {
  const by = document.querySelector('[name="by"]:checked').value;
  const label = { step: "Step", tokens: "Tokens", seconds: "Time in steps" }[by];
  charts.loss?.destroy();
  charts.seconds?.destroy();
  const tables = runs.map(({ rows }) => columns(rows, by, ["loss", "validation"]));
  charts.loss = chart(place, tables, label, by, (value) => String(Number(value.toPrecision(4))), document.getElementById("loss-readout"), runs);
  const steps = runs.map(({ rows }) => columns(rows, "step", ["took"]));
  charts.seconds = chart(document.getElementById("seconds"), steps, "Step", "step", shownSeconds);
}

/** Columns of a table for a chart, of so many rows as can be seen. Rows with a validation loss are among them. */
function columns(rows, by, names) {
  const every = Math.ceil(rows.length / SHOWN);
  const kept = rows.filter((row, index) => row[by] !== null && (index % every === 0 || index === rows.length - 1 || row.validation !== null));
  return [kept.map((row) => row[by]), ...names.map((name) => kept.map((row) => row[name]))];
}

function chart(into, tables, label, by, shown, readout, runs) {
  const axis = { stroke: colour("muted"), grid: { stroke: colour("line"), width: 1 }, ticks: { stroke: colour("line") }, font: "12px system-ui, sans-serif", labelFont: "12px system-ui, sans-serif" };
  const series = tables.flatMap((table, index) => {
    const stroke = colour(index ? "second" : "accent");
    // Equal losses lie on each other: both are to be seen.
    const line = { stroke: index ? stroke : `${stroke}90`, width: index ? 2 : 5, spanGaps: true, points: { show: table[0].length < 2 }, dash: index ? [8, 6] : [] };
    const dots = { stroke, paths: () => null, points: { show: true, size: index ? 7 : 13, width: 2, fill: colour("card") } };
    return table.length > 2 ? [line, dots] : [line];
  });
  const options = {
    width: into.clientWidth,
    height: 280,
    padding: [12, 16, 0, 0],
    legend: { show: false },
    cursor: { drag: { x: false, y: false }, y: false },
    scales: { x: { time: false } },
    axes: [
      { ...axis, label, labelSize: 20, size: 34, ...(by === "seconds" ? { values: (self, values) => values.map(shownSeconds) } : {}) },
      { ...axis, size: 62, values: (self, values) => values.map(shown) },
    ],
    series: [{}, ...series],
    hooks: { setCursor: readout ? [(self) => (readout.textContent = under(self, runs))] : [] },
  };
  return new uPlot(options, uPlot.join(tables), into);
}

function under(self, runs) {
  const index = self.cursor.idx;
  if (index === null || index === undefined || self.cursor.left < 0) return "";
  const said = runs.map((run, which) => {
    const loss = self.data[1 + 2 * which][index];
    return loss === null || loss === undefined ? null : `${run.name}: ${loss.toPrecision(5)}`;
  });
  return said.filter(Boolean).join(" · ");
}

/** How far apart the losses are, at the steps that both have. */
function judge(runs) {
  const [first, second] = runs;
  const others = new Map(second.rows.map((row) => [row.step, row.loss]));
  const pairs = first.rows.filter((row) => row.loss !== null && typeof others.get(row.step) === "number").map((row) => [row.loss, others.get(row.step)]);
  const verdict = document.getElementById("verdict");
  const cut = runs.some((run) => run.more) ? ` Only the first ${(ROWS * REQUESTS).toLocaleString()} steps are shown.` : "";
  times(runs);
  if (!pairs.length) {
    const waiting = runs.filter((run) => !run.rows.length).map((run) => run.name);
    verdict.textContent = waiting.length ? `No step yet of ${waiting.join(" and ")}.` : "They have no step in common.";
    return;
  }
  const apart = Math.max(...chunked(pairs.map(([left, right]) => Math.abs(left - right) / Math.max(Math.abs(left), Math.abs(right), 1e-12))));
  const at = `${pairs.length.toLocaleString()} steps that both have`;
  const equal = apart <= NOISE;
  verdict.className = equal ? "equal" : "muted";
  verdict.textContent = (equal
    ? `The losses are equal to within rounding at the ${at}: the largest difference is ${apart === 0 ? "none" : `${apart.toExponential(1)} of the loss`}. A plan changes memory and time, never the gradient.`
    : `At the ${at} the losses differ by up to ${Number((100 * apart).toPrecision(2))} %.`) + cut;
}

/** The largest of each thousand: a call takes only so many arguments. */
function chunked(values) {
  const made = [];
  for (let at = 0; at < values.length; at += 1000) made.push(Math.max(...values.slice(at, at + 1000)));
  return made;
}

function times(runs) {
  const medians = runs.map(({ rows }) => rows.map((row) => row.took).filter((each) => each !== null).sort((a, b) => a - b)).map((list) => list[Math.floor(list.length / 2)]);
  const known = runs.map((run, index) => (medians[index] === undefined ? null : `${run.name}: ${shownSeconds(medians[index])}`)).filter(Boolean);
  const ratio = medians.every((each) => each > 0) ? ` The second takes ${Number((medians[1] / medians[0]).toPrecision(3))} times as long as the first.` : "";
  document.getElementById("seconds-says").textContent = known.length ? `Median of a step: ${known.join(", ")}.${ratio}` : "No step yet.";
}
