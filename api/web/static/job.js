// The page of a job: curves, actions, and the stream of events that says when to look again.

import { refresh, request, shownBytes, shownSeconds } from "/ui/static/app.js";
import { LineChart, short } from "/ui/static/charts.js";
import "/ui/static/sample.js";

const job = () => document.getElementById("job");
const id = job().dataset.job;
const CURVE_SECONDS = 3;
const TABLE_ROWS = 50;

// Curves

const zoom = { first: null, last: null };
const axisX = "step";
const onZoom = (first, last) => {
  Object.assign(zoom, { first, last });
  document.getElementById("whole").hidden = first === null;
  drawCurves();
};
const lossChart = new LineChart(document.getElementById("loss-chart"), {
  height: 280,
  axes: { x: axisX, y: "nats per token" },
  series: [
    { label: "Training", colour: "accent" },
    { label: "Least", colour: "accent", width: 0, unlisted: true },
    { label: "Most", colour: "accent", width: 0, unlisted: true },
    { label: "Validation", colour: "second", width: 2, spanGaps: true, points: { show: true, size: 6 } },
  ],
  bands: [[3, 2, "accent"]],
  sync: "steps",
  onZoom,
});
const rateChart = new LineChart(document.getElementById("rate-chart"), {
  height: 150,
  axes: { x: axisX, y: "rate", values: (_, ticks) => ticks.map(short) },
  series: [{ label: "Learning rate", colour: "accent" }],
  sync: "steps",
  onZoom,
});
let drawing = false;
let wanted = false; // Once more, because something changed while an answer was on its way.
let drawn = { step: -1, status: "", at: 0, seconds: 0 };

async function drawCurves() {
  wanted = true;
  if (drawing) return;
  drawing = true;
  while (wanted) {
    wanted = false;
    await drawOnce();
  }
  drawing = false;
}

async function drawOnce() {
  const { step, status } = job().dataset;
  const query = new URLSearchParams({ first: zoom.first ?? 0, ...(zoom.last === null ? {} : { last: zoom.last }) });
  const began = Date.now();
  let curve = null;
  try {
    curve = await request("GET", `/ui/jobs/${id}/curve?${query}`);
  } catch (error) {
    if (drawn.step === -1) document.getElementById("loss-chart").replaceChildren(paragraph(`The curve cannot be read: ${error.message}`));
    // Of a job that is over no look will ask for it again.
    if (job().dataset.over === "true" && !isFinal(error)) setTimeout(drawCurves, 1000 * CURVE_SECONDS);
  }
  if (curve === null || wanted) return;
  drawn = { step, status, at: Date.now(), seconds: (Date.now() - began) / 1000 };
  show(curve);
}

function show(curve) {
  if (curve.step.length === 0) {
    const why = job().dataset.over === "true" ? "No step was made." : "No step yet: the curve begins with the first.";
    document.getElementById("loss-chart").replaceChildren(paragraph(why));
    return;
  }
  const whole = curve.width === 1;
  const marks = curve.step.flatMap((step, index) =>
    index > 0 && curve.attempt[index] > curve.attempt[index - 1] ? [{ at: step, label: `attempt ${curve.attempt[index]}` }] : [],
  );
  const nothing = curve.step.map(() => null);
  lossChart.set(
    [curve.step, curve.loss, whole ? nothing : curve.lowest_loss, whole ? nothing : curve.highest_loss, curve.validation_loss],
    marks,
  );
  rateChart.set([curve.step, curve.learning_rate], marks.map(({ at }) => ({ at, label: "" })));
  fillTable(curve);
}

function fillTable(curve) {
  const last = curve.step.length - 1;
  const every = Math.max(Math.ceil(curve.step.length / TABLE_ROWS), 1);
  const rows = curve.step.flatMap((step, index) => {
    if (index % every !== 0 && index !== last && curve.validation_loss[index] === null) return [];
    const cells = [curve.loss[index], curve.validation_loss[index], curve.learning_rate[index], curve.step_seconds[index]];
    const row = document.createElement("tr");
    row.append(cell("th", step.toLocaleString()), ...cells.map((value) => cell("td", value === null ? "–" : short(value))));
    return [row];
  });
  document.querySelector("#curve-table tbody").replaceChildren(...rows);
}

function cell(tag, text) {
  const element = document.createElement(tag);
  element.textContent = text;
  if (tag === "td") element.className = "number";
  else element.scope = "row";
  return element;
}

function paragraph(text) {
  const element = document.createElement("p");
  element.className = "waiting";
  element.textContent = text;
  return element;
}

/** After each look at the job: its steps may have gone on. A long curve, which takes the service a while, is asked for less. */
function followCurve() {
  const { step, status } = job().dataset;
  if (step === drawn.step && status === drawn.status) return;
  if (Date.now() - drawn.at >= 1000 * Math.max(CURVE_SECONDS - 1, 20 * drawn.seconds) || status !== drawn.status) drawCurves();
}

document.getElementById("log-scale").addEventListener("change", (event) => lossChart.logarithmic(event.target.checked));
document.getElementById("whole").addEventListener("click", () => onZoom(null, null));
document.addEventListener("htmx:after:swap", followCurve);
drawCurves();

// Events: each that comes is a reason to look again. Nobody looks at a hidden tab, whose connection others can use.

let stream = null;
let soon = null;

function lookSoon() {
  soon ??= setTimeout(() => {
    soon = null;
    refresh(job());
  }, 150);
}

function listen() {
  if (stream?.readyState === EventSource.CLOSED) stream = null; // It was refused: browsers do not ask again then.
  const useful = document.visibilityState === "visible" && job().dataset.over !== "true";
  if (!useful && stream) stream = void stream.close();
  if (!useful || stream) return;
  stream = new EventSource(`/jobs/${id}/events?after=${job().dataset.newestEvent}`);
  for (const type of job().dataset.eventTypes.split(" ")) stream.addEventListener(type, lookSoon);
  stream.addEventListener("end", () => {
    stream = void stream.close();
    lookSoon();
  });
}

document.addEventListener("visibilitychange", listen);
document.addEventListener("htmx:after:swap", listen);
listen();

// Actions

/** A button that is gone takes the focus with it; from here Tab goes on in the page, not at its top. */
document.addEventListener("htmx:after:swap", () => {
  if (document.activeElement === document.body) document.getElementById("content").focus({ preventScroll: true });
});

/** Whether asking again would not help. */
function isFinal({ status = 0 }) {
  return status >= 400 && status < 500 && status !== 429;
}

async function act(action, body) {
  await request("POST", `/jobs/${id}/${action}`, body);
  refresh(job());
}

document.addEventListener("click", async (event) => {
  const button = event.target.closest("[data-action]");
  if (!button) return;
  const shown = document.getElementById(button.dataset.error ?? "action-error");
  shown.hidden = true;
  button.disabled = true;
  try {
    await act(button.dataset.action);
    button.closest("dialog")?.close();
  } catch (error) {
    shown.textContent = error.message;
    shown.hidden = false;
  } finally {
    button.disabled = false;
  }
});

// Another cap: planned while it is typed, then pause, wait, resume

const cap = {
  dialog: document.getElementById("cap"),
  input: document.getElementById("cap-input"),
  plan: document.getElementById("cap-plan"),
  apply: document.getElementById("cap-apply"),
  asking: null,
  timer: null,
  changing: null,
};
const PAUSED_POLL = 1000; // Milliseconds.

/** Bytes where it is all digits, else as it stands: `1.5GiB`. */
function capValue(text = cap.input.value.trim()) {
  return /^\d+$/.test(text) ? Number(text) : text;
}

function line(text, kind = "") {
  const element = document.createElement("p");
  element.textContent = text;
  element.className = kind;
  return element;
}

function refused(error) {
  const box = line(error.message, "alert below");
  const least = error.problem?.minimum_cap_bytes ?? error.problem?.largest_device_bytes;
  const shown = [box];
  if (least !== undefined && least !== null) {
    const button = document.createElement("button");
    button.type = "button";
    button.id = "cap-least";
    button.className = "small below";
    button.textContent = `Use ${shownBytes(least)}`;
    button.addEventListener("click", () => {
      cap.input.value = String(least);
      cap.input.focus();
      preview();
    });
    shown.push(button);
  }
  cap.input.setAttribute("aria-invalid", "true");
  cap.plan.replaceChildren(...shown);
}

async function preview() {
  cap.asking?.abort();
  cap.asking = new AbortController();
  cap.apply.disabled = true;
  const { signal } = cap.asking;
  try {
    const spec = { ...JSON.parse(job().dataset.spec), memory_cap: capValue() };
    const plan = await request("POST", "/plans", spec, { signal });
    cap.input.removeAttribute("aria-invalid");
    cap.plan.replaceChildren(
      line(
        `${plan.num_chunks.toLocaleString()} chunks of ${plan.chunk_length.toLocaleString()} tokens, predicted peak ` +
          `${shownBytes(plan.predicted_peak_bytes)}, ${shownSeconds(plan.predicted_step_seconds)} a step.`,
        "alert done below",
      ),
    );
    cap.apply.disabled = plan.memory_cap_bytes === Number(job().dataset.cap);
  } catch (error) {
    if (error.name !== "AbortError") refused(error);
  }
}

/** Until the job no longer runs. A service that restarts meanwhile is asked again: the job waits to be resumed. */
async function untilPaused(signal) {
  for (;;) {
    const status = await request("GET", `/jobs/${id}`).then(
      (answer) => answer.status,
      (error) => (isFinal(error) ? Promise.reject(error) : "running"),
    );
    signal.throwIfAborted();
    if (status !== "running") return;
    await new Promise((done) => setTimeout(done, PAUSED_POLL));
  }
}

async function changeCap() {
  const memory_cap = capValue();
  const { signal } = (cap.changing = new AbortController());
  cap.apply.disabled = cap.input.readOnly = true;
  try {
    if ((await request("GET", `/jobs/${id}`)).status !== "paused") {
      cap.plan.replaceChildren(line("Pausing: the job writes a checkpoint. Keep this page open until it goes on.", "below"));
      await act("pause");
      await untilPaused(signal);
    }
    await act("resume", { memory_cap });
    cap.dialog.close();
    cap.plan.replaceChildren();
  } catch (error) {
    if (signal.aborted) cap.plan.replaceChildren();
    else refused(error);
  } finally {
    cap.input.readOnly = false;
  }
  refresh(job());
}

cap.input.addEventListener("input", () => {
  // Nothing is known of this cap yet: a job must not be paused for one under which it cannot go on.
  cap.apply.disabled = true;
  cap.asking?.abort();
  clearTimeout(cap.timer);
  cap.timer = setTimeout(preview, 300);
});
// Whoever closes it does not want the rest: the job stays paused.
cap.dialog.addEventListener("close", () => cap.changing?.abort());
document.addEventListener("htmx:after:swap", () => {
  const bytes = Number(job().dataset.cap);
  document.getElementById("cap-now").textContent = `${shownBytes(bytes)} (${bytes.toLocaleString()} bytes)`;
});
document.getElementById("cap-form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (!cap.apply.disabled) changeCap();
});
