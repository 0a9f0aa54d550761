// What all pages share: the theme, times in the reader's own zone, and requests to the API.

export const csrf = document.querySelector('meta[name="csrf"]').content;

/** The API's JSON. Throws ApiError with the problem's fields; sends a reader whose session is over to log in. */
export async function request(method, path, body, options = {}) {
  const headers = { Accept: "application/json", ...(csrf ? { "X-CSRF-Token": csrf } : {}) };
  const isForm = body instanceof FormData;
  if (body !== undefined && !isForm) headers["Content-Type"] = "application/json";
  const response = await fetch(path, {
    method,
    headers: { ...headers, ...options.headers },
    body: body === undefined || isForm ? body : JSON.stringify(body),
    signal: options.signal,
  });
  if (response.ok) return response.status === 204 ? null : response.json();
  throw await refusalOf(response);
}

/** The ApiError of an answer that is none of what was asked for. */
export async function refusalOf(response) {
  const problem = await response.json().catch(() => ({ detail: `HTTP ${response.status}`, code: "unknown" }));
  if (response.status === 401) toLogin();
  return new ApiError(problem, response.status);
}

/** A session is over. */
export function toLogin() {
  location.assign(`/ui/login?next=${encodeURIComponent(location.pathname + location.search)}`);
}

export class ApiError extends Error {
  constructor(problem, status) {
    super(problem.detail);
    this.problem = problem;
    this.status = status;
    this.code = problem.code;
  }
}

/** A message at the top of the page, read out by screen readers. */
export function say(text, kind = "alert") {
  const line = document.createElement("p");
  line.className = kind;
  line.textContent = text;
  document.getElementById("messages").replaceChildren(line);
}

/** As `shown_bytes` in pages.py: 1.5 GiB. */
export function shownBytes(count) {
  if (count === null || count === undefined) return "–";
  const units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
  let unit = 0;
  while (Math.abs(count) >= 999.5 && unit < units.length - 1) [count, unit] = [count / 1024, unit + 1];
  return `${Number(count.toPrecision(3))} ${units[unit]}`;
}

/** As `shown_seconds` in pages.py: 2 h 5 min. */
export function shownSeconds(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  if (seconds < 60) return `${Number(seconds.toPrecision(3))} s`;
  const whole = Math.round(seconds);
  const parts = [
    [Math.floor(whole / 86400), "d"],
    [Math.floor(whole / 3600) % 24, "h"],
    [Math.floor(whole / 60) % 60, "min"],
    [whole % 60, "s"],
  ];
  const first = parts.findIndex(([amount]) => amount);
  return parts.slice(first, first + 2).filter(([amount]) => amount).map((part) => part.join(" ")).join(" ");
}

/** The value of one of the colours in app.css, as the theme has it now: `colour("accent")`. */
export function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}

/** Calls `draw` again when the theme changes: canvases do not follow by themselves. */
export function onTheme(draw) {
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  document.addEventListener("themechange", draw);
}

const AGO = new Intl.RelativeTimeFormat("en", { numeric: "auto", style: "short" });
const SPANS = [[60, "second"], [3600, "minute"], [86400, "hour"], [7 * 86400, "day"]];

/** `3 min. ago`; a date for what is more than a week old. */
function ago(moment) {
  const seconds = (Date.now() - moment) / 1000;
  if (seconds < 5) return "now";
  const index = SPANS.findIndex(([end]) => seconds < end);
  if (index < 0) return moment.toLocaleDateString();
  return AGO.format(-Math.floor(seconds / (index ? SPANS[index - 1][0] : 1)), SPANS[index][1]);
}

/** Times as the reader's own clock has them. */
export function localTimes(root = document) {
  for (const element of root.querySelectorAll("time[datetime]")) {
    const moment = new Date(element.dateTime);
    const whole = moment.toLocaleString();
    element.textContent = element.hasAttribute("data-ago") ? ago(moment) : whole;
    element.title = element.hasAttribute("data-ago") ? whole : element.dateTime;
  }
}

/** Text to the clipboard, which a page without TLS has no proper access to. */
async function copy(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const field = document.createElement("textarea");
  field.value = text;
  document.body.append(field);
  field.select();
  document.execCommand("copy");
  field.remove();
}

document.addEventListener("click", async (event) => {
  const button = event.target.closest("[data-copy]");
  if (button) {
    await copy(button.dataset.copy);
    button.classList.add("copied");
    say("Copied.", "unseen");
    setTimeout(() => button.classList.remove("copied"), 1500);
  }
  const opener = event.target.closest("[data-opens]");
  if (opener) document.getElementById(opener.dataset.opens).showModal();
  const closer = event.target.closest("[data-closes]");
  if (closer) closer.closest("dialog").close();
});

// Parts that ask for themselves again (data-every: seconds), as long as somebody can see them.
const asked = new WeakMap();

export function refresh(element) {
  asked.set(element, Date.now());
  element.dispatchEvent(new Event("refresh"));
}

function refreshDue(now = false) {
  if (document.visibilityState !== "visible") return;
  for (const element of document.querySelectorAll("[data-every]")) {
    if (!asked.has(element)) asked.set(element, Date.now());
    if (now || Date.now() - asked.get(element) >= element.dataset.every * 1000) refresh(element);
  }
}

setInterval(refreshDue, 500);
document.addEventListener("visibilitychange", () => refreshDue(true));

// A service that does not answer, or answers a look with an error: what is shown gets old, and the reader has to know. It
// is said once, however often the page asks, and taken back when a look succeeds.
const AWAY = "The service does not answer. What you see is what it said last; this page keeps asking.";
let trouble = "";

export function sayAway() {
  if (trouble !== AWAY) say(AWAY);
  trouble = AWAY;
}

export function isBack() {
  if (trouble) document.getElementById("messages").replaceChildren();
  trouble = "";
}

document.addEventListener("htmx:error", sayAway);
document.addEventListener("htmx:before:swap", (event) => {
  const { hx, response, sourceElement, text } = event.detail.ctx;
  const isLook = sourceElement.matches("[data-every]");
  if (response.status < 400) return isLook && isBack();
  // What a proxy says in place of a service that restarts is no piece of this page.
  if (!hx.retarget) sayAway();
  if (!hx.retarget || (isLook && trouble === text)) return event.preventDefault();
  if (isLook) trouble = text;
});

// A refresh leaves alone what the reader has opened, and times that are in the reader's words already.
window.htmx.registerExtension("leave-alone", {
  htmx_before_morph_attr: (element, { attrName }) => !(attrName === "open" && element.matches("details, dialog")),
  htmx_before_morph_node: (element, { oldNode, newNode }) =>
    !(oldNode instanceof HTMLTimeElement && newNode instanceof HTMLTimeElement && oldNode.dateTime === newNode.dateTime),
});

document.getElementById("theme").addEventListener("click", () => {
  const dark = document.documentElement.dataset.theme
    ? document.documentElement.dataset.theme === "dark"
    : matchMedia("(prefers-color-scheme: dark)").matches;
  document.documentElement.dataset.theme = dark ? "light" : "dark";
  localStorage.setItem("theme", document.documentElement.dataset.theme);
  document.dispatchEvent(new Event("themechange"));
});
localTimes();
setInterval(() => localTimes(), 30_000);
document.addEventListener("htmx:after:swap", () => localTimes());
