// The form of a job as a request, and back. Each control has in data-path where its value goes; `@…` stays in the page.

export const OWN = "own";

/** Reads, checks and changes the controls of one form. */
export class JobForm {
  constructor(form) {
    this.form = form;
    this.controls = [...form.querySelectorAll("[data-path]")];
    form.addEventListener("input", () => this.refresh());
    form.addEventListener("invalid", (event) => open(event.target), true);
    this.refresh();
  }

  /** What one control says, as a text; nothing where it does not count. */
  value(path) {
    if (path === "@built-in") return flag(this.chosen("model"), "builtIn");
    if (path === "@softmax") return flag(this.chosen("model"), "softmax");
    const controls = this.controls.filter((each) => each.dataset.path === path && !each.disabled);
    const control = controls.find((each) => each.type !== "radio" || each.checked);
    if (!control) return "";
    return control.dataset.kind === "switch" ? (control.checked ? "on" : "off") : control.value;
  }

  chosen(path) {
    const select = this.control(path);
    return select.selectedOptions[0];
  }

  control(path) {
    return this.controls.find((each) => each.dataset.path === path);
  }

  /** Hides and disables what the other choices leave no use for. */
  refresh() {
    for (const row of this.form.querySelectorAll("[data-when]")) {
      const [path, words] = row.dataset.when.split("=");
      const counts = words.split("|").includes(this.value(path));
      row.hidden = !counts;
      for (const input of row.querySelectorAll("input, select, textarea")) input.disabled = !counts;
      if (row.matches("fieldset")) row.disabled = !counts;
    }
    for (const hint of this.form.querySelectorAll("[data-hint-of]")) {
      const option = document.getElementById(hint.dataset.hintOf).selectedOptions[0];
      hint.textContent = option?.dataset.hint ?? "";
    }
    for (const nothing of this.form.querySelectorAll(".nothing")) {
      const fields = [...nothing.parentElement.querySelectorAll(".field")];
      nothing.hidden = fields.some((each) => !each.hidden);
    }
    // A training has a length: whichever of both counts is needed.
    for (const path of ["steps", "epochs", "validation_dataset", "validation_fraction"]) {
      this.control(path).required = !this.control(path).disabled;
    }
  }

  /** The body of the request, without what is as it would be anyway. */
  body() {
    const body = {};
    for (const control of this.controls) {
      const path = control.dataset.path;
      if (control.disabled || path.startsWith("@")) continue;
      const value = read(control);
      if (value === undefined || same(value, JSON.parse(control.dataset.default))) continue;
      put(body, path.split("."), value);
    }
    return body;
  }

  /** Sets a field as if it had been typed; `method` may be given as "lora". */
  set(path, value) {
    const control = this.control(path);
    control.value = value;
    open(control);
    control.dispatchEvent(new Event("input", { bubbles: true }));
  }

  /** What is missing before there can be a plan, by label. */
  missing() {
    const paths = ["model", "memory_cap", "sequence_length", this.value("@duration")];
    if (this.value("@duration") === "epochs") paths.push("dataset");
    return paths.filter((path) => !this.value(path).trim()).map((path) => label(this.control(path)));
  }

  clearErrors() {
    for (const place of this.form.querySelectorAll(".field-error")) place.textContent = "";
    for (const control of this.controls) control.removeAttribute("aria-invalid");
  }

  /** Puts a message at its field. False where there is no such field, or it does not count. */
  showError(field, message) {
    let path = field;
    while (path && !this.control(path)) path = path.slice(0, Math.max(0, path.lastIndexOf(".")));
    const control = path && (this.controls.find((each) => each.dataset.path === path && !each.disabled) ?? this.control(path));
    const id = control?.id || (control && `f-${path.replaceAll(".", "-")}`);
    const place = id && document.getElementById(`e-${id}`);
    if (!place || control.disabled) return false;
    open(control);
    control.setAttribute("aria-invalid", "true");
    place.textContent = path === field ? message : `${field}: ${message}`;
    return true;
  }
}

function flag(option, name) {
  return option && name in option.dataset ? "yes" : "no";
}

function label(control) {
  return control.labels[0].firstChild.textContent.trim().toLowerCase();
}

/** Whatever is folded around it. */
function open(control) {
  const details = control.closest("details");
  if (details) details.open = true;
}

/** The value of a control as the API has it; undefined where it says nothing. */
function read(control) {
  const kind = control.dataset.kind;
  if (kind === "switch") return control.checked ? {} : undefined;
  if (kind === "list") return [...control.querySelectorAll("input:checked")].map((each) => each.value);
  if (kind === "pairs") return pairs(control.value);
  const text = control.value.trim();
  if (text === "") return "nullable" in control.dataset ? null : undefined;
  if (text === OWN && kind === "choice") return undefined;
  return kind === "integer" || kind === "number" ? Number(text) : text;
}

/** Lines `key=value`, as pair_lines in job_form.py writes them: either side may be a text in JSON's quotes. */
function pairs(text) {
  const lines = text.split("\n").filter((line) => line.trim());
  return Object.fromEntries(lines.map((line) => {
    const [, key, value] = /^\s*("(?:[^"\\]|\\.)*"(?=\s*(?:=|$))|[^=]*)=?(.*)$/s.exec(line);
    return [unquoted(key.trim()), unquoted(value.trim())];
  }));
}

function unquoted(text) {
  if (!/^".*"$/s.test(text)) return text;
  try {
    return JSON.parse(text);
  } catch {
    return text; // Quotes of the reader's own.
  }
}

function same(left, right) {
  if (typeof left !== "object" || left === null) return left === right;
  return right !== null && JSON.stringify(left) === JSON.stringify(right);
}

function put(body, path, value) {
  const [name, ...rest] = path;
  if (rest.length === 0) body[name] = typeof value === "object" && value !== null && !Array.isArray(value) ? { ...body[name], ...value } : value;
  else put((body[name] ??= {}), rest, value);
}
