// What a plan means, in words: the one that would run, all others as a table, or why there is none and what would help.

import { shownBytes, shownSeconds } from "./app.js";
import { MIB, capText } from "./sizes.js";
import { element } from "./upload.js";

const POLICIES = { keep: "kept", reverse: "recomputed backwards", stride: "some kept", prefix: "keys and values" };

/** The points of the curve, from a plan's frontier. */
export function pointsOf(plan, inAll) {
  return plan.frontier.map((each) => {
    const seconds = each.predicted_step_seconds * (inAll ? plan.total_steps : 1);
    const chosen = plan.chosen && ["chunk_length", "state_policy", "micro_batch_size"].every((name) => each[name] === plan[name]);
    return { bytes: each.predicted_peak_bytes, seconds, chosen, row: each, says: `${shownBytes(each.predicted_peak_bytes)}, ${shownSeconds(seconds)}: chunks of ${each.chunk_length.toLocaleString()}, states ${POLICIES[each.state_policy] ?? each.state_policy}` };
  });
}

/** The plan that the job would get. */
export function describe(plan, cap) {
  const whole = plan.num_chunks === 1;
  const room = cap - plan.predicted_peak_bytes;
  const facts = [
    ["Predicted peak", `${shownBytes(plan.predicted_peak_bytes)}`, `${shownBytes(room)} under the cap`],
    ["A step", shownSeconds(plan.predicted_step_seconds), `one of ${plan.total_steps.toLocaleString()}`],
    ["In all", shownSeconds(plan.predicted_total_seconds), "as predicted"],
    ["Chunks", whole ? "none" : plan.chunk_length.toLocaleString(), whole ? "the sequence as a whole" : `tokens, ${plan.num_chunks.toLocaleString()} a sequence; states ${POLICIES[plan.state_policy] ?? plan.state_policy}`],
  ];
  const list = element("dl", { className: "facts" });
  for (const [name, value, more] of facts) list.append(element("div", {}, element("dt", { textContent: name }), element("dd", {}, element("strong", { textContent: value }), element("span", { className: "muted", textContent: more }))));
  return [list, element("p", { className: "reason muted", textContent: `${plan.reason} The longest sequence for this cap has ${plan.max_sequence_length.toLocaleString()} tokens.` })];
}

/** Rows of the table; each can be made the cap. */
export function tableRows(points, plan, cap, onCap) {
  return points.map(({ bytes, row, chosen }) => {
    const use = element("button", { type: "button", className: "small", textContent: "Set as cap" });
    use.setAttribute("aria-label", `Set the cap to ${capText(bytes)}`);
    use.addEventListener("click", () => onCap(bytes));
    const cells = [shownSeconds(row.predicted_step_seconds), shownSeconds(row.predicted_step_seconds * plan.total_steps), row.chunk_length.toLocaleString(), row.state_policy, String(row.micro_batch_size)];
    const head = element("th", { scope: "row" }, shownBytes(bytes));
    if (chosen) head.append(element("span", { className: "tag", textContent: "chosen" }));
    const made = element("tr", { className: chosen ? "chosen" : bytes > cap ? "over" : "" }, head, ...cells.map((text) => element("td", { textContent: text })), element("td", {}, use));
    return made;
  });
}

export function parts(breakdown, total) {
  const named = Object.entries(breakdown).filter(([, bytes]) => bytes > 0).sort((left, right) => right[1] - left[1]);
  return named.map(([name, bytes]) => element("div", {}, element("dt", { textContent: name }), element("dd", {}, bar(bytes / total), element("span", { textContent: shownBytes(bytes) }))));
}

function bar(share) {
  const [made, inner] = ["svg", "rect"].map((name) => document.createElementNS("http://www.w3.org/2000/svg", name));
  for (const [name, value] of Object.entries({ class: "bar", viewBox: "0 0 100 1", preserveAspectRatio: "none", "aria-hidden": "true" })) made.setAttribute(name, value);
  inner.setAttribute("width", (100 * share).toFixed(1));
  inner.setAttribute("height", "1");
  made.append(inner);
  return made;
}

/** Why there is no plan, and buttons that change the form. `set(path, value)`. */
export function whyNot(problem, set) {
  const said = element("div", { className: "no-plan" }, element("p", {}, element("strong", { textContent: problem.errors ? "There is no plan before the marked fields are put right." : detailOf(problem) })));
  const mends = (problem.suggestions ?? []).map(mend);
  if (problem.largest_device_bytes) mends.push({ label: `Lower the cap to ${fitting(problem)}`, path: "memory_cap", value: fitting(problem) });
  if (problem.code === "dataset_too_small" && problem.max_sequence_length) mends.push({ label: `Shorten the sequences to ${problem.max_sequence_length.toLocaleString()}`, path: "sequence_length", value: problem.max_sequence_length });
  const buttons = mends.filter((each) => each.path);
  if (buttons.length) {
    const row = element("div", { className: "mends" });
    row.setAttribute("role", "group");
    row.setAttribute("aria-label", "What would fit");
    for (const each of buttons) {
      const button = element("button", { type: "button", textContent: each.label });
      button.addEventListener("click", () => set(each.path, each.value));
      row.append(button);
    }
    said.append(element("p", { textContent: "What would fit:" }), row);
  }
  for (const each of mends.filter((one) => !one.path)) said.append(element("p", { className: "muted", textContent: `${each.label}.` }));
  if (problem.hint && !buttons.length) said.append(element("p", { textContent: `What to do: ${problem.hint}.` }));
  return said;
}

function fitting(problem) {
  return `${Math.floor(problem.largest_device_bytes / MIB)} MiB`;
}

/** The problem's detail, with sizes as people read them. */
export function detailOf(problem) {
  if (problem.code !== "memory_cap_exceeds_device") return problem.detail;
  return `No device has so much: the largest holds ${shownBytes(problem.largest_device_bytes)} for jobs.`;
}

/** One sentence for who does not see the curve. */
export function sentence(plan, cap) {
  const chunks = plan.num_chunks === 1 ? "without chunks" : `in chunks of ${plan.chunk_length.toLocaleString()} tokens`;
  return `Under ${shownBytes(cap)} there is a plan ${chunks}: it holds ${shownBytes(plan.predicted_peak_bytes)} at its peak, a step takes ${shownSeconds(plan.predicted_step_seconds)}, all take ${shownSeconds(plan.predicted_total_seconds)}.`;
}

/** A suggestion of the planner as a change of the form; without a path where no form can do it. */
function mend(text) {
  const cap = /^raise memory_cap to (\d+) bytes/.exec(text);
  if (cap) return { label: `Raise the cap to ${capText(Number(cap[1]))}`, path: "memory_cap", value: capText(Number(cap[1])) };
  const length = /^shorten sequence_length to (\d+) or less$/.exec(text);
  if (length) return { label: `Shorten the sequences to ${Number(length[1]).toLocaleString()}`, path: "sequence_length", value: length[1] };
  const needs = /: the smallest schedule then needs (.+)$/.exec(text);
  const more = needs ? ` (from ${needs[1]})` : "";
  const word = /^set (optimizer\.name|precision|attention) to "(\w+)"/.exec(text);
  const names = { "optimizer.name": "Use", precision: "Compute in", attention: "Train with attention" };
  if (word) return { label: `${names[word[1]]} ${word[2]}${more}`, path: word[1], value: word[2] };
  if (text.startsWith('set method to {"type": "lora"}')) return { label: `Train with LoRA${more}`, path: "method.type", value: "lora" };
  if (text.startsWith('set chunking to "auto"')) return { label: "Leave the chunks to the planner", path: "chunking", value: "auto" };
  return { label: text.charAt(0).toUpperCase() + text.slice(1) };
}
