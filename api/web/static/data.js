// Datasets, models and tokenizers: uploads, deletions, and another look while something is being prepared.

import { ApiError, localTimes, request, toLogin } from "./app.js";
import { onFiles, uploadInto } from "./upload.js";

const POLL = 2000; // Milliseconds.
const LISTS = ["datasets-list", "models-list", "tokenizers-list"];
const at = (id) => document.getElementById(id);

// Looking again

let timer = 0;
let newest = 0;

async function look() {
  clearTimeout(timer);
  const mine = (newest += 1);
  const response = await fetch(`/ui/data/lists${location.search}`, { headers: { "HX-Request": "true" } }).catch(() => null);
  if (response?.status === 401) return toLogin();
  const text = response?.ok ? await response.text() : null;
  if (mine !== newest) return; // What was asked for later knows more, also where it was answered before.
  if (text !== null) replace(new DOMParser().parseFromString(text, "text/html"));
  wait();
}

function wait() {
  clearTimeout(timer);
  if (document.querySelector("[data-pending]")) timer = setTimeout(look, POLL);
}

/** Entries that changed, and no others: where the keyboard is, it stays. */
function replace(found) {
  const focused = document.activeElement?.id;
  for (const id of LISTS) {
    const fresh = found.getElementById(id);
    localTimes(fresh);
    if (fresh.innerHTML !== at(id).innerHTML) at(id).replaceWith(document.adoptNode(fresh));
  }
  if (focused) at(focused)?.focus();
  offer();
}

/** What can be trained on, and tokenised with, follows the lists. */
function offer() {
  const datasets = [...document.querySelectorAll("[data-dataset]")].map((each) => new Option(each.dataset.name, each.dataset.dataset));
  const chosen = at("train-dataset").value;
  at("train-dataset").replaceChildren(...(datasets.length ? datasets : [new Option("Upload a dataset first", "")]));
  if (chosen) at("train-dataset").value = chosen;
  const tokenizers = [...document.querySelectorAll("[data-tokenizer], [data-own-tokenizer]")].map((each) => new Option(each.dataset.name, each.dataset.tokenizer ?? each.dataset.ownTokenizer));
  const made = at("with").value;
  at("with").replaceChildren(new Option("bytes", "bytes"), ...tokenizers);
  if (tokenizers.some((each) => each.value === made)) at("with").value = made;
}

// Uploads

for (const zone of document.querySelectorAll("[data-upload]")) {
  onFiles(zone, zone.querySelector("input"), async (files) => {
    const kind = zone.dataset.upload;
    const place = zone.querySelector(".upload");
    // Each file is a dataset of its own; a model's files and a tokenizer's belong together.
    for (const group of kind === "datasets" ? files.map((file) => [file]) : [files]) {
      if (await uploadInto(place, `/${kind}`, group)) await look();
      else break;
    }
  });
}

// Training a tokenizer

at("train").addEventListener("submit", async (event) => {
  event.preventDefault();
  const fields = new FormData(at("train"));
  const body = { train: { dataset: fields.get("dataset"), vocab_size: Number(fields.get("vocab_size")) } };
  if (fields.get("name")) body.name = fields.get("name");
  await acted(at("train"), event.submitter, () => request("POST", "/tokenizers", body));
});

// Dialogs

let about = null;

document.addEventListener("click", (event) => {
  const button = event.target.closest("[data-delete], [data-tokenize]");
  if (!button) return;
  about = button.dataset;
  const [dialog, title] = about.delete ? ["deletion", `Delete “${about.name}”?`] : ["tokenization", `Make tokens of “${about.name}”`];
  at(`${dialog}-title`).textContent = title;
  at(dialog).querySelector(".said").replaceChildren();
  at(dialog).showModal();
});

at("delete").addEventListener("click", async () => {
  if (await acted(at("deletion"), at("delete"), () => request("DELETE", about.delete))) at("deletion").close();
});

at("tokenize").addEventListener("click", async () => {
  const body = { tokenizer: at("with").value };
  if (await acted(at("tokenization"), at("tokenize"), () => request("POST", `/datasets/${about.tokenize}/tokenizations`, body))) at("tokenization").close();
});

/** Does it once, and says in `place` why it could not be done. */
async function acted(place, button, action) {
  const said = place.querySelector(".said");
  said.replaceChildren();
  button.disabled = true;
  try {
    await action();
    await look();
    return true;
  } catch (error) {
    const line = document.createElement("p");
    line.className = "alert";
    line.textContent = error instanceof ApiError ? error.message + (error.problem.hint ? ` What to do: ${error.problem.hint}.` : "") : "The service does not answer.";
    said.replaceChildren(line);
    for (const id of error.problem?.jobs ?? []) line.append(" ", Object.assign(document.createElement("a"), { href: `/ui/jobs/${id}`, textContent: id }));
    return false;
  } finally {
    button.disabled = false;
  }
}

offer();
wait();
