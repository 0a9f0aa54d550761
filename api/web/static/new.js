// A new job: the plan follows the form, files can be dropped on it, and it is sent once.

import { ApiError, request, shownBytes } from "./app.js";
import { Curve } from "./curve.js";
import { JobForm } from "./form.js";
import { describe, detailOf, parts, pointsOf, sentence, tableRows, whyNot } from "./plan.js";
import { capText, parseBytes } from "./sizes.js";
import { snippet } from "./snippets.js";
import { element, onFiles, uploadInto } from "./upload.js";

const PAUSE = 250; // Milliseconds without a change before a plan is asked for.
const AGAIN = 2000; // Milliseconds until something that is being prepared is asked for again.
const WAITS = ["dataset_not_tokenized", "tokenizer_not_ready", "model_not_ready", "idempotency_key_in_flight"];

const at = (id) => document.getElementById(id);
const form = at("job");
const job = new JobForm(form);
const curve = new Curve(at("curve"), at("readout"), (bytes) => job.set("memory_cap", capText(bytes)));

// The plan

let asking = null;
let timer = 0;
let plan = null; // The last one, also of a cap that nothing fits: its frontier is that of every cap.

function changed() {
  clearTimeout(timer);
  asking?.abort();
  const cap = parseBytes(job.value("memory_cap"));
  if (cap && plan) curve.moveCap(cap);
  showSnippet();
  busy(true);
  timer = setTimeout(ask, PAUSE);
}

async function ask() {
  const missing = job.missing();
  if (missing.length) return empty(`The curve of memory against time is drawn as soon as there is: ${missing.join(", ")}.`);
  const mine = (asking = new AbortController());
  busy(true);
  const body = job.body();
  try {
    show(await request("POST", "/plans", body, { signal: mine.signal }));
  } catch (error) {
    if (mine.signal.aborted) return;
    await refused(error, body, mine.signal);
  }
  if (!mine.signal.aborted) busy(false);
}

function busy(is) {
  at("plan").setAttribute("aria-busy", String(is));
  at("planning").hidden = !is;
}

function show(answer) {
  job.clearErrors();
  plan = { ...answer, chosen: true };
  at("plan-says").replaceChildren(...describe(plan, plan.memory_cap_bytes));
  at("plan-line").textContent = sentence(plan, plan.memory_cap_bytes);
  at("plan-parts").hidden = false;
  at("plan-parts").querySelector("dl").replaceChildren(...parts(plan.breakdown, plan.predicted_peak_bytes));
  draw(plan.memory_cap_bytes);
}

function draw(cap) {
  const inAll = at("in-all").checked;
  const points = pointsOf(plan, inAll);
  for (const id of ["curve", "curve-legend", "plan-table"]) at(id).hidden = false;
  curve.show({ points, cap, minimum: plan.minimum_cap_bytes, unchunked: plan.unchunked_peak_bytes, what: inAll ? "Time of the training" : "Time of a step" });
  at("plan-table").querySelector("tbody").replaceChildren(...tableRows(points, plan, cap, (bytes) => job.set("memory_cap", capText(bytes))));
}

function empty(text) {
  busy(false);
  plan = null;
  for (const id of ["curve", "curve-legend", "plan-table", "plan-parts"]) at(id).hidden = true;
  at("plan-says").replaceChildren(element("p", { className: "muted", textContent: text }));
  at("plan-line").textContent = text;
}

/** There is no plan: why, what would help, and where the fault is in a field, there. */
async function refused(error, body, signal) {
  if (!(error instanceof ApiError)) {
    empty("The service does not answer. It is asked again with your next change.");
    return;
  }
  const { problem } = error;
  if (WAITS.includes(error.code)) {
    empty(`${problem.detail} The plan is asked for again until it is there.`);
    timer = setTimeout(ask, AGAIN);
    return;
  }
  job.clearErrors();
  if (problem.minimum_cap_bytes) await drawBeyond(problem, body, signal);
  else empty("");
  if (signal.aborted) return;
  at("plan-parts").hidden = true;
  at("plan-says").replaceChildren(whyNot(problem, (path, value) => job.set(path, value)));
  at("plan-line").textContent = "There is no plan.";
  showErrors(problem);
}

/** The curve where the cap lies outside of it: that of the smallest cap that has a plan. */
async function drawBeyond(problem, body, signal) {
  try {
    const answer = await request("POST", "/plans", { ...body, memory_cap: problem.minimum_cap_bytes }, { signal });
    plan = { ...answer, chosen: false };
    draw(problem.memory_cap_bytes);
  } catch (error) {
    if (!signal.aborted) empty("");
  }
}

/** Messages at their fields. Answers those that have none. */
function showErrors(problem) {
  const errors = problem.errors ?? (problem.error?.param ? [{ field: problem.error.param, message: detailOf(problem) }] : []);
  return errors.filter(({ field, message }) => !job.showError(field, message));
}

// Data

onFiles(at("drop"), at("file"), async ([file]) => {
  const made = await uploadInto(at("upload"), "/datasets", [file]);
  if (!made) return;
  const counted = [[made.documents, "document"], [made.tokens, "byte"]]
    .filter(([count]) => count !== null)
    .map(([count, what]) => `${count.toLocaleString()} ${what}${count === 1 ? "" : "s"}`)
    .join(", ") || "not counted yet";
  at("upload").append(element("p", { className: "muted", textContent: `${shownBytes(made.bytes)}; ${counted}.` }));
  for (const id of ["f-dataset", "f-validation_dataset"]) {
    const option = new Option(`${made.name} (${made.id.slice(-6)})`, made.id);
    option.dataset.hint = counted;
    at(id).options[0].after(option);
  }
  job.set("dataset", made.id);
});

// The same as a file or a command

let kind = "yaml";

function showSnippet() {
  const keys = at("snippet").dataset.keys === "yes";
  at("snippet").textContent = snippet(kind, job.body(), { origin: location.origin, keys });
}

const tabs = [...document.querySelectorAll("[data-snippet]")];
for (const tab of tabs) {
  tab.addEventListener("click", () => choose(tab));
  tab.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step) return;
    const next = tabs[(tabs.indexOf(tab) + step + tabs.length) % tabs.length];
    choose(next);
    next.focus();
  });
}

function choose(tab) {
  kind = tab.dataset.snippet;
  for (const each of tabs) {
    each.setAttribute("aria-selected", String(each === tab));
    each.tabIndex = each === tab ? 0 : -1;
  }
  at("snippet").setAttribute("aria-labelledby", tab.id);
  showSnippet();
}

at("copy").addEventListener("click", async () => {
  try {
    await navigator.clipboard.writeText(at("snippet").textContent);
    at("copy").textContent = "Copied";
  } catch {
    // Browsers lend the clipboard to safe origins only: the text is chosen for the keyboard.
    getSelection().selectAllChildren(at("snippet"));
    at("copy").textContent = "Ctrl+C copies";
  }
  setTimeout(() => (at("copy").textContent = "Copy"), 2500);
});

// Sending

let key = form.dataset.key;
let sending = false;

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  if (sending) return;
  sending = true;
  at("start").disabled = true;
  at("form-error").replaceChildren();
  try {
    await send(job.body());
  } finally {
    sending = false;
    at("start").disabled = false;
  }
});

/** One job, however often it takes: the key is that of the form. */
async function send(body) {
  for (;;) {
    try {
      at("sending").textContent = at("sending").textContent || "Sending…";
      const made = await request("POST", "/jobs", body, { headers: { "Idempotency-Key": key } });
      at("sending").textContent = "Started.";
      location.assign(`/ui/jobs/${made.id}`);
      return;
    } catch (error) {
      if (!(error instanceof ApiError)) {
        at("sending").textContent = "";
        fail({ detail: "The service does not answer. Start again: however often you do, it makes one job." });
        return;
      }
      if (!WAITS.includes(error.code)) {
        at("sending").textContent = "";
        fail(error.problem);
        return;
      }
      at("sending").textContent = `${error.problem.detail} The job is sent as soon as that is done; leave this page open, or change the form to stop.`;
      if (!(await pause(body))) {
        at("sending").textContent = "The form has changed: the job was not sent.";
        return;
      }
    }
  }
}

/** Waits a moment. False if the form has changed in it. */
async function pause(body) {
  await new Promise((resume) => setTimeout(resume, AGAIN));
  return JSON.stringify(job.body()) === JSON.stringify(body);
}

function fail(problem) {
  job.clearErrors();
  const left = showErrors(problem);
  const said = element("div", { className: "alert" }, element("p", { textContent: problem.detail }));
  if (problem.hint) said.append(element("p", { textContent: `What to do: ${problem.hint}.` }));
  for (const { field, message } of left) if (field && !problem.detail.startsWith(`${field}: `)) said.append(element("p", { textContent: `${field}: ${message}` }));
  if (problem.code === "idempotency_key_reused") {
    said.replaceChildren(element("p", {}, "This form has made a job already, before it was changed: see ", element("a", { href: "/", textContent: "the jobs" }), ". To make another one, start again."));
    key = `${form.dataset.key}-${Date.now()}`;
  }
  at("form-error").replaceChildren(said);
  form.querySelector("[aria-invalid]")?.focus();
}

// A job is started by its button, not by the way: Enter in a field asks for the plan at once.
form.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || !event.target.matches("input:not([type=file])")) return;
  event.preventDefault();
  changed();
});
// Who comes back to this page from the job wants another one.
window.addEventListener("pageshow", (event) => {
  if (event.persisted) key = `${form.dataset.key}-${Date.now()}`;
});
form.addEventListener("input", (event) => event.target.type !== "file" && event.target.id !== "in-all" && changed());
at("in-all").addEventListener("input", () => plan && draw(plan.chosen ? plan.memory_cap_bytes : parseBytes(job.value("memory_cap"))));
showSnippet();
ask();
