// Files on their way to the service: with a bar, a way to stop, and what was wrong with them by line.

import { ApiError, csrf, shownBytes, toLogin } from "./app.js";

/** Sends a form by XMLHttpRequest, which says how far it is. Answers the API's JSON; throws ApiError, or AbortError. */
export function send(path, form, onProgress, signal) {
  return new Promise((resolve, reject) => {
    const asked = new XMLHttpRequest();
    asked.open("POST", path);
    asked.responseType = "json";
    asked.setRequestHeader("Accept", "application/json");
    if (csrf) asked.setRequestHeader("X-CSRF-Token", csrf);
    asked.upload.addEventListener("progress", (event) => event.lengthComputable && onProgress(event.loaded, event.total));
    asked.addEventListener("load", () => {
      if (asked.status === 401) toLogin();
      if (asked.status < 300) resolve(asked.response);
      else reject(new ApiError(asked.response ?? { detail: `HTTP ${asked.status}`, code: "unknown" }, asked.status));
    });
    // A file that is refused early breaks the connection before its answer is read.
    asked.addEventListener("error", () => reject(new ApiError({ detail: "The connection broke off before there was an answer. Look under Data whether the file is there.", code: "unreachable" }, 0)));
    asked.addEventListener("abort", () => reject(new DOMException("stopped", "AbortError")));
    signal.addEventListener("abort", () => asked.abort());
    asked.send(form);
  });
}

/** One upload with its bar in `place`. Answers what the API made of it, or null where it was refused or stopped. */
export async function uploadInto(place, path, files, fields = {}) {
  const form = new FormData();
  for (const [name, value] of Object.entries(fields)) if (value) form.append(name, value);
  for (const file of files) form.append("file", file, file.name);
  const names = files.map((file) => file.name).join(", ");
  const total = files.reduce((sum, file) => sum + file.size, 0);
  const stopping = new AbortController();
  const bar = element("progress", { max: 1, value: 0 });
  bar.setAttribute("aria-label", `Upload of ${names}`);
  const says = element("span", { className: "muted", textContent: `${names}, ${shownBytes(total)}` });
  const stop = element("button", { type: "button", className: "quiet", textContent: "Stop" });
  stop.addEventListener("click", () => stopping.abort());
  place.replaceChildren(element("div", { className: "uploading" }, bar, says, stop));
  let sent = false;
  const onProgress = (loaded, all) => {
    sent = loaded === all;
    bar.value = loaded / all;
    says.textContent = loaded < all ? `${names}, ${shownBytes(loaded)} of ${shownBytes(all)}` : `${names} is there and being checked…`;
  };
  try {
    const made = await send(path, form, onProgress, stopping.signal);
    place.replaceChildren(element("p", { className: "done", textContent: `${names} is uploaded.` }));
    return made;
  } catch (error) {
    if (error.name === "AbortError") place.replaceChildren(element("p", { className: "muted", textContent: sent ? "Stopped. All of it had arrived: look under Data whether it was stored." : "Stopped. Nothing was stored." }));
    else if (error instanceof ApiError) place.replaceChildren(refusal(names, error));
    else throw error;
    return null;
  }
}

/** Why a file was refused, with its lines. */
function refusal(names, { problem }) {
  const said = element("div", { className: "alert" }, element("p", {}, element("strong", { textContent: `${names} was refused. ` }), problem.detail));
  said.setAttribute("role", "alert");
  if (problem.hint) said.append(element("p", { textContent: `What to do: ${problem.hint}.` }));
  const found = problem.problems ?? [];
  if (found.length) {
    const rows = found.map((each) => element("li", {}, element("strong", { textContent: where(each) }), ` ${each.reason}`));
    said.append(element("ul", { className: "problems" }, ...rows));
    if (problem.total_problems > found.length) said.append(element("p", { className: "muted", textContent: `These are the first ${found.length} of ${problem.total_problems}.` }));
  }
  return said;
}

function where(problem) {
  if (problem.line !== undefined) return `Line ${problem.line}`;
  return [problem.file, problem.tensor].filter(Boolean).join(", ");
}

/** Lets files be dropped on `zone`, or chosen with `input`. */
export function onFiles(zone, input, take) {
  let depth = 0;
  const lit = (change) => {
    depth = Math.max(0, depth + change);
    zone.classList.toggle("over", depth > 0);
  };
  zone.addEventListener("dragenter", () => lit(1));
  zone.addEventListener("dragleave", () => lit(-1));
  zone.addEventListener("dragover", (event) => event.preventDefault());
  zone.addEventListener("drop", (event) => {
    event.preventDefault();
    lit(-depth);
    if (event.dataTransfer.files.length) take([...event.dataTransfer.files]);
  });
  input.addEventListener("change", () => {
    if (input.files.length) take([...input.files]);
    input.value = "";
  });
  // A file that misses the zone must not replace the page, and the form with it.
  for (const name of ["dragover", "drop"]) window.addEventListener(name, (event) => event.preventDefault());
}

export function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}
