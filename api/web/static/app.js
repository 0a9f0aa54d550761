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
  const problem = await response.json().catch(() => ({ detail: `HTTP ${response.status}`, code: "unknown" }));
  if (response.status === 401) location.assign(`/ui/login?next=${encodeURIComponent(location.pathname + location.search)}`);
  throw new ApiError(problem, response.status);
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
  while (Math.abs(count) >= 1000 && unit < units.length - 1) [count, unit] = [count / 1024, unit + 1];
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

export function localTimes(root = document) {
  for (const element of root.querySelectorAll("time[datetime]")) {
    element.title = element.dateTime;
    element.textContent = new Date(element.dateTime).toLocaleString();
  }
}

document.getElementById("theme").addEventListener("click", () => {
  const dark = document.documentElement.dataset.theme
    ? document.documentElement.dataset.theme === "dark"
    : matchMedia("(prefers-color-scheme: dark)").matches;
  document.documentElement.dataset.theme = dark ? "light" : "dark";
  localStorage.setItem("theme", document.documentElement.dataset.theme);
  document.dispatchEvent(new Event("themechange"));
});
localTimes();
document.addEventListener("htmx:after:swap", () => localTimes());
