// The box to try a model, where there is one: a sample that appears as it is made, and can be stopped.

import { ApiError, csrf, refusalOf } from "/ui/static/app.js";

const id = document.getElementById("job").dataset.job;
const form = document.getElementById("sample-form");
const part = (name) => document.getElementById(`sample-${name}`);
let running = null;

function asked() {
  const fields = new FormData(form);
  const which = fields.get("checkpoint").trim();
  const topK = fields.get("top_k");
  return {
    prompt: fields.get("prompt"),
    checkpoint: /^\d+$/.test(which) ? Number(which) : which,
    max_tokens: Number(fields.get("max_tokens")),
    temperature: Number(fields.get("temperature")),
    top_p: Number(fields.get("top_p")),
    ...(topK ? { top_k: Number(topK) } : {}),
    stream: true,
  };
}

/** The events of an answer: [name, data]. */
async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const fields = Object.fromEntries(block.split("\n").map((text) => text.split(/:\s?(.*)/s, 2)));
      if (fields.event) yield [fields.event, JSON.parse(fields.data)];
    }
  }
}

async function sample() {
  const body = asked();
  running = new AbortController();
  const prompt = document.createElement("span");
  prompt.className = "prompt";
  prompt.textContent = body.prompt;
  part("text").replaceChildren(prompt);
  part("text").hidden = false;
  part("error").hidden = true;
  part("status").textContent = "Loading the checkpoint…";
  const headers = { "Content-Type": "application/json", Accept: "text/event-stream", ...(csrf ? { "X-CSRF-Token": csrf } : {}) };
  const response = await fetch(`/jobs/${id}/generate`, {
    method: "POST", headers, body: JSON.stringify(body), signal: running.signal,
  });
  if (!response.ok) throw await refusalOf(response);
  for await (const [name, data] of eventsOf(response)) {
    if (name === "token") {
      part("text").append(data.text);
      part("status").textContent = "Writing…";
    } else if (name === "error") throw new ApiError(data, data.status);
    else if (name === "done") {
      const why = { stop: "the text ended", length: "the most tokens were reached", time: "the time was over" }[data.finish_reason];
      part("status").textContent = `${data.tokens} tokens in ${data.seconds.toFixed(1)} s from step ${data.step}: ${why}. Seed ${data.seed}.`;
      return;
    }
  }
  throw new Error("the sample broke off");
}

form?.addEventListener("submit", async (event) => {
  event.preventDefault();
  if (running) return;
  part("start").disabled = true;
  part("stop").hidden = false;
  try {
    await sample();
  } catch (error) {
    part("status").textContent = "";
    if (error.name === "AbortError") part("status").textContent = "Stopped.";
    else {
      part("error").textContent = error.problem ? error.message : `The service does not answer: ${error.message}`;
      part("error").hidden = false;
      if (!part("text").querySelector(".prompt")?.nextSibling) part("text").hidden = true;
    }
  } finally {
    running = null;
    part("start").disabled = false;
    part("stop").hidden = true;
  }
});
part("stop")?.addEventListener("click", () => running?.abort());
